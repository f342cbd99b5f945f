"""The power-law fit against an exhaustive scan, on spectra that are easy to get wrong."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from farms_fast.core import ops
from farms_fast.spectra.power_law import (
    STATUSES,
    PowerLawFit,
    fit_power_law,
    fit_power_laws,
    least_spread,
    xmin_rule,
)
from farms_fast.testing import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# rule, xmin_pos, bins, published
SETTINGS = [
    ("median", 2.0, 100, False),
    ("median", 3.7, 100, False),
    ("ks", 2.0, 100, False),
    ("peak", 2.0, 100, False),
    ("peak", 2.0, 7, False),
    ("median", 2.0, 100, True),
    ("ks", 2.0, 100, True),
    ("peak", 2.0, 100, True),
]
SETTING_IDS = ["median", "median-3.7", "ks", "peak", "peak-7-bins"]
SETTING_IDS += ["median-published", "ks-published", "peak-published"]
KS, KS_PUBLISHED = SETTINGS[2], SETTINGS[6]


def zoo(seed: int, count: int) -> list[np.ndarray]:
    """Short spectra: heavy and light tails, ties, clusters within ulps, hundreds of decades."""
    rng = np.random.default_rng(seed)
    spectra = []
    for case in range(count):
        n = int(rng.integers(1, 200))
        spectrum = [
            lambda n: rng.pareto(rng.uniform(0.5, 4), n) + 1,
            lambda n: rng.lognormal(0, rng.uniform(0.1, 4), n),
            lambda n: np.linalg.svd(rng.normal(size=(n, n + 5)), compute_uv=False) ** 2,
            lambda n: rng.integers(0, 6, n).astype(float),
            lambda n: np.repeat(rng.random(n) + 0.5, rng.integers(2, 5)),
            lambda n: 10 ** rng.uniform(-150, 150, n),
            lambda n: rng.choice([0, np.nan, np.inf, -1, -np.inf, 0.5, 2.0, 3.0], n),
            lambda n: 1 + rng.integers(-5, 5, n) * 2.0**-52,
            lambda n: 2.0 ** np.arange(n),
        ][case % 9](n)
        spectra.append(np.sort(spectrum))
    return spectra


def on_a_bin_edge(spectrum: np.ndarray, bins: int) -> bool:
    """Whether an ulp of log10, which the device rounds its own way, can move a value's bin."""
    logs = np.log10(spectrum[(spectrum > 0) & np.isfinite(spectrum)])
    if logs.size == 0 or logs[0] == logs[-1]:
        return False
    place = (logs - logs[0]) / (logs[-1] - logs[0]) * bins
    inner = place[(place > 0) & (place < bins)]
    return bool((np.abs(inner - np.rint(inner)) < 1e-9).any())


