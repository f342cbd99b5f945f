"""Rows of solvers that a device is given at run time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from farms_fast.core import ops


class TestChoicesOfADevice:
    """Rows given at run time, here to the GPUs that are told of by their compute capability."""

    @pytest.fixture(autouse=True)
    def no_rows_afterwards(self) -> Iterator[None]:
        yield
        self.give()

    def give(self, *rows: tuple[int, int, int, str]) -> None:
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[]] * 4
        torch.ops.farms_fast.set_solver_choices(-1, *columns)

    def solver(
        self, order: int, count: int = 1, capability: int = 80, dtype: torch.dtype = torch.float64
    ) -> str:
        told = {"dtype": dtype, "count": count, "compute_capability": capability}
        return ops.solver_facts(order, device="cuda", **told).solver

    def test_they_come_first_and_what_they_leave_out_is_as_before(self) -> None:
        sizes = [(100, 1), (100, 11), (300, 10), (301, 10), (1000, 1), (1000, 3)]
        for capability in (75, 80, 90):
            before = [self.solver(*size, capability) for size in sizes]
            self.give((0, 300, 10, "cusolver"), (0, 300, 2**62, "two_stage"))
            own = "two_stage" if capability >= 80 else "cusolver"
            found = [self.solver(*size, capability) for size in sizes]
            assert found == ["cusolver", own, "cusolver", *before[3:]]
            self.give()
            assert [self.solver(*size, capability) for size in sizes] == before

    def test_real_and_complex_rows_are_apart(self) -> None:
        self.give((1, 500, 2**62, "cusolver"))
        assert self.solver(60, dtype=torch.complex64) == "cusolver"
        assert self.solver(60) == "one_stage"

    def test_a_row_whose_solver_takes_no_such_order_says_nothing(self) -> None:
        self.give((0, 400, 2**62, "one_stage"))
        assert self.solver(160) == self.solver(400, capability=90, count=1000) == "one_stage"
        assert self.solver(161) == "two_stage"

    def test_a_named_solver_is_taken_all_the_same(self) -> None:
        self.give((0, 500, 2**62, "cusolver"))
        told = {"device": "cuda", "compute_capability": 80, "solver": "two_stage"}
        assert ops.solver_facts(100, **told).solver == "two_stage"

    @pytest.mark.parametrize(
        ("message", "arguments"),
        [
            ("'device': expected the index of a GPU, or -1, got -2", (-2, [], [], [], [])),
            (
                "'solvers': expected lists of one length, got 1",
                (-1, [0], [1, 2], [1], ["cusolver"]),
            ),
            ("'up_to_order': expected positive orders, got 0", (-1, [0], [0], [1], ["cusolver"])),
            ("'up_to_batch': expected positive batches, got 0", (-1, [0], [1], [0], ["cusolver"])),
            ("'solvers': expected names of CUDA solvers, got x", (-1, [0], [1], [1], ["x"])),
        ],
    )
    def test_bad_rows_are_named_and_change_nothing(
        self, message: str, arguments: tuple[object, ...]
    ) -> None:
        self.give((0, 500, 2**62, "cusolver"))
        with pytest.raises(RuntimeError, match=f"set_solver_choices: argument {message}"):
            torch.ops.farms_fast.set_solver_choices(*arguments)
        assert self.solver(100) == "cusolver"

    def test_whose_measurements_are_shipped(self) -> None:
        found = [torch.ops.farms_fast.shipped_choices(each) for each in (75, 80, 90, 100, 103, 120)]
        assert found == [0, 0, 90, 90, 90, 0]
