"""The two-stage CUDA solver, at the orders where its panels, tiles and bands begin and end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from farms_fast.core import ops
from tests.support.matrix_zoo import ZOO, error_bound

pytestmark = pytest.mark.gpu

Values = NDArray[np.float64]

# Below and around one panel of 32 and one tile of 64; multiples of neither; odd and prime.
ORDERS = (1, 2, 3, 31, 32, 33, 34, 35, 63, 64, 65, 66, 97, 98, 128, 161, 257, 449, 512, 577, 613)


def gram_of(weight: Values) -> Values:
    gram = weight @ weight.T
    return np.tril(gram) + np.tril(gram, -1).T


def lapack(gram: Values) -> Values:
    return np.asarray(np.linalg.eigvalsh(gram), dtype=np.float64)


def solve(gram: torch.Tensor) -> torch.Tensor:
    return ops.eigvalsh(gram.cuda(), "two_stage").cpu()


def assert_within_bound(evals: Values, expected: Values, label: str) -> None:
    worst = np.abs(evals - expected).max()
    assert worst <= error_bound(expected), f"{label}: {worst} of {error_bound(expected)}"
    assert (np.diff(evals) >= 0).all(), label


@pytest.mark.parametrize("order", ORDERS)
def test_zoo(order: int) -> None:
    rng = np.random.default_rng(order)
    grams = {name: gram_of(make(order, rng)) for name, make in ZOO.items()}
    found = solve(torch.from_numpy(np.stack(list(grams.values())))).numpy()
    for (name, gram), evals in zip(grams.items(), found, strict=True):
        assert_within_bound(evals, lapack(gram), f"{name} of order {order}")


@pytest.mark.parametrize(
    ("order", "name"),
    [
        (1021, "rank_deficient"),
        (1021, "clustered"),
        (2000, "student_t"),
        (2001, "graded"),
        (3001, "gaussian"),  # columns of the narrow band packed closely
        (3700, "few_rows"),  # a narrow band longer than shared memory, and panels beyond 2048 rows
        (4096, "gaussian"),
    ],
)
def test_large_orders(order: int, name: str) -> None:
    gram = gram_of(ZOO[name](order, np.random.default_rng(order)))
    evals = solve(torch.from_numpy(gram).unsqueeze(0)).numpy()[0]
    assert_within_bound(evals, lapack(gram), f"{name} of order {order}")


def test_panels_longer_than_the_registers_of_a_cluster() -> None:
    order = 11008
    weight = torch.randn(order, order, dtype=torch.float64, device="cuda")
    gram = weight @ weight.T
    gram = gram.tril() + gram.tril(-1).T
    expected = torch.linalg.eigvalsh(gram).cpu().numpy()
    assert_within_bound(solve(gram.unsqueeze(0)).numpy()[0], expected, f"order {order}")


@pytest.mark.parametrize("name", ["graded", "clustered", "few", "power_law", "identity", "zero"])
def test_known_spectra_of_the_largest_layers(name: str) -> None:
    # Seen through three reflections, which keep the eigenvalues to within a few roundings.
    order = 11008
    steps = torch.arange(order, dtype=torch.float64)
    spectra = {
        "graded": 10 ** (-16 * steps / order),
        "clustered": 1 + 1e-14 * steps,
        "few": torch.where(steps < 500, 1 + steps, 0.0),
        "power_law": (1 + steps) ** -0.8,
        "identity": torch.ones(order, dtype=torch.float64),
        "zero": torch.zeros(order, dtype=torch.float64),
    }
    expected = spectra[name].sort().values
    gram = spectra[name].diag().cuda()
    for _ in range(3):
        v = torch.randn(order, dtype=torch.float64, device="cuda")
        v /= v.norm()
        p = gram @ v
        outer = torch.outer(v, p - (v @ p) * v)
        gram -= 2 * (outer + outer.T)
    found = solve(gram.unsqueeze(0))[0].numpy()
    assert_within_bound(found, expected.numpy(), f"{name} of order {order}")


@pytest.mark.parametrize("order", [1, 2, 3, 16, 17, 33, 48, 100, 257, 510])
def test_complex(order: int) -> None:
    graded = torch.randn(order, order, dtype=torch.complex128)
    graded *= torch.logspace(0, -12, order, dtype=torch.float64)[:, None]
    few = torch.randn(order, 1 + order // 5, dtype=torch.complex128)
    unitary = torch.linalg.qr(torch.randn(order, order, dtype=torch.complex128)).Q
    pairs = unitary * (1 + torch.arange(order) // 2)
    gram = torch.stack([w @ w.mH for w in (graded, few, pairs)])
    gram = gram.tril() + gram.tril(-1).mH
    found = solve(gram).numpy()
    for label, evals, matrix in zip(("graded", "few", "pairs"), found, gram.numpy(), strict=True):
        assert_within_bound(evals, lapack(matrix), f"{label} of order {order}")
    single = solve(gram.to(torch.complex64))
    assert single.dtype == torch.float32
    for evals, matrix in zip(single.numpy(), gram.to(torch.complex64).numpy(), strict=True):
        expected = lapack(matrix.astype(np.complex128))
        error = np.abs(evals - expected).max()
        assert error <= float(np.finfo(np.float32).eps) * np.abs(expected).max()


@pytest.mark.parametrize("order", [97, 512, 1021])
def test_same_bits_in_every_batch(order: int) -> None:
    # How many warps and blocks share a matrix depends on the batch; what they compute does not.
    weight = torch.randn(3, order, order, dtype=torch.float64, device="cuda")
    gram = weight @ weight.mT
    gram = (gram.tril() + gram.tril(-1).mT).repeat(100, 1, 1)
    together = solve(gram)
    assert torch.equal(together, solve(gram))
    assert torch.equal(together[:3], together[150:153])
    for i in range(3):
        assert torch.equal(together[i], solve(gram[i : i + 1])[0])
    assert torch.equal(together[:140], solve(gram[:140]))


@pytest.mark.parametrize("order", [2001, 3600])
def test_same_bits_however_many_blocks_share_a_matrix(order: int) -> None:
    # One matrix alone takes more blocks than each of 34. At 3600 the narrow band is longer than
    # shared memory.
    weight = torch.randn(order, order, dtype=torch.float64, device="cuda")
    gram = weight @ weight.T
    gram = (gram.tril() + gram.tril(-1).T).unsqueeze(0)
    alone = solve(gram)[0]
    together = solve(gram.expand(34, -1, -1).contiguous())
    assert torch.equal(together, alone.expand_as(together))


def test_captured_in_a_graph() -> None:
    weight = torch.randn(3, 512, 512, dtype=torch.float64, device="cuda")
    gram = weight @ weight.mT
    gram = gram.tril() + gram.tril(-1).mT
    expected = ops.eigvalsh(gram, "two_stage")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        evals = ops.eigvalsh(gram, "two_stage")
    for _ in range(2):
        evals.zero_()
        graph.replay()
        assert torch.equal(evals, expected)


@pytest.mark.parametrize("order", [33, 257, 1000])
def test_float32_errs_by_its_own_rounding(order: int) -> None:
    gram = gram_of(np.random.default_rng(order).standard_normal((order, order)))
    rounded = gram.astype(np.float32)
    evals = solve(torch.from_numpy(rounded).unsqueeze(0))[0]
    assert evals.dtype == torch.float32
    expected = lapack(rounded.astype(np.float64))
    # Reduced in float64: the values are those of the rounded matrix, rounded once more.
    error = np.abs(evals.numpy() - expected).max()
    assert error <= float(np.finfo(np.float32).eps) * expected[-1]


def test_caller_keeps_the_matrices() -> None:
    gram = torch.from_numpy(gram_of(np.random.default_rng(0).standard_normal((200, 200)))).cuda()
    batch = gram.unsqueeze(0).clone()
    ops.eigvalsh(batch, "two_stage")
    assert torch.equal(batch[0], gram)
