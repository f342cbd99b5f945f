"""Gram matrices of overlapping windows, whose common products are formed once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farms_fast._host as _host
from farms_fast.core import ops
from farms_fast.spectra.windows import FixedAspectSampling, window_table
from farms_fast.testing import reference
from tests.native.test_ops import DTYPES
from tests.support.matrix_zoo import error_bound

EPS = float(np.finfo(np.float64).eps)


def grid_table(
    rows: list[int], columns: list[int], size: tuple[int, int], entries: int = 1
) -> torch.Tensor:
    places = itertools.product([0], range(entries), rows, columns)
    return torch.tensor([[*place, *size] for place in places])


def shared(table: torch.Tensor, device: str, **options: bool) -> bool:
    """Whether every run of the table is shared."""
    return all(run["shared"] for run in _host.gram_sharing(table.numpy(), device, **options))


def enough_entries(device: torch.device) -> int:
    """Entries of a stack that fill the device: too few windows are faster each on its own there."""
    return 2 if device.type == "cpu" else 96


def windows_of(stack: torch.Tensor, table: torch.Tensor) -> list[np.ndarray]:
    wide = torch.complex128 if stack.is_complex() else torch.float64
    return [
        stack[entry, row : row + rows, column : column + columns].to(wide).numpy()
        for _, entry, row, column, rows, columns in table.tolist()
    ]


def assert_grams(stack: torch.Tensor, table: torch.Tensor, device: torch.device) -> None:
    order = int(table[0, 4:].min())
    found = ops.window_gram([stack.to(device)], table, order).cpu().numpy()
    for gram, window in zip(found, windows_of(stack, table), strict=True):
        expected = reference.gram(window)
        scale = float(np.abs(np.diag(expected)).max())
        assert np.abs(gram - expected).max() <= 4 * max(window.shape) * EPS * scale
        assert np.array_equal(gram, gram.conj().T)


def assert_eigenvalues(found: np.ndarray, windows: list[np.ndarray]) -> None:
    for evals, window in zip(found, windows, strict=True):
        expected = reference.eigenvalues(window)
        assert np.abs(evals - expected).max() <= error_bound(expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("shape", "saved"), [((4096, 11008), 9), ((4096, 4096), 12)])
def test_llama_shapes_take_a_ninth_of_the_products(
    device: str, shape: tuple[int, int], saved: float
) -> None:
    for rows, columns in (shape, shape[::-1]):
        table = window_table(FixedAspectSampling().grid(rows, columns), entries=2)
        for run in _host.gram_sharing(table.numpy(), device):
            assert run["windows"] == 225
            assert run["alone"] > saved * run["products"]
            assert (run["vectors"] == "rows") == (rows <= columns)


starts = st.lists(st.integers(0, 90), min_size=1, max_size=6, unique=True).map(sorted)


@settings(max_examples=200)
@given(starts, starts, st.integers(1, 70), st.integers(1, 70), st.sampled_from(["cpu", "cuda"]))
def test_plans_cover_every_window(
    rows: list[int], columns: list[int], height: int, width: int, device: str
) -> None:
    table = grid_table(rows, columns, (height, width), entries=100)
    runs = _host.gram_sharing(table.numpy(), device)
    assert sum(run["windows"] for run in runs) == len(table)
    for run in runs:
        if not run["shared"]:
            continue
        along_rows = run["vectors"] == "rows"
        assert height == width or along_rows == (height < width)
        vector_starts, inner_starts = (rows, columns) if along_rows else (columns, rows)
        order, inner = (height, width) if along_rows else (width, height)
        assert run["vector_starts"] == [start - vector_starts[0] for start in vector_starts]
        assert [start for group in run["groups"] for start in group] == [
            start - inner_starts[0] for start in inner_starts
        ]
        for group in run["groups"]:  # all of its windows hold its last start
            assert group[-1] - group[0] < inner
        pairs = np.zeros((run["vector_starts"][-1] + order,) * 2, dtype=int)
        for begin, size, end in run["panels"]:
            pairs[begin:end, begin : begin + size] += 1
        assert pairs.max() == 1
        for start in run["vector_starts"]:
            assert np.tril(pairs)[start : start + order, start : start + order].sum() == (
                order * (order + 1) // 2
            )


def test_memory_bounds_what_is_kept() -> None:
    table = window_table(FixedAspectSampling().grid(4096, 11008)).numpy()
    for device in ("cpu", "cuda"):
        (free,) = _host.gram_sharing(table, device)
        (bounded,) = _host.gram_sharing(table, device, memory=free["kept_bytes"] - 1)
        assert bounded["kept_bytes"] < free["kept_bytes"]
        assert bounded["products"] > free["products"]
    (none,) = _host.gram_sharing(table, "cuda", memory=0)
    assert none["kept_bytes"] == 0
    (alone,) = _host.gram_sharing(table, "cpu", memory=0)
    assert not alone["shared"]


def test_windows_that_share_nothing_stay_alone() -> None:
    apart = grid_table([0, 512], [0, 512], (512, 512), entries=50)
    diagonal = torch.tensor([[0, 0, 600 * i, 600 * i, 512, 512] for i in range(20)])
    twice = torch.cat([grid_table([0, 50], [0], (512, 512))] * 2)
    one = grid_table([0], [0], (512, 512))
    for table, device in itertools.product([apart, diagonal, twice, one], ["cpu", "cuda"]):
        assert not any(run["shared"] for run in _host.gram_sharing(table.numpy(), device))


def test_bad_arguments_of_the_plan_are_named() -> None:
    with pytest.raises(ValueError, match=r"table: expected an int64 array of shape \(windows, 6\)"):
        _host.gram_sharing(np.zeros((2, 5), dtype=np.int64), "cpu")
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got tpu"):
        _host.gram_sharing(np.zeros((2, 6), dtype=np.int64), "tpu")


@pytest.mark.parametrize(
    "dtype",
    DTYPES,
    ids=str,
)
@pytest.mark.parametrize("size", [(200, 200), (150, 230), (230, 150)], ids=str)
def test_grams_of_every_type_and_stride(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    entries = enough_entries(device)
    table = grid_table([3, 20, 40, 55, 70, 90, 110], [0, 15, 30, 45, 60, 77], size, entries)
    assert shared(table, device.type, either_side=False, complex=dtype.is_complex)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    base = torch.randn(entries, 345, 345, dtype=wide).to(dtype)
    picked = list(range(0, len(table), 37))[:60]
    for stack in (base, base.mT, base.mT.flip(0).contiguous().mT):
        found = ops.window_gram([stack.to(device)], table, min(size))
        assert torch.equal(found, found.mH)
        grams = found[picked].cpu().numpy()
        for gram, window in zip(grams, windows_of(stack, table[picked]), strict=True):
            expected = reference.gram(window)
            scale = float(np.abs(np.diag(expected)).max())
            assert np.abs(gram - expected).max() <= 4 * max(size) * EPS * scale


@settings(max_examples=40)
@given(starts, starts, st.integers(8, 140), st.integers(8, 140), st.integers(0, 99), st.booleans())
def test_any_grid_any_part_of_it_any_order(
    rows: list[int], columns: list[int], height: int, width: int, seed: int, transposed: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    stack = torch.randn(2, 90 + height, 90 + width, dtype=torch.float64, generator=rng)
    if transposed:
        stack = stack.mT.contiguous().mT
    table = grid_table(rows, columns, (height, width), entries=2)
    mixed = table[torch.randperm(len(table), generator=rng)]
    first, last = sorted(torch.randint(0, len(table) + 1, (2,), generator=rng).tolist())
    for part in (table, mixed[torch.argsort(mixed[:, 1], stable=True)], table[first:last]):
        if len(part):
            assert_grams(stack, part, torch.device("cpu"))


@pytest.mark.parametrize("size", [(200, 200), (180, 220), (220, 180)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150])
def test_eigenvalues(device: torch.device, size: tuple[int, int], scale: float) -> None:
    entries = enough_entries(device)
    table = grid_table([0, 12, 30, 44, 60, 80, 101], [5, 20, 40, 44, 65, 80], size, entries)
    assert shared(table, device.type)
    stack = torch.randn(entries, 330, 330, dtype=torch.float64) * scale
    order = min(size)
    found = ops.window_eigvalsh([stack.to(device)], table, order).cpu().numpy()
    assert_eigenvalues(found[-24:], windows_of(stack, table[-24:]))
    again = ops.window_eigvalsh([stack.to(device)], table, order).cpu().numpy()
    assert np.array_equal(found, again)


def test_weights_that_share_beside_weights_that_do_not(device: torch.device) -> None:
    entries = enough_entries(device)
    stacks = [torch.randn(entries, 300, 300), torch.randn(2, 200, 260), torch.randn(1, 600, 220)]
    tables = [
        grid_table([0], [0], (200, 260), entries=2),
        grid_table([0, 16, 33, 66, 80, 100], [0, 20, 40, 90], (200, 200), entries),
        grid_table([0, 300], [7], (300, 200)),
    ]
    for table, weight in zip(tables, (1, 0, 2), strict=True):
        table[:, 0] = weight
    table = torch.cat(tables)
    found = ops.window_eigvalsh([s.to(device) for s in stacks], table, 200).cpu().numpy()
    for b in (*range(14), *range(len(table) - 3, len(table))):
        (window,) = windows_of(stacks[table[b, 0]], table[b : b + 1])
        assert_eigenvalues(found[b : b + 1], [window])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_value_that_is_not_finite_spoils_the_windows_that_hold_it(
    device: torch.device, bad: float, transposed: bool
) -> None:
    entries = enough_entries(device)
    table = grid_table([0, 14, 30, 60, 80, 101], [0, 20, 50, 90], (200, 200), entries)
    assert shared(table, device.type)
    stack = torch.randn(entries, 301, 290, dtype=torch.float64)
    if transposed:
        stack = stack.mT.contiguous().mT
    clean = ops.window_eigvalsh([stack.to(device)], table, 200).cpu().numpy()
    for row, column in ((25, 3), (150, 150), (240, 60), (300, 289), (10, 270)):
        spoiled = stack.clone()
        spoiled[1, row, column] = bad
        found = ops.window_eigvalsh([spoiled.to(device)], table, 200).cpu().numpy()
        for b, (_, entry, top, left, rows, columns) in enumerate(table.tolist()):
            if entry == 1 and top <= row < top + rows and left <= column < left + columns:
                assert np.isnan(found[b]).all()
            else:
                assert np.array_equal(found[b], clean[b])


def test_budgets_change_no_more_than_rounding(device: torch.device) -> None:
    entries = enough_entries(device)
    table = grid_table([0, 14, 30, 60, 80, 101], [0, 20, 50, 90], (200, 200), entries)
    stack = torch.randn(entries, 301, 290, dtype=torch.float64)
    # From what a few matrices take to what all of them do, and no bound.
    for budget in (8 * 2**20, 16 * 2**20, 64 * 2**20, 2**30, 0):
        found = ops.window_eigvalsh([stack.to(device)], table, 200, memory_budget=budget)
        assert_eigenvalues(found.cpu().numpy()[:24], windows_of(stack, table[:24]))


def test_float32_errs_by_its_own_rounding(device: torch.device) -> None:
    entries = enough_entries(device)
    table = grid_table([0, 14, 30, 60, 80, 101], [0, 20, 50, 90], (200, 200), entries)
    stack = torch.randn(entries, 301, 290)
    found = ops.window_eigvalsh([stack.to(device)], table, 200, torch.float32).cpu().numpy()
    assert found.dtype == np.float32
    eps = float(np.finfo(np.float32).eps)
    for evals, window in zip(found[:12], windows_of(stack, table[:12]), strict=True):
        expected = reference.eigenvalues(window)
        assert np.abs(evals - expected).max() <= 8 * 200 * eps * expected[-1]


def test_windows_wider_than_the_rest_of_a_panel(device: torch.device) -> None:
    # A gap along the vectors, and starts closer to each other than a step of the product.
    entries = enough_entries(device)
    table = grid_table([0, 1, 2, 300, 303], [0, 1, 5, 6], (170, 190), entries)
    stack = torch.randn(entries, 473, 196, dtype=torch.float64)
    picked = table[: 2 * 20]
    found = ops.window_gram([stack.to(device)], table, 170).cpu().numpy()[: len(picked)]
    for gram, window in zip(found, windows_of(stack, picked), strict=True):
        np.testing.assert_allclose(gram, reference.gram(window), rtol=0, atol=1e-12)
