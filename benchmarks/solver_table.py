"""Measures every CUDA solver over orders and batches, and writes the table behind `solver="auto"`.

`python -m benchmarks.solver_table` on the GPU in question rewrites that architecture's rows of
csrc/host/measured_choice.inc and leaves the others; build again afterwards. With `real` or
`complex` as an argument, only the rows for matrices of that kind. `farms-fast tune` measures the
same way, with a coarser grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from farms_fast import build_info
from farms_fast.core import ops
from farms_fast.engine.tune import Grid, measure

TABLE = Path(__file__).parent.parent / "csrc/host/measured_choice.inc"
ORDERS = (8, 16, 24, 32, 48, 64, 80, 100, 112, 128, 144, 160, 192, 224, 256, 320, 384, 448, 512)
LARGE_ORDERS = (640, 768, 1000, 1500, 2000, 3000, 4096, 8192, 11008)
# Of complex matrices, which the package's own solvers take as real ones of twice the order.
COMPLEX_ORDERS = (8, 16, 24, 32, 40, 52, 64, 80, 96, 112, 128, 160, 192, 224, 256)
LARGE_COMPLEX_ORDERS = (320, 384, 512, 768, 1024, 2048)
# Fifteen clusters of eight blocks, or 66 of two, fit on an H200 at once.
BATCHES = (1, 4, 9, 15, 32, 66, 132, 256, 512, 1024, 4096)
GRIDS = {
    "real": Grid(False, ORDERS + LARGE_ORDERS, BATCHES, 4 * 2**30),
    "complex": Grid(True, COMPLEX_ORDERS + LARGE_COMPLEX_ORDERS, BATCHES, 2**30),
}


def main() -> None:
    """Measures, prints, and rewrites this architecture's rows."""
    if not build_info()["cuda"] or not torch.cuda.is_available():
        sys.exit("error: expected a CUDA device and a build with CUDA (see farms-fast info)")
    architecture = ops.compute_capability()
    for field in sys.argv[1:] or GRIDS:
        mine = [
            f"{{{architecture}, {{Field::{field}, {row.up_to_order}, {row.up_to_batch}, "
            f'"{row.solver}"}}}},'
            for row in measure(GRIDS[field])
        ]
        others = [
            line
            for line in TABLE.read_text().splitlines()
            if not line.startswith(f"{{{architecture}, {{Field::{field}, ")
        ]
        TABLE.write_text("\n".join(others + mine) + "\n")
        print("\n".join(mine))


if __name__ == "__main__":
    main()
