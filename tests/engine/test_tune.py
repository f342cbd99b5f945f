"""How the solvers are measured: which sizes, what is left out, and the rows that come of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from farms_fast.core import ops
from farms_fast.core.solver_table import NO_LIMIT, Row, use_rows
from farms_fast.engine import tune as engine_tune
from farms_fast.engine.tune import Grid, measure, merged, rows_of_order, tune, tuning_grids

GRID = Grid(False, (100, 200, 300, 400), (1, 4, 16), bytes=16 * 300**2 * 8)
Measured = list[tuple[int, int]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """The sizes that were measured on a GPU where cuSOLVER wins below order 200, of one matrix."""
    sizes: Measured = []

    def times(order: int, batch: int, dtype: torch.dtype, told: object) -> object:
        sizes.append((order, batch))
        library = 1.0 if order < 200 and batch == 1 else 50.0
        return {"two_stage": 5.0 * batch, "cusolver": library * batch}, library * batch / 1e3

    monkeypatch.setattr(engine_tune, "_times", times)
    return sizes


def test_rows_hold_what_lies_nearest_to_each_measured_batch(measured: Measured) -> None:
    lines: list[str] = []
    assert measure(GRID, lines.append) == [
        Row(False, 100, 2, "cusolver"),
        Row(False, 100, NO_LIMIT, "two_stage"),
        Row(False, 400, NO_LIMIT, "two_stage"),
    ]
    # Sixteen matrices of order 400 are beyond the bytes.
    assert measured == [(k, n) for k in GRID.orders for n in GRID.batches if (k, n) != (400, 16)]
    assert lines[1] == "real order 100, batch 4, us each: two_stage 5e+03  cusolver 5e+04"


def test_a_slow_call_ends_an_order(measured: Measured) -> None:
    measure(dataclasses.replace(GRID, call_seconds=0.1), lambda line: None)
    assert measured == [(k, n) for k in GRID.orders for n in (1, 4)]


def test_no_order_is_begun_when_time_is_up(measured: Measured) -> None:
    lines: list[str] = []
    assert measure(dataclasses.replace(GRID, seconds=-1), lines.append) == []
    assert lines == ["real matrices from order 100 on are left out, to be done in time"]
    assert measured == []


def test_what_does_not_fit_into_memory_ends_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(order: int, batch: int, *rest: object) -> object:
        if order * batch >= 1200:
            raise torch.OutOfMemoryError("no memory")
        return {"cusolver": 1.0}, 0.0

    monkeypatch.setattr(engine_tune, "_times", times)
    assert measure(GRID, lambda line: None) == [Row(False, 400, NO_LIMIT, "cusolver")]
    monkeypatch.setattr(engine_tune, "_times", lambda *size: times(10**4, 1))
    assert measure(GRID, lambda line: None) == []


def test_rows_of_orders_that_say_the_same_are_one() -> None:
    def rows(order: int, *choices: tuple[int, str]) -> list[Row]:
        return rows_of_order(True, order, list(choices))

    a, b = (1, "one_stage"), (9, "two_stage")
    apart = [*rows(8, a), *rows(16, a), *rows(32, a, b), *rows(64, a, b), *rows(80, b)]
    assert merged(apart) == [*rows(16, a), *rows(64, a, b), *rows(80, b)]
    assert rows(64, a, b) == [Row(True, 64, 5, "one_stage"), Row(True, 64, NO_LIMIT, "two_stage")]
    assert rows(64) == merged([]) == []


def test_what_is_measured_fits_the_gpu() -> None:
    for memory in (2**31, 2**34, 2**38):
        for quick in (False, True):
            real, complex_ = tuning_grids(memory, quick)
            assert (real.is_complex, complex_.is_complex) == (False, True)
            assert max(real.bytes, complex_.bytes) <= memory / 8
            assert max(complex_.orders) <= max(real.orders) / 2
            for grid in (real, complex_):
                assert list(grid.orders) == sorted(set(grid.orders))
                assert list(grid.batches) == sorted(set(grid.batches))
    whole, quick = (
        sum(grid.seconds for grid in tuning_grids(2**34, each)) for each in (False, True)
    )
    assert (whole, quick) == (60, 15)


@pytest.mark.gpu
def test_tuning_this_gpu() -> None:
    index = torch.cuda.current_device()
    lines: list[str] = []
    table = tune(index, quick=True, told=lines.append)
    assert not [line for line in lines if "wrong" in line]
    assert table.gpu.name == torch.cuda.get_device_name()
    assert {row.is_complex for row in table.rows} == {False, True}
    try:
        use_rows(index, table.rows)
        for row in table.rows:
            dtype = torch.complex128 if row.is_complex else torch.float64
            count = min(row.up_to_batch, 10**6)
            told = {"count": count, "dtype": dtype, "device": "cuda"}
            assert ops.solver_facts(row.up_to_order, **told).solver == row.solver
    finally:
        use_rows(index, ())
