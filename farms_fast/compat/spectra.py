"""From a module to the fitted spectra of its layers, all layers together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from farms_fast.arguments import natural
from farms_fast.arrays import FLOATING
from farms_fast.compat.published_windows import PublishedWindows
from farms_fast.layers import module_tensor, sparse_layout
from farms_fast.power_law import STATUSES, XMIN_RULES, fit_power_laws
from farms_fast.spectrum import window_eigenvalues

__all__ = [
    "FitWarning",
    "FittedSpectrum",
    "TailRule",
    "Weight",
    "WindowedLayer",
    "alpha_hat",
    "fitted_spectra",
    "kernel_positions",
    "number",
    "positive",
    "warn_of_missing_fit",
    "weights_of",
    "workspace",
]

# Eigenvalues that are held on the device at once, unless one layer has more.
_VALUES_PER_BATCH = 2**24


class FitWarning(UserWarning):
    """A layer has no power-law fit; the message says which and why."""


@dataclass(frozen=True)
class Weight:
    """The weight of a Linear or Conv2d module, with the module's name."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class WindowedLayer:
    """A layer and its windows.

    Attributes:
        name: the module's.
        stack: (S, R, C), any strides.
        windows: of every matrix of the stack.
        scale: what the eigenvalues are multiplied with.
    """

    name: str
    stack: Tensor
    windows: PublishedWindows
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Eigenvalues of all windows."""
        return len(self.stack) * self.windows.count * self.windows.order


@dataclass(frozen=True)
class TailRule:
    """Where a tail starts, and which eigenvalues there are at all.

    Attributes:
        xmin: "median", "ks" or "peak".
        xmin_pos: for the median rule.
        bins: for the peak rule.
        threshold: only eigenvalues above it enter the fit, unless none is; None for all.
    """

    xmin: str
    xmin_pos: float
    bins: int
    threshold: float | None

    @classmethod
    def published(
        cls,
        fix_fingers: str | None,
        xmin_pos: float,
        bins: int,
        EVALS_THRESH: float,
        filter_zeros: bool,
    ) -> TailRule:
        """From the published arguments, checked.

        Raises:
            TypeError: an argument of another kind.
            ValueError: an unknown rule or a number out of range.
        """
        if fix_fingers is not None and fix_fingers not in XMIN_RULES:
            choices = ", ".join(repr(choice) for choice in (None, *XMIN_RULES))
            raise ValueError(f"fix_fingers: expected one of {choices}; got {fix_fingers!r}")
        number("EVALS_THRESH", EVALS_THRESH)
        xmin = "ks" if fix_fingers is None else XMIN_RULES[fix_fingers]
        rule = cls(xmin, xmin_pos, bins, float(EVALS_THRESH) if filter_zeros else None)
        # A fit of nothing checks the rest.
        rule.fit(torch.empty((0, 1), dtype=torch.float64))
        return rule

    def fit(self, evals: Tensor) -> Tensor:
        """(spectra, 3) alpha, D and status of every row of (spectra, values), each ascending."""
        spectra, values = evals.shape
        entering = self._entering(evals).contiguous().flatten()
        offsets = torch.arange(spectra + 1, device=evals.device) * values
        fits = fit_power_laws(
            entering, offsets, self.xmin, self.xmin_pos, self.bins, compat="farms"
        )
        return torch.stack([fits.alpha, fits.D, fits.status.to(torch.float64)], dim=1)

    def _entering(self, evals: Tensor) -> Tensor:
        """The spectra with 0, which no fit counts, for what does not enter."""
        out = torch.zeros_like(evals, dtype=torch.bool)
        if self.threshold is not None:
            below = evals <= self.threshold
            out = below & ~below.all(dim=1, keepdim=True)
        found = evals.masked_fill(out, 0.0)
        if self.xmin == "median" and evals.numel():
            # A zero has its place below the median as any eigenvalue has. At or above it there is
            # no tail with zeros, and then it starts at the median of the positive ones.
            left_out = out.sum(dim=1, keepdim=True)
            entering = (evals.shape[1] - left_out).to(torch.float64)
            start = left_out + (entering / self.xmin_pos).long()
            counts = found.gather(1, start.clamp_(max=evals.shape[1] - 1)) > 0
            zero = (evals == 0) & ~out & counts
            found = found.masked_fill(zero, torch.finfo(torch.float64).tiny)
        return found


@dataclass(frozen=True)
class FittedSpectrum:
    """A spectrum and its fit.

    Attributes:
        evals: all eigenvalues, float64, ascending, NaN last.
        entered: those that entered the fit.
        alpha: NaN without a fit, 0 without a candidate for xmin, which is what the published scan
            ends with.
        D: NaN without a fit, 1 without a candidate.
        status: one of `farms_fast.power_law.STATUSES`.
    """

    evals: NDArray[np.float64]
    entered: NDArray[np.float64]
    alpha: float
    D: float
    status: str

    @property
    def spectral_norm(self) -> float:
        """The largest eigenvalue."""
        return float(self.evals[-1]) if self.evals.size else math.nan

    @property
    def norm(self) -> float:
        """The sum of all eigenvalues."""
        return float(self.evals.sum()) if self.evals.size else math.nan

    @property
    def stable_rank(self) -> float:
        """Sum over largest."""
        return self.norm / self.spectral_norm if self.spectral_norm else math.nan

    @property
    def norm_stable_rank(self) -> float:
        """Mean eigenvalue."""
        return self.norm / self.evals.size if self.evals.size else math.nan


def weights_of(net: nn.Module) -> Iterable[Weight]:
    """The weights of every Linear and Conv2d, subclasses included, in the order of named_modules.

    Raises:
        TypeError: not a module, or a weight that is not dense and real floating.
        ValueError: a weight without data, or on a device that is neither CPU nor CUDA.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch.nn.Module, got {type(net).__name__}")
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        path = f"{name}.weight" if name else "weight"
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"net: {path} is not initialised, run the module once")
        tensor = module_tensor(net, path)
        if sparse_layout(tensor) or tensor.dtype not in FLOATING:
            kind = sparse_layout(tensor) or str(tensor.dtype).removeprefix("torch.")
            raise TypeError(f"net: expected {path} dense and real floating, got {kind}")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"net: expected {path} on cpu or cuda, got {tensor.device}")
        yield Weight(name, tensor)


