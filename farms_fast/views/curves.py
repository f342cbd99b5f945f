"""The curves that a spectrum is looked at with, thinned to what a screen can show.

All values are decimal logarithms unless said otherwise, so that spectra of any scale have curves.

Of N eigenvalues the curves keep the largest thousand, and below them those of ranks (counted from
the largest) that grow by a thousandth. Between two neighbours the share of eigenvalues above then
changes by at most a thousandth of itself, 0.00044 decades. `thin` drops further points of the
complementary CDF. The distance D at a candidate xmin, a maximum over the tail, goes over the ranks
that are kept, and so is at most 0.001 too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farms_fast.spectra.marchenko_pastur import (
    marchenko_pastur_density,
    marchenko_pastur_support,
    marchenko_pastur_survival,
)
from farms_fast.views.values import LayerValues

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

_ALL_RANKS = 1000
_RANK_RATIO = 1.001
_CANDIDATES = 160
_MOST_BINS = 100
_LAW_POINTS = 48
# Decades below what the spectrum has at which a falling curve is cut off.
_BELOW = 0.3
SURVIVAL_TOLERANCE = 0.0008
"""Of the plotted range of the complementary CDF: what thinning may move the curve by."""


@dataclass(frozen=True)
class SpectrumCurves:
    """One layer's pooled spectrum as curves; log10 of everything but D and alpha.

    Attributes:
        count: finite eigenvalues, zeros included: what shares are taken of.
        positive: those above 0, of which there is a logarithm.
        bin_edges: (bins + 1,), log10 λ, evenly spaced.
        density: (bins,), log10 of the density of λ in each bin; NaN where the bin is empty.
        survival_x: (points,), log10 λ, ascending.
        survival: (points,), log10 of the share of eigenvalues >= λ: the complementary CDF.
        tail_x: (2,), log10 of xmin and of the largest eigenvalue, where `tail_density` and
            `tail_survival` are those of the fitted power law; all empty without a fit.
        law_x: (points,), log10 λ inside the Marchenko-Pastur law of the windows' shape and
            variance, as far as the spectrum goes down, with `law_density` and `law_survival`.
        candidates: (candidates,), log10 of candidate xmin, ascending.
        D: (candidates,), Kolmogorov-Smirnov distance of the tail that starts there.
        alpha: (candidates,), its exponent.
    """

    count: int
    positive: int
    bin_edges: Array
    density: Array
    survival_x: Array
    survival: Array
    tail_x: Array
    tail_density: Array
    tail_survival: Array
    law_x: Array
    law_density: Array
    law_survival: Array
    candidates: Array
    D: Array
    alpha: Array


def spectrum_curves(record: LayerValues) -> SpectrumCurves:
    """Computes the curves of a layer; its spectrum is not kept where it has to be loaded.

    A ValueError says why a layer has no eigenvalues, or none above 0.
    """
    values = record.read_window_evals()
    if values.size == 0:
        raise ValueError(_why_empty(record))
    values = np.sort(values[np.isfinite(values)], axis=None)
    positive = values[values > 0]
    if positive.size == 0:
        raise ValueError("the eigenvalues are all zero")
    logs = np.log10(positive)
    edges, density = _density(logs, values.size)
    kept = _kept_ranks(positive.size)
    survival_x, survival = _survival(logs[kept], positive.size - kept, values.size)
    floors = np.nanmin(density) - _BELOW, survival[-1] - _BELOW
    return SpectrumCurves(
        *(values.size, positive.size, edges, density, survival_x, survival),
        *_tail(record, values.size),
        *_law(record, logs, positive, values.size, floors),
        *_scan(logs, kept),
    )


def thin(x: Array, y: Array, tolerance: float) -> Indices:
    """Positions of points between which straight lines stay close to all others, x ascending.

    Starting from the two ends, the point that is farthest from the line is added until none is
    farther than the tolerance (Douglas and Peucker, 1973, with vertical distances).
    """
    chosen = {0, max(0, x.size - 1)}
    open_ends = [(0, x.size - 1)]
    while open_ends:
        first, last = open_ends.pop()
        if last - first < 2:
            continue
        inner = slice(first + 1, last)
        slope = (y[last] - y[first]) / (x[last] - x[first])
        away = np.abs(y[inner] - (y[first] + slope * (x[inner] - x[first])))
        farthest = int(np.argmax(away))
        if away[farthest] > tolerance:
            middle = first + 1 + farthest
            chosen.add(middle)
            open_ends += [(first, middle), (middle, last)]
    return np.array(sorted(chosen), dtype=np.intp)


def _why_empty(record: LayerValues) -> str:
    if record.num_evals:
        return "the analysis was read from a file without spectra"
    return record.message or "the layer has no eigenvalues"


def _kept_ranks(size: int) -> Indices:
    """Positions of the eigenvalues that are kept, ascending, the least and the largest included."""
    grown = _ALL_RANKS * _RANK_RATIO ** np.arange(
        max(0.0, math.log(max(1.0, size / _ALL_RANKS)) / math.log(_RANK_RATIO)) + 1
    )
    ranks = np.concatenate([np.arange(1, _ALL_RANKS + 1), np.floor(grown), [size]])
    return np.unique(size - ranks[ranks <= size].astype(np.intp))


def _density(logs: Array, count: int) -> tuple[Array, Array]:
    bins = int(min(_MOST_BINS, max(10, math.ceil(math.sqrt(logs.size)))))
    low, high = float(logs[0]), float(logs[-1])
    if high - low < 1e-9:
        # All alike: one bin that can be seen.
        low, high = low - 0.05, high + 0.05
    counts, edges = np.histogram(logs, bins=bins, range=(low, high))
    # log10 of the width of a bin in λ, from its right end, so that no width leaves the range.
    widths = edges[1:] + math.log10(-math.expm1(-math.log(10) * (high - low) / bins))
    with np.errstate(divide="ignore"):
        density = np.log10(counts / count) - widths
    return edges, np.where(counts > 0, density, np.nan)


def _survival(logs: Array, above: Indices, count: int) -> tuple[Array, Array]:
    # Of equal eigenvalues the first has all of them at or above it.
    x, first = np.unique(logs, return_index=True)
    y = np.log10(above[first] / count)
    chosen = thin(x, y, SURVIVAL_TOLERANCE * max(float(y[0] - y[-1]), 1e-9))
    return x[chosen], y[chosen]


def _tail(record: LayerValues, count: int) -> tuple[Array, Array, Array]:
    if not (math.isfinite(record.alpha) and record.xmin > 0 and record.num_pl_spikes > 0):
        return np.empty(0), np.empty(0), np.empty(0)
    start = math.log10(record.xmin)
    x = np.array([start, max(start, record.log_spectral_norm)])
    survival = math.log10(record.num_pl_spikes / count) - (record.alpha - 1) * (x - start)
    return x, survival + math.log10(record.alpha - 1) - x, survival


def _law(
    record: LayerValues, logs: Array, positive: Array, count: int, floors: tuple[float, float]
) -> tuple[Array, Array, Array]:
    nothing = np.empty(0), np.empty(0), np.empty(0)
    if min(record.M, record.N) < 1:
        return nothing
    aspect = record.N / record.M
    # In units of the mean eigenvalue, which keeps every power inside of the range.
    log_mean = float(logs[-1]) + math.log10(float(np.sum(positive / positive[-1])) / count)
    lower, upper = marchenko_pastur_support(1.0, aspect)
    start = max(math.log10(lower) if lower > 0 else -math.inf, float(logs[0]) - log_mean)
    end = math.log10(upper)
    if start >= end:
        return nothing
    # Evenly where the law is a power, and close together where it falls at its upper edge.
    even = np.linspace(start, end, _LAW_POINTS)
    close = end - (end - start) * 10 ** np.linspace(-5, -1, _LAW_POINTS // 2)
    x = np.unique(np.concatenate([even, close]))
    at = 10**x
    at[-1] = upper
    with np.errstate(divide="ignore"):
        density = np.log10(marchenko_pastur_density(at, np.array(1.0), aspect)) - log_mean
        survival = np.log10(marchenko_pastur_survival(at, 1.0, aspect))
    return x + log_mean, np.maximum(density, floors[0]), np.maximum(survival, floors[1])


def _scan(logs: Array, kept: Indices) -> tuple[Array, Array, Array]:
    """Candidate xmin with D and alpha of their tails.

    `alpha(i) = 1 + n / sum_{j >= i} (ln l_j - ln l_i)` is exact. D is over the ranks that are
    kept: between two of them both the model and the data only rise, so |model - data| exceeds the
    larger of its values there by at most what the data rise by.
    """
    size = logs.size
    if size < 2:
        return np.empty(0), np.empty(0), np.empty(0)
    # No term is negative, so the sums lose no digits.
    steps = np.arange(1, size)[::-1] * np.diff(logs)
    excess = np.append(np.cumsum(steps[::-1])[::-1], 0.0) * math.log(10)
    inside = kept[kept <= size - 2]
    wanted = np.linspace(logs[inside[0]], logs[inside[-1]], _CANDIDATES)
    chosen = inside[np.searchsorted(logs[inside], wanted).clip(0, inside.size - 1)]
    chosen = np.unique(chosen[excess[chosen] > 0])
    # The same value twice has two tails; the longer one has all of it.
    _, first = np.unique(logs[chosen], return_index=True)
    chosen = chosen[first]
    remaining = size - chosen
    alpha = 1 + remaining / excess[chosen]
    distances = np.empty(chosen.size)
    for position, (i, n) in enumerate(zip(chosen, remaining, strict=True)):
        tail = kept[np.searchsorted(kept, i) :]
        ratios = (logs[tail] - logs[i]) * math.log(10)
        model = -np.expm1((1 - alpha[position]) * ratios)
        distances[position] = np.max(np.abs(model - (tail - i) / n))
    return logs[chosen], distances, alpha
