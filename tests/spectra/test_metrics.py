"""Every metric against its formula written out plainly, on spectra with known answers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from farms_fast.spectra.metrics import spectrum_metrics
from farms_fast.spectra.power_law import PowerLawFit

# fmt: off
WEIGHTWATCHER_NAMES = (
    "alpha", "D", "sigma", "xmin", "xmax", "num_pl_spikes", "norm", "log_norm", "spectral_norm",
    "log_spectral_norm", "alpha_weighted", "log_alpha_norm", "stable_rank", "matrix_rank",
    "entropy", "mp_softrank", "Q", "M", "N", "num_evals",
)
UNDEFINED_FOR_ZERO = (
    "log_norm", "log_spectral_norm", "alpha_weighted", "log_alpha_norm", "stable_rank", "entropy",
    "mp_softrank",
)
# fmt: on


def a_fit(alpha: float = 2.5, n_tail: int = 9, status: str = "ok") -> PowerLawFit:
    return PowerLawFit(
        alpha=alpha,
        D=0.125,
        xmin=0.75,
        n_tail=n_tail,
        n=20,
        dropped=0,
        status=status,
        xmin_rule="median",
    )


def gram_eigenvalues(weight: np.ndarray) -> np.ndarray:
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return np.maximum(np.linalg.eigvalsh(gram), 0.0)


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        "wide": rng.normal(size=(30, 50)),
        "tall": rng.normal(size=(64, 16)),
        "square": rng.normal(size=(40, 40)),
        "heavy": rng.standard_t(2, size=(40, 60)),
        "rank 5": rng.normal(size=(40, 5)) @ rng.normal(size=(5, 30)),
    }


@pytest.mark.parametrize("name", list(random_weights()))
def test_against_the_matrix_itself(name: str) -> None:
    weight = random_weights()[name]
    rows, cols = weight.shape
    sigma = np.linalg.svd(weight, compute_uv=False)
    got = spectrum_metrics(gram_eigenvalues(weight), a_fit(alpha=3.25), rows, cols)

    assert got["norm"] == pytest.approx(np.linalg.norm(weight, "fro") ** 2, rel=1e-12)
    assert got["log_norm"] == pytest.approx(2 * np.log10(np.linalg.norm(weight, "fro")))
    assert got["spectral_norm"] == pytest.approx(np.linalg.norm(weight, 2) ** 2, rel=1e-12)
    assert got["xmax"] == got["spectral_norm"]
    assert got["log_spectral_norm"] == pytest.approx(2 * np.log10(sigma[0]))
    assert got["alpha_weighted"] == pytest.approx(3.25 * 2 * np.log10(sigma[0]))
    # Schatten norm: the sum of sigma^(2 alpha).
    assert got["log_alpha_norm"] == pytest.approx(np.log10(np.sum(sigma**6.5)))
    assert got["stable_rank"] == pytest.approx((np.linalg.norm(weight) / sigma[0]) ** 2)
    rank = np.linalg.matrix_rank(weight)
    assert got["matrix_rank"] == rank
    share = sigma**2 / np.sum(sigma**2)
    assert got["entropy"] == pytest.approx(scipy.special.entr(share).sum() / np.log(rank))
    variance = np.mean(weight**2)
    edge = variance * (np.sqrt(rows) + np.sqrt(cols)) ** 2
    assert got["mp_softrank"] == pytest.approx(edge / sigma[0] ** 2)
    assert (got["M"], got["N"]) == (min(rows, cols), max(rows, cols))
    assert got["Q"] == max(rows, cols) / min(rows, cols)
    assert got["num_evals"] == min(rows, cols)


def test_fit_values_pass_through() -> None:
    got = spectrum_metrics(np.array([0.5, 1.0, 2.0]), a_fit(alpha=4.0, n_tail=9), 3, 3)
    assert (got["alpha"], got["D"], got["xmin"], got["num_pl_spikes"]) == (4.0, 0.125, 0.75, 9)
    assert got["sigma"] == pytest.approx(3.0 / math.sqrt(9))


def test_names_and_order() -> None:
    got = spectrum_metrics(np.array([1.0, 2.0]), a_fit(), 2, 2)
    assert tuple(got) == WEIGHTWATCHER_NAMES
    assert all(type(value) in (int, float) for value in got.values())


def test_identity() -> None:
    got = spectrum_metrics(np.ones(10), a_fit(alpha=2.0), 10, 10)
    assert got["norm"] == got["stable_rank"] == got["matrix_rank"] == 10
    assert got["log_norm"] == pytest.approx(1.0)
    assert got["log_spectral_norm"] == got["alpha_weighted"] == 0.0
    assert got["log_alpha_norm"] == pytest.approx(1.0)
    assert got["entropy"] == pytest.approx(1.0)
    # The edge of a square matrix is four times the mean.
    assert got["mp_softrank"] == pytest.approx(4.0)


def test_rank_one() -> None:
    got = spectrum_metrics(np.array([0.0] * 9 + [100.0]), a_fit(alpha=3.0), 10, 40)
    assert got["stable_rank"] == 1.0
    assert got["matrix_rank"] == 1
    assert got["entropy"] == 0.0
    assert got["alpha_weighted"] == pytest.approx(6.0)
    assert got["log_alpha_norm"] == pytest.approx(6.0)
    assert got["mp_softrank"] == pytest.approx(0.1 * 1.5**2)
    assert (got["Q"], got["M"], got["N"]) == (4.0, 10, 40)


def test_geometric() -> None:
    n, ratio, alpha = 12, 0.25, 2.5
    got = spectrum_metrics(ratio ** np.arange(n)[::-1], a_fit(alpha=alpha), n, n)
    total = (1 - ratio**n) / (1 - ratio)
    assert got["norm"] == pytest.approx(total)
    assert got["stable_rank"] == pytest.approx(total)
    r = ratio**alpha
    assert got["log_alpha_norm"] == pytest.approx(math.log10((1 - r**n) / (1 - r)))
    # H = ln(total) - ln(ratio) * E[i] with the probabilities ratio^i / total.
    mean_index = ratio / (1 - ratio) - n * ratio**n / (1 - ratio**n)
    entropy = math.log(total) - math.log(ratio) * mean_index
    assert got["entropy"] == pytest.approx(entropy / math.log(n))


def test_rank_is_not_fooled_by_the_noise_of_gram_eigenvalues() -> None:
    eps = np.finfo(np.float64).eps
    noise = np.linspace(0.0, 1.0, 95) * 4 * 100 * eps
    spectrum = np.concatenate([noise, [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert spectrum_metrics(spectrum, a_fit(), 100, 100)["matrix_rank"] == 5
    # Just above the accuracy of the eigenvalues counts, just below does not.
    bound = 8 * 100 * eps
    assert spectrum_metrics(np.array([bound * 1.01, 1.0]), a_fit(), 100, 100)["matrix_rank"] == 2
    assert spectrum_metrics(np.array([bound * 0.99, 1.0]), a_fit(), 100, 100)["matrix_rank"] == 1


def test_rank_after_float32() -> None:
    spectrum = np.array([1e-6, 0.5, 1.0])
    assert spectrum_metrics(spectrum, a_fit(), 100, 100)["matrix_rank"] == 3
    eps = float(np.finfo(np.float32).eps)
    assert spectrum_metrics(spectrum, a_fit(), 100, 100, eps=eps)["matrix_rank"] == 2


def test_log_alpha_norm_does_not_overflow() -> None:
    # lambda^alpha is 10^2000 and 10^-2000 here.
    huge = spectrum_metrics(np.array([1e200, 1e200]), a_fit(alpha=10.0), 2, 2)
    assert huge["log_alpha_norm"] == pytest.approx(2000 + math.log10(2))
    tiny = spectrum_metrics(np.array([1e-200, 1e-200]), a_fit(alpha=10.0), 2, 2)
    assert tiny["log_alpha_norm"] == pytest.approx(-2000 + math.log10(2))


@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e60, 1e300])
def test_scale_free_metrics(scale: float) -> None:
    spectrum = np.array([0.25, 0.5, 2.0, 64.0])
    plain = spectrum_metrics(spectrum, a_fit(), 4, 6)
    scaled = spectrum_metrics(spectrum * scale, a_fit(), 4, 6)
    for name in ("stable_rank", "matrix_rank", "entropy", "mp_softrank"):
        assert scaled[name] == pytest.approx(plain[name], rel=1e-12), name
    shift = math.log10(scale)
    assert scaled["log_norm"] == pytest.approx(plain["log_norm"] + shift, rel=1e-12)
    assert scaled["log_alpha_norm"] == pytest.approx(plain["log_alpha_norm"] + 2.5 * shift)


def test_norm_beyond_the_range_has_a_finite_logarithm() -> None:
    got = spectrum_metrics(np.full(10, 1e308), a_fit(), 10, 10)
    assert got["norm"] == math.inf
    assert got["log_norm"] == pytest.approx(309.0)


def test_pooled_windows_add_up() -> None:
    one = np.array([0.5, 1.0, 4.0])
    alone = spectrum_metrics(one, a_fit(), 3, 3)
    pooled = spectrum_metrics(np.sort(np.concatenate([one] * 5)), a_fit(), 3, 3)
    for name in ("norm", "stable_rank", "matrix_rank", "num_evals"):
        assert pooled[name] == pytest.approx(5 * alone[name]), name
    for name in ("spectral_norm", "mp_softrank", "M", "N", "Q"):
        assert pooled[name] == alone[name], name


FAILED = a_fit(alpha=math.nan, n_tail=0, status="too_few")


@pytest.mark.parametrize("fit", [a_fit(), FAILED])
def test_zero_spectrum(fit: PowerLawFit) -> None:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = spectrum_metrics(np.zeros(4), fit, 4, 4)
    assert got["norm"] == got["spectral_norm"] == got["xmax"] == 0.0
    assert got["matrix_rank"] == 0
    assert got["num_evals"] == 4
    assert all(math.isnan(got[name]) for name in UNDEFINED_FOR_ZERO)


@pytest.mark.parametrize(
    "spectrum",
    [[], [1.0, math.nan], [1.0, math.inf], [math.nan, math.nan]],
    ids=["empty", "nan", "inf", "all nan"],
)
def test_empty_and_nonfinite_spectra(spectrum: list[float]) -> None:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = spectrum_metrics(np.array(spectrum), FAILED, 3, 6)
    unknown = [*UNDEFINED_FOR_ZERO, "norm", "spectral_norm", "xmax", "matrix_rank"]
    assert all(math.isnan(got[name]) for name in unknown)
    assert got["num_evals"] == len(spectrum)
    assert (got["M"], got["N"], got["Q"]) == (3, 6, 2.0)


def test_failed_fit_leaves_the_other_metrics() -> None:
    got = spectrum_metrics(np.array([1.0, 2.0]), FAILED, 2, 2)
    assert math.isnan(got["alpha_weighted"])
    assert math.isnan(got["log_alpha_norm"])
    assert got["stable_rank"] == 1.5


def test_no_floating_point_exception_on_extreme_spectra() -> None:
    with warnings.catch_warnings(), np.errstate(over="raise", divide="raise", invalid="raise"):
        warnings.simplefilter("error")
        got = spectrum_metrics(np.array([5e-324, 1e-200, 1e308, 1e308]), a_fit(alpha=50.0), 4, 4)
    assert got["stable_rank"] == pytest.approx(2.0)
    assert got["log_alpha_norm"] == pytest.approx(50 * 308 + math.log10(2))


@given(
    st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=40),
    st.floats(1.01, 20.0),
)
def test_bounds(spectrum: list[float], alpha: float) -> None:
    values = np.sort(np.array(spectrum))
    n = len(values)
    got = spectrum_metrics(values, a_fit(alpha=alpha), n, n)
    assert 1.0 <= got["stable_rank"] <= n * (1 + 1e-12)
    assert 1 <= got["matrix_rank"] <= n
    if got["matrix_rank"] == n:
        assert 0.0 <= got["entropy"] <= 1.0 + 1e-9
    # The largest term alone and n of it enclose the sum.
    assert got["log_alpha_norm"] >= got["alpha_weighted"] - 1e-9
    assert got["log_alpha_norm"] <= got["alpha_weighted"] + math.log10(n) + 1e-9


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"evals: expected one or two dim.*, got shape \(2, 2, 2"):
        spectrum_metrics(np.ones((2, 2, 2)), a_fit(), 2, 2)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        spectrum_metrics(np.ones(2), a_fit(), 0, 2)
    with pytest.raises(ValueError, match="cols: expected at least 1, got -1"):
        spectrum_metrics(np.ones(2), a_fit(), 2, -1)


def test_input_is_not_written() -> None:
    spectrum = np.array([-1e-18, 1.0, 2.0])
    spectrum.setflags(write=False)
    before = spectrum.copy()
    spectrum_metrics(spectrum, a_fit(), 3, 3)
    np.testing.assert_array_equal(spectrum, before)
