"""Fit of the Marchenko-Pastur law to a spectrum, the way WeightWatcher does it.

The spectrum is rescaled to mean 1, its density estimated with a linear kernel of width 0.1 at 1000
points, and the one parameter sigma chosen by least squares: a grid first, then Nelder-Mead from the
best point of the grid. Here the density is estimated once, with prefix sums, and not once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from farms_fast.spectra.marchenko_pastur import FloatArray, marchenko_pastur_density

_BANDWIDTH = 0.1
_POINTS = 1000
# Where the density is below this, the law is not compared with it.
_LEAST_DENSITY = 0.01
_REFUSED = 1000.0


@dataclass(frozen=True)
class MarchenkoPasturFit:
    """The law that fits a spectrum, by WeightWatcher's columns; the defaults say there is no fit.

    `num_spikes` eigenvalues lie beyond the bulk's edge and its Tracy-Widom width. `sigma_mp` is
    that of the spectrum rescaled to mean 1, by the factor `W_scale` squared; `bulk_min` and
    `bulk_max` are in the spectrum's own scale.
    """

    num_spikes: int = -1
    sigma_mp: float = -1.0
    mp_softrank: float = -1.0
    bulk_min: float = -1.0
    bulk_max: float = -1.0
    W_scale: float = -1.0


def fit_marchenko_pastur(evals: FloatArray, N: int, M: int) -> MarchenkoPasturFit:
    """Fits sigma of the Marchenko-Pastur law, or of the quarter-circle law of a square matrix.

    With Q = N / M the bulk is `sigma^2 (1 -+ Q^(-1/2))^2`. A square matrix is fitted on singular
    values, with `sqrt(4 - x^2) / (pi sigma^2)`: the support stays at 2 whatever sigma is, as in
    WeightWatcher (Martin and Mahoney, "Implicit self-regularization in deep neural networks", JMLR
    22, 2021, section 3). A spectrum of zeros, or with a value that is not finite, has no fit.
    """
    total = float(np.sum(evals))
    if evals.size == 0 or not (math.isfinite(total) and total > 0) or M < 1:
        return MarchenkoPasturFit()
    aspect = N / M
    scale = math.sqrt(evals.size) / math.sqrt(total)
    scaled = scale * scale * evals
    sigma = _fit_sigma(scaled, aspect)

    upper = (sigma * (1 + 1 / math.sqrt(aspect))) ** 2
    lower = (sigma * (1 - 1 / math.sqrt(aspect))) ** 2
    edge = upper + math.sqrt(upper ** (2 / 3) * M ** (-2 / 3) / math.sqrt(aspect))
    return MarchenkoPasturFit(
        num_spikes=int(np.count_nonzero(scaled > edge)),
        sigma_mp=sigma,
        mp_softrank=upper / float(scaled.max()),
        bulk_min=lower / (scale * scale),
        bulk_max=upper / (scale * scale),
        W_scale=scale,
    )


def linear_kernel_density(values: FloatArray, at: FloatArray, bandwidth: float) -> FloatArray:
    """Density estimate `1 / (n h) sum_i max(0, 1 - |x - v_i| / h)` at every x."""
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    low = np.searchsorted(ordered, at - bandwidth, side="right")
    middle = np.searchsorted(ordered, at, side="right")
    high = np.searchsorted(ordered, at + bandwidth, side="left")
    below = (middle - low) * at - (sums[middle] - sums[low])
    above = (sums[high] - sums[middle]) - (high - middle) * at
    density = ((high - low) - (below + above) / bandwidth) / (values.size * bandwidth)
    return np.asarray(np.maximum(density, 0.0), dtype=np.float64)


def _fit_sigma(scaled: FloatArray, aspect: float) -> float:
    square = aspect == 1
    values = np.sqrt(scaled) if square else scaled
    grid = np.linspace(0, np.max(values) + 0.5, _POINTS)
    density = linear_kernel_density(values, grid, _BANDWIDTH)
    kept = density > _LEAST_DENSITY
    at, density = grid[kept], density[kept]
    if at.size == 0:
        return -1.0
    mode = float(at[np.argmax(density)])
    last = float(at[-1])

    if square:
        arc = np.sqrt(np.maximum(4 - at**2, 0.0)) / np.pi
    root = math.sqrt(1 / aspect)

    def cost(sigma: FloatArray) -> FloatArray:
        """Of many values of sigma at once; the law is 0 outside of its support."""
        variance = np.square(sigma)[:, None]
        if square:
            return np.asarray(np.square(arc / variance - density).sum(axis=1))
        law = marchenko_pastur_density(at, variance, aspect)
        upper, lower = variance * (1 + root) ** 2, variance * (1 - root) ** 2
        squares = np.square(law - density).sum(axis=1)
        refused = (upper < mode) | (upper > last) | (lower > mode)
        return np.asarray(np.where(refused[:, 0], _REFUSED**2 * at.size, squares))

    edge_sigma = math.sqrt(float(scaled.max()) / (1 + 1 / math.sqrt(aspect)) ** 2)
    start, stop, step = 0.05 * edge_sigma, 2.0 * edge_sigma, 0.01 * edge_sigma
    steps = np.arange(math.ceil((stop - start) / step), dtype=np.float64)
    candidates = start + steps * step
    best = float(candidates[int(np.argmin(cost(candidates)))])
    return _nelder_mead(lambda sigma: float(cost(np.array([sigma]))[0]), best)


def _nelder_mead(cost: Callable[[float], float], start: float) -> float:
    """Minimum of a function of one variable by the simplex method, a pair of points here.

    With the customary coefficients (1, 2, 1/2, 1/2), a first step of 5 % and a tolerance of 1e-4 of
    both the point and the value, so that it ends where SciPy's `fmin` does.
    """
    best, worst = start, 1.05 * start
    f_best, f_worst = cost(best), cost(worst)
    for _ in range(200):
        if f_worst < f_best:
            best, worst, f_best, f_worst = worst, best, f_worst, f_best
        if abs(worst - best) <= 1e-4 and abs(f_worst - f_best) <= 1e-4:
            break
        reflected = 2 * best - worst
        f_reflected = cost(reflected)
        if f_reflected < f_best:
            expanded = 3 * best - 2 * worst
            f_expanded = cost(expanded)
            worst, f_worst = reflected, f_reflected
            if f_expanded < f_reflected:
                worst, f_worst = expanded, f_expanded
            continue
        # Not better than the best is not better than the second worst: there are but two.
        outside = f_reflected < f_worst
        contracted = 1.5 * best - 0.5 * worst if outside else 0.5 * best + 0.5 * worst
        f_contracted = cost(contracted)
        if f_contracted <= f_reflected if outside else f_contracted < f_worst:
            worst, f_worst = contracted, f_contracted
        else:
            worst = best + 0.5 * (worst - best)
            f_worst = cost(worst)
    return best if f_best <= f_worst else worst
