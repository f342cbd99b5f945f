"""Measures every CUDA solver over orders and batches, and writes the table behind `solver="auto"`.

`python -m benchmarks.solver_table` on the GPU in question rewrites that architecture's rows of
csrc/host/measured_choice.inc and leaves the others; build again afterwards. With `real` or
`complex` as an argument, only the rows for matrices of that kind. A solver is timed only where its
eigenvalues agree with cuSOLVER's.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from farms_fast import build_info
from farms_fast.core import ops
from farms_fast.spectra.windows import FullMatrix, window_table

TABLE = Path(__file__).parent.parent / "csrc/host/measured_choice.inc"
FIELDS = {"real": torch.float64, "complex": torch.complex128}
ORDERS = (8, 16, 24, 32, 48, 64, 80, 100, 112, 128, 144, 160, 192, 224, 256, 320, 384, 448, 512)
LARGE_ORDERS = (640, 768, 1000, 1500, 2000, 3000, 4096, 8192, 11008)
# Of complex matrices, which the package's own solvers take as real ones of twice the order.
COMPLEX_ORDERS = (8, 16, 24, 32, 40, 52, 64, 80, 96, 112, 128, 160, 192, 224, 256)
LARGE_COMPLEX_ORDERS = (320, 384, 512, 768, 1024, 2048)
ORDERS_OF = {"real": ORDERS + LARGE_ORDERS, "complex": COMPLEX_ORDERS + LARGE_COMPLEX_ORDERS}
# Fifteen clusters of eight blocks, or 66 of two, fit on an H200 at once.
BATCHES = (1, 4, 9, 15, 32, 66, 132, 256, 512, 1024, 4096)
# Batches above the middle between two measured ones go with the larger.
NO_LIMIT = 2**62
MATRIX_BYTES = {"real": 4 * 2**30, "complex": 2**30}
Row = tuple[int, int, str]


def median_ms(call: Callable[[], object], enough: float, rounds: int = 3) -> float:
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


def fastest(
    order: int, batch: int, dtype: torch.dtype, solvers: list[str]
) -> tuple[str, dict[str, float]]:
    """The fastest solver that agrees with cuSOLVER, and every solver's milliseconds."""
    weight = torch.randn(batch, order, order, dtype=dtype, device="cuda")
    table = window_table(FullMatrix().grid(order, order), batch)
    expected = ops.window_eigvalsh([weight], table, order, solver="cusolver")
    bound = 16 * order * torch.finfo(torch.float64).eps * float(expected.max())
    times: dict[str, float] = {}
    # The own ones first: the library's, which is slow, is then timed briefly.
    for solver in reversed(solvers):

        def call(solver: str = solver) -> torch.Tensor:
            return ops.window_eigvalsh([weight], table, order, solver=solver)

        try:
            found = call()
        except RuntimeError as error:
            if "'solver': expected one that takes order" not in str(error):
                raise
            continue
        if not bool(((found - expected).abs() <= bound).all()):
            print(f"{solver} is wrong at order {order}, batch {batch}", file=sys.stderr)
            continue
        # What takes twice as long as another one is out.
        times[solver] = median_ms(call, 2 * min(times.values(), default=math.inf))
    return min(times, key=times.__getitem__), times


def measure(field: str, solvers: list[str]) -> list[Row]:
    """Rows (up_to_order, up_to_batch, solver) in the order in which they are looked up."""
    rows: list[Row] = []
    dtype = FIELDS[field]
    for order in ORDERS_OF[field]:
        matrix = order * order * dtype.itemsize
        batches = [b for b in BATCHES if b * matrix <= MATRIX_BYTES[field] and order * b < 2**20]
        of_order: list[Row] = []
        for batch, following in zip(batches, [*batches[1:], 0], strict=True):
            choice, times = fastest(order, batch, dtype, solvers)
            shown = "  ".join(f"{name} {ms / batch * 1e3:.3g}" for name, ms in times.items())
            print(f"{field} order {order}, batch {batch}, us each: {shown}", flush=True)
            limit = (batch + following) // 2 if following else NO_LIMIT
            if of_order and of_order[-1][2] == choice:
                of_order.pop()
            of_order.append((order, limit, choice))
        rows += of_order
    return merged(rows)


def merged(rows: list[Row]) -> list[Row]:
    """Drops an order's rows where the next order's say the same."""
    by_order: dict[int, list[tuple[int, str]]] = {}
    for order, limit, solver in rows:
        by_order.setdefault(order, []).append((limit, solver))
    orders = sorted(by_order)
    kept = [
        order
        for order, following in zip(orders, [*orders[1:], 0], strict=True)
        if not following or by_order[order] != by_order[following]
    ]
    return [(order, limit, solver) for order in kept for limit, solver in by_order[order]]


def main() -> None:
    """Measures, prints, and rewrites this architecture's rows."""
    if not build_info()["cuda"] or not torch.cuda.is_available():
        sys.exit("error: expected a CUDA device and a build with CUDA (see farms-fast info)")
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    solvers = build_info()["solvers"]
    assert isinstance(solvers, dict)
    for field in sys.argv[1:] or FIELDS:
        rows = measure(field, solvers["cuda"])
        mine = [
            f'{{{architecture}, Field::{field}, {order}, {limit}, "{solver}"}},'
            for order, limit, solver in rows
        ]
        others = [
            line
            for line in TABLE.read_text().splitlines()
            if not line.startswith(f"{{{architecture}, Field::{field}, ")
        ]
        TABLE.write_text("\n".join(others + mine) + "\n")
        print("\n".join(mine))


if __name__ == "__main__":
    main()
