"""The windows of the published FARMS code, those that reach beyond the matrix included.

The published code slices, and Python cuts a slice that reaches too far. So a matrix smaller than
the window has windows of other shapes than asked for, which `FixedAspectSampling` never gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farms_fast.spectra.windows import FixedAspectSampling

__all__ = [
    "PublishedWindows",
    "block_windows",
    "sampled_windows",
    "stepped_windows",
    "whole_matrix",
]


@dataclass(frozen=True)
class PublishedWindows:
    """Equal windows at every pair of a row start and a column start, in every matrix of a stack.

    Attributes:
        rows: of a window.
        columns: of a window.
        row_starts: first rows, ascending.
        column_starts: first columns, ascending.
        by_row: the windows of each row start make a spectrum of their own, pooled over the stack;
            otherwise all windows make one.
    """

    rows: int
    columns: int
    row_starts: tuple[int, ...]
    column_starts: tuple[int, ...]
    by_row: bool = False

    @property
    def count(self) -> int:
        """Windows of one matrix."""
        return len(self.row_starts) * len(self.column_starts)

    @property
    def order(self) -> int:
        """Eigenvalues of a window."""
        return min(self.rows, self.columns)

    @property
    def spectra(self) -> int:
        """Spectra of the stack."""
        return len(self.row_starts) if self.by_row else 1

    def table(self, weight: int = 0, entries: int = 1) -> NDArray[np.int64]:
        """Rows of the ops' window table, ordered by spectrum.

        Args:
            weight: index of the stack among the weights given to the op.
            entries: matrices in the stack.

        Returns:
            (entries · count, 6): weight, entry, row, column, rows, columns.
        """
        rows, columns = len(self.row_starts), len(self.column_starts)
        table = np.empty((entries, rows, columns, 6), np.int64)
        table[..., 0] = weight
        table[..., 1] = np.arange(entries)[:, None, None]
        table[..., 2] = np.array(self.row_starts, np.int64)[:, None]
        table[..., 3] = np.array(self.column_starts, np.int64)
        table[..., 4:] = self.rows, self.columns
        if self.by_row:
            table = table.swapaxes(0, 1)
        return table.reshape(-1, 6)


def whole_matrix(rows: int, columns: int) -> PublishedWindows:
    """One window, the matrix itself."""
    return PublishedWindows(rows, columns, (0,), (0,))


def sampled_windows(
    rows: int, columns: int, window_rows: int, q: float, per_dim: int, *, clamped: bool = True
) -> PublishedWindows:
    """At most `per_dim` windows in each dimension (`sampling_ops_per_dim`).

    Args:
        rows: of the matrix.
        columns: of the matrix.
        window_rows: `num_row_samples`.
        q: columns over rows of a window.
        per_dim: windows in each dimension at most.
        clamped: cut `window_rows` at the matrix's shorter side first, as the published code does
            for language models and not for image models.

    Returns:
        The windows. Where a window is longer than the matrix, the published code starts it at
        extent − window, a negative index that counts from the far end: what is left is the last
        window − extent rows or columns, or all where that is more than there are.

    Example:
        >>> windows = sampled_windows(300, 100, 100, 1.5, 3)
        >>> windows.rows, windows.columns, windows.row_starts, windows.column_starts
        (100, 50, (0, 100, 200), (50,))
    """
    m = min(window_rows, rows, columns) if clamped else window_rows
    n = int(m * q)
    row_starts, m = _sampled(rows, m, per_dim)
    column_starts, n = _sampled(columns, n, per_dim)
    return PublishedWindows(m, n, row_starts, column_starts)


def stepped_windows(
    rows: int, columns: int, window_rows: int, q: float, step: int
) -> PublishedWindows:
    """Windows at every multiple of `step` (`step_size`); one that is too long is cut at the edge.

    Example:
        >>> windows = stepped_windows(25, 15, 20, 1.0, 2)
        >>> windows.rows, windows.columns, windows.row_starts, windows.column_starts
        (20, 15, (0, 2, 4), (0,))
    """
    m, n = min(window_rows, rows), min(int(window_rows * q), columns)
    return PublishedWindows(m, n, _stepped(rows, m, step), _stepped(columns, n, step))


def block_windows(rows: int, columns: int, q: float) -> PublishedWindows:
    """Blocks of a kernel position's tall matrix, rows//columns of them, each its own spectrum.

    A block has ⌊columns/q⌋ rows and all columns for q above 1, as many rows as the matrix has
    columns and columns//(1/q) columns otherwise, one at least; block b begins at row b · its rows.

    Args:
        rows: of the matrix, no fewer than columns.
        columns: of the matrix.
        q: columns over rows of a block.

    Example:
        >>> windows = block_windows(7, 3, 1.0)
        >>> windows.rows, windows.columns, windows.row_starts
        (3, 3, (0, 3))
    """
    if q > 1:
        m, n = max(1, int(columns // q)), columns
    else:
        # Not ⌊q · columns⌋: 10 // (1 / 0.3) is 2.
        m, n = columns, max(1, int(columns // (1 / q)))
    starts = tuple(block * m for block in range(rows // columns))
    return PublishedWindows(m, n, starts, (0,), by_row=True)


def _sampled(extent: int, window: int, per_dim: int) -> tuple[tuple[int, ...], int]:
    """Starts along one dimension, and the length of what is left of the window there."""
    if window > extent:
        start = max(0, 2 * extent - window)
        return (start,), extent - start
    if window == 0:
        return (), 0
    square = FixedAspectSampling(rows=window, per_dim=per_dim, compat="farms")
    return tuple(square.grid(extent, extent).row_starts), window


def _stepped(extent: int, window: int, step: int) -> tuple[int, ...]:
    return tuple(range(0, extent - window + 1, step)) if window else ()
