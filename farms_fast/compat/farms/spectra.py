"""From a module to the fitted spectra of its layers, all layers together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, cycle, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from farms_fast.compat.farms.published_windows import PublishedWindows
from farms_fast.compat.farms.tails import TailRule
from farms_fast.core.arguments import check_int, check_module
from farms_fast.core.arrays import FLOATING
from farms_fast.core.packing import pack
from farms_fast.engine.streams import beside, side_by_side
from farms_fast.spectra.esd import window_eigenvalues
from farms_fast.spectra.power_law import STATUSES, sort_spectra
from farms_fast.weights.layers import module_tensor, sparse_layout

__all__ = [
    "FitWarning",
    "FittedSpectrum",
    "Weight",
    "WindowedLayer",
    "alpha_hat",
    "fitted_spectra",
    "kernel_positions",
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
class FittedSpectrum:
    """A spectrum and its fit.

    Attributes:
        evals: all eigenvalues, float64, ascending, NaN last.
        entered: those that entered the fit.
        alpha: NaN without a fit, 0 without a candidate for xmin, which is what the published scan
            ends with.
        D: NaN without a fit, 1 without a candidate.
        status: one of `farms_fast.spectra.power_law.STATUSES`.
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

    @cached_property
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
    for batches in _together(_batches(layers), layers):
        for index, spectrum in _solved(batches, layers, rule, memory):
            found[index].append(spectrum)
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


def workspace(memory: int | None) -> int:
    """Bytes for `fitted_spectra`, 0 for its default; an error unless None or a positive integer."""
    return 0 if memory is None else check_int("memory", memory, least=1)


def _batches(layers: Sequence[WindowedLayer]) -> list[list[int]]:
    """Layers of one device, dtype and order, in parts of bounded size."""
    buckets: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.count:
            key = (layer.stack.device, layer.stack.dtype, layer.windows.order)
            buckets.setdefault(key, []).append(index)
    parts = [
        pack(bucket, lambda index: layers[index].count, _VALUES_PER_BATCH)
        for bucket in buckets.values()
    ]
    return list(chain.from_iterable(parts))


def _together(
    batches: Sequence[Sequence[int]], layers: Sequence[WindowedLayer]
) -> list[list[Sequence[int]]]:
    """Batches of one device, as many at a time as may be held."""
    parts = [
        pack(own, lambda batch: sum(layers[index].count for index in batch), _VALUES_PER_BATCH)
        for _, own in groupby(batches, key=lambda batch: layers[batch[0]].stack.device)
    ]
    return list(chain.from_iterable(parts))


def _solved(
    batches: Sequence[Sequence[int]], layers: Sequence[WindowedLayer], rule: TailRule, memory: int
) -> Iterator[tuple[int, FittedSpectrum]]:
    """Every spectrum of the batches' layers, with the layer's index."""
    device = layers[batches[0][0]].stack.device
    streams = []
    if device.type == "cuda":
        streams = beside(torch.cuda.current_stream(device))
    pooled: list[Tensor] = []
    with side_by_side(streams) as lanes:
        for batch, lane in zip(batches, cycle(lanes)):
            with lane:
                pooled += _pooled(batch, layers, memory)
    owners, lengths = [], []
    for index, spectra in zip(chain.from_iterable(batches), pooled, strict=True):
        owners += [index] * len(spectra)
        lengths += [spectra.shape[1]] * len(spectra)
    offsets = torch.tensor([0, *accumulate(lengths)], device="cpu").to(device, non_blocking=True)
    evals = sort_spectra(torch.cat([spectra.flatten() for spectra in pooled]), offsets)
    # The one place where the host waits for the device.
    fits = rule.fit(evals, offsets).tolist()
    values = evals.cpu().numpy()
    end = 0
    for index, length, (alpha, distance, code) in zip(owners, lengths, fits, strict=True):
        own = values[end : end + length]
        end += length
        yield index, _one(own, alpha, distance, STATUSES[int(code)], rule)


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
