"""Analyses for the tests of pages: every kind of layer, without computing one from weights."""

from __future__ import annotations

import numpy as np

from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord, Uncertainty
from farms_fast.results.settings import AnalysisSettings
from farms_fast.spectra.power_law import fit_power_law
from farms_fast.weights.stacks import Skipped

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\">'&amp;<!--<script>{{data}}\u2028"
RIGHT_TO_LEFT = "\u05d0\u05d1\u05d2.\u202eevil.\u0627\u0644"
VERY_LONG = "very." * 500 + "long"
ROLES = ("attn.q", "attn.k", "mlp.up", "mlp.down")


def a_layer(name: str, seed: int, *, windows: int = 12, k: int = 40) -> LayerRecord:
    """A heavy-tailed layer with uncertain alpha; nothing in it but its arguments decides."""
    generator = np.random.default_rng(seed)
    spectra = np.sort(generator.pareto(1.0 + seed % 5 / 4, (windows, k)) + 0.01, axis=1)
    fit = fit_power_law(spectra.ravel())
    spread = Uncertainty()
    if windows > 1:
        spread = Uncertainty(
            window_alphas=generator.normal(fit.alpha, 0.1, windows),
            alpha_se=0.05,
            alpha_low=fit.alpha - 0.1,
            alpha_high=fit.alpha + 0.09,
            alpha_even=fit.alpha - 0.02,
            alpha_odd=fit.alpha + 0.03,
        )
    return LayerRecord.from_spectra(name, "linear", (1, 100, 80), spectra, fit, k, 2 * k, spread)


def an_analysis(blocks: int = 3, seed: int = 0, **options: int) -> Analysis:
    """Blocks of four layers each, and layers that are odd in every way."""
    layers = [
        a_layer(f"model.layers.{block}.{role}", seed + 4 * block + number, **options)
        for block in range(blocks)
        for number, role in enumerate(ROLES)
    ]
    odd = [
        a_layer(HOSTILE, seed + 100),
        a_layer(RIGHT_TO_LEFT, seed + 101),
        a_layer(VERY_LONG, seed + 102),
        a_layer("__proto__", seed + 103, windows=1),
        a_layer("model.layers.0.constructor", seed + 104),
        LayerRecord(
            "zero", "conv2d", (9, 8, 8), "too_few", num_evals=8, M=8, N=8, windows=1,
            window_evals=np.zeros((1, 8)),
        ),
    ]  # fmt: skip
    settings = AnalysisSettings("/models/some model")
    skipped = [Skipped("a.bias", (4,), "vector, not a matrix"), Skipped(HOSTILE, (), "<b>")]
    # In front, where sorting has to take it from.
    bad = LayerRecord("bad", "linear", (1, 4, 4), "nonfinite", "3 weights are NaN")
    return Analysis([bad, *layers, *odd], skipped, settings)
