"""The spread of alpha over windows, against a slow version of the scheme in NumPy."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.spectra.bootstrap import FitRule, LayerFits, fit_layers, resampled_counts
from farms_fast.spectra.windows import WindowGrid
from farms_fast.testing import reference
from tests.support.purity import left_as_it_was

RULES = [FitRule(), FitRule(xmin_pos=1.5), FitRule("ks"), FitRule("peak", bins=20)]
RULES.append(FitRule("peak", bins=20, compat="farms"))

# Entries of a stack, and the windows of each.
LAYOUTS = {
    "overlapping": (1, FixedAspectSampling(rows=8, per_dim=5).grid(20, 24)),
    "every position": (1, FixedAspectSampling(rows=6, per_dim=1000).grid(6, 13)),
    "disjoint": (1, FixedAspectSampling(rows=5, per_dim=2).grid(20, 20)),
    "one row of windows": (1, FixedAspectSampling(rows=9, per_dim=6).grid(9, 40)),
    "stack": (4, FixedAspectSampling(rows=8, q=0.5, per_dim=3).grid(14, 14)),
    "stack of full matrices": (5, FullMatrix().grid(7, 9)),
}


def spectra_of(entries: int, grid: WindowGrid, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(rng.lognormal(sigma=1.5, size=(entries * grid.count, 12)), axis=1)


def slow_alpha(values: np.ndarray, rule: FitRule) -> float:
    fit = reference.fit_power_law(
        values.ravel(), rule.xmin, rule.xmin_pos, rule.bins, rule.compat == "farms"
    )
    return float(fit["alpha"])


def fit_one(
    entries: int,
    grid: WindowGrid,
    rule: FitRule,
    bootstrap: int,
    device: str | torch.device = "cpu",
) -> LayerFits:
    spectra = torch.from_numpy(spectra_of(entries, grid)).to(device)
    (fits,) = fit_layers([spectra], [entries], [grid], rule, bootstrap)
    return fits


# ---------------------------------------------------------------------------------------- counts


def block_length(starts: list[int], extent: int) -> int:
    """Starts that a window at the first one reaches, half of them at most, one at least."""
    reached = len([start for start in starts if start < starts[0] + extent])
    return max(1, min(reached, len(starts) // 2))


def every_circular_draw(size: int, block: int) -> Counter[tuple[int, ...]]:
    """How many of the equally likely draws of block starts give each vector of counts."""
    ways: Counter[tuple[int, ...]] = Counter()
    for firsts in itertools.product(range(size), repeat=math.ceil(size / block)):
        drawn = [(first + step) % size for first in firsts for step in range(block)][:size]
        ways[tuple(drawn.count(position) for position in range(size))] += 1
    return ways


def margins(entries: int, grid: WindowGrid, counts: np.ndarray) -> list[np.ndarray]:
    """Counts of entries, of row starts and of column starts."""
    sizes = (entries, len(grid.row_starts), len(grid.column_starts))
    table = counts.reshape(-1, *sizes)
    found = []
    for axis, size in enumerate(sizes):
        others = tuple(a + 1 for a in range(3) if a != axis)
        margin, remainder = np.divmod(table.sum(axis=others), math.prod(sizes) // size)
        assert not remainder.any()
        found.append(margin)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_of_whole_resamples(layout: str) -> None:
    entries, grid = LAYOUTS[layout]
    counts = resampled_counts(entries, grid, 50)
    assert counts.shape == (50, entries * grid.count)
    assert counts.dtype == np.int64
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == entries * grid.count).all()
    # A window counts as often as its entry, its row and its column were drawn.
    by_entry, by_row, by_column = margins(entries, grid, counts)
    expected = np.einsum("be,br,bc->berc", by_entry, by_row, by_column)
    np.testing.assert_array_equal(counts, expected.reshape(counts.shape))


@pytest.mark.parametrize("layout", ["overlapping", "disjoint", "one row of windows", "stack"])
def test_counts_are_of_circular_blocks(layout: str) -> None:
    entries, grid = LAYOUTS[layout]
    resamples = 4000
    found = margins(entries, grid, resampled_counts(entries, grid, resamples))
    blocks = (
        1,
        block_length(grid.row_starts, grid.rows),
        block_length(grid.column_starts, grid.columns),
    )
    for margin, block in zip(found, blocks, strict=True):
        ways = every_circular_draw(margin.shape[1], block)
        drawn = Counter(map(tuple, margin.tolist()))
        assert set(drawn) <= set(ways)
        # Every draw is equally likely: mean and spread of each position's count tell.
        vectors, weights = np.array(list(ways)), np.array(list(ways.values()))
        mean = np.average(vectors, axis=0, weights=weights)
        square = np.average(vectors**2, axis=0, weights=weights)
        np.testing.assert_allclose(
            margin.mean(axis=0), mean, atol=5 * square.max() / resamples**0.5
        )
        np.testing.assert_allclose((margin**2).mean(axis=0), square, rtol=0.15)


def test_blocks_are_as_long_as_a_window_reaches() -> None:
    layouts = {name: grid for name, (_, grid) in LAYOUTS.items()}
    overlapping, disjoint = layouts["overlapping"], layouts["disjoint"]
    assert overlapping.row_starts == [0, 3, 6, 9, 12]
    assert block_length(overlapping.row_starts, 8) == 2  # three overlap, half of five is two
    assert block_length(disjoint.row_starts, 5) == 1
    by_row = margins(1, overlapping, resampled_counts(1, overlapping, 200))[1]
    # Two circular blocks of two and one cut to one: never a lonely set of five equal positions.
    assert by_row.max() <= 3
    assert margins(1, disjoint, resampled_counts(1, disjoint, 200))[1].max() == 4


def test_directions_are_drawn_independently() -> None:
    entries, grid = 4, FixedAspectSampling(rows=5, per_dim=4).grid(20, 20)
    by_entry, by_row, by_column = margins(entries, grid, resampled_counts(entries, grid, 3000))
    for a, b in itertools.combinations((by_entry, by_row, by_column), 2):
        correlation = np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :]
        assert np.abs(correlation).max() < 0.08


def test_counts_do_not_depend_on_what_came_before() -> None:
    entries, grid = LAYOUTS["stack"]
    first = resampled_counts(entries, grid, 20)
    np.random.default_rng().random(3)
    with left_as_it_was():
        second = resampled_counts(entries, grid, 20)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) > 15


# ------------------------------------------------------------------------------------------ fits


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_slow_scheme(device: torch.device, layout: str, rule: FitRule) -> None:
    entries, grid = LAYOUTS[layout]
    spectra = spectra_of(entries, grid)
    fits = fit_one(entries, grid, rule, 25, device)

    assert fits.pooled.alpha == pytest.approx(slow_alpha(spectra, rule), rel=1e-11)
    assert fits.pooled.n == spectra.size
    alone = [slow_alpha(window, rule) for window in spectra]
    np.testing.assert_allclose(fits.window_alphas, alone, rtol=1e-11)
    halves = [slow_alpha(spectra[0::2], rule), slow_alpha(spectra[1::2], rule)]
    np.testing.assert_allclose(fits.halves, halves, rtol=1e-11)

    counts = resampled_counts(entries, grid, 25)
    alphas = np.array([slow_alpha(np.repeat(spectra, row, axis=0), rule) for row in counts])
    alphas = alphas[~np.isnan(alphas)]
    np.testing.assert_allclose(fits.resampled, alphas, rtol=1e-11)
    mean = alphas.sum() / len(alphas)
    deviation = math.sqrt(((alphas - mean) ** 2).sum() / (len(alphas) - 1))
    assert fits.standard_error == pytest.approx(deviation, rel=1e-9)
    np.testing.assert_allclose(fits.interval(), np.percentile(alphas, [2.5, 97.5]), rtol=1e-9)
    np.testing.assert_allclose(fits.interval(0.5), np.percentile(alphas, [25, 75]), rtol=1e-9)


def test_layers_do_not_mix(device: torch.device) -> None:
    layouts = list(LAYOUTS.values())
    spectra = [
        torch.from_numpy(spectra_of(*layout, seed=i)).to(device) for i, layout in enumerate(layouts)
    ]
    spectra.insert(2, spectra[0][:1])  # a layer of one window among the others
    entries = [layout[0] for layout in layouts]
    grids = [layout[1] for layout in layouts]
    entries.insert(2, 1)
    grids.insert(2, FullMatrix().grid(8, 8))
    with left_as_it_was(*spectra):
        together = fit_layers(spectra, entries, grids, FitRule("ks"), 10)
    assert len(together) == len(spectra)
    for i, found in enumerate(together):
        (alone,) = fit_layers([spectra[i]], [entries[i]], [grids[i]], FitRule("ks"), 10)
        assert found.pooled == alone.pooled
        np.testing.assert_array_equal(found.window_alphas, alone.window_alphas)
        np.testing.assert_array_equal(found.halves, alone.halves)
        np.testing.assert_array_equal(found.resampled, alone.resampled)


def test_layers_sampled_alike_have_their_own_least_spread() -> None:
    entries, grid = LAYOUTS["stack"]
    spectra = torch.from_numpy(spectra_of(entries, grid))
    both = [spectra] * 2, [entries] * 2, [grid] * 2
    fits = fit_layers(*both, FitRule(), 10, spreads=[1e-3, 1e3])
    assert [fit.pooled.status for fit in fits] == ["ok", "degenerate_tail"]
    assert [fit.resampled.size for fit in fits] == [10, 0]
    assert np.isfinite(fits[0].window_alphas).all()
    assert np.isnan(fits[1].window_alphas).all()


def test_no_layers() -> None:
    assert fit_layers([], [], [], FitRule()) == []


def test_same_bits_every_time(device: torch.device) -> None:
    first, second = (fit_one(*LAYOUTS["stack"], FitRule("peak"), 20, device) for _ in range(2))
    assert first.pooled == second.pooled
    np.testing.assert_array_equal(first.resampled, second.resampled)


def test_bounded_calls_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, grid = LAYOUTS["stack"]
    spectra = torch.from_numpy(spectra_of(entries, grid))
    size = spectra.numel()

    def fitted(values_per_call: int) -> tuple[LayerFits, list[int]]:
        calls.clear()
        (fits,) = fit_layers([spectra], [entries], [grid], FitRule(), 23, values_per_call)
        return fits, list(calls)

    calls: list[int] = []
    fit = FitRule.fit

    def counted(
        self: FitRule, packed: torch.Tensor, lengths: list[int], spreads: list[float]
    ) -> object:
        calls.append(packed.numel())
        assert packed.numel() == sum(lengths)
        assert len(lengths) == len(spreads)
        return fit(self, packed, lengths, spreads)

    monkeypatch.setattr(FitRule, "fit", counted)
    whole, sizes = fitted(2**24)
    assert sizes == [3 * size, 23 * size]
    for values, expected in {
        # Pooled, halves and windows; then resamples.
        5 * size: [3 * size] + [5 * size] * 4 + [3 * size],
        2 * size: [2 * size, size] + [2 * size] * 11 + [size],
        # A layer larger than a call's bound goes resample by resample.
        1: [size, size // 2, size // 2] + [grid_order(spectra)] * len(spectra) + [size] * 23,
    }.items():
        fits, sizes = fitted(values)
        assert sizes == expected
        assert (fits.pooled, fits.halves) == (whole.pooled, whole.halves)
        np.testing.assert_array_equal(fits.window_alphas, whole.window_alphas)
        np.testing.assert_array_equal(fits.resampled, whole.resampled)


def grid_order(spectra: torch.Tensor) -> int:
    return spectra.shape[1]


@pytest.mark.parametrize("bootstrap", [0, 10])
def test_one_window_has_no_spread(bootstrap: int) -> None:
    fits = fit_one(1, FullMatrix().grid(30, 40), FitRule(), bootstrap)
    assert fits.pooled.status == "ok"
    assert fits.window_alphas.size == 0
    assert fits.resampled.size == 0
    assert all(math.isnan(x) for x in (*fits.halves, fits.standard_error, *fits.interval()))


def test_without_bootstrap() -> None:
    fits = fit_one(*LAYOUTS["overlapping"], FitRule(), 0)
    assert math.isnan(fits.standard_error)
    assert all(map(math.isnan, fits.interval()))
    assert all(map(math.isfinite, fits.halves))
    one = fit_one(*LAYOUTS["overlapping"], FitRule(), 1)
    assert one.resampled.size == 1
    assert math.isnan(one.standard_error)


def test_resamples_that_cannot_be_fitted_are_left_out() -> None:
    # Only the first window has values to fit: resamples without it have none.
    grid = FixedAspectSampling(rows=5, per_dim=2).grid(5, 20)
    spectra = np.zeros((4, 6))
    spectra[0] = np.arange(1.0, 7)
    counts = resampled_counts(1, grid, 50)
    (fits,) = fit_layers([torch.from_numpy(spectra)], [1], [grid], FitRule(), 50)
    assert 0 < fits.resampled.size == (counts[:, 0] > 0).sum() < 50
    assert fits.pooled.dropped == 18
    assert math.isnan(fits.halves[1])
    np.testing.assert_array_equal(np.isnan(fits.window_alphas), [False, True, True, True])


def test_equal_windows_have_no_spread() -> None:
    entries, grid = LAYOUTS["overlapping"]
    window = np.sort(np.random.default_rng(0).lognormal(size=40))
    spectra = torch.from_numpy(np.tile(window, (grid.count, 1)))
    (fits,) = fit_layers([spectra], [entries], [grid], FitRule(), 30)
    assert fits.standard_error < 1e-12
    assert fits.halves == pytest.approx([fits.pooled.alpha] * 2, rel=0.05)


@pytest.mark.parametrize("layout", ["overlapping", "disjoint"])
def test_standard_error_is_that_of_repetitions(layout: str) -> None:
    # What the bootstrap estimates from one matrix, seen over many. Drawing rows and columns
    # crosswise overstates the error of independent windows, by the root of 3 at most.
    entries, grid = LAYOUTS[layout]
    matrices = [np.random.default_rng(seed).standard_normal((24, 24)) for seed in range(60)]
    spectra = [
        torch.from_numpy(
            np.stack(
                [
                    reference.eigenvalues(m[r : r + h, c : c + w])
                    for r, c, h, w in grid.table()[:, 2:]
                ]
            )
        )
        for m in matrices
    ]
    fits = fit_layers(spectra, [entries] * 60, [grid] * 60, FitRule(), 50)
    repeated = np.std([fit.pooled.alpha for fit in fits], ddof=1)
    estimated = np.mean([fit.standard_error for fit in fits])
    assert 0.5 < estimated / repeated < 2.0
    mean = np.mean([fit.pooled.alpha for fit in fits])
    covering = [low < mean < high for low, high in (fit.interval() for fit in fits)]
    assert np.mean(covering) > 0.7
