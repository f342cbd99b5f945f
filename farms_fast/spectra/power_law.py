"""Power-law fit of a spectrum's tail: alpha, its distance D and where the tail starts.

With `l` the ascending positive finite eigenvalues, `N` their number and `n = N - i`, the
tail that starts at index `i` has the maximum-likelihood exponent

`alpha(i) = 1 + n / (sum_{j >= i} ln l_j - n ln l_i)`

and the Kolmogorov-Smirnov distance

`D(i) = max_{j >= i} |1 - (l_j / l_i)^(1 - alpha(i)) - (j - i) / n|`

(Clauset, Shalizi and Newman, SIAM Review 51, 2009). Three rules choose `i`; see
`fit_power_law`. A tail is all values from xmin on: of equal values it has all or none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch

from farms_fast.core import ops
from farms_fast.core.arguments import MOST_BINS, check_int, check_type
from farms_fast.core.arrays import on_stream_of, to_tensor

#: What a fit can end as, in the order of the op's status codes.
STATUSES = ("ok", "too_few", "degenerate_tail", "no_candidate", "nonfinite")

# That of float16 and bfloat16, or more.
_HALF_EPS = 2.0**-11

#: Every accepted name of a rule, and the rule it means.
XMIN_RULES = {
    "median": "median",
    "xmin_mid": "median",
    "ks": "ks",
    "goodness-of-fit": "ks",
    "peak": "peak",
    "xmin_peak": "peak",
    "fix-finger": "peak",
}


@dataclass(frozen=True)
class PowerLawFit:
    """Fit of one spectrum.

    Attributes:
        alpha: exponent of the density, above 1; NaN unless `status` is `"ok"`.
        D: Kolmogorov-Smirnov distance between tail and fit; NaN unless ok.
        xmin: smallest value of the tail; NaN unless ok.
        n_tail: values in the tail; 0 unless ok.
        n: values that entered the fit, the tail and what lies below it.
        dropped: values that did not enter: zero, zero but for rounding where the order of the
            window is known, negative or not finite.
        status: `"ok"`; `"too_few"`: fewer than two values in the tail;
            `"degenerate_tail"`: the tail's values are equal, or equal but for the rounding of the
            weights where their dtype is known; `"no_candidate"`: no value near the peak;
            `"nonfinite"`: there were values, none of them finite.
        xmin_rule: the rule that chose `xmin`: `"median"`, `"ks"` or `"peak"`.
    """

    alpha: float
    D: float
    xmin: float
    n_tail: int
    n: int
    dropped: int
    status: str
    xmin_rule: str = "median"

    @property
    def sigma(self) -> float:
        """Standard error of alpha for independent values, `(alpha - 1) / sqrt(n_tail)`."""
        return (self.alpha - 1) / math.sqrt(self.n_tail) if self.n_tail > 0 else math.nan


@dataclass(frozen=True)
class PowerLawFits:
    """Fits of many spectra, one entry of each tensor per spectrum, on the spectra's device.

    alpha, D and xmin are float64, the others int64; see `PowerLawFit` for all of them.
    """

    alpha: torch.Tensor
    D: torch.Tensor
    xmin: torch.Tensor
    n_tail: torch.Tensor
    n: torch.Tensor
    dropped: torch.Tensor
    status: torch.Tensor  # an index into `STATUSES`
    xmin_rule: str  # one for all

    def __len__(self) -> int:
        return self.alpha.numel()

    def __getitem__(self, index: int) -> PowerLawFit:
        """Fit of one spectrum; waits for the device."""
        return self.part(slice(index, index + 1)).to_list()[0]

    def part(self, spectra: slice) -> PowerLawFits:
        """The fits of some of the spectra."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        del tensors["xmin_rule"]
        return replace(self, **{name: tensor[spectra] for name, tensor in tensors.items()})

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows alpha, D and xmin, and the rows n_tail, n, dropped and status."""
        integers = torch.stack((self.n_tail, self.n, self.dropped, self.status))
        return torch.stack((self.alpha, self.D, self.xmin)), integers

    def to_list(self) -> list[PowerLawFit]:
        """All fits on the host; waits for the device."""
        reals, integers = self.stacked()
        return [
            PowerLawFit(alpha, distance, xmin, n_tail, n, dropped, STATUSES[status], self.xmin_rule)
            for alpha, distance, xmin, n_tail, n, dropped, status in zip(
                *reals.tolist(), *integers.tolist(), strict=True
            )
        ]


def xmin_rule(name: str) -> str:
    """Canonical name of a rule; ValueError for what is no key of `XMIN_RULES`."""
    if not isinstance(name, str) or name not in XMIN_RULES:
        choices = ", ".join(repr(choice) for choice in XMIN_RULES)
        raise ValueError(f"xmin: expected one of {choices}; got {name!r}")
    return XMIN_RULES[name]


def fit_power_law(
    evals: object,
    xmin: str = "median",
    xmin_pos: float = 2,
    bins: int = 100,
    *,
    order: int | None = None,
    weights: torch.dtype | None = None,
    compat: str | None = None,
) -> PowerLawFit:
    """Fits a power law to the tail of one spectrum.

    Args:
        evals: eigenvalues, 1-D and floating, in any order: a NumPy array, a torch tensor on CPU
            or CUDA, or an array of another library that has `__dlpack__`. It is not written.
            Values that are not positive and finite are dropped and counted.
        xmin: where the tail starts. `"median"` (`"xmin_mid"`): at the value that has the index
            `int(N / xmin_pos)`. `"ks"` (`"goodness-of-fit"`): at the value of least D that leaves
            two in the tail, the smallest of several. `"peak"` (`"xmin_peak"`, `"fix-finger"`):
            likewise among the values between 0.95 and 1.5 times the left edge of the fullest bin of
            `log10 l`.
        xmin_pos: used by `"median"`; finite and above 1.
        bins: histogram bins, used by `"peak"`; 1 to 2^20.
        order: where `evals` are those of one window, as `esd` computes them, its shorter side k:
            values at or below 8·k·2⁻⁵²·λ_max are zero but for rounding, and dropped.
        weights: the dtype of the weights, where `order` is given: a tail whose values are equal but
            for its rounding is `"degenerate_tail"` (see `least_spread`).
        compat: `"farms"` repeats the published FARMS code: a tail may begin in the middle of equal
            values, and under `"peak"` the lower end is `log10` of 0.95 times the edge.
            `"weightwatcher"` is another name of it, for WeightWatcher's fit does the same.

    Returns:
        The fit. A spectrum that cannot be fitted is no error: `status` says why.

    Raises:
        TypeError: if `evals` is no floating array, or a parameter is no number.
        ValueError: if `evals` is not 1-D or empty, or a parameter is out of range or unknown.

    Example:
        >>> import numpy as np
        >>> fit = fit_power_law(np.exp(np.arange(4.0)), xmin_pos=4)
        >>> fit.status, round(fit.alpha, 6), fit.n_tail
        ('ok', 2.0, 3)
    """
    with on_stream_of(evals):
        values = one_spectrum(evals)
        # A comparison costs a hundredth of a sort, and most spectra come sorted. NaN compares as
        # false.
        ascending = bool((values[1:] >= values[:-1]).all())
        ordered = values.contiguous() if ascending else torch.sort(values).values
        spread = None
        if order is not None:
            order = check_int("order", order, least=1)
            limit = ordered[-1] * rounding_share(order)
            ordered = torch.where((ordered <= limit) & limit.isfinite(), 0.0, ordered)
            least = least_spread(weights, order)
            spread = torch.tensor([least], dtype=torch.float64, device=ordered.device)
        elif weights is not None:
            raise ValueError("order: expected that of the window where weights is given, got None")
        offsets = torch.tensor([0, ordered.numel()], device=ordered.device)
        fits = fit_power_laws(ordered, offsets, xmin, xmin_pos, bins, spread, compat=compat)
        return fits[0]


def rounding_share(order: int, precision: torch.dtype = torch.float64) -> float:
    """What eigenvalues may err by, over the largest of their window: `8·k·ε`.

    Up to here an eigenvalue is zero as far as is known. `ops.drop_rounding` makes it so.

    Args:
        order: k, the shorter side of the window.
        precision: in which they were computed.

    Example:
        >>> rounding_share(100) == 800 * 2.0**-52
        True
    """
    return 8.0 * order * torch.finfo(precision).eps


def least_spread(
    weights: torch.dtype | None, order: int, precision: torch.dtype = torch.float64
) -> float:
    """How far a tail's eigenvalues have to spread, as ln(λ_max / xmin), to be a tail at all.

    Rounding to a dtype changes each entry of W by at most ε/2 of itself, independently of the
    others, so that the singular values of an m x n matrix with entries of one size change by about
    `ε/√12·(√m + √n)/√max(m, n)` of their root mean square, 0.58·ε at most. ln λ of equal ones then
    spreads over 2.3·ε; 1.2·ε is measured for orthogonal matrices of any order. The bound is 4·ε.

    A matrix that was made equal in its own precision, as orthogonal initialisation does by a QR
    factorisation, errs by more: 15·ε at order 32 and 38·ε at order 2048 in float32. The bound is
    64·ε for float32 and float64, in which factorisations are made. The eigenvalues themselves are
    known to `rounding_share`, at both ends.

    Args:
        weights: dtype of the weights, real or complex; None where it is not known.
        order: k, the shorter side of the window.
        precision: in which the eigenvalues were computed.

    Example:
        >>> import torch
        >>> least_spread(torch.bfloat16, 100) == 4 * 2.0**-7 + 1600 * 2.0**-52
        True
    """
    own = 0.0
    if weights is not None:
        check_type("weights", weights, torch.dtype, "a torch dtype")
        if not (weights.is_floating_point or weights.is_complex):
            raise ValueError(f"weights: expected a floating or complex dtype, got {weights}")
        info = torch.finfo(weights)
        own = (64 if info.eps < _HALF_EPS else 4) * info.eps
    return own + 2 * rounding_share(order, precision)


def packed_offsets(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """Where packed spectra of these lengths begin, and the last one ends; int64, on the device."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
    return offsets.to(device, non_blocking=True)


