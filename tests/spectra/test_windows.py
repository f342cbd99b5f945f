"""Grids of windows against the plain-Python reference, and what any grid has to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.spectra.windows import WindowGrid, window_table
from farms_fast.testing import reference

extents = st.integers(1, 40) | st.integers(41, 700)
ratios = st.sampled_from([1.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.5, 2.0, 3.0]) | st.floats(0.02, 50)
counts = st.integers(1, 20)
no_deadline = settings(deadline=None)


def windows_of(grid: WindowGrid) -> np.ndarray:
    return grid.table()[:, 2:]


def covered(starts: list[int], window: int, extent: int) -> bool:
    ends = [0, *(start + window for start in starts)]
    return (
        all(start <= end for start, end in zip(starts, ends, strict=False)) and ends[-1] == extent
    )


# ------------------------------------------------------------------------------ against reference


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios, per_dim=counts)
@example(R=4096, C=11008, rows=2000, q=1.0, per_dim=15)
@example(R=3, C=3, rows=2000, q=0.1, per_dim=15)
@example(R=100, C=3, rows=2000, q=0.1, per_dim=2)
def test_default_equals_reference(R: int, C: int, rows: int, q: float, per_dim: int) -> None:
    grid = FixedAspectSampling(rows, q, per_dim).grid(R, C)
    expected = reference.fixed_aspect_windows(R, C, rows, q, per_dim)
    np.testing.assert_array_equal(windows_of(grid), expected)
    assert grid.count == len(expected)


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios, per_dim=counts)
@example(R=4096, C=11008, rows=2000, q=1.0, per_dim=15)
@example(R=10, C=10, rows=3, q=50.0, per_dim=4)
def test_published_equals_reference(R: int, C: int, rows: int, q: float, per_dim: int) -> None:
    grid = FixedAspectSampling(rows, q, per_dim, compat="farms").grid(R, C)
    np.testing.assert_array_equal(
        windows_of(grid), reference.published_windows(R, C, rows, q, per_dim)
    )


# ------------------------------------------------------------------------------------- properties


@no_deadline
@given(
    R=extents,
    C=extents,
    rows=extents,
    q=ratios,
    per_dim=counts,
    compat=st.sampled_from([None, "farms"]),
)
def test_windows_lie_inside(
    R: int, C: int, rows: int, q: float, per_dim: int, compat: str | None
) -> None:
    grid = FixedAspectSampling(rows, q, per_dim, compat).grid(R, C)
    for starts, window, extent in (
        (grid.row_starts, grid.rows, R),
        (grid.column_starts, grid.columns, C),
    ):
        assert starts == sorted(set(starts))
        assert all(0 <= start <= extent - window for start in starts)
        if compat:
            assert len(starts) <= per_dim
    assert grid.count == len(grid.row_starts) * len(grid.column_starts)
    assert grid.order == min(grid.rows, grid.columns)


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios, per_dim=st.integers(2, 20))
def test_every_row_and_column_is_covered(R: int, C: int, rows: int, q: float, per_dim: int) -> None:
    grid = FixedAspectSampling(rows, q, per_dim).grid(R, C)
    if grid.count:
        assert covered(grid.row_starts, grid.rows, R)
        assert covered(grid.column_starts, grid.columns, C)


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios, per_dim=st.integers(2, 20))
def test_spread_is_even_and_dense_enough(R: int, C: int, rows: int, q: float, per_dim: int) -> None:
    grid = FixedAspectSampling(rows, q, per_dim).grid(R, C)
    for starts, window, extent in (
        (grid.row_starts, grid.rows, R),
        (grid.column_starts, grid.columns, C),
    ):
        if grid.count:
            # As many as there are places for, and no gap that differs from another by more than 1.
            assert len(starts) >= min(per_dim, extent - window + 1)
            gaps = set(np.diff(starts).tolist())
            assert not gaps or max(gaps) - min(gaps) <= 1


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios)
def test_one_per_dimension_is_centred(R: int, C: int, rows: int, q: float) -> None:
    grid = FixedAspectSampling(rows, q, per_dim=1).grid(R, C)
    if grid.count:
        assert grid.count == 1
        for (start,), window, extent in (
            (grid.row_starts, grid.rows, R),
            (grid.column_starts, grid.columns, C),
        ):
            before, after = start, extent - window - start
            assert abs(before - after) <= 1
            assert start % 2 == 0 or before == after


@no_deadline
@given(R=extents, C=extents, rows=extents, q=ratios, per_dim=counts)
def test_shrinking_keeps_q(R: int, C: int, rows: int, q: float, per_dim: int) -> None:
    grid = FixedAspectSampling(rows, q, per_dim).grid(R, C)
    if grid.count:
        assert abs(grid.columns - grid.rows * q) <= 0.5 + 1e-9
        # The largest such window: one more row is more than was asked for, or does not fit.
        assert grid.rows in (rows, R) or (grid.rows + 1) * q > C
    else:
        assert q > C or round(min(rows, R, math.floor(C / q)) * q) == 0


# --------------------------------------------------------------------------------- known examples


def test_windows_of_the_paper() -> None:
    ours = FixedAspectSampling().grid(4096, 11008)
    assert (ours.rows, ours.columns, ours.count) == (2000, 2000, 225)
    assert (ours.row_starts[-1], ours.column_starts[-1]) == (2096, 9008)
    published = FixedAspectSampling(compat="farms").grid(4096, 11008)
    assert published.count == 225
    # A step that is rounded down stops short of the far edge.
    assert published.row_starts == [149 * i for i in range(15)]
    assert published.column_starts == [643 * i for i in range(15)]


@pytest.mark.parametrize(
    ("extent", "window", "per_dim", "starts"),
    [
        (9, 4, 3, [0, 2, 5]),  # 2.5 goes to 2
        (11, 4, 3, [0, 4, 7]),  # 3.5 goes to 4
        (9, 4, 1, [2]),
        (11, 4, 1, [4]),
        (4, 4, 1, [0]),
        (4, 4, 7, [0]),
        (5, 4, 15, [0, 1]),  # duplicates merged
        (12, 4, 2, [0, 4, 8]),  # two would leave a gap
        (13, 4, 2, [0, 3, 6, 9]),
    ],
)
def test_starts(extent: int, window: int, per_dim: int, starts: list[int]) -> None:
    grid = FixedAspectSampling(window, per_dim=per_dim).grid(extent, extent)
    assert grid.row_starts == starts
    assert grid.column_starts == starts
    assert reference.window_starts(extent, window, per_dim) == starts


@pytest.mark.parametrize(
    ("shape", "rows", "q", "window"),
    [
        ((8, 8), 2000, 1.0, (8, 8)),
        ((8, 20), 2000, 1.0, (8, 8)),
        ((20, 8), 2000, 1.0, (8, 8)),
        ((20, 8), 2000, 2.0, (4, 8)),
        ((20, 9), 2000, 2.0, (4, 8)),
        ((20, 8), 2000, 0.5, (16, 8)),
        ((10, 8), 2000, 0.5, (10, 5)),
        ((10, 8), 3, 0.5, (3, 2)),  # 1.5 goes to 2
        ((10, 8), 5, 0.5, (5, 2)),  # 2.5 goes to 2
    ],
)
def test_window_size(shape: tuple[int, int], rows: int, q: float, window: tuple[int, int]) -> None:
    grid = FixedAspectSampling(rows, q).grid(*shape)
    assert (grid.rows, grid.columns) == window


@pytest.mark.parametrize(("shape", "q"), [((4, 6), 7.0), ((3, 3), 0.1), ((4, 6), 1e300)])
def test_no_window_fits(shape: tuple[int, int], q: float) -> None:
    grid = FixedAspectSampling(q=q).grid(*shape)
    assert (grid.count, grid.row_starts, grid.column_starts) == (0, [], [])
    assert window_table(grid, entries=3).shape == (0, 6)


def test_published_window_is_cut_at_the_columns() -> None:
    for q in (2.0, 1e300):
        grid = FixedAspectSampling(q=q, compat="farms").grid(4, 6)
        assert (grid.rows, grid.columns) == (4, 6)


def test_sizes_beyond_the_matrix_are_no_error() -> None:
    many, all_places = 10**30, list(range(6))
    assert FixedAspectSampling(many, per_dim=2).grid(4, 9).rows == 4
    for compat in (None, "farms"):
        grid = FixedAspectSampling(4, per_dim=many, compat=compat).grid(9, 9)
        assert grid.row_starts == all_places


def test_numpy_numbers() -> None:
    given_ints = FixedAspectSampling(rows=np.int64(3), q=np.float32(0.5), per_dim=np.int32(2))
    expected = FixedAspectSampling(rows=3, q=0.5, per_dim=2)
    np.testing.assert_array_equal(
        windows_of(given_ints.grid(7, 8)), windows_of(expected.grid(7, 8))
    )


def test_full_matrix() -> None:
    grid = FullMatrix().grid(3, 5)
    assert windows_of(grid).tolist() == [[0, 0, 3, 5]]
    assert (grid.count, grid.order) == (1, 3)


def test_table_order() -> None:
    grid = FixedAspectSampling(rows=2, q=1.5, per_dim=3).grid(7, 8)
    table = window_table(grid, entries=2, weight=5)
    assert table.dtype == torch.int64
    assert table.is_contiguous()
    assert table.tolist() == [
        [5, entry, row, column, 2, 3]
        for entry in range(2)
        for row in grid.row_starts
        for column in grid.column_starts
    ]


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["rows", "per_dim"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError)],
)
def test_bad_counts(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected a positive integer, got {value!r}$"):
        FixedAspectSampling(**{name: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1.5, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_bad_q(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^q: expected a positive finite number, got "):
        FixedAspectSampling(q=value)


@pytest.mark.parametrize("value", ["FARMS", "weightwatcher", True, 0])
def test_bad_compat(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^compat: expected None or 'farms', got {value!r}$"):
        FixedAspectSampling(compat=value)
