"""The two-stage CPU solver at the orders where its panels, tiles and chases begin and end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from farms_fast.core import ops
from tests.support.matrix_zoo import ZOO

Values = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

PRECISION = {torch.float32: np.float32, torch.float64: np.float64}

# Around one and two panels of 32 and one tile of 128, and multiples of neither.
ORDERS = (1, 2, 3, 31, 32, 33, 34, 35, 63, 64, 65, 66, 67, 97, 127, 128, 129, 161, 257, 449)


def solve(symmetric: Values, dtype: torch.dtype = torch.float64) -> Floats:
    batch = torch.from_numpy(symmetric.copy()).to(dtype).unsqueeze(0)
    return np.asarray(ops.eigvalsh(batch, "two_stage")[0].numpy())


def assert_within_bound(evals: Floats, expected: Floats, label: str) -> None:
    bound = 8 * len(expected) * np.finfo(evals.dtype).eps * np.abs(expected).max()
    worst = np.abs(evals - expected).max()
    assert worst <= bound, f"{label}: {worst} of {bound}"
    assert (np.diff(evals) >= 0).all(), label


def tridiagonal(diagonal: Values, off_diagonal: Values) -> Values:
    return np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)


def path(k: int) -> Values:
    """No diagonal: the pivots of the tridiagonal iteration vanish."""
    return tridiagonal(np.zeros(k), np.ones(k - 1))


def wilkinson(k: int) -> Values:
    """Pairs of eigenvalues that agree to rounding though nothing splits the matrix."""
    return tridiagonal(np.abs(np.arange(k) - k // 2).astype(np.float64), np.ones(k - 1))


def graded(k: int) -> Values:
    scales = np.logspace(0, -30, k)
    return tridiagonal(scales, scales[1:])


def nearly_split(k: int) -> Values:
    return tridiagonal(np.zeros(k), np.where(np.arange(k - 1) % 2, 1e-170, 1.0))


def exchange(k: int) -> Values:
    return np.eye(k)[::-1]


def arrow(k: int) -> Values:
    matrix = np.diag(np.arange(k, dtype=np.float64))
    matrix[0] = matrix[:, 0] = 1
    return matrix


SPECIAL: dict[str, Callable[[int], Values]] = {
    "path": path,
    "wilkinson": wilkinson,
    "graded": graded,
    "graded up": lambda k: graded(k)[::-1, ::-1],
    "nearly split": nearly_split,
    "exchange": exchange,
    "arrow": arrow,
    "negative ones": lambda k: -np.ones((k, k)),
    "zero": lambda k: np.zeros((k, k)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_and_special_matrices(order: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(order)
    gaussian = rng.standard_normal((order, order))
    cases = {"gaussian": gaussian + gaussian.T}
    cases |= {name: make(order) for name, make in SPECIAL.items()}
    for name in ("rank_deficient", "clustered", "graded"):
        weight = ZOO[name](order, rng)
        gram = weight @ weight.T
        cases[f"Gram of {name}"] = np.tril(gram) + np.tril(gram, -1).T
    for name, matrix in cases.items():
        stored = matrix.astype(PRECISION[dtype]).astype(np.float64)
        label = f"{name} of order {order}"
        assert_within_bound(solve(matrix, dtype), np.linalg.eigvalsh(stored), label)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float64, (-1000, -600, -333, -331, 331, 333, 600, 1000)),
        (torch.float32, (-100, -60, -34, -32, 32, 34, 60, 100)),
    ],
    ids=str,
)
def test_scales(dtype: torch.dtype, exponents: tuple[int, ...]) -> None:
    gaussian = np.random.default_rng(0).standard_normal((150, 150)).astype(np.float32)
    matrix = (gaussian + gaussian.T).astype(np.float64)
    expected = np.linalg.eigvalsh(matrix)
    for exponent in exponents:
        evals = solve(np.ldexp(matrix, exponent), dtype).astype(np.float64)
        bound = 8 * 150 * torch.finfo(dtype).eps * np.abs(expected).max()
        assert np.abs(np.ldexp(evals, -exponent) - expected).max() <= bound, exponent


def test_auto_takes_it_for_large_real_matrices_only() -> None:
    for order, dtype, name in [
        (40, torch.float64, "lapack"),
        (300, torch.float64, "two_stage"),
        (300, torch.float32, "two_stage"),
        (300, torch.complex128, "lapack"),
    ]:
        matrix = torch.randn(1, order, order, dtype=dtype)
        matrix = matrix + matrix.transpose(1, 2).conj()
        assert torch.equal(ops.eigvalsh(matrix), ops.eigvalsh(matrix, name)), (order, dtype)


def test_complex_matrices_are_refused() -> None:
    message = "'solver': expected one that takes order 5 of complex matrices on the CPU, got two_s"
    with pytest.raises(RuntimeError, match=message):
        ops.eigvalsh(torch.eye(5, dtype=torch.complex64).unsqueeze(0), "two_stage")
