"""Eigenvalues against LAPACK's singular values, over the zoo, on every device and solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farms_fast import build_info
from farms_fast.core import ops
from farms_fast.spectra.windows import FullMatrix, window_table
from farms_fast.testing import reference
from tests.support.bounds import assert_spectrum_of, assert_within_bound
from tests.support.matrix_zoo import ZOO
from tests.support.solvers import one_stage_largest

SOLVERS = build_info()["solvers"]
CASES = [("cpu", solver) for solver in SOLVERS["cpu"]] + [
    pytest.param("cuda", solver, marks=pytest.mark.gpu) for solver in SOLVERS["cuda"] or ["auto"]
]
ONE_STAGE = (one_stage_largest(), one_stage_largest() // 2)
# The largest real and complex order of the solvers that have one.
LARGEST = {
    ("cuda", "one_stage"): ONE_STAGE,
    ("cuda", "two_stage"): (16384, 8192),
    ("cpu", "two_stage"): (2**31, 0),
}
SMALL_ORDERS = (1, 2, 3, 31, 32, 33, 100)


def solve(
    stacks: list[torch.Tensor], solver: str, dtype: torch.dtype = torch.float64, memory: int = 0
) -> np.ndarray:
    table = torch.cat(
        [
            window_table(FullMatrix().grid(*stack.shape[1:]), stack.shape[0], weight)
            for weight, stack in enumerate(stacks)
        ]
    )
    order = min(stacks[0].shape[1:])
    return ops.window_eigvalsh(stacks, table, order, dtype, solver, memory).cpu().numpy()


def refused(where: str, solver: str, stack: torch.Tensor) -> bool:
    """Whether the solver does not take such matrices; if so, that it says it clearly."""
    order = min(stack.shape[1:])
    if order <= LARGEST.get((where, solver), (2**31, 2**31))[stack.is_complex()]:
        return False
    with pytest.raises(RuntimeError, match=r"'solver': expected one that takes order"):
        solve([stack], solver)
    return True


@pytest.mark.parametrize(("where", "solver"), CASES)
@pytest.mark.parametrize("order", SMALL_ORDERS)
def test_zoo(where: str, solver: str, order: int) -> None:
    rng = np.random.default_rng(order)
    weights = {name: make(order, rng) for name, make in ZOO.items()}
    stack = torch.from_numpy(np.stack(list(weights.values()))).to(where)
    for (name, weight), evals in zip(weights.items(), solve([stack], solver), strict=True):
        assert_spectrum_of(weight, evals, f"{name} of order {order}")


@pytest.mark.slow
@pytest.mark.parametrize(("where", "solver"), CASES)
@pytest.mark.parametrize(
    ("order", "names"),
    [
        (512, ["gaussian", "rank_deficient", "graded", "clustered"]),
        (2000, ["student_t", "few_rows"]),
    ],
)
def test_zoo_of_large_orders(where: str, solver: str, order: int, names: list[str]) -> None:
    rng = np.random.default_rng(order)
    for name in names:
        weight = ZOO[name](order, rng)
        stack = torch.from_numpy(weight).unsqueeze(0).to(where)
        if not refused(where, solver, stack):
            assert_spectrum_of(weight, solve([stack], solver)[0], f"{name} of order {order}")


@pytest.mark.parametrize(("where", "solver"), CASES)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (33, 33), (1, 9), (9, 1)], ids=str)
def test_input_dtypes_and_strides(
    where: str, solver: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    base = torch.randn(2, 2 * shape[0] + 1, 3 * shape[1] + 2, dtype=torch.float64).to(dtype)
    views = {
        "contiguous": base[:, : shape[0], : shape[1]].contiguous(),
        "sliced": base[:, : shape[0], 1 : shape[1] + 1],
        "strided": base[:, : 2 * shape[0] : 2, : 3 * shape[1] : 3],
        "transposed": base[:, : shape[0], : shape[1]].contiguous().mT.contiguous().mT,
        "expanded": base[:, :1, : shape[1]].expand(2, *shape),
        "stack last": base[:, : shape[0], : shape[1]]
        .permute(1, 2, 0)
        .contiguous()
        .permute(2, 0, 1),
    }
    for label, view in views.items():
        for evals, weight in zip(solve([view.to(where)], solver), view, strict=True):
            assert_spectrum_of(weight.double().numpy(), evals, f"{label} {dtype} {shape}")


@pytest.mark.parametrize(("where", "solver"), CASES)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (20, 31), (31, 20), (65, 65)], ids=str)
def test_complex(where: str, solver: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, dtype=dtype)
    if refused(where, solver, stack.to(where)):
        return
    for evals, weight in zip(solve([stack.to(where)], solver), stack, strict=True):
        assert_spectrum_of(weight.to(torch.complex128).numpy(), evals, f"{dtype} {shape}")


@pytest.mark.parametrize(("where", "solver"), CASES)
def test_float32_errs_by_its_own_rounding(where: str, solver: str) -> None:
    weight = np.random.default_rng(0).standard_normal((120, 120))
    expected = reference.eigenvalues(weight)
    stack = torch.from_numpy(weight).unsqueeze(0).to(where)
    evals = solve([stack], solver, torch.float32)[0]
    assert evals.dtype == np.float32
    assert_within_bound(evals, expected)
    # Smaller errors would be those of float64.
    assert np.abs(evals - expected).max() > 1e-3 * np.finfo(np.float32).eps * expected[-1]


@pytest.mark.parametrize(("where", "solver"), CASES)
def test_one_call_over_several_weights(where: str, solver: str) -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape) for shape in [(2, 24, 60), (3, 24, 24), (1, 90, 24)]]
    found = solve([torch.from_numpy(weight).to(where) for weight in weights], solver)
    matrices = [matrix for weight in weights for matrix in weight]
    assert len(found) == len(matrices)
    for evals, matrix in zip(found, matrices, strict=True):
        assert_spectrum_of(matrix, evals, str(matrix.shape))


@pytest.mark.parametrize(("where", "solver"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_spoils_its_own_window_only(
    where: str, solver: str, bad: float
) -> None:
    weight = np.random.default_rng(2).standard_normal((4, 40, 50))
    weight[1, 7, 11] = bad
    found = solve([torch.from_numpy(weight).to(where)], solver)
    assert np.isnan(found[1]).all()
    for entry in (0, 2, 3):
        assert_spectrum_of(weight[entry], found[entry], f"entry {entry}")


@pytest.mark.parametrize(("where", "solver"), CASES)
def test_ready_gram_matrices(where: str, solver: str) -> None:
    rng = np.random.default_rng(3)
    symmetric = rng.standard_normal((5, 37, 37))
    symmetric = symmetric + symmetric.transpose(0, 2, 1)
    gram = torch.from_numpy(symmetric).to(where)
    before = gram.clone()
    evals = ops.eigvalsh(gram, solver).cpu().numpy()
    expected = np.linalg.eigvalsh(symmetric)
    assert (expected[:, 0] < 0).all()  # nothing is clipped where negative values are true ones
    for found, exact in zip(evals, expected, strict=True):
        assert_within_bound(found, exact)
    assert torch.equal(gram, before)


@pytest.mark.parametrize(("where", "solver"), CASES)
def test_same_bits_again_and_the_same_values_in_chunks(where: str, solver: str) -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((12, 64, 64))
    stack = torch.from_numpy(weight).to(where)
    once = solve([stack], solver)
    assert np.array_equal(once, solve([stack], solver))
    for memory in (64 * 2**20, 8 * 2**20):
        for evals, matrix in zip(solve([stack], solver, memory=memory), weight, strict=True):
            assert_spectrum_of(matrix, evals, f"budget {memory}")


@pytest.mark.parametrize(("where", "solver"), CASES)
def test_a_budget_below_one_matrix_says_what_is_needed(where: str, solver: str) -> None:
    stack = torch.randn(1, 50, 50, dtype=torch.float64, device=where)
    if solver == "one_stage":  # takes no memory but the result's
        assert np.isfinite(solve([stack], solver, memory=1000)).all()
        return
    with pytest.raises(RuntimeError, match=r"'memory_budget': expected at least the \d+ bytes"):
        solve([stack], solver, memory=1000)
