"""The one-stage CUDA solver, at every order that it takes up to 130 and a spread above."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from farms_fast import ops, reference
from farms_fast.windows import FullMatrix, window_table
from tests.zoo import ZOO, error_bound

pytestmark = pytest.mark.gpu

Values = NDArray[np.float64]

LARGEST = 160
ORDERS = (*range(1, 131), 137, 143, 144, 145, 151, 159, LARGEST)
# The last order of each of the kernel's sizes, and the one after it.
EDGES = (1, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 104, 105, 128, 129, LARGEST)


def solve(stack: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    table = window_table(FullMatrix().grid(*stack.shape[1:]), stack.shape[0], 0)
    order = min(stack.shape[1:])
    return ops.window_eigvalsh([stack.cuda()], table, order, dtype, "one_stage").cpu()


def assert_within_bound(evals: Values, expected: Values, label: str) -> None:
    worst = np.abs(evals - expected).max()
    assert worst <= error_bound(expected), f"{label}: {worst} of {error_bound(expected)}"
    assert (np.diff(evals) >= 0).all(), label
    assert (evals >= 0).all(), label


@pytest.mark.parametrize("order", ORDERS)
def test_zoo(order: int) -> None:
    rng = np.random.default_rng(order)
    weights = {name: make(order, rng) for name, make in ZOO.items()}
    found = solve(torch.from_numpy(np.stack(list(weights.values())))).numpy()
    for (name, weight), evals in zip(weights.items(), found, strict=True):
        assert_within_bound(evals, reference.eigenvalues(weight), f"{name} of order {order}")


@pytest.mark.parametrize("order", EDGES)
def test_windows_longer_than_wide_and_strided(order: int) -> None:
    double = torch.randn(2, 2 * order + 1, 5 * order + 3, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        base = double.to(dtype).cuda()
        views = {
            "wide": base[:, :order],
            "tall": base[:, :order].mT,
            "strided": base[:, : 2 * order : 2, : 3 * order : 3],
            "stack last": base[:, :order, : order + 1]
            .permute(1, 2, 0)
            .contiguous()
            .permute(2, 0, 1),
        }
        for label, view in views.items():
            for evals, weight in zip(solve(view).numpy(), view.double().cpu().numpy(), strict=True):
                expected = reference.eigenvalues(weight)
                assert_within_bound(evals, expected, f"{label} {dtype} of order {order}")


@pytest.mark.parametrize("order", [k for k in EDGES if 2 * k <= LARGEST])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(order: int, dtype: torch.dtype) -> None:
    stack = torch.randn(3, order, order + 2, dtype=dtype)
    for view in (stack, stack.mT):
        for evals, weight in zip(solve(view).numpy(), view, strict=True):
            expected = reference.eigenvalues(weight.to(torch.complex128).numpy())
            assert_within_bound(evals, expected, f"{dtype} of order {order}")
    gram = (stack @ stack.mH).to(torch.complex128)
    found = ops.eigvalsh(gram.cuda(), "one_stage").cpu().numpy()
    for evals, matrix in zip(found, gram.numpy(), strict=True):
        expected = np.linalg.eigvalsh(matrix)
        assert np.abs(evals - expected).max() <= error_bound(expected)


@pytest.mark.parametrize("order", EDGES)
def test_ready_matrices_keep_their_negative_eigenvalues(order: int) -> None:
    symmetric = torch.randn(4, order, order, dtype=torch.float64)
    symmetric = symmetric + symmetric.mT - 2 * torch.eye(order, dtype=torch.float64)
    found = ops.eigvalsh(symmetric.cuda(), "one_stage").cpu().numpy()
    for evals, matrix in zip(found, symmetric.numpy(), strict=True):
        expected = np.linalg.eigvalsh(matrix)
        largest = np.abs(expected).max()
        assert np.abs(evals - expected).max() <= 8 * order * np.finfo(np.float64).eps * largest
        assert (np.diff(evals) >= 0).all()


@pytest.mark.parametrize("order", EDGES)
def test_float32_is_the_float64_result_rounded(order: int) -> None:
    stack = torch.randn(5, order, order)
    single = solve(stack, torch.float32)
    assert single.dtype == torch.float32
    assert torch.equal(single, solve(stack).float())


@pytest.mark.parametrize("order", EDGES)
def test_same_bits_wherever_a_window_stands_in_the_batch(order: int) -> None:
    stack = torch.randn(300, order, order, dtype=torch.float64)
    once = solve(stack)
    assert torch.equal(once, solve(stack))
    assert torch.equal(once.flip(0), solve(stack.flip(0)))


def test_captured_in_a_graph() -> None:
    gram = torch.randn(50, 100, 100, dtype=torch.float64, device="cuda")
    gram = gram @ gram.mT
    expected = ops.eigvalsh(gram, "one_stage")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.eigvalsh(gram, "one_stage")
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
