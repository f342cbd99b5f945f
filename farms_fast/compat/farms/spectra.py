"""From a module to the fitted spectra of its layers, all layers together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from farms_fast.compat.arguments import choice, number
from farms_fast.compat.farms.published_windows import PublishedWindows
from farms_fast.core.arguments import check_module
from farms_fast.core.arrays import FLOATING
from farms_fast.core.packing import group_by_budget
from farms_fast.engine.solve import SolveTask, fit_pools, make_pools, solve_side_by_side
from farms_fast.engine.streams import STREAMS, make_streams
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.power_law import STATUSES, XMIN_RULES, PowerLawFits
from farms_fast.weights.module_tensors import module_tensor, sparse_layout

# Eigenvalues that are held on the device at once, unless one layer has more.
_VALUES_PER_BATCH = 2**24


class FitWarning(UserWarning):
    """A layer has no power-law fit; the message says which and why."""


@dataclass(frozen=True)
class TailRule:
    """Where a tail starts; only eigenvalues above the threshold enter the fit, unless none is."""

    rule: FitRule
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
        """From the published arguments, checked."""
        if fix_fingers is not None:
            choice("fix_fingers", fix_fingers, (None, *XMIN_RULES))
        threshold = number("EVALS_THRESH", EVALS_THRESH)
        rule = FitRule.checked(fix_fingers or "ks", xmin_pos, bins, "farms")
        return cls(rule, threshold if filter_zeros else None)

    def fit_at(self, evals: Tensor, offsets: Tensor, spread: Tensor | None = None) -> PowerLawFits:
        """Fits of packed spectra, each ascending with NaN last, as `FitRule.fit_at`."""
        return self.rule.fit_at(self._entering(evals, offsets), offsets, spread)

    def _entering(self, evals: Tensor, offsets: Tensor) -> Tensor:
        """The spectra with 0, which no fit counts, for what does not enter."""
        lengths, begins = offsets.diff(), offsets[:-1]
        numbers = torch.arange(lengths.numel(), device=evals.device)
        owners = numbers.repeat_interleave(lengths, output_size=evals.numel())
        left_out = torch.zeros_like(lengths)
        if self.threshold is not None:
            left_out.index_add_(0, owners, (evals <= self.threshold).to(torch.int64))
            left_out = torch.where(left_out < lengths, left_out, 0)
        # Ascending spectra begin with what is left out.
        indices = torch.arange(evals.numel(), device=evals.device) - begins[owners]
        out = indices < left_out[owners]
        entering = evals.masked_fill(out, 0.0)
        if self.rule.xmin == "median":
            # A zero has its place below the median as any eigenvalue has. At or above it there is
            # no tail with zeros, and then it starts at the median of the positive ones.
            counts = (lengths - left_out).to(torch.float64)
            start = left_out + (counts / self.rule.xmin_pos).long()
            positive = entering[begins + torch.minimum(start, lengths - 1)] > 0
            zero = (evals == 0) & ~out & positive[owners]
            entering = entering.masked_fill(zero, torch.finfo(torch.float64).tiny)
        return entering


@dataclass(frozen=True)
class WindowedLayer:
    """A layer's stack (S, R, C), the windows of every matrix, and a factor of the eigenvalues."""

    name: str
    stack: Tensor
    windows: PublishedWindows
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Eigenvalues of all windows."""
        return len(self.stack) * self.windows.count * self.windows.order


@dataclass(frozen=True)
class FittedSpectrum:
    """All eigenvalues, ascending with NaN last, those that entered the fit, and the fit.

    Without a fit alpha and D are NaN; without a candidate for xmin they are 0 and 1, which is what
    the published scan ends with.
    """

    evals: NDArray[np.float64]
    entered: NDArray[np.float64]
    alpha: float
    D: float
    status: str

    @cached_property
    def columns(self) -> dict[str, float]:
        """What the published functions list of a spectrum; NaN of one without eigenvalues."""
        count = self.evals.size
        largest = float(self.evals[-1]) if count else math.nan
        norm = float(self.evals.sum()) if count else math.nan
        return {
            "alpha": self.alpha,
            "D": self.D,
            "spectral_norm": largest,
            "norm": norm,
            "alpha_hat": self.alpha * math.log10(largest) if largest > 0 else math.nan,
            "stable_rank": norm / largest if largest else math.nan,
            "norm_stable_rank": norm / count if count else math.nan,
        }


def weights_of(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of every Linear and Conv2d, subclasses included, as named_modules has them.

    TypeError and ValueError as `net_esd_estimator` raises them.
    """
    check_module("net", net)
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
        yield name, tensor


