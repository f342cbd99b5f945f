"""Matrices on which eigenvalue solvers go wrong, each k x k in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def _orthogonal(k: int, rng: np.random.Generator) -> Matrix:
    return np.linalg.qr(rng.standard_normal((k, k)))[0]


def with_singular_values(values: Matrix, rng: np.random.Generator) -> Matrix:
    k = len(values)
    return (_orthogonal(k, rng) * values) @ _orthogonal(k, rng)


def _low_rank(k: int, rng: np.random.Generator) -> Matrix:
    rank = max(1, k // 3)
    return rng.standard_normal((k, rank)) @ rng.standard_normal((rank, k))


def _duplicated_rows(k: int, rng: np.random.Generator) -> Matrix:
    return rng.standard_normal((k, k))[np.arange(k) // 2]


def _few_rows(k: int, rng: np.random.Generator) -> Matrix:
    matrix = np.zeros((k, k))
    matrix[:: max(1, k // 3)] = rng.standard_normal((len(matrix[:: max(1, k // 3)]), k))
    return matrix


ZOO: dict[str, Callable[[int, np.random.Generator], Matrix]] = {
    "gaussian": lambda k, rng: rng.standard_normal((k, k)),
    "student_t": lambda k, rng: rng.standard_t(2.5, (k, k)),
    "power_law": lambda k, rng: with_singular_values((1 + np.arange(k)) ** -1.5, rng),
    "rank_deficient": _low_rank,
    "duplicated_rows": _duplicated_rows,
    "few_rows": _few_rows,
    "zero": lambda k, rng: np.zeros((k, k)),
    "identity": lambda k, rng: np.eye(k),
    "ones": lambda k, rng: np.ones((k, k)),
    "clustered": lambda k, rng: with_singular_values(
        1 + 1e-12 * rng.standard_normal(k) + (np.arange(k) % 3), rng
    ),
    "graded": lambda k, rng: rng.standard_normal((k, k)) * np.logspace(0, -16, k)[:, None],
    "graded_up": lambda k, rng: rng.standard_normal((k, k)) * np.logspace(-16, 0, k)[:, None],
    "huge": lambda k, rng: 1e150 * rng.standard_normal((k, k)),
    "tiny": lambda k, rng: 1e-150 * rng.standard_normal((k, k)),
    "large": lambda k, rng: 1e30 * rng.standard_normal((k, k)),
    "small": lambda k, rng: 1e-30 * rng.standard_normal((k, k)),
}


def error_bound(evals: Matrix) -> float:
    """8·k·ε·λ_max, what every float64 solver has to keep."""
    return 8 * len(evals) * float(np.finfo(np.float64).eps) * float(evals[-1])
