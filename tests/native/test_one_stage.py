"""The one-stage CUDA solver, in blocks and in clusters: every order up to 130, a spread above."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from farms_fast.core import ops
from farms_fast.spectra.windows import FullMatrix, window_table
from tests.support.bounds import assert_spectrum_of, assert_within_bound
from tests.support.matrix_zoo import ZOO
from tests.support.solvers import one_stage_largest

pytestmark = pytest.mark.gpu

Values = NDArray[np.float64]

LARGEST = one_stage_largest()
IN_CLUSTERS = (161, 167, 176, 191, 192, 193, 199, 224, 227, 251, 255, 256, 257, 263, 288, 307)
IN_LARGE_CLUSTERS = (320, 333, 353, 383, 384, 385, 400, 401, 419, 447, 448, 449, 487, 511, 512)
SPREAD = (137, 143, 144, 145, 151, 159, 160, *IN_CLUSTERS, *IN_LARGE_CLUSTERS)
ORDERS = tuple(k for k in (*range(1, 131), *SPREAD) if k <= LARGEST)
# The last order of each of the kernel's sizes, and the one after it.
BLOCK_EDGES = (1, 16, 17, 32, 33, 48, 49, 64, 65, 80, 81, 104, 105, 128, 129, 160)
CLUSTER_EDGES = (161, 192, 193, 256, 257, 384, 385, 512)
EDGES = tuple(k for k in (*BLOCK_EDGES, *CLUSTER_EDGES) if k <= LARGEST)
# Matrices that go to clusters of eight blocks, of four and of two, the last in several rounds.
BATCHES = (1, 9, 24, 50, 150)


def solve(stack: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    table = window_table(FullMatrix().grid(*stack.shape[1:]), stack.shape[0], 0)
    order = min(stack.shape[1:])
    return ops.window_eigvalsh([stack.cuda()], table, order, dtype, "one_stage").cpu()


@pytest.mark.parametrize("order", ORDERS)
def test_zoo(order: int) -> None:
    rng = np.random.default_rng(order)
    weights = {name: make(order, rng) for name, make in ZOO.items()}
    found = solve(torch.from_numpy(np.stack(list(weights.values())))).numpy()
    for (name, weight), evals in zip(weights.items(), found, strict=True):
        assert_spectrum_of(weight, evals, f"{name} of order {order}")


@pytest.mark.parametrize("order", [k for k in (163, 192, 224, 256, 319, 384, 448) if k <= LARGEST])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches_of_clusters(order: int, batch: int) -> None:
    rng = np.random.default_rng(order)
    weights = [make(order, rng) for name, make in ZOO.items() if name in ("clustered", "graded")]
    stack = torch.from_numpy(np.stack(weights))[torch.arange(batch) % 2]
    found = solve(stack)
    assert torch.equal(found, solve(stack))
    assert torch.equal(found, found[torch.arange(batch) % 2])
    for weight, evals in zip(weights, found.numpy(), strict=False):
        assert_spectrum_of(weight, evals, f"{batch} of order {order}")


@pytest.mark.parametrize("order", [k for k in (16, 100, 165, 256, 384) if k <= LARGEST])
@pytest.mark.parametrize("decades", [45, 90, 140])
def test_columns_whose_squares_leave_the_exponent_range(order: int, decades: int) -> None:
    rng = np.random.default_rng(decades)
    weight = rng.standard_normal((order, order)) * np.logspace(0, -decades, order)[:, None]
    evals = solve(torch.from_numpy(weight).unsqueeze(0)).numpy()[0]
    assert_spectrum_of(weight, evals, f"{decades} decades, order {order}")


@pytest.mark.parametrize("order", [k for k in (16, 100, 256, 384) if k <= LARGEST])
def test_one_bad_window_leaves_the_others_alone(order: int) -> None:
    stack = torch.randn(20, order, order, dtype=torch.float64)
    expected = solve(stack)
    for bad in (float("nan"), float("inf"), 1e200):
        spoilt = stack.clone()
        spoilt[7, order // 2, order // 3] = bad
        found = solve(spoilt)
        assert found[7].isnan().all()
        others = torch.arange(20) != 7
        assert torch.equal(found[others], expected[others])


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
                assert_spectrum_of(weight, evals, f"{label} {dtype} of order {order}")


@pytest.mark.parametrize("order", [k for k in EDGES if 2 * k <= LARGEST])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(order: int, dtype: torch.dtype) -> None:
    stack = torch.randn(3, order, order + 2, dtype=dtype)
    for view in (stack, stack.mT):
        for evals, weight in zip(solve(view).numpy(), view, strict=True):
            wide = weight.to(torch.complex128).numpy()
            assert_spectrum_of(wide, evals, f"{dtype} of order {order}")
    gram = (stack @ stack.mH).to(torch.complex128)
    found = ops.eigvalsh(gram.cuda(), "one_stage").cpu().numpy()
    for evals, matrix in zip(found, gram.numpy(), strict=True):
        assert_within_bound(evals, np.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("order", [k for k in (257, 300, 512) if k <= LARGEST])
def test_large_windows_a_few_at_a_time(order: int) -> None:
    # Their Gram matrices are formed before, as many as the memory holds.
    stack = torch.randn(7, order, order + 5, dtype=torch.float64)
    table = window_table(FullMatrix().grid(*stack.shape[1:]), stack.shape[0], 0)
    budget = 3 * order * order * 8
    found = ops.window_eigvalsh(
        [stack.cuda()], table, order, torch.float64, "one_stage", budget
    ).cpu()
    assert torch.equal(found, solve(stack))
    with pytest.raises(RuntimeError, match=r"'memory_budget': expected at least"):
        ops.window_eigvalsh([stack.cuda()], table, order, torch.float64, "one_stage", budget // 4)


@pytest.mark.parametrize("order", EDGES)
def test_ready_matrices_keep_their_negative_eigenvalues(order: int) -> None:
    symmetric = torch.randn(4, order, order, dtype=torch.float64)
    symmetric = symmetric + symmetric.mT - 2 * torch.eye(order, dtype=torch.float64)
    found = ops.eigvalsh(symmetric.cuda(), "one_stage").cpu().numpy()
    for evals, matrix in zip(found, symmetric.numpy(), strict=True):
        assert_within_bound(evals, np.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("order", EDGES)
def test_float32_is_the_float64_result_rounded(order: int) -> None:
    stack = torch.randn(5, order, order)
    single = solve(stack, torch.float32)
    assert single.dtype == torch.float32
    assert torch.equal(single, solve(stack).float())


@pytest.mark.parametrize("order", EDGES)
def test_same_bits_wherever_a_window_stands_in_the_batch(order: int) -> None:
    stack = torch.randn(300 if order <= 160 else 70, order, order, dtype=torch.float64)
    once = solve(stack)
    assert torch.equal(once, solve(stack))
    assert torch.equal(once.flip(0), solve(stack.flip(0)))


@pytest.mark.parametrize("order", [k for k in (100, 256, 448) if k <= LARGEST])
def test_captured_in_a_graph(order: int) -> None:
    gram = torch.randn(50, order, order, dtype=torch.float64, device="cuda")
    gram = gram @ gram.mT
    expected = ops.eigvalsh(gram, "one_stage")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.eigvalsh(gram, "one_stage")
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("order", [k for k in (100, 256) if k <= LARGEST])
def test_no_memory_but_the_results(order: int) -> None:
    gram = torch.eye(order, dtype=torch.float64, device="cuda").repeat(200, 1, 1)
    ops.eigvalsh(gram[:1].contiguous(), "one_stage")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = ops.eigvalsh(gram, "one_stage")
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= found.numel() * 8 + 4096
    for evals in found.cpu().numpy():
        assert_within_bound(evals, np.ones(order))
