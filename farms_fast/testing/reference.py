"""The same results in plain NumPy: slow, short, and the truth in tests.

Nothing here is compiled, blocked or pruned. Each function states the formula that the fast
implementation of the same name must reproduce.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def fit_power_law(
    evals: npt.ArrayLike,
    rule: str = "median",
    xmin_pos: float = 2.0,
    bins: int = 100,
    published: bool = False,
    least_spread: float = 0.0,
) -> dict[str, float | int | str]:
    """Fits a power law to the tail of one spectrum by exhaustive scan.

    With `l` the ascending positive finite values, `N` their number and `n = N - i`,

    `alpha(i) = 1 + n / sum_{j >= i} (ln l_j - ln l_i)` and
    `D(i) = max_{j >= i} |1 - (l_j / l_i)^(1 - alpha(i)) - (j - i) / n|`.

    Rule `"median"` takes the value at `int(N / xmin_pos)` for xmin; `"ks"` takes the first argmin
    of `D` over all `i <= N - 2`; `"peak"` takes it over the values within 0.95 and 1.5 times the
    left edge x2 of the fullest bin of a histogram of `log10 l`.

    A tail has all values from xmin on, so that it begins at the first of equal values. No tail has
    `ln(l_{N-1} / l_i)` of `least_spread` or less. As `published`, a tail may begin in the middle of
    equal values, and the lower end of `"peak"` is `log10(0.95 x2)`.

    Example:
        >>> import numpy as np
        >>> fit = fit_power_law(np.exp(np.arange(4.0)), "median", xmin_pos=4.0)
        >>> round(float(fit["alpha"]), 6), fit["n_tail"]
        (2.0, 3)
    """
    given = np.asarray(evals, dtype=np.float64)
    values = np.sort(given[np.isfinite(given) & (given > 0)])
    size = values.size
    failed: dict[str, float | int | str] = dict.fromkeys(("alpha", "D", "xmin"), np.nan)
    failed |= {"n_tail": 0, "n": size, "dropped": given.size - size}
    if size < 2:
        nothing_finite = given.size > 0 and not np.isfinite(given).any()
        return failed | {"status": "nonfinite" if nothing_finite else "too_few"}

    if rule == "median":
        candidates = np.array([int(size / xmin_pos)])
        if candidates[0] > size - 2:
            return failed | {"status": "too_few"}
        if not published:
            candidates = np.searchsorted(values, values[candidates])
    elif rule == "ks":
        candidates = np.arange(size - 1)
    elif rule == "peak":
        candidates = _peak_candidates(values, bins, published)
        if candidates.size == 0:
            return failed | {"status": "no_candidate"}
    else:
        raise ValueError(f"rule: expected 'median', 'ks' or 'peak', got {rule!r}")

    # The logarithm of two close values may come out of order by an ulp.
    logs = np.minimum.accumulate(np.log(values)[::-1])[::-1]
    excess = _excess(logs)
    best_distance, best = np.inf, -1
    for i in candidates:
        begins = published or i == 0 or values[i - 1] < values[i]
        if begins and excess[i] > 0 and logs[-1] - logs[i] > least_spread:
            distance = _distance(logs, excess, int(i))
            if distance < best_distance:
                best_distance, best = distance, int(i)
    if best < 0:
        return failed | {"status": "degenerate_tail"}
    n_tail = size - best
    return failed | {
        "alpha": float(1 + n_tail / excess[best]),
        "D": best_distance,
        "xmin": float(values[best]),
        "n_tail": n_tail,
        "status": "ok",
    }


def _excess(logs: FloatArray) -> FloatArray:
    """`sum_{j >= i} (L_j - L_i)` for every i, from the top, in compensated summation.

    Equal to `sum_{k >= i} (N - 1 - k) (L_{k+1} - L_k)`: no term is negative, so no digits cancel.
    """
    excess = np.zeros_like(logs)
    terms = np.arange(1, logs.size)[::-1] * np.diff(logs)
    total = error = 0.0
    for i, term in zip(range(logs.size - 2, -1, -1), terms[::-1].tolist(), strict=True):
        grown = total + term
        shadow = grown - total
        error += (total - (grown - shadow)) + (term - shadow)
        total = grown
        excess[i] = total + error
    return excess


def _distance(logs: FloatArray, excess: FloatArray, i: int) -> float:
    """Kolmogorov-Smirnov distance of the tail from index i, over every j."""
    n = logs.size - i
    alpha = 1 + n / excess[i]
    model = 1 - np.exp((1 - alpha) * (logs[i:] - logs[i]))
    return float(np.max(np.abs(model - np.arange(n) / n)))


def _peak_candidates(values: FloatArray, bins: int, published: bool) -> npt.NDArray[np.intp]:
    """Indices, short of the last, around the left edge of the modal bin of `log10 l`."""
    counts, edges = np.histogram(np.log10(values), bins=bins)
    peak = 10 ** edges[np.argmax(counts)]
    lower = np.log10(0.95 * peak) if published else 0.95 * peak
    inside = (values >= lower) & (values <= 1.5 * peak)
    return np.flatnonzero(inside[:-1])


def gram(window: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`G[i, j] = sum_t v_i[t] conj(v_j[t])` of a window's rows, or of its columns if fewer."""
    wide = window.astype(np.complex128 if np.iscomplexobj(window) else np.float64)
    vectors = wide if wide.shape[0] <= wide.shape[1] else wide.T
    return np.asarray(vectors @ vectors.conj().T)


