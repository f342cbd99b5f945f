"""Types of the pybind11 module in csrc/pybind/host.cpp."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class WindowGrid:
    """Windows of one size at every pair of a row start and a column start."""

    rows: int
    columns: int
    row_starts: list[int]
    column_starts: list[int]
    @property
    def count(self) -> int: ...
    @property
    def order(self) -> int: ...
    def table(self, weight: int = 0, entries: int = 1) -> NDArray[np.int64]: ...

def fixed_aspect_grid(
    matrix_rows: int, matrix_columns: int, rows: int, q: float, per_dim: int
) -> WindowGrid: ...
def published_grid(
    matrix_rows: int, matrix_columns: int, rows: int, q: float, per_dim: int
) -> WindowGrid: ...
def full_grid(matrix_rows: int, matrix_columns: int) -> WindowGrid: ...
def needs_zeroed_workspace(version: int) -> bool: ...
def build_settings() -> dict[str, str | int]: ...
def gram_sharing(
    table: NDArray[np.int64],
    device: str,
    either_side: bool = True,
    complex: bool = False,
    memory: int = ...,
) -> list[dict[str, Any]]: ...
