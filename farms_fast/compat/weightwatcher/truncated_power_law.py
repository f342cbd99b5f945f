"""Truncated power law of a spectrum's tail, by maximum likelihood.

The density above xmin is `p(x) ~ x^-alpha exp(-Lambda x)`. With t = x / xmin and z = Lambda xmin,
the log-likelihood of n values is `-n (alpha <ln t> + z <t> + ln Z)`, where

`Z(alpha, z) = int_1^inf t^-alpha exp(-z t) dt`.

It is concave in (alpha, z), so its maximum over alpha >= 1 and z >= 0 is the only one, and Newton's
method finds it for all candidates of xmin at once. The start of the tail is the candidate with the
least Kolmogorov-Smirnov distance, as for `farms_fast.fit_power_law` (Clauset, Shalizi and Newman,
SIAM Review 51, 2009, which also treats this distribution in its table 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from farms_fast.spectra.power_law import one_spectrum

FloatArray = npt.NDArray[np.float64]
FloatArrays = tuple[FloatArray, ...]
Pieces = tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]

# Where the integrand has fallen by exp(-42), less than a rounding error is left of the integral.
_DECAY = 42.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(160)
# Between neighbouring values the integrand hardly changes, so that few nodes do.
_FEW_NODES, _FEW_WEIGHTS = np.polynomial.legendre.leggauss(5)
_LONGEST_PIECE = 0.2
_CHUNK = 256
_ITERATIONS = 100


@dataclass(frozen=True)
class TruncatedPowerLawFit:
    """Fit of one spectrum.

    Attributes:
        alpha: exponent, at least 1; NaN unless `status` is `"ok"`.
        Lambda: rate of the exponential, per unit of the values, at least 0; NaN unless ok.
        D: Kolmogorov-Smirnov distance between tail and fit; NaN unless ok.
        xmin: smallest value of the tail; NaN unless ok.
        n_tail: values in the tail; 0 unless ok.
        n: values that entered the fit.
        dropped: values that did not enter: zero, negative or not finite.
        loglikelihood: of the tail's values; NaN unless ok.
        status: `"ok"`; `"too_few"`: fewer than two different values; `"no_candidate"`: fewer
            than two different values in the range of xmin.
    """

    alpha: float = math.nan
    Lambda: float = math.nan
    D: float = math.nan
    xmin: float = math.nan
    n_tail: int = 0
    n: int = 0
    dropped: int = 0
    loglikelihood: float = math.nan
    status: str = "too_few"


def fit_truncated_power_law(
    evals: object, xmin: float | Sequence[float] | None = None
) -> TruncatedPowerLawFit:
    """Fits a truncated power law to the tail of one spectrum.

    Args:
        evals: eigenvalues, 1-D and floating, in any order: a NumPy array, a torch tensor or another
            array with `__dlpack__`. It is not written. Values that are not positive and finite
            are dropped and counted.
        xmin: where the tail starts: a number; a range `(low, high)` of candidates; None for every
            value. The largest candidate is left out, so that two values remain.

    Returns:
        The fit. Where the likelihood grows up to the border, alpha is 1 or Lambda is 0 (the power
        law). A spectrum that cannot be fitted is no error: `status` says why.

    Raises:
        TypeError: if `evals` is no floating array, or `xmin` is neither a number nor a range.
        ValueError: if `evals` is not 1-D or empty, or `xmin` is not positive or not finite.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> sample = 1 + rng.exponential(2.0, 20000)
        >>> kept = sample[rng.random(20000) < sample**-1.5]
        >>> fit = fit_truncated_power_law(kept, xmin=1.0)
        >>> abs(fit.alpha - 1.5) < 0.3, abs(fit.Lambda - 0.5) < 0.15
        (True, True)
    """
    given = one_spectrum(evals).cpu().numpy()
    low, high = _range(xmin)
    values = np.sort(given[np.isfinite(given) & (given > 0)])
    dropped = given.size - values.size
    fixed = xmin is not None and low == high
    if fixed:
        values = values[values >= low]
    if values.size < 2 or values[0] == values[-1]:
        return TruncatedPowerLawFit(n=values.size, dropped=dropped, status="too_few")
    if fixed:
        candidates, starts = np.zeros(1, dtype=np.int64), np.array([low])
    else:
        starts, candidates = np.unique(values, return_index=True)
        within = (starts >= low) & (starts <= high)
        candidates, starts = candidates[within][:-1], starts[within][:-1]
    return replace(_best_fit(values, candidates, starts), n=values.size, dropped=dropped)


def _range(xmin: object) -> tuple[float, float]:
    if xmin is None:
        return 0.0, math.inf
    try:
        if isinstance(xmin, Sequence) and not isinstance(xmin, str):
            low, high = (float(end) for end in xmin)
            if not low <= high or math.isnan(low):
                raise ValueError(f"xmin: expected low <= high, got {(low, high)}")
            return low, high
        start = float(xmin)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"xmin: expected a number or a pair of numbers, got {xmin!r}") from None
    if not (math.isfinite(start) and start > 0):
        raise ValueError(f"xmin: expected a positive finite number, got {xmin!r}")
    return start, start


def _best_fit(
    values: FloatArray, candidates: npt.NDArray[np.int64], starts: FloatArray
) -> TruncatedPowerLawFit:
    """The candidate of least D, of those whose parameters could be found."""
    if candidates.size == 0:
        return TruncatedPowerLawFit(status="no_candidate")
    logs = np.log(values)
    counts = (values.size - candidates).astype(np.float64)
    # From the top, so that no large sum is subtracted from another.
    log_sums = np.cumsum(logs[::-1])[::-1][candidates]
    sums = np.cumsum(values[::-1])[::-1][candidates]
    mean_log = np.maximum(log_sums / counts - np.log(starts), 0.0)
    mean = np.maximum(sums / counts / starts, 1.0 + 1e-15)
    alpha, rate, log_z = maximum_likelihood(mean_log, mean)
    pieces = _pieces(logs)
    laws = zip(candidates.tolist(), starts, alpha.tolist(), rate.tolist(), strict=True)
    distances = np.array(
        [_distance(logs, pieces, i, float(np.log(start)), a, z) for i, start, a, z in laws]
    )
    if np.isnan(distances).all():
        return TruncatedPowerLawFit(status="no_candidate")
    best = int(np.nanargmin(distances))
    start, n = float(starts[best]), int(counts[best])
    a, z = float(alpha[best]), float(rate[best])
    cost = float(a * mean_log[best] + z * mean[best] + log_z[best] + math.log(start))
    return TruncatedPowerLawFit(
        a, z / start, float(distances[best]), start, n, loglikelihood=-n * cost, status="ok"
    )


def maximum_likelihood(mean_log: FloatArray, mean: FloatArray) -> FloatArrays:
    """Alpha >= 1, z >= 0 and ln Z of the tails whose ln t and t have these means, (n,) each."""
    parts = [
        _maximum_likelihood(mean_log[i : i + _CHUNK], mean[i : i + _CHUNK])
        for i in range(0, mean_log.size, _CHUNK)
    ]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _maximum_likelihood(mean_log: FloatArray, mean: FloatArray) -> FloatArrays:
    with np.errstate(divide="ignore", over="ignore"):
        power_law = 1 + 1 / mean_log
    # Under a power law <t> is (alpha - 1) / (alpha - 2), or infinite. A sample whose mean exceeds
    # it has its maximum at Lambda = 0.
    heavy = (power_law > 2) & (mean * (power_law - 2) >= power_law - 1)
    alpha, rate, log_z = found = np.ones_like(power_law), 1 / (mean - 1), np.zeros_like(power_law)
    # The exponential that is left to be found is of t - 1: its mean stays positive near t = 1.
    means = mean_log, mean - 1
    _newton(found, means, ~heavy, free=False)
    # Where <ln t> exceeds the law's at alpha = 1, a larger alpha would be less likely still.
    inside = ~heavy
    inside[~heavy] = mean_log[~heavy] < _moments(alpha[~heavy], rate[~heavy])[1]
    alpha[inside] = np.minimum(power_law[inside], 50.0)
    rate[inside] = 1 / mean[inside]
    _newton(found, means, inside, free=True)
    alpha[heavy], rate[heavy] = power_law[heavy], 0.0
    log_z[heavy] = -np.log(power_law[heavy] - 1)
    return found


def _newton(
    found: FloatArrays, means: FloatArrays, where: npt.NDArray[np.bool_], free: bool
) -> None:
    """Minimises `alpha <ln t> + z <t> + ln Z` in place, over z alone unless alpha is free."""
    rows = np.flatnonzero(where)
    if rows.size == 0:
        return
    (alpha, rate, log_z), (m1, m2) = found, means
    state = _moments(alpha[rows], rate[rows])
    for _ in range(_ITERATIONS):
        a, z = alpha[rows], rate[rows]
        value = a * m1[rows] + z * m2[rows] + state[0]
        g1, g2 = m1[rows] - state[1], m2[rows] - state[2]
        v11, v12, v22 = state[3:]
        if free:
            determinant = np.maximum(v11 * v22 - v12 * v12, 1e-300)
            step_a = -(v22 * g1 - v12 * g2) / determinant
            step_z = -(v11 * g2 - v12 * g1) / determinant
        else:
            step_a = np.zeros_like(a)
            step_z = -g2 / v22
        # The rate moves on a logarithmic scale, so that it stays positive. Where it would fall far,
        # each parameter takes its own step: shortening both together would end near 0.
        step_s = step_z / z
        falling = step_s < -2
        step_s = np.where(falling, np.clip(-g2 / (z * v22), -2, 2), step_s)
        step_a = np.where(falling & free, np.clip(-g1 / v11, -2, 2), step_a)
        slope = g1 * step_a + g2 * z * step_s
        length = 1 / np.maximum(1, np.maximum(step_s / 2, np.abs(step_a) / 10))
        for _ in range(40):
            new_a, new_z = a + length * step_a, z * np.exp(length * step_s)
            new_state = _moments(new_a, new_z)
            new_value = new_a * m1[rows] + new_z * m2[rows] + new_state[0]
            poor = ~(new_value <= value + 1e-4 * length * slope + 1e-14 * np.abs(value))
            if not poor.any():
                break
            length[poor] /= 2
        alpha[rows], rate[rows] = new_a, new_z
        log_z[rows] = new_state[0] - new_z
        # The decrease that Newton's quadratic model still promises.
        going = ~(np.abs(slope) < 1e-18)
        rows = rows[going]
        if rows.size == 0:
            return
        promised = slope[going]
        state = tuple(column[going] for column in new_state)
    # Rounding can keep the last digits moving; anything else is no maximum.
    alpha[rows[np.abs(promised) > 1e-10]] = np.nan


def _moments(alpha: FloatArray, rate: FloatArray) -> FloatArrays:
    """Ln of the integral of t^-alpha exp(-z (t - 1)), and means and covariances of ln t and t - 1.

    The variable of integration is u = ln t.
    """
    # The variance of t asks for two powers of t more than the integral itself.
    power = alpha - 3
    excess = np.maximum(-power, 0.0)
    reach = np.log1p((_DECAY + 2 * excess * (1 + np.log1p(excess / rate))) / rate)
    with np.errstate(divide="ignore"):
        reach = np.where(power > 0, np.minimum(reach, _DECAY / power), reach)
    u = reach[:, None] * (0.5 * (_NODES + 1))
    t = np.expm1(u)
    exponent = (1 - alpha)[:, None] * u - rate[:, None] * t
    top = exponent.max(axis=1)
    density = np.exp(exponent - top[:, None]) * _WEIGHTS
    total = density.sum(axis=1)
    density /= total[:, None]
    mean_u = (density * u).sum(axis=1)
    mean_t = (density * t).sum(axis=1)
    du, dt = u - mean_u[:, None], t - mean_t[:, None]
    covariances = [(density * x * y).sum(axis=1) for x, y in ((du, du), (du, dt), (dt, dt))]
    return np.log(total * reach / 2) + top, mean_u, mean_t, *covariances


def _pieces(logs: FloatArray) -> Pieces:
    """Nodes and weights of the integral between neighbours, and where each gap's nodes begin."""
    gaps = np.diff(logs)
    parts = np.maximum(1, np.ceil(gaps / _LONGEST_PIECE)).astype(np.int64)
    widths = np.repeat(gaps / parts, parts)
    first = np.concatenate([[0], np.cumsum(parts)])
    within = np.arange(first[-1]) - np.repeat(first[:-1], parts)
    left = np.repeat(logs[:-1], parts) + within * widths
    nodes = left[:, None] + widths[:, None] * (0.5 * (_FEW_NODES + 1))
    weights = 0.5 * widths[:, None] * _FEW_WEIGHTS
    return nodes, weights, first


