"""How far a layer's alpha depends on which windows were taken.

Windows overlap, so they are not independent, and a resample has to keep neighbours together. The
bootstrap here resamples the grid's row starts and column starts, each by circular blocks as long as
the run of starts that one window overlaps (half of the starts at most), and the stack's entries one
by one; a window counts as often as its row, its column and its entry were drawn.

Drawing rows and columns independently is careful where windows hardly overlap: measured against the
true spread on random matrices, the standard error was 1.7 times too large for windows that touch,
1.2 times for windows that overlap by half, and 0.8 times for 15 x 15 heavily overlapping ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.spectra.power_law import (
    PowerLawFit,
    PowerLawFits,
    fit_power_laws,
    least_spread,
    packed_offsets,
    packed_spreads,
    xmin_rule,
)
from farms_fast.spectra.windows import WindowGrid

# Values in one call of the fit where the caller does not say; it works on 48 bytes for each.
_VALUES_PER_CALL = 2**24
_SEED = 20250628


@dataclass(frozen=True)
class FitRule:
    """The settings of `fit_power_law`, for everything that is fitted in one analysis."""

    xmin: str = "median"
    xmin_pos: float = 2
    bins: int = 100
    compat: str | None = None

    @classmethod
    def checked(cls, xmin: str, xmin_pos: float, bins: int, compat: str | None = None) -> FitRule:
        """The rule of this name; TypeError or ValueError for a setting that no fit takes."""
        rule = cls(xmin_rule(xmin), xmin_pos, bins, compat)
        # A fit of no spectra checks the rest.
        rule.fit(torch.empty(0, dtype=torch.float64, device="cpu"), [])
        return rule

    @property
    def published(self) -> bool:
        """Whether fits repeat published code: of all eigenvalues, those of rounding too."""
        return self.compat is not None

    def least_spread(self, weights: torch.dtype, order: int, precision: torch.dtype) -> float:
        """`farms_fast.spectra.power_law.least_spread`; 0 for published fits."""
        return 0.0 if self.published else least_spread(weights, order, precision)

    def fit(
        self, packed: Tensor, lengths: Sequence[int], spreads: Sequence[float] | None = None
    ) -> PowerLawFits:
        """Fits packed ascending spectra of the given lengths, each with its least spread."""
        device = packed.device
        return self.fit_at(packed, packed_offsets(lengths, device), packed_spreads(spreads, device))

    def fit_at(self, packed: Tensor, offsets: Tensor, spread: Tensor | None = None) -> PowerLawFits:
        """Fits packed ascending spectra that begin and end at offsets on the same device."""
        return fit_power_laws(
            packed, offsets, self.xmin, self.xmin_pos, self.bins, spread, compat=self.compat
        )


@dataclass(frozen=True)
class LayerFits:
    """Fits of one layer's pooled spectrum and of parts and resamples of it."""

    pooled: PowerLawFit
    window_alphas: NDArray[np.float64]  # (windows,), each window fitted alone
    halves: tuple[float, float]  # alphas of the even and the odd windows; NaN for a single window
    resampled: NDArray[np.float64]  # alphas of the resamples that could be fitted

    @property
    def standard_error(self) -> float:
        """Standard deviation over the resamples; NaN with fewer than two."""
        return float(self.resampled.std(ddof=1)) if self.resampled.size > 1 else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval over the resamples; NaN without any."""
        if self.resampled.size < 2:
            return math.nan, math.nan
        low, high = np.quantile(self.resampled, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def fit_layers(
    spectra: Sequence[Tensor],
    entries: Sequence[int],
    grids: Sequence[WindowGrid],
    rule: FitRule,
    bootstrap: int = 0,
    values_per_call: int = _VALUES_PER_CALL,
    spreads: Sequence[float] | None = None,
) -> list[LayerFits]:
    """Fits the pooled spectra of layers, and how they vary over windows.

    Layers that are sampled alike are sorted and resampled together, and all of them fitted in one
    call, so that the many small layers of a network take hardly more launches than one. At most
    `values_per_call` are fitted at once, which bounds the memory; a layer with more is fitted by
    itself, and resample by resample. The resamples drawn depend on nothing but the grid.

    For each layer, `spectra` has (windows, k) float64 with ascending rows, all on one device,
    `entries` the matrices of its stack, `grids` the windows of one matrix, and `spreads` the least
    spread of a tail, 0 without.
    """
    least = [0.0] * len(spectra) if spreads is None else spreads
    alike: dict[tuple[object, ...], list[int]] = {}
    for layer, (count, grid) in enumerate(zip(entries, grids, strict=True)):
        starts = tuple(grid.row_starts), tuple(grid.column_starts)
        key = (*spectra[layer].shape, count, grid.rows, grid.columns, *starts, least[layer])
        alike.setdefault(key, []).append(layer)
    groups: list[_Group] = []
    for layers in alike.values():
        # So that one resample of all of them fits into a call.
        count = max(1, values_per_call // spectra[layers[0]].numel())
        for begin in range(0, len(layers), count):
            groups.append(_Group(layers[begin : begin + count], spectra, least[layers[0]]))
    if not groups:
        return []
    parts = [(part, group.least_spread) for group in groups for part in group.parts()]
    fits = _fit_rows(parts, rule, values_per_call)
    by_layer: dict[int, LayerFits] = {}
    end = 0
    for group in groups:
        first = group.layers[0]
        counts = resampled_counts(entries[first], grids[first], bootstrap)
        mine = slice(end, end := end + group.spectra)
        results = group.results(fits.part(mine), counts, rule, values_per_call)
        by_layer.update(zip(group.layers, results, strict=True))
    return [by_layer[layer] for layer in range(len(spectra))]


def _fit_rows(
    parts: Sequence[tuple[Tensor, float]], rule: FitRule, values_per_call: int
) -> PowerLawFits:
    """Fits of every row of every part, as many in one call as it takes; on the host.

    With each part comes the least spread of its rows.
    """
    calls: list[list[tuple[Tensor, float]]] = [[]]
    free_values = values_per_call
    for part, spread in parts:
        begin, length = 0, part.shape[1]
        while begin < len(part):
            rows = min(len(part) - begin, free_values // length)
            if rows < 1 and calls[-1]:
                calls.append([])
                free_values = values_per_call
                continue
            rows = max(rows, 1)
            calls[-1].append((part[begin : begin + rows], spread))
            free_values -= rows * length
            begin += rows
    stacked = []
    for call in calls:
        lengths = [part.shape[1] for part, _ in call for _ in range(len(part))]
        spreads = [spread for part, spread in call for _ in range(len(part))]
        fits = rule.fit(torch.cat([part.flatten() for part, _ in call]), lengths, spreads)
        stacked.append([rows.cpu() for rows in fits.stacked()])
    reals, integers = (torch.cat(rows, dim=1) for rows in zip(*stacked, strict=True))
    alpha, distance, xmin = reals
    n_tail, n, dropped, status = integers
    return PowerLawFits(alpha, distance, xmin, n_tail, n, dropped, status, rule.xmin)


class _Group:
    """Layers of equally many windows of one order, sampled alike."""

    def __init__(self, layers: list[int], spectra: Sequence[Tensor], least_spread: float) -> None:
        self.layers = layers  # their positions in the caller's sequence
        self.least_spread = least_spread
        self._windows = torch.stack([spectra[layer] for layer in layers])
        self._values, indices = self._windows.flatten(1).sort(dim=1)
        # Where each sorted value comes from.
        self._window_of = indices.floor_divide_(self._windows.shape[2]).to(torch.int32)

    @property
    def spectra(self) -> int:
        """How many are fitted: rows of all parts."""
        layers, windows, _ = self._windows.shape
        return layers if windows == 1 else layers * (3 + windows)

    def parts(self) -> list[Tensor]:
        """What is fitted, a row a spectrum: pooled, even windows, odd windows, every window."""
        values = self._values
        layers, windows, order = self._windows.shape
        if windows == 1:
            return [values]
        # What is drawn from sorted values is sorted.
        odd = self._window_of % 2
        halves = [((windows + 1) // 2, 1 - odd), (windows // 2, odd)]
        drawn = [
            values.flatten()
            .repeat_interleave(chosen.flatten(), output_size=layers * half * order)
            .view(layers, half * order)
            for half, chosen in halves
        ]
        return [values, *drawn, self._windows.flatten(0, 1)]

    def results(
        self, fits: PowerLawFits, counts: NDArray[np.int64], rule: FitRule, values_per_call: int
    ) -> list[LayerFits]:
        """From the fits of the parts, in their order, and resamples; one entry a layer."""
        layers, windows, _ = self._windows.shape
        pooled = fits.part(slice(layers)).to_list()
        several = windows > 1
        even, odd, single = np.split(fits.alpha[layers:].numpy().copy(), [layers, 2 * layers])
        resampled = self._resampled_alphas(counts if several else counts[:0], rule, values_per_call)
        return [
            LayerFits(
                pooled[i],
                single[i * windows : (i + 1) * windows],
                (float(even[i]), float(odd[i])) if several else (math.nan, math.nan),
                resampled[i][np.isfinite(resampled[i])],
            )
            for i in range(layers)
        ]

    def _resampled_alphas(
        self, counts: NDArray[np.int64], rule: FitRule, values_per_call: int
    ) -> NDArray[np.float64]:
        """Alphas (layers, resamples); repeating sorted values keeps them sorted."""
        layers, values = self._values.shape
        alphas = torch.empty(0, layers, dtype=torch.float64, device="cpu")
        per_call = max(1, values_per_call // (layers * values))
        for begin in range(0, len(counts), per_call):
            part = torch.from_numpy(counts[begin : begin + per_call])
            repeats = part.to(self._window_of.device)[:, self._window_of]
            packed = (
                self._values.expand_as(repeats)
                .flatten()
                .repeat_interleave(repeats.flatten(), output_size=repeats.numel())
            )
            number = len(part) * layers
            fitted = rule.fit(packed, [values] * number, [self.least_spread] * number).alpha
            alphas = torch.cat([alphas, fitted.view(len(part), layers).cpu()])
            # Before the next resamples are made beside them.
            del packed, repeats
        return alphas.T.numpy()


def resampled_counts(entries: int, grid: WindowGrid, resamples: int) -> NDArray[np.int64]:
    """How often each window is drawn in each resample of a stack of so many matrices.

    (resamples, windows), windows ordered as in the window table; rows sum to the windows' number.
    """
    if resamples == 0:
        return np.zeros((0, entries * grid.count), dtype=np.int64)
    generator = np.random.default_rng(_SEED)
    by_entry = _block_counts(generator, entries, 1, resamples)
    by_row, by_column = (
        _block_counts(generator, len(starts), _overlapping(starts, extent), resamples)
        for starts, extent in ((grid.row_starts, grid.rows), (grid.column_starts, grid.columns))
    )
    counts = np.einsum("be,br,bc->berc", by_entry, by_row, by_column)
    return np.asarray(counts.reshape(resamples, entries * grid.count))


def _overlapping(starts: Sequence[int], extent: int) -> int:
    """Starts that fall into a window placed at the first one, itself included."""
    return sum(start - starts[0] < extent for start in starts)


def _block_counts(
    generator: np.random.Generator, size: int, block: int, resamples: int
) -> NDArray[np.int64]:
    """Counts of `size` positions drawn by circular blocks, (resamples, size)."""
    block = max(1, min(block, size // 2))
    blocks = math.ceil(size / block)
    first = generator.integers(size, size=(resamples, blocks, 1))
    drawn = ((first + np.arange(block)) % size).reshape(resamples, blocks * block)[:, :size]
    counts = np.zeros((resamples, size), dtype=np.int64)
    np.add.at(counts, (np.arange(resamples)[:, None], drawn), 1)
    return counts