def kernel_positions(weight: Tensor) -> Tensor:
    """A convolution's (out, in, i, j) as the stack (i · j, out, in); a linear weight as (1, R, C).

    Example:
        >>> kernel_positions(torch.zeros(8, 4, 3, 3)).shape
        torch.Size([9, 8, 4])
    """
    return weight.flatten(2).permute(2, 0, 1) if weight.ndim == 4 else weight.unsqueeze(0)


def fitted_spectra(
    layers: Sequence[WindowedLayer], rule: TailRule, memory: int = 0
) -> list[list[FittedSpectrum]]:
    """Solves and fits all layers, windows of one order together.

    Args:
        layers: the layers; those without windows have one empty spectrum.
        rule: of every fit.
        memory: bytes of workspace, 0 for the default of `ops.window_eigvalsh`.

    Returns:
        The spectra of each layer, in the order given.
    """
    found: list[list[FittedSpectrum]] = [[] for _ in layers]
    # What was computed is fetched late, so that the device does not wait for the host in between.
    computed: list[_Computed] = []
    for batch in _batches(layers):
        pooled = _pooled(batch, layers, memory)
        # Spectra of one length are sorted and fitted in one call.
        by_length: dict[int, list[tuple[int, Tensor]]] = {}
        for index, spectra in zip(batch, pooled, strict=True):
            by_length.setdefault(spectra.shape[1], []).append((index, spectra))
        for group in by_length.values():
            evals = torch.cat([spectra for _, spectra in group]).sort(dim=1).values
            owners = [index for index, spectra in group for _ in range(len(spectra))]
            computed.append(_Computed(owners, evals, rule.fit(evals)))
        if sum(one.evals.numel() for one in computed) > _VALUES_PER_BATCH:
            _fetch(computed, rule, found)
    _fetch(computed, rule, found)
    empty = np.empty(0)
    return [one or [FittedSpectrum(empty, empty, math.nan, math.nan, "too_few")] for one in found]


