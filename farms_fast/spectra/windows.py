"""How a matrix is sampled: the windows whose eigenvalues make up its spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from farms_fast._host import WindowGrid, fixed_aspect_grid, full_grid, published_grid
from farms_fast.core.arguments import check_int, is_real

__all__ = ["FixedAspectSampling", "FullMatrix", "Sampling", "WindowGrid", "window_table"]


class Sampling(Protocol):
    """Anything that lays a grid of equal windows over a matrix."""

    def grid(self, rows: int, columns: int) -> WindowGrid:
        """The windows of a rows x columns matrix; a grid without windows where none fits."""
        ...


@dataclass(frozen=True)
class FixedAspectSampling:
    """FARMS: windows of one aspect ratio, evenly spread over the matrix (arXiv 2506.06280).

    For an R x C matrix the window has m = min(rows, R, ⌊C/q⌋) rows and n = min(C, round(m·q))
    columns, so that a matrix smaller than the window shrinks it and keeps q. Each dimension gets
    max(per_dim, ⌈extent/window⌉) starts, evenly spread from edge to edge (rounded, halves to even,
    duplicates merged), so that nothing is left uncovered; `per_dim=1` takes the centred window
    instead.

    Args:
        rows: rows of a window at most.
        q: aspect ratio, columns over rows.
        per_dim: starts in each dimension at least.
        compat: "farms" for the windows of the published code: m = min(rows, R, C), n = int(m·q)
            cut at C, starts at multiples of max(1, (extent − window)//(per_dim − 1)).

    Raises:
        TypeError: an argument of another kind.
        ValueError: rows, q or per_dim is not positive, or compat is unknown.

    Example:
        >>> from farms_fast import FixedAspectSampling
        >>> grid = FixedAspectSampling(rows=100, per_dim=3).grid(300, 200)
        >>> grid
        WindowGrid(3 x 3 windows of 100 x 100)
        >>> grid.row_starts, grid.column_starts
        ([0, 100, 200], [0, 50, 100])
    """

    rows: int = 2000
    q: float = 1.0
    per_dim: int = 15
    compat: str | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "per_dim"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a positive integer, got {value!r}")
            if value <= 0:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if not is_real(self.q):
            raise TypeError(f"q: expected a positive finite number, got {self.q!r}")
        if not (math.isfinite(self.q) and self.q > 0):
            raise ValueError(f"q: expected a positive finite number, got {self.q}")
        if self.compat not in (None, "farms"):
            raise ValueError(f"compat: expected None or 'farms', got {self.compat!r}")

    def grid(self, rows: int, columns: int) -> WindowGrid:
        """The windows of a rows x columns matrix; a grid without windows where none fits."""
        rows, columns = check_int("rows", rows), check_int("columns", columns)
        make_grid = published_grid if self.compat == "farms" else fixed_aspect_grid
        # Beyond the matrix's extents neither changes the grid; the host code counts in 64 bits.
        per_dim = min(int(self.per_dim), max(rows, columns))
        return make_grid(rows, columns, min(int(self.rows), rows), float(self.q), per_dim)


@dataclass(frozen=True)
class FullMatrix:
    """One window, the matrix itself.

    Example:
        >>> from farms_fast import FullMatrix
        >>> FullMatrix().grid(3, 5)
        WindowGrid(1 x 1 windows of 3 x 5)
    """

    def grid(self, rows: int, columns: int) -> WindowGrid:
        """The matrix as a grid of one window."""
        return full_grid(check_int("rows", rows), check_int("columns", columns))


def window_table(grid: WindowGrid, entries: int = 1, weight: int = 0) -> Tensor:
    """The op's window table for a stack of so many entries, the op's weight of that number.

    Its columns are weight, entry, row, column, rows, columns, ordered by entry, row and column.
    """
    return torch.from_numpy(grid.table(weight, entries))
