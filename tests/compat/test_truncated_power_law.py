"""Truncated power laws against powerlaw, quadrature and what the likelihood's maximum must be."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate

from farms_fast import fit_power_law
from farms_fast.compat.weightwatcher.truncated_power_law import (
    TruncatedPowerLawFit,
    fit_truncated_power_law,
    maximum_likelihood,
)

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def powerlaw() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module("powerlaw")


def theirs(powerlaw: Any, values: FloatArray, **options: Any) -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        fit = powerlaw.Fit(values, verbose=False, **options)
        assert fit.truncated_power_law is not None
    return fit


def sample(n: int, alpha: float, rate: float, seed: int = 0) -> FloatArray:
    """Values above 1 of a truncated power law, by rejection from an exponential."""
    rng = np.random.default_rng(seed)
    kept: list[float] = []
    while len(kept) < n:
        drawn = 1 + rng.exponential(1 / rate, 10_000)
        kept.extend(drawn[rng.random(drawn.size) < drawn**-alpha])
    return np.sort(np.array(kept[:n]))


@pytest.mark.parametrize(("alpha", "rate"), [(1.5, 0.5), (2.5, 0.05), (1.2, 0.01), (3.0, 1.0)])
def test_same_maximum_as_powerlaw(powerlaw: Any, alpha: float, rate: float) -> None:
    values = sample(200, alpha, rate)
    found = fit_truncated_power_law(values, xmin=1.0)
    expected = theirs(powerlaw, values, xmin=1.0).truncated_power_law
    assert found.loglikelihood >= expected.loglikelihood - 1e-9
    assert found.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-3)
    # A simplex search with a tolerance of 1e-4.
    assert found.alpha == pytest.approx(expected.alpha, abs=2e-3)
    assert found.Lambda == pytest.approx(expected.Lambda, rel=5e-3)
    assert pytest.approx(expected.D, abs=2e-4) == found.D


def test_same_tail_as_powerlaw(powerlaw: Any) -> None:
    values = sample(40, 1.2, 0.01, seed=1)
    found = fit_truncated_power_law(values)
    expected = theirs(powerlaw, values, xmin_distribution="truncated_power_law")
    assert found.xmin == expected.xmin
    assert found.n_tail == expected.n
    assert pytest.approx(expected.D, abs=5e-4) == found.D
    assert found.alpha == pytest.approx(expected.truncated_power_law.alpha, abs=5e-3)


def test_same_power_law_as_powerlaw(powerlaw: Any) -> None:
    values = np.linalg.eigvalsh(np.cov(np.random.default_rng(0).standard_t(3, (60, 200))))
    found = fit_power_law(values, "ks")
    expected = theirs(powerlaw, values)
    assert (found.xmin, found.n_tail) == (expected.xmin, expected.n)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-12)
    assert pytest.approx(expected.D, rel=1e-10) == found.D
    assert found.sigma == pytest.approx(expected.sigma, rel=1e-12)


@pytest.mark.parametrize(
    ("mean_log", "mean"), [(0.5, 1.9), (1.5, 12.0), (0.02, 1.0203), (1, 6), (3, 50)]
)
def test_maximum_has_the_means_of_the_sample(mean_log: float, mean: float) -> None:
    alpha, rate, log_z = maximum_likelihood(np.array([mean_log]), np.array([mean]))
    a, z = float(alpha[0]), float(rate[0])
    assert a >= 1
    assert z > 0

    def moment(power: Any) -> float:
        # In u = ln t, up to where the exponential has ended it.
        end = math.log1p(60 / z)
        value, _ = integrate.quad(
            lambda u: power(u) * math.exp((1 - a) * u - z * math.exp(u)),
            0,
            end,
            epsabs=0,
            epsrel=1e-12,
            limit=500,
            points=[min(end / 2, 1 / a)],
        )
        return float(value)

    normaliser = moment(lambda u: 1.0)
    assert log_z[0] == pytest.approx(math.log(normaliser), abs=1e-9)
    assert moment(math.exp) / normaliser == pytest.approx(mean, rel=1e-8)
    found = moment(lambda u: u) / normaliser
    # On the border the likelihood would rise with alpha still smaller.
    assert found == pytest.approx(mean_log, rel=1e-8) if a > 1 else found < mean_log


@pytest.mark.parametrize(("alpha", "rate"), [(2.4, 1e-3), (2.1, 1e-6), (1.05, 1e-4), (5.0, 20.0)])
def test_parameters_come_back_from_their_means(alpha: float, rate: float) -> None:
    def moment(power: Any) -> float:
        # In pieces: the law may span many orders of magnitude.
        ends = np.linspace(0, math.log1p(60 / rate), 25)
        return math.fsum(
            integrate.quad(
                lambda u: power(u) * math.exp((1 - alpha) * u - rate * math.expm1(u)), *piece
            )[0]
            for piece in pairwise(ends)
        )

    normaliser = moment(lambda u: 1.0)
    mean_log, mean = moment(lambda u: u) / normaliser, moment(math.exp) / normaliser
    found, found_rate, _ = maximum_likelihood(np.array([mean_log]), np.array([mean]))
    assert found[0] == pytest.approx(alpha, rel=1e-6)
    assert found_rate[0] == pytest.approx(rate, rel=1e-4)


def test_distance_is_that_of_the_distribution() -> None:
    values = sample(60, 1.8, 0.2)
    # A gap that is wide beside the scale of the exponential.
    values[30:] *= 10
    fit = fit_truncated_power_law(values, xmin=1.0)

    def survival(x: float) -> float:
        value, _ = integrate.quad(
            lambda t: t**-fit.alpha * math.exp(-fit.Lambda * t), x, np.inf, epsabs=0, limit=200
        )
        return float(value)

    law = 1 - np.array([survival(x) for x in values]) / survival(1.0)
    expected = np.abs(law - np.arange(60) / 60).max()
    assert pytest.approx(expected, abs=1e-8) == fit.D


def test_scan_takes_the_least_distance() -> None:
    values = sample(50, 2.0, 0.3)
    each = [fit_truncated_power_law(values, xmin=float(x)) for x in values[:-1]]
    best = min(each, key=lambda fit: fit.D)
    found = fit_truncated_power_law(values)
    assert found.xmin == best.xmin
    for name in ("alpha", "Lambda", "D", "loglikelihood"):
        assert getattr(found, name) == pytest.approx(getattr(best, name), rel=1e-6), name
    low, high = float(values[5]), float(values[20])
    within = min(each[5:20], key=lambda fit: fit.D)
    assert fit_truncated_power_law(values, (low, high)).xmin == within.xmin


def test_without_truncation_it_is_the_power_law() -> None:
    # Quantiles of a power law: their mean is below that of the law, unless one is far out.
    values = (1 - (np.arange(200) + 0.5) / 200) ** (-1 / 2.5)
    values[-1] *= 40
    fit = fit_truncated_power_law(values, xmin=float(values[0]))
    expected = 1 + 200 / np.log(values / values[0]).sum()
    assert (fit.Lambda, fit.alpha) == (0.0, pytest.approx(expected, rel=1e-12))
    law = 1 - (values / values[0]) ** (1 - expected)
    assert pytest.approx(np.abs(law - np.arange(200) / 200).max(), rel=1e-10) == fit.D


def test_alpha_ends_at_one() -> None:
    values = 1 + np.random.default_rng(0).gamma(3.0, 1.0, 300)
    fit = fit_truncated_power_law(values, xmin=1.0)
    assert fit.alpha == 1.0
    assert fit.Lambda > 0


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_scale(factor: float) -> None:
    values = sample(80, 1.5, 0.4)
    fit, scaled = fit_truncated_power_law(values), fit_truncated_power_law(factor * values)
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-6)
    assert scaled.Lambda * factor == pytest.approx(fit.Lambda, rel=1e-6)
    assert pytest.approx(fit.D, rel=1e-6) == scaled.D


def test_arrays_of_any_kind_and_order() -> None:
    values = sample(40, 1.5, 0.5)
    expected = fit_truncated_power_law(values)
    mixed = np.concatenate([values[::-1], [0.0, -1.0, np.nan, np.inf]])
    found = fit_truncated_power_law(torch.from_numpy(mixed))
    assert (found.dropped, found.n) == (4, 40)
    assert (found.alpha, found.xmin) == (expected.alpha, expected.xmin)


def test_nothing_to_fit() -> None:
    def status(values: list[float], xmin: Any = None) -> str:
        fit: TruncatedPowerLawFit = fit_truncated_power_law(np.array(values), xmin)
        assert (fit.status == "ok") == math.isfinite(fit.alpha)
        return fit.status

    assert status([1.0]) == "too_few"
    assert status([2.0, 2.0, 2.0]) == "too_few"
    assert status([1.0, 2.0, 3.0], 2.5) == "too_few"
    assert status([1.0, 2.0, 3.0], (1.5, 2.5)) == "no_candidate"
    assert status([1.0, 2.0, 3.0]) == "ok"


def test_wrong_arguments_are_named() -> None:
    values = np.ones(3)
    with pytest.raises(ValueError, match="evals: expected one spectrum"):
        fit_truncated_power_law(np.ones((2, 2)))
    with pytest.raises(TypeError, match="evals"):
        fit_truncated_power_law([1.0, 2.0])
    with pytest.raises(ValueError, match="xmin: expected a positive finite number, got 0"):
        fit_truncated_power_law(values, 0)
    with pytest.raises(ValueError, match="xmin: expected low <= high"):
        fit_truncated_power_law(values, (2.0, 1.0))
    with pytest.raises(TypeError, match="xmin: expected a number or a pair"):
        fit_truncated_power_law(values, values)  # type: ignore[arg-type]
