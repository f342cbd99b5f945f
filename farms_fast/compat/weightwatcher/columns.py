"""The columns of WeightWatcher's table of details, by the formulas of version 0.7.7."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from farms_fast.compat.weightwatcher.fits import TailFit
from farms_fast.compat.weightwatcher.layers import WeightLayer
from farms_fast.compat.weightwatcher.marchenko_pastur import fit_marchenko_pastur
from farms_fast.compat.weightwatcher.options import Options
from farms_fast.compat.weightwatcher.spectra import LayerSpectra

FloatArray = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Added to probabilities and to the rank, against logarithms of zero.
_ENTROPY_EPSILON = 1e-10


def columns_of(
    layer: WeightLayer, spectra: LayerSpectra, fit: TailFit, options: Options
) -> dict[str, object]:
    """One row of the table; a layer whose weights are not finite has NaN where numbers would be."""
    names = ("layer_id", "name", "longname", "layer_type", "N", "M", "rf")
    row: dict[str, object] = {name: getattr(layer, name) for name in names}
    row |= {"Q": layer.N / layer.M, **layer.extra}
    evals, known = spectra.evals, spectra.evals.size > 0
    # What the formulas divide by may be 0, and they say infinity or NaN then.
    with np.errstate(all="ignore"):
        row |= _spectrum_columns(layer, spectra.per_matrix, options.tolerance, known)
        row |= _fit_columns(fit, options)
        if options.mp_fit:
            row |= _mp_columns(layer, evals)
        if options.randomize:
            row |= _random_columns(layer, spectra, known)
        if options.detX:
            row |= _detx_columns(evals, fit.num_pl_spikes, known)
        row |= _norm_columns(evals, fit.alpha, layer.N, known)
    return row


def _rank(singular_values: FloatArray, longest: int) -> int:
    """Singular values above sigma_max N eps; of all matrices together where they are pooled."""
    return int(np.count_nonzero(singular_values > singular_values.max() * longest * _EPS))


def _spectrum_columns(
    layer: WeightLayer, per_matrix: FloatArray, tolerance: float, known: bool
) -> dict[str, object]:
    counts = {"has_esd": known, "num_evals": per_matrix.size}
    if not known:
        names = ("sv_max", "sv_min", "rank_loss", "weak_rank_loss", "lambda_max")
        return counts | dict.fromkeys(names, math.nan)
    roots = np.sqrt(per_matrix)
    return counts | {
        "sv_max": float(roots.max()),
        # The largest of the matrices' smallest.
        "sv_min": float(roots[:, 0].max()),
        "rank_loss": sum(row.size - _rank(row, layer.N) for row in roots),
        "weak_rank_loss": int(np.count_nonzero(per_matrix < tolerance)),
        "lambda_max": float(per_matrix.max()),
    }


def _fit_columns(fit: TailFit, options: Options) -> dict[str, object]:
    names = ["alpha", "xmin", "xmax", "D", "sigma", "num_pl_spikes", "status", "warning"]
    names += ["Lambda"] if options.truncated else []
    names += ["num_fingers", "raw_alpha"] if options.fix_fingers == "clip_xmax" else []
    return {name: getattr(fit, name) for name in names}


def _mp_columns(layer: WeightLayer, evals: FloatArray, prefix: str = "") -> dict[str, object]:
    fit = fit_marchenko_pastur(evals, layer.N, layer.M)
    return {prefix + name: value for name, value in vars(fit).items()}


def _random_columns(layer: WeightLayer, spectra: LayerSpectra, known: bool) -> dict[str, object]:
    names = ("max_rand_eval", "rand_distance", "ww_softrank", "ww_maxdist")
    row: dict[str, object] = dict.fromkeys(names, math.nan)
    if known:
        largest, once = float(spectra.evals.max()), spectra.shuffled_once
        row = {
            "max_rand_eval": float(spectra.shuffled.max()),
            "rand_distance": _jensen_shannon(spectra.evals, once),
            "ww_softrank": float(np.float64(once.max()) / largest),
            "ww_maxdist": largest - float(once.max()),
        }
    row |= _mp_columns(layer, spectra.shuffled, "rand_")
    return row | {"num_traps": row["rand_num_spikes"]}


def _jensen_shannon(p: FloatArray, q: FloatArray) -> float:
    """Root of the Jensen-Shannon divergence, in nats; the midpoint is of the sums as they are."""
    middle = (p + q) / 2
    middle = middle / middle.sum()
    divergence = 0.0
    for one in (p / p.sum(), q / q.sum()):
        terms = np.where(one > 0, one * np.log(one / middle), 0.0)
        divergence += float(terms.sum()) / 2
    return float(np.sqrt(divergence))


def _detx_columns(evals: FloatArray, num_pl_spikes: int, known: bool) -> dict[str, object]:
    """How many of the largest eigenvalues, scaled to mean 1, have a product of at least 1.

    The first is counted whose product with all larger ones is below 1, as WeightWatcher counts; the
    product is a sum of logarithms here, so that it cannot leave the range.
    """
    number = first = 0
    value = scaled_value = math.nan
    if known:
        scaled = evals * (evals.size / evals.sum())
        if evals.size >= 2 and scaled[0] < scaled[-1]:
            below = np.cumsum(np.log(scaled[:0:-1])) < 0
            first = evals.size - 1 - int(np.argmax(below)) if below.any() else 1
            number = evals.size - first if below.any() else evals.size
        value, scaled_value = float(evals[first]), float(scaled[first])
    return {
        "detX_num": number,
        "num_ERG_spikes": number,
        "ERG_gap": number - num_pl_spikes,
        "detX_val": value,
        # By its name the other one; so it is in WeightWatcher.
        "detX_val_unrescaled": scaled_value,
    }


def _norm_columns(evals: FloatArray, alpha: float, longest: int, known: bool) -> dict[str, object]:
    if not known:
        names = ("norm", "log_norm", "spectral_norm", "log_spectral_norm", "alpha_weighted")
        more = ("log_alpha_norm", "stable_rank", "matrix_rank", "entropy")
        return dict.fromkeys((*names, *more), math.nan)
    norm, largest = evals.sum(), evals.max()
    roots = np.sqrt(evals)
    rank = _rank(roots, longest)
    p = evals / norm + _ENTROPY_EPSILON
    return {
        "norm": float(norm),
        "log_norm": float(np.log10(norm)),
        "spectral_norm": float(largest),
        "log_spectral_norm": float(np.log10(largest)),
        "alpha_weighted": float(alpha * np.log10(largest)),
        "log_alpha_norm": float(np.log10(np.sum(evals**alpha))),
        "stable_rank": float(norm / largest),
        "matrix_rank": rank,
        "entropy": float(-np.sum(p * np.log(p)) / np.log(rank + _ENTROPY_EPSILON)),
    }
