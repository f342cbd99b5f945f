"""The error that every eigenvalue solver has to keep."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from farms_fast.testing import reference

Values = NDArray[np.floating[Any]]


def error_bound(evals: Values, eps: float = 2**-52) -> float:
    """8·k·ε·|λ|_max for the k eigenvalues of a matrix, by default in float64."""
    return 8 * len(evals) * eps * float(np.abs(evals).max())


def assert_within_bound(evals: Values, expected: Values, label: object = "") -> None:
    """Fails unless the eigenvalues ascend and are the expected ones within their type's bound."""
    worst = np.abs(evals - expected).max()
    bound = error_bound(expected, float(np.finfo(evals.dtype).eps))
    assert worst <= bound, f"{label}: off by {worst}, the bound is {bound}"
    assert (np.diff(evals) >= 0).all(), label


def assert_spectrum_of(weight: NDArray[Any], evals: Values, label: object = "") -> None:
    """Fails unless the values are W·Wᵀ's eigenvalues within the bound, none of them negative."""
    assert_within_bound(evals, reference.eigenvalues(weight), label)
    assert (evals >= 0).all(), label
