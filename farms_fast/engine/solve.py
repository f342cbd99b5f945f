"""Windows to eigenvalues, eigenvalues to pooled sorted spectra, spectra to fits.

Every analysis takes this way: `analyze` batch by batch, `LiveAnalysis` with everything prepared
once, the published estimators and the WeightWatcher table for all layers of a device together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.core import ops
from farms_fast.core.packing import split_by_budget
from farms_fast.engine.streams import fork_join
from farms_fast.spectra.esd import window_eigenvalues
from farms_fast.spectra.power_law import packed_offsets, packed_spreads, sort_spectra

Fits = TypeVar("Fits", covariant=True)


class Windows(Protocol):
    """Equal windows of every matrix of a stack: a `WindowGrid`, or the published ones."""

    @property
    def order(self) -> int:
        """Eigenvalues of a window."""

    def table(self, weight: int = 0, entries: int = 1) -> NDArray[np.int64]:
        """Rows of the ops' window table, (windows, 6)."""


@dataclass(frozen=True)
class SolveTask:
    """Windows of one order, of stacks of one device and dtype, that one call solves."""

    table: Tensor  # on the CPU, where the op reads it
    windows: tuple[int, ...]  # of each stack
    order: int
    workspace: int = 0  # bytes for Gram matrices and workspace to begin with; 0 leaves it to the op
    stream: int = 0  # which of the streams takes it where tasks run side by side
    published: bool = False  # as the solver gives them, with those that are zero but for rounding

    @classmethod
    def of(
        cls,
        stacks: Sequence[tuple[Windows, int]],
        workspace: int = 0,
        stream: int = 0,
        published: bool = False,
    ) -> SolveTask:
        """The task of stacks in this order, each told by its windows and its number of matrices."""
        tables = [
            windows.table(number, entries) for number, (windows, entries) in enumerate(stacks)
        ]
        table = torch.from_numpy(np.concatenate(tables))
        windows = tuple(map(len, tables))
        return cls(table, windows, stacks[0][0].order, workspace, stream, published)

    def solve(
        self,
        stacks: Sequence[Tensor],
        dtype: torch.dtype = torch.float64,
        solver: str | None = None,
    ) -> Tensor:
        """(windows, k) eigenvalues of (S, R, C) stacks, each row ascending; only launched on CUDA.

        Those that are zero but for rounding are 0: nothing after this has to know of them, for
        zeros enter no fit and no rank. When a CUDA device's memory ends, it solves again with half
        of the workspace.
        """
        workspace = self.workspace
        while True:
            try:
                evals = window_eigenvalues(stacks, self.table, self.order, dtype, solver, workspace)
                return evals if self.published else ops.drop_rounding(evals)
            except torch.OutOfMemoryError:
                if not stacks[0].is_cuda:
                    raise
                torch.cuda.empty_cache()
                workspace //= 2
                # One matrix and its workspace must fit; below that the op names what it needs.
                if workspace < self.order**2 * dtype.itemsize:
                    raise


def solve_side_by_side(
    tasks: Sequence[SolveTask],
    stacks: Sequence[Tensor],
    streams: Sequence[torch.cuda.Stream],
    dtype: torch.dtype = torch.float64,
    solver: str | None = None,
) -> list[Tensor]:
    """Each task's eigenvalues, solved on its stream, for the current one; stacks of all tasks."""
    rest = iter(stacks)
    evals = []
    with fork_join(streams) as contexts:
        for task in tasks:
            own = list(islice(rest, len(task.windows)))
            with contexts[task.stream]:
                evals.append(task.solve(own, dtype, solver))
    return evals


@dataclass(frozen=True)
class Pool:
    """Spectra that lie one after the other, and are sorted and fitted in one call."""

    begin: int  # of their values among all values
    end: int
    offsets: Tensor  # (spectra + 1,), int64, on the device, from `begin`
    spreads: Tensor | None  # (spectra,), the least spread of each one's tail; None for 0

    def sort(self, values: Tensor) -> Tensor:
        """The pool's part of all values, each spectrum ascending with NaN last."""
        return sort_spectra(values[self.begin : self.end], self.offsets)


def make_pools(
    lengths: Sequence[int],
    device: torch.device,
    max_values: int | None = None,
    spreads: Sequence[float] | None = None,
) -> list[Pool]:
    """Pools of spectra of these lengths and least spreads, in their order.

    A pool has at most `max_values`, unless a single spectrum has more; None makes one pool.
    """
    limit = sum(lengths) if max_values is None else max_values
    pools = []
    begin = first = 0
    for part in split_by_budget(lengths, int, limit):
        end, last = begin + sum(part), first + len(part)
        own = None if spreads is None else spreads[first:last]
        pools.append(Pool(begin, end, packed_offsets(part, device), packed_spreads(own, device)))
        begin, first = end, last
    return pools


class Rule(Protocol[Fits]):
    """How sorted spectra are fitted."""

    def fit_at(self, packed: Tensor, offsets: Tensor, spread: Tensor | None) -> Fits:
        """Fits packed ascending spectra that begin and end at offsets on the same device."""


def fit_pools(
    values: Tensor, pools: Sequence[Pool], rule: Rule[Fits]
) -> Iterator[tuple[Tensor, Fits]]:
    """Sorted spectra and their fits, pool by pool, without waiting for a device; float64 values."""
    for pool in pools:
        spectra = pool.sort(values)
        yield spectra, rule.fit_at(spectra, pool.offsets, pool.spreads)