def eigenvalues(window: npt.NDArray[Any]) -> FloatArray:
    """Eigenvalues of W·Wᴴ, min(rows, columns) of them, ascending: LAPACK's singular values squared.

    Singular values keep the small eigenvalues that forming the Gram matrix would round away.
    """
    wide = window.astype(np.complex128 if np.iscomplexobj(window) else np.float64)
    return np.asarray(np.linalg.svd(wide, compute_uv=False)[::-1] ** 2)


def drop_rounding(evals: npt.ArrayLike, eps: float = 2.0**-52) -> FloatArray:
    """Ascending eigenvalues (windows, k), 0 for those up to `8 k eps` of their window's largest.

    Example:
        >>> drop_rounding([[1e-16, 1e-3, 4.0]]).tolist()
        [[0.0, 0.001, 4.0]]
    """
    values = np.asarray(evals, dtype=np.float64)
    limit = 8.0 * values.shape[1] * eps * values[:, -1:]
    return np.where(np.isfinite(limit) & (values <= limit), 0.0, values)


def window_starts(extent: int, window: int, per_dim: int) -> list[int]:
    """Where windows start in one dimension: `round(i (extent - window) / (count - 1))`.

    There are `count = max(per_dim, ceil(extent / window))` of them before duplicates are merged;
    `per_dim` of 1 means the centred window instead. Halves are rounded to even.
    """
    slack = Fraction(extent - window)
    if slack == 0:
        return [0]
    if per_dim == 1:
        return [round(slack / 2)]
    count = max(per_dim, math.ceil(Fraction(extent, window)))
    return sorted({round(slack * i / (count - 1)) for i in range(count)})


def fixed_aspect_windows(
    matrix_rows: int, matrix_columns: int, rows: int, q: float, per_dim: int
) -> IntArray:
    """Windows of one aspect ratio over an R x C matrix: (windows, 4) of row, column, rows, columns.

    They have `m = min(rows, R, floor(C / q))` rows and `n = min(C, round(m q))` columns; there are
    none where m or n is 0.
    """
    # The smaller of the two first: an infinite quotient has no floor.
    m = min(matrix_rows, math.floor(min(matrix_columns / q, rows)))
    n = min(matrix_columns, round(m * q))
    if m == 0 or n == 0:
        return np.empty((0, 4), np.int64)
    starts = window_starts(matrix_rows, m, per_dim), window_starts(matrix_columns, n, per_dim)
    return np.array([(row, column, m, n) for row, column in product(*starts)], np.int64)


def published_windows(
    matrix_rows: int, matrix_columns: int, rows: int, q: float, per_dim: int
) -> IntArray:
    """Windows as FARMS's published code takes them (arXiv 2506.06280).

    `m = min(rows, R, C)` rows and `int(m q)` columns, cut at C; in each dimension
    `step = max(1, slack // (per_dim - 1))` with `slack = dim - win`, and the first
    `min(per_dim, max(1, slack // step + 1))` multiples of it, clipped to the slack. A `per_dim`
    of 1, by which that divides by zero, is the first window here.
    """
    m = min(rows, matrix_rows, matrix_columns)
    n = min(int(m * q), matrix_columns)
    if m == 0 or n == 0:
        return np.empty((0, 4), np.int64)
    starts: list[list[int]] = []
    for slack in (matrix_rows - m, matrix_columns - n):
        step = max(1, slack // (per_dim - 1)) if per_dim > 1 else 1
        count = min(per_dim, max(1, slack // step + 1))
        starts.append(sorted({min(i * step, slack) for i in range(count)}))
    return np.array([(row, column, m, n) for row, column in product(*starts)], np.int64)


def marchenko_pastur_edges(rows: int, columns: int, variance: float = 1.0) -> tuple[float, float]:
    """Ends of the spectrum of W·Wᵀ for a large matrix of independent entries of one variance.

    `variance (sqrt(max) -+ sqrt(min))^2` with the larger and the smaller of rows and columns
    (Marchenko and Pastur, 1967).

    Example:
        >>> marchenko_pastur_edges(100, 400, variance=0.01)
        (1.0, 9.0)
    """
    smaller, larger = math.sqrt(min(rows, columns)), math.sqrt(max(rows, columns))
    return variance * (larger - smaller) ** 2, variance * (larger + smaller) ** 2
