"""The windows of the published FARMS code, those that reach beyond the matrix included.

The published code slices, and Python cuts a slice that reaches too far. So a matrix smaller than
the window has windows of other shapes than asked for, which `FixedAspectSampling` never gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farms_fast.spectra.windows import FixedAspectSampling


@dataclass(frozen=True)
class PublishedWindows:
    """Windows of rows x columns at every pair of a row start and a column start.

    All windows of a stack make one spectrum; with `by_row` those of each row start make one. The
    default is one window, the matrix itself.
    """

    rows: int
    columns: int
    row_starts: tuple[int, ...] = (0,)
    column_starts: tuple[int, ...] = (0,)
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
        """Rows (entries · count, 6) of the ops' window table, ordered by spectrum."""
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


def sampled_windows(
    rows: int, columns: int, window_rows: int, q: float, per_dim: int, *, clamped: bool = True
) -> PublishedWindows:
    """At most `per_dim` windows in each dimension of a rows x columns matrix.

    The published code cuts `window_rows` at the matrix's shorter side (`clamped`) for language
    models and not for image models.
    """
    wanted = min(window_rows, rows, columns) if clamped else window_rows
    row_starts, m = _sampled(rows, wanted, per_dim)
    column_starts, n = _sampled(columns, int(wanted * q), per_dim)
    return PublishedWindows(m, n, row_starts, column_starts)


def stepped_windows(
    rows: int, columns: int, window_rows: int, q: float, step: int
) -> PublishedWindows:
    """Windows at every multiple of `step`; one that is too long is cut at the edge."""
    m, n = min(window_rows, rows), min(int(window_rows * q), columns)
    return PublishedWindows(m, n, _stepped(rows, m, step), _stepped(columns, n, step))


def block_windows(rows: int, columns: int, q: float) -> PublishedWindows:
    """Blocks of a kernel position's tall matrix, rows//columns of them, each its own spectrum.

    A block has ⌊columns/q⌋ rows and all columns for q above 1, as many rows as the matrix has
    columns and columns//(1/q) columns otherwise, one at least; block b begins at row b · its rows.
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
    # The published code starts a window that is too long at extent − window, a negative index that
    # counts from the far end.
    if window > extent:
        start = max(0, 2 * extent - window)
        return (start,), extent - start
    if window == 0:
        return (), 0
    square = FixedAspectSampling(rows=window, per_dim=per_dim, compat="farms")
    return tuple(square.grid(extent, extent).row_starts), window


def _stepped(extent: int, window: int, step: int) -> tuple[int, ...]:
    return tuple(range(0, extent - window + 1, step)) if window else ()
