"""The fastest CUDA solver by order and batch, as it was measured on a GPU of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from farms_fast.core.gpu_records import Gpu, read_record, record_path, write_record

NO_LIMIT = 2**62
_KIND = "solvers"


class Row(NamedTuple):
    """What the fastest solver is up to an order and a batch; the first row that holds both counts.

    Attributes:
        is_complex: whether of complex matrices.
        up_to_order: largest order that it holds.
        up_to_batch: largest number of matrices, `NO_LIMIT` for any.
        solver: its name.
    """

    is_complex: bool
    up_to_order: int
    up_to_batch: int
    solver: str


@dataclass(frozen=True)
class SolverTable:
    """A table of choices.

    Attributes:
        gpu: what it was measured on.
        rows: by kind, order and batch.
        made: the date, such as "2026-12-01"; empty until it is written.
    """

    gpu: Gpu
    rows: tuple[Row, ...]
    made: str = ""

    def write(self) -> str:
        """Writes it to the cache folder, in place of a former one, and returns the path.

        Raises:
            OSError: the folder cannot be made or written.
        """
        return str(write_record(self.gpu, _KIND, {"rows": self.rows}))

    @classmethod
    def read(cls, gpu: Gpu) -> SolverTable | None:
        """The table in the cache folder of such a GPU, maybe with another driver or release.

        Raises:
            ValueError: the file is damaged.
            OSError: the file cannot be read.
        """
        found = read_record(gpu, _KIND)
        if found is None:
            return None
        made_for, record = found
        rows = record.get("rows")
        if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
            raise ValueError(
                f"{record_path(gpu, _KIND)}: expected rows of [complex, order, batch, solver], "
                f"got {rows!r:.80}"
            )
        return cls(made_for, tuple(Row(*row) for row in rows), record["made"])


def use_rows(index: int, rows: Sequence[Row]) -> None:
    """Gives the compiled code the rows by which "auto" goes on a GPU, before those it came with.

    Args:
        index: of the GPU; -1 for those that are told of by their compute capability alone.
        rows: the first that holds a batch counts; none of them leaves the shipped table, which
            also serves what no row holds.
    """
    torch.ops.farms_fast.set_solver_choices(
        index,
        [int(row.is_complex) for row in rows],
        [row.up_to_order for row in rows],
        [row.up_to_batch for row in rows],
        [row.solver for row in rows],
    )


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4:
        return False
    is_complex, *limits, solver = row
    return (
        isinstance(is_complex, bool)
        and all(type(limit) is int and 0 < limit <= NO_LIMIT for limit in limits)
        and solver in ("cusolver", "one_stage", "two_stage")
    )
