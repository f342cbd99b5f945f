"""Checks of the results of whole jobs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.agreement import (
    EXACT_FIT,
    FLOAT32,
    FLOAT32_FIT,
    FLOAT64,
    JACOBI32,
    Accuracy,
    FloatArray,
    candidates_of,
    check_eigenvalues,
    check_fit,
    fit_truth,
)
from benchmarks.jobs import JobCase, Layer, LayerResult
from farms_fast import Analysis, LayerRecord
from farms_fast.live import LayerAlpha


def check_contender(found: Any, layers: list[Layer], case: JobCase, thorough: bool) -> float:
    """Every layer's fit and moments; with `thorough`, the cheapest layers against LAPACK."""
    assert not found.failed, f"failed layers: {[record.name for record in found.failed]}"
    records: dict[str, LayerRecord] = {record.name: record for record in found}
    assert sorted(records) == sorted(layer.name for layer in layers), "other layers"
    worst = 0.0
    lapack_flops = 0.0
    for layer in sorted(layers, key=lambda x: x.order**3 * len(x.window_slices) * len(x.stack)):
        record = records[layer.name]
        evals = np.asarray(record.evals)
        windows = layer.windows()
        norm = sum(float(window.double().square().sum()) for window in windows)
        assert evals.size == len(windows) * layer.order, f"{layer.name}: {evals.size} eigenvalues"
        assert abs(evals.sum() - norm) <= 1e-10 * norm, f"{layer.name}: wrong sum of eigenvalues"
        if not thorough:
            continue
        lapack_flops += 10 * layer.order**3 * len(windows)
        if lapack_flops < 2e10:
            worst = max(worst, _against_lapack(layer, windows, evals))
        values = torch.from_numpy(evals[evals > 0])
        truth = fit_truth(values, case.xmin, record.xmin, 1e8)
        error = check_fit(record.alpha, record.D, record.xmin, truth, EXACT_FIT)
        worst = max(worst, error)
    return worst


def check_live(found: list[LayerAlpha], analysis: Analysis) -> None:
    """The fits of the analysis, to the bit."""
    assert len(found) == len(analysis), "other layers"
    for layer, record in zip(found, analysis, strict=True):
        fits = [(x.name, x.status, x.alpha, x.D, x.xmin) for x in (layer, record)]
        assert fits[0] == fits[1], f"{layer.name}: {fits[0]}, expected {fits[1]}"
        counts = [(layer.n_tail, layer.n_evals), (record.num_pl_spikes, record.num_evals)]
        assert counts[0] == counts[1], f"{layer.name}: {counts[0]}, expected {counts[1]}"


def _against_lapack(layer: Layer, windows: list[Tensor], evals: FloatArray) -> float:
    from farms_fast.testing.reference import eigenvalues

    spectra = [eigenvalues(window.double().cpu().numpy()) for window in windows]
    expected = np.sort(np.concatenate(spectra))
    allowed = FLOAT64.bound(layer.order) * expected[-1]
    error = float(np.abs(evals - expected).max())
    assert error <= allowed, f"{layer.name}: eigenvalues differ by {error:.3g}"
    return error / allowed


def check_published(
    found: dict[str, LayerResult],
    layers: list[Layer],
    case: JobCase,
    pooled: dict[str, Tensor],
    accuracy: Accuracy,
) -> float:
    """A window of every layer against float64, and the fits of the spectra that were fitted."""
    worst = 0.0
    for layer in layers:
        result = found[layer.name]
        assert result.spectra is not None
        window = layer.windows()[0].double()
        vectors = window if window.shape[0] <= window.shape[1] else window.T
        expected = torch.linalg.eigvalsh(vectors @ vectors.T).cpu().numpy()
        norm = np.array([float(window.square().sum())])
        one = {0: expected}
        shape = (1, layer.order)
        worst = max(worst, check_eigenvalues(result.spectra[0][None], shape, one, norm, accuracy))
        fitted = pooled[layer.name]
        if result.pooled is not None:
            fitted = torch.from_numpy(result.pooled)
        truth = fit_truth(fitted, case.xmin, result.fit[2], 1e8)
        if len(candidates_of(fitted, case.xmin)) > 0:
            worst = max(worst, check_fit(*result.fit, truth, FLOAT32_FIT))
    return worst


# WeightWatcher's largest relative error of alpha.
_WEIGHTWATCHER = 1e-9


def check_weightwatcher(found: dict[str, LayerResult], pooled: dict[str, Tensor]) -> float:
    """Its alpha per layer against the fit of the right spectrum."""
    from farms_fast import fit_power_law

    worst = 0.0
    for name, result in found.items():
        evals = pooled[name]
        expected = fit_power_law(evals[evals > 0], "ks").alpha
        error = abs(result.fit[0] - expected) / expected / _WEIGHTWATCHER
        worst = max(worst, error)
        assert error <= 1, f"{name}: WeightWatcher's alpha {result.fit[0]}, expected {expected}"
    return worst


ACCURACY = {"cpu": FLOAT32, "cuda": JACOBI32}