def kernel_positions(weight: Tensor) -> Tensor:
    """A convolution's (out, in, i, j) as the stack (i · j, out, in), a linear weight as one."""
    return weight.flatten(2).permute(2, 0, 1) if weight.ndim == 4 else weight.unsqueeze(0)


def fitted_spectra(
    layers: Sequence[WindowedLayer], rule: TailRule, memory: int = 0
) -> list[list[FittedSpectrum]]:
    """The spectra of each layer, windows of one order solved together; one empty one for none."""
    spectra: list[list[FittedSpectrum]] = [[] for _ in layers]
    batches = group_by_budget(
        [index for index, layer in enumerate(layers) if layer.count],
        key=lambda i: (layers[i].stack.device, layers[i].stack.dtype, layers[i].windows.order),
        size=lambda i: layers[i].count,
        budget=_VALUES_PER_BATCH,
    )
    for together in group_by_budget(
        batches,
        key=lambda batch: layers[batch[0]].stack.device,
        size=lambda batch: sum(layers[i].count for i in batch),
        budget=_VALUES_PER_BATCH,
    ):
        solved = _solved([[layers[i] for i in batch] for batch in together], rule, memory)
        for index in chain.from_iterable(together):
            spectra[index] = list(islice(solved, layers[index].windows.spectra))
    empty = np.empty(0)
    return [own or [FittedSpectrum(empty, empty, math.nan, math.nan, "too_few")] for own in spectra]


def _solved(
    batches: Sequence[Sequence[WindowedLayer]], rule: TailRule, memory: int
) -> Iterator[FittedSpectrum]:
    """Every spectrum of every layer of batches of one device."""
    layers = list(chain.from_iterable(batches))
    device = layers[0].stack.device
    tasks = [
        SolveTask.of(
            [(x.windows, len(x.stack)) for x in batch], memory, index % STREAMS, published=True
        )
        for index, batch in enumerate(batches)
    ]
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None
    streams = make_streams(device, current)
    evals = solve_side_by_side(tasks, [layer.stack for layer in layers], streams)
    split = (own.split(task.windows) for task, own in zip(tasks, evals, strict=True))
    parts = zip(layers, chain.from_iterable(split), strict=True)
    scaled = [part.flatten() * layer.scale for layer, part in parts]
    lengths: list[int] = []
    for layer in layers:
        lengths += [layer.count // layer.windows.spectra] * layer.windows.spectra
    ((spectra, fits),) = fit_pools(torch.cat(scaled), make_pools(lengths, device), rule)
    # The one place where the host waits for the device.
    results = torch.stack([fits.alpha, fits.D, fits.status.to(torch.float64)], dim=1).tolist()
    values = np.split(spectra.cpu().numpy(), np.cumsum(lengths)[:-1])
    for own, (alpha, distance, code) in zip(values, results, strict=True):
        yield _fitted(own, alpha, distance, STATUSES[int(code)], rule.threshold)


def _fitted(
    evals: NDArray[np.float64], alpha: float, distance: float, status: str, threshold: float | None
) -> FittedSpectrum:
    if not np.isfinite(evals[-1]):
        status = "nonfinite"
    if status == "no_candidate":
        alpha, distance = 0.0, 1.0
    elif status != "ok":
        alpha, distance = math.nan, math.nan
    above = evals > (-math.inf if threshold is None else threshold)
    entered = evals[above] if above.any() else evals
    return FittedSpectrum(evals, entered, alpha, distance, status)


def warn_of_missing_fit(name: str, spectra: Sequence[FittedSpectrum], stacklevel: int) -> None:
    """A `FitWarning` where a layer, or a block of it, has no fit."""
    missing = [one.status for one in spectra if one.status != "ok"]
    if not missing:
        return
    blocks = f" in {len(missing)} of {len(spectra)} blocks" if len(spectra) > 1 else ""
    kinds = ", ".join(dict.fromkeys(missing))
    text = f"layer {name!r}: no power-law fit{blocks} ({kinds})"
    warnings.warn(text, FitWarning, stacklevel=stacklevel + 1)