def pack(spectra: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.concatenate([[0], np.cumsum([len(spectrum) for spectrum in spectra])])
    packed = torch.from_numpy(np.concatenate([*spectra, np.empty(0)]))
    return packed.to(device), torch.from_numpy(offsets.astype(np.int64)).to(device)


def fit_all(
    spectra: list[np.ndarray],
    device: str,
    setting: tuple[str, float, int, bool],
    least_spread: float = 0.0,
) -> list[PowerLawFit]:
    rule, xmin_pos, bins, published = setting
    spreads = torch.full((len(spectra),), least_spread, dtype=torch.float64, device=device)
    fits = fit_power_laws(
        *pack(spectra, device),
        rule,
        xmin_pos,
        bins,
        spreads if least_spread else None,
        compat="farms" if published else None,
    )
    assert len(fits) == len(spectra)
    return fits.to_list()


def libm_distances(values: np.ndarray) -> tuple[list[float], list[float]]:
    """D(i) and alpha(i) for all i <= N - 2, one libm call per value: the CPU op's own rounding."""
    logs = [math.log(value) for value in values]
    for i in range(len(logs) - 2, -1, -1):
        logs[i] = min(logs[i], logs[i + 1])
    excess = reference._excess(np.array(logs)).tolist()
    distances, alphas = [], []
    for i in range(len(logs) - 1):
        n = len(logs) - i
        if not excess[i] > 0:
            distances.append(math.inf)
            alphas.append(math.inf)
            continue
        alpha = 1 + n / excess[i]
        gaps = (
            abs((1 - math.exp((1 - alpha) * (logs[j] - logs[i]))) - (j - i) / n)
            for j in range(i, len(logs))
        )
        distances.append(max(gaps))
        alphas.append(alpha)
    return distances, alphas


def assert_matches_reference(
    fit: PowerLawFit,
    spectrum: np.ndarray,
    setting: tuple[str, float, int, bool],
    least_spread: float = 0.0,
) -> None:
    wanted = reference.fit_power_law(spectrum, *setting, least_spread=least_spread)
    if fit.status == "ok" and not setting[3]:
        assert fit.n_tail == int((spectrum[np.isfinite(spectrum)] >= fit.xmin).sum())
    found = (fit.status, fit.n_tail, fit.n, fit.dropped)
    assert found == (wanted["status"], wanted["n_tail"], wanted["n"], wanted["dropped"])
    np.testing.assert_array_equal(fit.xmin, wanted["xmin"])
    np.testing.assert_allclose(
        [fit.alpha, fit.D], [wanted["alpha"], wanted["D"]], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=SETTING_IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_the_exhaustive_scan(device: str, setting: tuple[str, float, int, bool]) -> None:
    spectra = zoo(seed=1, count=180)
    if device == "cuda" and setting[0] == "peak":
        spectra = [spectrum for spectrum in spectra if not on_a_bin_edge(spectrum, setting[2])]
        assert len(spectra) > 100
    for spectrum, fit in zip(spectra, fit_all(spectra, device, setting), strict=True):
        assert_matches_reference(fit, spectrum, setting)


@pytest.mark.parametrize("setting", SETTINGS[:5], ids=SETTING_IDS[:5])
@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_spreads_by_more_than_the_least(
    device: str, setting: tuple[str, float, int, bool]
) -> None:
    spectra = [spectrum for spectrum in zoo(seed=15, count=90) if not on_a_bin_edge(spectrum, 7)]
    statuses = set()
    for least in (2.0**-50, 0.1, 3.0):
        fits = fit_all(spectra, device, setting, least)
        for spectrum, fit in zip(spectra, fits, strict=True):
            if device == "cpu" or setting[0] != "peak" or not on_a_bin_edge(spectrum, setting[2]):
                assert_matches_reference(fit, spectrum, setting, least)
            statuses.add((least, fit.status))
    assert {(0.1, "degenerate_tail"), (3.0, "degenerate_tail"), (3.0, "ok")} <= statuses


def test_each_spectrum_has_its_own_least_spread() -> None:
    one = np.array([1.0, 1.1, 1.2, 1.3])
    for rule in ("median", "ks", "peak"):
        spreads = torch.tensor([0.0, 1.0, 0.1], dtype=torch.float64)
        fits = fit_power_laws(*pack([one, one, one], "cpu"), rule, 4.0, 2, spreads).to_list()
        assert [fit.status for fit in fits] == ["ok", "degenerate_tail", "ok"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_begins_at_the_first_of_equal_values(device: str) -> None:
    # Of 81 values: powerlaw's Fit has alpha 3.5969 of all of them.
    values = np.repeat([1.0, 2.0, 4.0, 8.0], [50, 20, 8, 3])
    fit = fit_all([values], device, KS)[0]
    assert (fit.xmin, fit.n_tail) == (1.0, 81)
    logs = 20 * math.log(2) + 8 * math.log(4) + 3 * math.log(8)
    assert fit.alpha == pytest.approx(1 + 81 / logs, rel=1e-14)
    published = fit_all([values], device, KS_PUBLISHED)[0]
    assert (published.xmin, published.n_tail) == (1.0, 46)
    # Index 40 of 81 lies among the ones, index 60 among the twos.
    for xmin_pos, xmin, n_tail in ((2.0, 1.0, 81), (81 / 60.5, 2.0, 31)):
        fit = fit_all([values], device, ("median", xmin_pos, 100, False))[0]
        assert (fit.xmin, fit.n_tail) == (xmin, n_tail)
        published = fit_all([values], device, ("median", xmin_pos, 100, True))[0]
        assert (published.xmin, published.n_tail) == (xmin, 81 - int(81 / xmin_pos))
    # One value beside 199 equal ones: all of them or nothing.
    beside = np.concatenate([np.ones(199), [2.0]])
    assert fit_all([beside], device, KS)[0].n_tail == 200


@pytest.mark.parametrize("setting", SETTINGS[2:4], ids=SETTING_IDS[2:4])
@pytest.mark.parametrize("device", DEVICES)
def test_matches_the_exhaustive_scan_on_longer_spectra(
    device: str, setting: tuple[str, float, int, bool]
) -> None:
    rng = np.random.default_rng(2)
    windows = [np.linalg.svd(rng.standard_t(4, (300, 300)), compute_uv=False) for _ in range(8)]
    spectra = [
        np.sort(values)
        for values in (
            rng.pareto(2, 3000) + 1,
            rng.lognormal(0, 1.5, 3001),
            np.concatenate(windows) ** 2,
            rng.integers(1, 50, 3000).astype(float),
            rng.random(40),
            1 + rng.integers(-20, 20, 3000) * 2.0**-52,
        )
    ]
    for spectrum, fit in zip(spectra, fit_all(spectra, device, setting), strict=True):
        assert_matches_reference(fit, spectrum, setting)


def adversarial() -> list[np.ndarray]:
    """Spectra where the best D is nearly or exactly reached more than once."""
    rng = np.random.default_rng(3)
    base = np.sort(rng.pareto(2, 150) + 1)
    spectra = [
        base,
        np.sort(np.concatenate([base, base])),
        np.sort(np.concatenate([base, base * (1 + 2.0**-52)])),
        np.sort(base.repeat(3) * (1 + rng.integers(0, 3, 450) * 2.0**-52)),
        2.0 ** np.arange(300),
        np.array([1.0, 1.0, 2.0, 2.0]),
        np.array([1.0, 2.0, 4.0]),
        np.linspace(1, 2, 301),
    ]
    # A tail scaled by a power of two keeps its shape, so D comes back at another index.
    spectra += [np.concatenate([base[:k], base[-k:] * 2.0**40]) for k in (20, 75)]
    return spectra


def test_pruning_keeps_the_bits_of_the_exhaustive_scan() -> None:
    spectra = zoo(seed=4, count=90) + adversarial()
    for spectrum, fit in zip(spectra, fit_all(spectra, "cpu", KS_PUBLISHED), strict=True):
        values = spectrum[np.isfinite(spectrum) & (spectrum > 0)]
        if fit.status != "ok":
            continue
        distances, alphas = libm_distances(values)
        first = int(np.argmin(distances))
        found = (fit.D, values.size - fit.n_tail, fit.alpha)
        assert found == (distances[first], first, alphas[first])


@pytest.mark.parametrize("device", DEVICES)
def test_no_candidate_alone_beats_the_one_chosen(device: str) -> None:
    """The median rule evaluates one chosen candidate: a scan on the device's own arithmetic."""
    for values in adversarial()[:5]:
        best = fit_all([values], device, KS_PUBLISHED)[0]
        n = values.size
        single = [
            fit_all([values], device, ("median", n / (i + 0.5), 100, True))[0]
            for i in range(1, n - 1)
        ]
        # Index 0 is what xmin_pos > 2 N gives.
        single.insert(0, fit_all([values], device, ("median", 2.0 * n + 1, 100, True))[0])
        distances = [fit.D if fit.status == "ok" else math.inf for fit in single]
        first = int(np.argmin(distances))
        assert (best.D, best.n_tail) == (distances[first], n - first)
        assert best.alpha == single[first].alpha


@pytest.mark.parametrize(
    ("exponents", "tied", "distance"),
    [
        ([0, 0, 0, 9, 9, 16], (0, 3), 1 / 3),
        ([0, 0, 0, 0, 9, 9, 16], (1, 4), 1 / 3),
        ([2, 2, 2, 4, 8, 8, 9, 16], (0, 4), 1 / 4),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_the_first_of_equal_distances_wins(
    device: str, exponents: list[int], tied: tuple[int, int], distance: float
) -> None:
    values = 2.0 ** np.array(exponents)
    distances, _ = libm_distances(values)
    assert np.flatnonzero(np.array(distances) == min(distances)).tolist() == list(tied)
    fit = fit_all([values], device, KS_PUBLISHED)[0]
    assert (fit.D, values.size - fit.n_tail) == (distance, tied[0])


@pytest.mark.parametrize("rule", ["median", "ks", "peak"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_spectrum_gives_the_same_bits_alone_packed_and_again(device: str, rule: str) -> None:
    rng = np.random.default_rng(5)
    # Lengths on both sides of where the CPU turns from threads over spectra to threads within one.
    spectra = [np.sort(rng.lognormal(0, 2, n)) for n in (1, 40, 20000, 0, 333, 17000, 5000)]
    setting = (rule, 2.0, 100, False)
    packed = fit_all(spectra, device, setting)
    again = fit_all(spectra, device, setting)
    np.testing.assert_equal([astuple(fit) for fit in packed], [astuple(fit) for fit in again])
    alone = [fit_all([spectrum], device, setting)[0] for spectrum in spectra]
    np.testing.assert_equal([astuple(fit) for fit in packed], [astuple(fit) for fit in alone])


@pytest.mark.parametrize("rule", ["median", "ks", "peak"])
def test_the_number_of_threads_does_not_matter(rule: str) -> None:
    rng = np.random.default_rng(6)
    spectra = [np.sort(rng.lognormal(0, 2, n)) for n in (30000, 100, 25000)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fit_all(spectra, "cpu", (rule, 2.0, 100, False))
        torch.set_num_threads(3)
        three = fit_all(spectra, "cpu", (rule, 2.0, 100, False))
    finally:
        torch.set_num_threads(threads)
    assert one == three


@pytest.mark.parametrize("device", DEVICES)
def test_no_spectra_and_empty_spectra(device: str) -> None:
    none = fit_power_laws(*pack([], device), "ks")
    assert len(none) == 0
    assert none.to_list() == []
    empty = fit_all([np.empty(0), np.empty(0)], device, SETTINGS[2])
    assert [(fit.status, fit.n, fit.dropped) for fit in empty] == [("too_few", 0, 0)] * 2


STATUS_CASES = [
    ("too_few", "ks", [3.0], 1, 0),
    ("too_few", "peak", [0.0, 0.0, -1.0], 0, 3),
    ("too_few", "ks", [0.0, np.nan], 0, 2),
    ("too_few", "median", [1.0, 2.0], 2, 0),
    ("degenerate_tail", "median", [1.0, 2.0, 2.0, 2.0], 4, 0),
    ("degenerate_tail", "ks", [2.0, 2.0, 2.0], 3, 0),
    ("degenerate_tail", "peak", [2.0, 2.0, np.inf], 2, 1),
    ("no_candidate", "peak", [1.0, 1e3, 1.1e3, 1.2e3, 1.3e3, 1e6], 6, 0),
    ("nonfinite", "ks", [np.nan, np.nan], 0, 2),
    ("nonfinite", "median", [np.inf, -np.inf, np.nan], 0, 3),
    ("ok", "ks", [1.0, 2.0, np.nan, 0.0], 2, 2),
]


@pytest.mark.parametrize(("status", "rule", "values", "n", "dropped"), STATUS_CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_statuses(
    device: str, status: str, rule: str, values: list[float], n: int, dropped: int
) -> None:
    fit = fit_power_law(torch.tensor(values, dtype=torch.float64, device=device), rule, bins=3)
    assert (fit.status, fit.n, fit.dropped) == (status, n, dropped)
    assert fit.xmin_rule == rule
    if status == "ok":
        assert fit.alpha > 1
        assert fit.n_tail == 2
        assert fit.sigma > 0
    else:
        assert np.isnan([fit.alpha, fit.D, fit.xmin, fit.sigma]).all()
        assert fit.n_tail == 0


@pytest.mark.parametrize("rule", ["median", "ks", "peak"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [1.7, 2.5, 4.0])
def test_recovers_the_exponent_of_a_pareto_sample(device: str, exponent: float, rule: str) -> None:
    rng = np.random.default_rng(7)
    sample = torch.from_numpy(rng.pareto(exponent - 1, 20000) + 1).to(device)
    fit = fit_power_law(sample, rule)
    assert fit.status == "ok"
    assert abs(fit.alpha - exponent) < 3 * fit.sigma
    assert fit.sigma == (fit.alpha - 1) / math.sqrt(fit.n_tail)


@pytest.mark.parametrize("scale", [2.0**-480, 2.0**300])
@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_of_a_spectrum_does_not_matter(device: str, scale: float) -> None:
    values = np.random.default_rng(8).pareto(2, 2000) + 1
    plain = fit_power_law(torch.from_numpy(values).to(device), "ks")
    scaled = fit_power_law(torch.from_numpy(values * scale).to(device), "ks")
    assert scaled.n_tail == plain.n_tail
    assert scaled.xmin == plain.xmin * scale
    np.testing.assert_allclose([scaled.alpha, scaled.D], [plain.alpha, plain.D], rtol=1e-12)


def test_accuracy_of_alpha_at_length() -> None:
    values = np.sort(np.random.default_rng(9).pareto(1.5, 100_000) + 1)
    logs = [math.log(value) for value in values]
    exact = 1 + values.size / math.fsum(log - logs[0] for log in logs)
    assert fit_power_law(values, xmin_pos=1e9).alpha == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(
    ("alias", "rule"),
    [
        ("xmin_mid", "median"),
        ("goodness-of-fit", "ks"),
        ("xmin_peak", "peak"),
        ("fix-finger", "peak"),
    ],
)
def test_aliases(alias: str, rule: str) -> None:
    values = np.random.default_rng(10).lognormal(0, 1, 300)
    assert xmin_rule(alias) == rule
    assert fit_power_law(values, alias) == fit_power_law(values, rule)


def test_compat_moves_the_lower_end_of_the_peak() -> None:
    rng = np.random.default_rng(11)
    values = np.concatenate([rng.pareto(1.5, 300) + 1, np.full(60, 40.0)])
    published = reference.fit_power_law(values, "peak", published=True)
    fit = fit_power_law(values, "peak", compat="farms")
    assert (fit.n_tail, fit.xmin) == (published["n_tail"], published["xmin"])
    assert fit.n_tail != fit_power_law(values, "peak").n_tail


class Exporter:
    """An array of some other library, seen only through DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: object) -> object:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("device", DEVICES)
def test_any_order_any_array_and_nothing_written(device: str) -> None:
    values = np.random.default_rng(12).permutation(np.arange(1.0, 65.0))
    wanted = fit_power_law(np.sort(values), "ks")
    readonly = values.copy()
    readonly.flags.writeable = False
    tensor = torch.from_numpy(values.copy()).to(device)
    strided = torch.stack([tensor, -tensor], dim=1)[:, 0]
    learned = tensor.clone().requires_grad_()
    arrays = [
        readonly,
        values[::-1],
        values.astype(">f8"),
        values.astype(np.float32),
        tensor,
        strided,
        learned,
        tensor.to(torch.bfloat16),
        Exporter(tensor),
    ]
    for array in arrays:
        fit = fit_power_law(array, "ks")
        assert (fit.n_tail, fit.xmin) == (wanted.n_tail, wanted.xmin)
        assert fit.alpha == pytest.approx(wanted.alpha, rel=1e-12)
    np.testing.assert_array_equal(tensor.cpu().numpy(), values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.arange(4),), TypeError, "evals: expected a real floating dtype, got int64"),
        ((np.array([object()]),), TypeError, "evals: expected a real floating dtype, got object"),
        ((np.ones(3, complex),), TypeError, "evals: expected a real floating dtype, got complex"),
        ((torch.arange(4),), TypeError, "evals: expected a real floating dtype, got int64"),
        ((torch.ones(3).to_sparse(),), TypeError, "evals: expected a dense tensor"),
        (([1.0, 2.0],), TypeError, "evals: expected a NumPy array, a torch tensor or an array"),
        ((np.array(1.0),), ValueError, "evals: expected one spectrum (1-D), got shape ()"),
        ((np.ones((2, 3)),), ValueError, "evals: expected one spectrum (1-D), got shape (2, 3)"),
        ((np.empty(0),), ValueError, "evals: expected at least one value, got none"),
        ((torch.ones(3, device="meta"),), ValueError, "evals: expected device cpu or cuda"),
        ((np.ones(3), "mode"), ValueError, "xmin: expected one of 'median', 'xmin_mid', 'ks'"),
        ((np.ones(3), None), ValueError, "xmin: expected one of"),
        ((np.ones(3), "median", 1.0), ValueError, "xmin_pos: expected a finite number above 1"),
        ((np.ones(3), "median", math.nan), ValueError, "xmin_pos: expected a finite number"),
        ((np.ones(3), "median", math.inf), ValueError, "xmin_pos: expected a finite number"),
        ((np.ones(3), "median", None), TypeError, "xmin_pos: expected a number above 1, got None"),
        ((np.ones(3), "peak", 2, 0), ValueError, "bins: expected an integer of at least 1, got 0"),
        ((np.ones(3), "peak", 2, 2.5), TypeError, "bins: expected an integer, got float"),
        ((np.ones(3), "peak", 2, True), ValueError, "bins: expected an integer of at least 1"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[object, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit_power_law(*arguments)


def test_the_order_of_the_window_tells_what_is_zero() -> None:
    rng = np.random.default_rng(16)
    rank, order = 12, 40
    for scale in (1.0, 3.0, 1e-150, 1e150):
        weight = scale * rng.standard_normal((order, rank)) @ rng.standard_normal((rank, 50))
        evals = np.linalg.svd(weight, compute_uv=False)[::-1] ** 2
        evals[:-rank] = np.linspace(0, 4 * order * 2.0**-52, order - rank) * evals[-1]
        fit = fit_power_law(evals, order=order)
        assert (fit.n, fit.dropped, fit.n_tail) == (rank, order - rank, rank // 2)
        assert fit == replace(fit_power_law(evals[-rank:]), dropped=order - rank)
        assert fit_power_law(evals).n > rank
    # Overflow says nothing of the others.
    assert fit_power_law(np.array([1.0, 2.0, np.inf]), "ks", order=3).n == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_but_for_the_rounding_of_the_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in ((64, 64), (48, 200)):
        made = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        weight = torch.nn.init.orthogonal_(made).to(dtype).double()
        evals = torch.linalg.svdvals(weight).square()
        order = min(shape)
        for rule in ("median", "ks", "peak"):
            assert fit_power_law(evals, rule).status == "ok"
            fit = fit_power_law(evals, rule, order=order, weights=dtype)
            assert fit.status == "degenerate_tail"
        # Twice the bound is something to fit.
        clear = np.exp(np.linspace(0, 4 * least_spread(dtype, order), order))
        assert fit_power_law(clear, order=order, weights=dtype).status == "ok"


def test_least_spread_needs_the_order_and_a_float() -> None:
    with pytest.raises(ValueError, match="order: expected that of the window"):
        fit_power_law(np.ones(3), weights=torch.float32)
    with pytest.raises(ValueError, match=r"weights: expected a floating.*got torch.int8"):
        fit_power_law(np.ones(3), order=3, weights=torch.int8)
    with pytest.raises(TypeError, match="weights: expected a torch dtype"):
        fit_power_law(np.ones(3), order=3, weights="float32")


def test_unknown_compat_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"compat: expected None, 'farms' or .*, got 'other'"):
        fit_power_law(np.ones(3), compat="other")


@pytest.mark.parametrize(
    ("spectra", "offsets", "error", "message"),
    [
        (torch.ones(3), torch.tensor([0, 3]), TypeError, "spectra: expected torch.float64"),
        (np.ones(3), torch.tensor([0, 3]), TypeError, "spectra: expected a torch tensor"),
        (torch.ones(2, 2).double(), torch.tensor([0, 4]), ValueError, "spectra: expected 1-D"),
        (torch.ones(6).double()[::2], torch.tensor([0, 3]), ValueError, "spectra: expected a cont"),
        (torch.ones(3).double(), torch.tensor([0.0, 3]), TypeError, "offsets: expected torch.int"),
        (torch.ones(3).double(), torch.tensor([0, 3])[:0], ValueError, "offsets: expected one"),
    ],
)
def test_packed_errors_name_the_argument(
    spectra: torch.Tensor, offsets: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit_power_laws(spectra, offsets)


def test_op_returns_what_the_schema_says() -> None:
    results = ops.fit_power_law(*pack([np.arange(1.0, 9.0)], "cpu"), "ks", 2.0, 100, False)
    assert [result.dtype for result in results] == [torch.float64] * 3 + [torch.int64] * 3
    assert all(result.shape == (1,) for result in results)
    assert STATUSES[int(results[4])] == "ok"


@pytest.mark.gpu
def test_many_short_spectra_on_the_device() -> None:
    rng = np.random.default_rng(13)
    spectra = list(np.sort(rng.lognormal(0, 2, (10_000, 100)), axis=1))
    for setting in SETTINGS[2:4]:
        fits = fit_all(spectra, "cuda", setting)
        host = fit_all(spectra, "cpu", setting)
        np.testing.assert_allclose([fit.D for fit in fits], [fit.D for fit in host], rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["median", "ks", "peak"])
def test_fit_can_be_captured_in_a_graph(rule: str) -> None:
    first, offsets = pack(zoo(seed=14, count=40), "cuda")
    buffer = first.clone()
    fit_power_laws(buffer, offsets, rule)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.fit_power_law(buffer, offsets, rule, 2.0, 100, False)
    for packed in (first, first * 2, first / 3):
        buffer.copy_(packed)
        graph.replay()
        direct = ops.fit_power_law(buffer, offsets, rule, 2.0, 100, False)
        for replayed, computed in zip(captured, direct, strict=True):
            np.testing.assert_array_equal(replayed.cpu().numpy(), computed.cpu().numpy())
