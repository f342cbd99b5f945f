"""Measures the CUDA solvers over orders and batches, for the table behind `solver="auto"`.

A solver is timed only where its eigenvalues agree with cuSOLVER's. `farms-fast tune` measures a
coarse grid on the user's GPU, `benchmarks/solver_table.py` a fine one for what is shipped.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch

from farms_fast.core import ops
from farms_fast.core.gpu_records import Gpu
from farms_fast.core.solver_table import NO_LIMIT, Row, SolverTable
from farms_fast.spectra.windows import FullMatrix, window_table

Told = Callable[[str], None]

# Over the largest eigenvalue and 2^-52, a unit of order: twice what each solver may err.
_AGREEMENT = 16


@dataclass(frozen=True)
class Grid:
    """What is measured for real matrices, or for complex ones.

    Attributes:
        is_complex: of which kind.
        orders: of the matrices, ascending.
        batches: numbers of matrices, ascending. One between two measured ones goes with the nearer.
        bytes: of a batch at most.
        call_seconds: a larger batch than one of which a solver took longer is left out.
        seconds: after so many no further order is begun.
    """

    is_complex: bool
    orders: tuple[int, ...]
    batches: tuple[int, ...]
    bytes: int
    call_seconds: float = math.inf
    seconds: float = math.inf

    @property
    def name(self) -> str:
        """Of the kind: real or complex."""
        return "complex" if self.is_complex else "real"


# The steps of the shipped table, coarsely. Complex matrices are real ones of twice the order to the
# package's own solvers.
_ORDERS = (32, 64, 104, 128, 160, 200, 256, 384, 512, 768, 1024, 2048, 4096)
_QUICK_ORDERS = (64, 104, 128, 160, 256, 512, 1024, 2048)
_BATCHES = (1, 2, 4, 16, 64, 256, 1024, 4096)
_QUICK_BATCHES = (1, 4, 32, 256, 2048)


def tuning_grids(memory: int, quick: bool = False) -> tuple[Grid, Grid]:
    """What `tune` measures, real matrices before complex ones.

    Args:
        memory: bytes of the GPU that are free.
        quick: whether a quarter of a minute has to do, instead of one.
    """
    orders = _QUICK_ORDERS if quick else _ORDERS
    batches = _QUICK_BATCHES if quick else _BATCHES
    most = min(2**31, memory // 8)
    call_seconds, seconds = (0.05, 10) if quick else (0.2, 40)
    halved = tuple(order // 2 for order in orders if order <= 2048)
    return (
        Grid(False, orders, batches, most, call_seconds, seconds),
        Grid(True, halved, batches, most, call_seconds, seconds / 2),
    )


def tune(index: int, quick: bool = False, told: Told = print) -> SolverTable:
    """Measures the solvers on a GPU; about a minute, or with `quick` a quarter of one.

    Args:
        index: of a GPU that is there, in a build with CUDA.
        quick: measure fewer orders and batches.
        told: called with a line for each measurement.

    Returns:
        The table, which is neither written nor used yet.
    """
    with torch.cuda.device(index):
        memory, _ = torch.cuda.mem_get_info()
        rows = [row for grid in tuning_grids(memory, quick) for row in measure(grid, told)]
    return SolverTable(Gpu.at(index), tuple(rows))


def measure(grid: Grid, told: Told = print) -> list[Row]:
    """The fastest solver on torch's current GPU, as rows in the order in which they are looked up.

    Args:
        grid: what to measure.
        told: called with a line for each measurement, and for each solver that is wrong.
    """
    dtype = torch.complex128 if grid.is_complex else torch.float64
    end = time.monotonic() + grid.seconds
    rows: list[Row] = []
    for order in grid.orders:
        if time.monotonic() > end:
            told(f"{grid.name} matrices from order {order} on are left out, to be done in time")
            break
        fitting = [b for b in grid.batches if b * order**2 * dtype.itemsize <= grid.bytes]
        fastest: list[tuple[int, str]] = []
        for batch in [b for b in fitting if b * order < 2**20]:
            try:
                times, slowest = _times(order, batch, dtype, told)
            except torch.OutOfMemoryError:
                break
            shown = "  ".join(f"{name} {ms / batch * 1e3:.3g}" for name, ms in times.items())
            told(f"{grid.name} order {order}, batch {batch}, us each: {shown}")
            fastest.append((batch, min(times, key=times.__getitem__)))
            if slowest > grid.call_seconds:
                break
        rows += rows_of_order(grid.is_complex, order, fastest)
    return merged(rows)


def rows_of_order(is_complex: bool, order: int, fastest: list[tuple[int, str]]) -> list[Row]:
    """Rows of one order from the fastest solver of each measured batch, the last for any larger.

    Example:
        >>> rows = rows_of_order(False, 256, [(1, "one_stage"), (4, "one_stage"), (9, "two_stage")])
        >>> [(row.up_to_batch, row.solver) for row in rows[:1]], rows[1].up_to_batch == NO_LIMIT
        ([(6, 'one_stage')], True)
    """
    rows: list[Row] = []
    following = [batch for batch, _ in fastest[1:]]
    for (batch, solver), after in zip_longest(fastest, following):
        limit = NO_LIMIT if after is None else (batch + after) // 2
        if rows and rows[-1].solver == solver:
            rows.pop()
        rows.append(Row(is_complex, order, limit, solver))
    return rows


def merged(rows: list[Row]) -> list[Row]:
    """Drops an order's rows where the next order's say the same."""
    by_order: dict[int, list[Row]] = {}
    for row in rows:
        by_order.setdefault(row.up_to_order, []).append(row)
    choices = {order: [row[2:] for row in of_order] for order, of_order in by_order.items()}
    orders = sorted(by_order)
    return [
        row
        for order, following in zip_longest(orders, orders[1:])
        if following is None or choices[order] != choices[following]
        for row in by_order[order]
    ]


def _times(
    order: int, batch: int, dtype: torch.dtype, told: Told
) -> tuple[dict[str, float], float]:
    """Milliseconds of every solver that agrees with cuSOLVER, and seconds of the slowest call."""
    generator = torch.Generator("cuda").manual_seed(order)
    weight = torch.randn((batch, order, order), dtype=dtype, device="cuda", generator=generator)
    table = window_table(FullMatrix().grid(order, order), batch)
    expected = ops.window_eigvalsh([weight], table, order, solver="cusolver")
    bound = _AGREEMENT * order * 2**-52 * float(expected.max())
    times: dict[str, float] = {}
    # The own ones first: the library's, which is slow, is then timed briefly.
    for solver in reversed(torch.ops.farms_fast.solver_names("cuda")):

        def call(solver: str = solver) -> torch.Tensor:
            return ops.window_eigvalsh([weight], table, order, solver=solver)

        try:
            found = call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "'solver': expected one that takes order" not in str(error):
                raise
            continue
        if not bool(((found - expected).abs() <= bound).all()):
            told(f"{solver} is wrong at order {order}, batch {batch}: please report this")
            continue
        # What takes twice as long as another one is out.
        times[solver] = _median_ms(call, 2 * min(times.values(), default=math.inf))
    return times, max(times.values()) / 1e3


def _median_ms(call: Callable[[], object], enough: float, rounds: int = 3) -> float:
    """Median over rounds, after one to warm up; the first one if that is more than enough."""
    times: list[float] = []
    for _ in range(rounds + 1):
        if times and times[-1] > enough:
            return times[-1]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:])