def _distance(
    logs: FloatArray, pieces: Pieces, start: int, log_start: float, alpha: float, rate: float
) -> float:
    """D of the tail that begins at an index, whose law begins at a value not above it."""
    nodes, weights, first = pieces
    tail = logs[start:] - log_start
    n = tail.size
    empirical = np.arange(n) / n
    # Of equal values the empirical distribution knows the first alone.
    known = np.concatenate([[True], np.diff(tail) > 0])
    if rate == 0:
        survival = np.exp((1 - alpha) * tail)
    else:
        u = nodes[first[start] :] - log_start
        density = np.exp((1 - alpha) * u - rate * np.expm1(u)) * weights[first[start] :]
        gaps = np.add.reduceat(density.sum(axis=1), first[start:-1] - first[start])
        last = float(tail[-1])
        beyond = float(_moments(np.array([alpha]), np.array([rate * math.exp(last)]))[0][0])
        beyond += (1 - alpha) * last - rate * math.expm1(last)
        above = np.concatenate([np.cumsum(gaps[::-1])[::-1], [0.0]]) + math.exp(beyond)
        total = above[0]
        if tail[0] > 0:
            total = math.exp(float(_moments(np.array([alpha]), np.array([rate]))[0][0]))
        survival = above / total
    return float(np.abs(1 - survival - empirical)[known].max())
