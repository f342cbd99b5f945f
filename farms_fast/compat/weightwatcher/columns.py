"""The columns of WeightWatcher's table of details, by the formulas of version 0.7.7."""

from __future__ import annotations

import math

import numpy as np
import torch

from farms_fast.compat.weightwatcher.fits import TailFit
from farms_fast.compat.weightwatcher.layers import WeightLayer
from farms_fast.compat.weightwatcher.marchenko_pastur import fit_marchenko_pastur
from farms_fast.compat.weightwatcher.options import Options
from farms_fast.compat.weightwatcher.spectra import FloatArray, LayerSpectra

_EPS = float(np.finfo(np.float64).eps)
# Stands for a spectrum that is not known, to have the names of its columns.
_ONE = np.ones(1)
_STAND_IN = LayerSpectra(_ONE, torch.from_numpy(_ONE), np.ones((1, 1)), _ONE, _ONE)
# Added to probabilities and to the rank, against logarithms of zero.
_ENTROPY_EPSILON = 1e-10


def columns_of(
    layer: WeightLayer, spectra: LayerSpectra, fit: TailFit, options: Options
) -> dict[str, object]:
    """One row of the table; a layer whose weights are not finite has NaN where numbers would be."""
    names = ("layer_id", "name", "longname", "layer_type", "N", "M", "rf")
    row: dict[str, object] = {name: getattr(layer, name) for name in names}
    known = spectra.evals.size > 0
    row |= {"Q": layer.N / layer.M, **layer.extra, **_fit_columns(fit, options)}
    row |= {"has_esd": known, "num_evals": spectra.per_matrix.size}
    # What the formulas divide by may be 0, and they say infinity or NaN then.
    with np.errstate(all="ignore"):
        if options.mp_fit:
            row |= _mp_columns(layer, spectra.evals)
        if options.randomize:
            row |= _mp_columns(layer, spectra.shuffled, "rand_")
            row["num_traps"] = row["rand_num_spikes"]
        if options.detX:
            row |= _detx_columns(spectra.evals, fit.num_pl_spikes)
        numbers = _numbers(layer, spectra if known else _STAND_IN, fit.alpha, options)
    return row | (numbers if known else dict.fromkeys(numbers, math.nan))


def _rank(singular_values: FloatArray, longest: int) -> int:
    """Singular values above sigma_max N eps; of all matrices together where they are pooled."""
    return int(np.count_nonzero(singular_values > singular_values.max() * longest * _EPS))


def _numbers(
    layer: WeightLayer, spectra: LayerSpectra, alpha: float, options: Options
) -> dict[str, object]:
    """The columns that are NaN where the spectrum is not known."""
    evals, roots = spectra.evals, np.sqrt(spectra.per_matrix)
    norm, largest = evals.sum(), evals.max()
    rank = _rank(np.sqrt(evals), layer.N)
    p = evals / norm + _ENTROPY_EPSILON
    numbers: dict[str, object] = {
        "sv_max": float(roots.max()),
        # The largest of the matrices' smallest.
        "sv_min": float(roots[:, 0].max()),
        "rank_loss": sum(row.size - _rank(row, layer.N) for row in roots),
        "weak_rank_loss": int(np.count_nonzero(spectra.per_matrix < options.tolerance)),
        "lambda_max": float(spectra.per_matrix.max()),
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
    if options.randomize:
        once = spectra.shuffled_once
        numbers |= {
            "max_rand_eval": float(spectra.shuffled.max()),
            "rand_distance": _jensen_shannon(evals, once),
            "ww_softrank": float(once.max() / largest),
            "ww_maxdist": float(largest) - float(once.max()),
        }
    return numbers


def _fit_columns(fit: TailFit, options: Options) -> dict[str, object]:
    names = ["alpha", "xmin", "xmax", "D", "sigma", "num_pl_spikes", "status", "warning"]
    names += ["Lambda"] if options.truncated else []
    names += ["num_fingers", "raw_alpha"] if options.fix_fingers == "clip_xmax" else []
    return {name: getattr(fit, name) for name in names}


def _mp_columns(layer: WeightLayer, evals: FloatArray, prefix: str = "") -> dict[str, object]:
    fit = fit_marchenko_pastur(evals, layer.N, layer.M)
    return {prefix + name: value for name, value in vars(fit).items()}


def _jensen_shannon(p: FloatArray, q: FloatArray) -> float:
    """Root of the Jensen-Shannon divergence, in nats; the midpoint is of the sums as they are."""
    middle = (p + q) / 2
    middle = middle / middle.sum()
    divergence = 0.0
    for one in (p / p.sum(), q / q.sum()):
        terms = np.where(one > 0, one * np.log(one / middle), 0.0)
        divergence += float(terms.sum()) / 2
    return float(np.sqrt(divergence))


def _detx_columns(evals: FloatArray, num_pl_spikes: int) -> dict[str, object]:
    """How many of the largest eigenvalues, scaled to mean 1, have a product of at least 1.

    The first is counted whose product with all larger ones is below 1, as WeightWatcher counts; the
    product is a sum of logarithms here, so that it cannot leave the range.
    """
    number = first = 0
    value = scaled_value = math.nan
    if evals.size > 0:
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