def warn_of_missing_fit(name: str, spectra: Sequence[FittedSpectrum], stacklevel: int) -> None:
    """A `FitWarning` where a layer, or a block of it, has no fit."""
    missing = [one.status for one in spectra if one.status != "ok"]
    if not missing:
        return
    of = f" in {len(missing)} of {len(spectra)} blocks" if len(spectra) > 1 else ""
    kinds = ", ".join(dict.fromkeys(missing))
    text = f"layer {name!r}: no power-law fit{of} ({kinds})"
    warnings.warn(text, FitWarning, stacklevel=stacklevel + 1)


def alpha_hat(alpha: float, spectral_norm: float) -> float:
    """Alpha times log10 of the largest eigenvalue; NaN for a zero matrix.

    Example:
        >>> alpha_hat(3.0, 100.0)
        6.0
    """
    return alpha * math.log10(spectral_norm) if spectral_norm > 0 else math.nan


def number(argument: str, value: object) -> float:
    """The value as a float; TypeError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{argument}: expected a number, got {value!r}")
    return float(value)


def positive(argument: str, value: object) -> float:
    """The value as a float; an error unless it is a positive finite number."""
    found = number(argument, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{argument}: expected a positive finite number, got {value!r}")
    return found


def workspace(memory: int | None) -> int:
    """Bytes for `fitted_spectra`, 0 for its default; an error unless None or a positive integer."""
    return 0 if memory is None else natural("memory", memory, least=1)


def _batches(layers: Sequence[WindowedLayer]) -> list[list[int]]:
    """Layers of one device, dtype and order, in parts of bounded size."""
    buckets: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.count:
            key = (layer.stack.device, layer.stack.dtype, layer.windows.order)
            buckets.setdefault(key, []).append(index)
    batches: list[list[int]] = []
    for bucket in buckets.values():
        values = math.inf
        for index in bucket:
            values += layers[index].count
            if values > _VALUES_PER_BATCH:
                batches.append([])
                values = layers[index].count
            batches[-1].append(index)
    return batches


def _pooled(batch: Sequence[int], layers: Sequence[WindowedLayer], memory: int) -> list[Tensor]:
    """The spectra of a batch's layers, (spectra, values) each, not sorted."""
    chosen = [layers[index] for index in batch]
    tables = [x.windows.table(at, len(x.stack)) for at, x in enumerate(chosen)]
    evals = window_eigenvalues(
        [layer.stack for layer in chosen],
        torch.from_numpy(np.concatenate(tables)),
        chosen[0].windows.order,
        torch.float64,
        None,
        memory,
    )
    parts = evals.split([len(table) for table in tables])
    return [
        part.reshape(layer.windows.spectra, -1) * layer.scale
        for layer, part in zip(chosen, parts, strict=True)
    ]


@dataclass(frozen=True)
class _Computed:
    """Spectra and fits on the device, and the layer of each."""

    owners: list[int]
    evals: Tensor
    fits: Tensor


def _fetch(computed: list[_Computed], rule: TailRule, found: list[list[FittedSpectrum]]) -> None:
    """Moves what was computed to its layers."""
    for part in computed:
        rows = zip(part.owners, part.evals.cpu().numpy(), part.fits.cpu().tolist(), strict=True)
        for index, values, (alpha, distance, code) in rows:
            found[index].append(_one(values, alpha, distance, STATUSES[int(code)], rule))
    computed.clear()


def _one(
    evals: NDArray[np.float64], alpha: float, distance: float, status: str, rule: TailRule
) -> FittedSpectrum:
    if not np.isfinite(evals[-1]):
        status = "nonfinite"
    if status == "no_candidate":
        alpha, distance = 0.0, 1.0
    elif status != "ok":
        alpha, distance = math.nan, math.nan
    above = evals > (-math.inf if rule.threshold is None else rule.threshold)
    entered = evals[above] if above.any() else evals
    return FittedSpectrum(evals, entered, alpha, distance, status)
