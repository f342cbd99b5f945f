"""Scalar metrics of one layer's spectrum, under the names that WeightWatcher gave them.

Everything here is a function of the eigenvalues, of a power-law fit that is already done and of the
window's shape. Ratios are taken to the largest eigenvalue before they are summed, so spectra scaled
by 1e300 or by 1e-300 give the metrics that the unscaled ones give.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from farms_fast.spectra.power_law import PowerLawFit

_EPS64 = float(np.finfo(np.float64).eps)


def _log10_power_sum(ratios: npt.NDArray[np.float64], power: float) -> float:
    """log10 of the sum of ratios**power, for ratios in [0, 1] of which the largest is 1."""
    # The largest term is exactly 1, so neither the sum nor its logarithm can leave the range.
    return math.log10(float(np.sum(ratios[ratios > 0.0] ** power)))


def _entropy(p: npt.NDArray[np.float64], rank: int) -> float:
    """Entropy of the probabilities p as a share of the entropy of rank equal ones."""
    if rank == 1:
        return 0.0
    p = p[p > 0.0]
    return float(-np.sum(p * np.log(p)) / math.log(rank))


def spectrum_metrics(
    evals: npt.NDArray[np.float64], fit: PowerLawFit, rows: int, cols: int, *, eps: float = _EPS64
) -> dict[str, float | int]:
    """Computes the metrics of a layer from its eigenvalues and its power-law fit.

    With lambda the eigenvalues of the Gram matrices (squared singular values) of all windows
    together, lambda_max the largest, n their number and log the decimal logarithm:

    ==================  ============================================================  =========
    name                formula                                                       source
    ==================  ============================================================  =========
    alpha, D, xmin      of the fit                                                    [1], [2]
    sigma               (alpha - 1) / sqrt(num_pl_spikes)                             [1]
    xmax                lambda_max                                                    [2]
    num_pl_spikes       number of eigenvalues in the tail, >= xmin                    [2]
    norm                sum lambda = squared Frobenius norm                           [2]
    spectral_norm       lambda_max                                                    [2]
    alpha_weighted      alpha * log lambda_max                                        [3]
    log_alpha_norm      log sum lambda^alpha                                          [3]
    stable_rank         sum lambda / lambda_max                                       [2]
    matrix_rank         number of lambda > 8 * M * eps * lambda_max of its window      see below
    entropy             -sum p ln p / ln matrix_rank, p = lambda / sum lambda         [2]
    mp_softrank         mean(lambda) * (1 + 1 / sqrt(Q))^2 / lambda_max               [4]
    M, N, Q             min(rows, cols), max(rows, cols), N / M                       [2]
    num_evals           n                                                             [2]
    ==================  ============================================================  =========

    `log_norm` and `log_spectral_norm` are the logarithms of norm and spectral_norm. The sources:
    [1] Clauset, Shalizi, Newman, SIAM Review 51 (2009), eqs. 3.1 and 3.2; [2] WeightWatcher,
    columns of `details` (https://weightwatcher.ai); [3] Martin, Peng, Mahoney, Nature
    Communications 12 (2021); [4] Martin, Mahoney, JMLR 22 (2021), section 3.

    Where the values differ from WeightWatcher's, and why:

    * matrix_rank. WeightWatcher takes singular values and keeps those above `sigma_max * N * eps`.
      Eigenvalues of a Gram matrix are known to `8 * M * eps * lambda_max`, so a threshold at
      `(N * eps)**2 * lambda_max` would count rounding noise; the accuracy itself is the threshold,
      as it is for what enters a fit. The two agree unless a singular value lies below about
      `1e-6 * sigma_max` and is not zero.
    * entropy. WeightWatcher adds 1e-10 to every p and to the rank against a logarithm of zero.
      Nothing is added here: the value lies in [0, 1], and it is 0 when the rank is 1.
    * mp_softrank. The Marchenko-Pastur edge is that of entries whose variance is the mean square of
      the entries. WeightWatcher moves that variance to fit the density. The value is not clipped:
      above 1 it says that the spectrum ends before the edge.

    For one matrix, give its own eigenvalues. For the pooled spectrum of several windows, sums and
    counts run over the pool: norm, stable_rank and matrix_rank grow with the number of windows.

    Values that do not exist are NaN, and nothing is raised or warned about:

    * no eigenvalues: everything except num_evals, M, N, Q and what the fit gives;
    * a NaN or infinite eigenvalue: likewise (`matrix_rank` too, which is an int otherwise);
    * all eigenvalues zero: the logarithms, stable_rank, entropy and mp_softrank, while the norms
      and the rank are 0;
    * a fit that failed (its alpha is NaN): alpha_weighted and log_alpha_norm.

    A norm beyond the range of float64 is infinite; its logarithm is right nevertheless.

    Args:
        evals: float64 (n,), the eigenvalues that were fitted, none negative, in any order; or
            (windows, M), those of each window. The rank goes by the largest eigenvalue of a window,
            that of all where they are not told apart.
        fit: their power-law fit.
        rows: rows of one window, at least 1.
        cols: columns of one window, at least 1.
        eps: unit roundoff of the arithmetic that gave the eigenvalues, for matrix_rank:
            `torch.finfo(torch.float32).eps` after a run in float32.
    """
    windows = np.atleast_2d(np.asarray(evals, dtype=np.float64))
    if windows.ndim != 2:
        raise ValueError(f"evals: expected one or two dimensions, got shape {windows.shape}")
    for argument, given in (("rows", rows), ("cols", cols)):
        if given < 1:
            raise ValueError(f"{argument}: expected at least 1, got {given}")

    values = windows.ravel()
    smaller, larger = min(rows, cols), max(rows, cols)
    aspect = larger / smaller
    known = values.size > 0 and bool(np.isfinite(values).all())
    largest = float(values.max()) if known else math.nan

    norm = largest
    log_norm = log_largest = log_alpha_norm = stable_rank = entropy = mp_softrank = math.nan
    rank: int | float = 0 if known else math.nan
    if known and largest > 0.0:
        with np.errstate(over="ignore", under="ignore"):
            # Rounding can leave a tiny negative eigenvalue in a caller's own spectrum.
            values = np.maximum(values, 0.0)
            norm = float(values.sum())
            ratios = values / largest
            total = float(ratios.sum())
            limits = windows.max(axis=1, keepdims=True) * (8.0 * smaller * eps)
            rank = int(np.count_nonzero(windows > limits))
            entropy = _entropy(ratios / total, rank)
            log_largest = math.log10(largest)
            if math.isfinite(fit.alpha):
                log_alpha_norm = fit.alpha * log_largest + _log10_power_sum(ratios, fit.alpha)
        log_norm = log_largest + math.log10(total)
        stable_rank = total
        mp_softrank = total / values.size * (1.0 + 1.0 / math.sqrt(aspect)) ** 2

    return {
        "alpha": float(fit.alpha),
        "D": float(fit.D),
        "sigma": float(fit.sigma),
        "xmin": float(fit.xmin),
        "xmax": largest,
        "num_pl_spikes": int(fit.n_tail),
        "norm": norm,
        "log_norm": log_norm,
        "spectral_norm": largest,
        "log_spectral_norm": log_largest,
        "alpha_weighted": float(fit.alpha) * log_largest,
        "log_alpha_norm": log_alpha_norm,
        "stable_rank": stable_rank,
        "matrix_rank": rank,
        "entropy": entropy,
        "mp_softrank": mp_softrank,
        "Q": aspect,
        "M": smaller,
        "N": larger,
        "num_evals": int(values.size),
    }