def packed_spreads(spreads: Sequence[float] | None, device: torch.device) -> torch.Tensor | None:
    """Least spreads of packed spectra, float64, on the device; None where none is above 0."""
    if spreads is None or not any(spreads):
        return None
    return torch.tensor(spreads, dtype=torch.float64, device="cpu").to(device, non_blocking=True)


def sort_spectra(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Packed spectra, each in ascending order with NaN last, without waiting for a device.

    It takes two sorts of all values, however many spectra there are.

    Example:
        >>> import torch
        >>> sort_spectra(torch.tensor([3.0, 1.0, 2.0, 0.5]), torch.tensor([0, 2, 4])).tolist()
        [1.0, 3.0, 0.5, 2.0]
    """
    ascending, indices = values.sort()
    spectra = offsets.numel() - 1
    if spectra == 1:
        return ascending
    # Few bits sort faster.
    narrow = torch.uint8 if spectra <= 256 else torch.int32
    numbers = torch.arange(spectra, dtype=narrow, device=values.device)
    owners = numbers.repeat_interleave(offsets.diff(), output_size=values.numel())
    return ascending[owners[indices].sort(stable=True).indices]


def fit_power_laws(
    spectra: torch.Tensor,
    offsets: torch.Tensor,
    xmin: str = "median",
    xmin_pos: float = 2,
    bins: int = 100,
    spread: torch.Tensor | None = None,
    *,
    compat: str | None = None,
) -> PowerLawFits:
    """`fit_power_law` for each of many packed spectra, without waiting for a device.

    Spectrum `s`, float64 and ascending with NaN last, is `spectra[offsets[s]:offsets[s + 1]]`, with
    int64 offsets on the same device. Each may have a `least_spread`, float64 on the same device.
    """
    rule = xmin_rule(xmin)
    position = _xmin_pos(xmin_pos)
    n_bins = check_int("bins", bins, least=1, most=MOST_BINS)
    if compat not in (None, "farms", "weightwatcher"):
        raise ValueError(f"compat: expected None, 'farms' or 'weightwatcher', got {compat!r}")
    _require_packed(spectra, offsets)
    alpha, distance, tail_start, n_tail, status, dropped = ops.fit_power_law(
        spectra, offsets, rule, position, n_bins, compat is not None, spread
    )
    n = torch.diff(offsets) - dropped
    return PowerLawFits(alpha, distance, tail_start, n_tail, n, dropped, status, rule)


def one_spectrum(evals: object) -> torch.Tensor:
    """A caller's spectrum as a float64 tensor on its device, perhaps sharing the caller's memory.

    What is no real floating array is a TypeError, what is not 1-D or is empty a ValueError.
    """
    tensor, _ = to_tensor("evals", evals, real=True)
    if tensor.ndim != 1:
        raise ValueError(f"evals: expected one spectrum (1-D), got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError("evals: expected at least one value, got none")
    return tensor.to(torch.float64)


def _xmin_pos(xmin_pos: float) -> float:
    try:
        position = float(xmin_pos)
    except (TypeError, ValueError):
        got = type(xmin_pos).__name__
        raise TypeError(f"xmin_pos: expected a number above 1, got {got}") from None
    if not (math.isfinite(position) and position > 1):
        raise ValueError(f"xmin_pos: expected a finite number above 1, got {xmin_pos!r}")
    return position


def _require_packed(spectra: torch.Tensor, offsets: torch.Tensor) -> None:
    expected = ("spectra", spectra, torch.float64), ("offsets", offsets, torch.int64)
    for name, tensor, dtype in expected:
        check_type(name, tensor, torch.Tensor, "a torch tensor")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.ndim != 1:
            raise ValueError(f"{name}: expected 1-D, got shape {tuple(tensor.shape)}")
    if offsets.numel() == 0:
        raise ValueError("offsets: expected one entry more than spectra, got none")
    if not spectra.is_contiguous():
        raise ValueError("spectra: expected a contiguous tensor")
    if spectra.device != offsets.device:
        raise ValueError(
            f"offsets: expected the spectra's device {spectra.device}, got {offsets.device}"
        )


def nonfinite_message(bad: int, windows: int) -> str:
    """Why a layer has no fit whose eigenvalues are not finite in so many of its windows."""
    return f"NaN, infinity or overflow in {bad} of {windows} windows"


def fit_message(fit: PowerLawFit) -> str:
    """Why a fit failed, for the reader of a report; empty where it did not."""
    used = f"{fit.n} eigenvalues, {fit.dropped} dropped, xmin rule {fit.xmin_rule!r}"
    return {
        "ok": "",
        "too_few": f"too few positive eigenvalues for a fit ({used})",
        "degenerate_tail": f"the eigenvalues of the tail are equal but for rounding ({used})",
        "no_candidate": f"no eigenvalue qualifies as xmin ({used})",
        "nonfinite": f"the spectrum has values that are not finite ({used})",
    }.get(fit.status, f"the fit ended as {fit.status!r} ({used})")
