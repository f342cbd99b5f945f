"""Logs of rates: CSV files and TensorBoard scalars."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

from farms_fast.adapters.layer_rates.rate_table import COLUMNS, RateTable
from farms_fast.core.arguments import check_type, path_of
from farms_fast.core.optional import optional_import
from farms_fast.core.text import csv_cell

# A function that gets every new table of rates.
Log = Callable[[RateTable], object]
# A function, the path of a CSV file, or several of them.
Logs = Log | str | os.PathLike[str] | Sequence[Log | str | os.PathLike[str]] | None


class CsvLog:
    """Appends every table to a CSV file, one line for each layer.

    Args:
        path: the file; a new or empty one gets a header.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from farms_fast.adapters.training import LayerRate, RateTable
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = CsvLog(Path(folder) / "rates.csv")
        ...     log(RateTable(3, 0.1, (LayerRate("fc", alpha=2.5, lr=0.15),)))
        ...     print(log.path.read_text().splitlines()[1])
        3,0.1,fc,2.5,nan,0,ok,,,nan,1.0,0.15
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of("path", path)

    def __call__(self, table: RateTable) -> None:
        """Appends the table; OSError if the file cannot be written."""
        check_type("table", table, RateTable, "a RateTable")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            for row in table:
                writer.writerow([table.call, table.base_lr, *map(csv_cell, astuple(row))])


class TensorBoardLog:
    """Writes alpha, factor and rate of every layer as TensorBoard scalars.

    Args:
        where: a folder for the event files, or a writer that has `add_scalar`.

    Raises:
        ImportError: a folder is given and tensorboard is not installed.
        TypeError: neither is given.
    """

    def __init__(self, where: Any) -> None:
        is_writer = hasattr(where, "add_scalar")
        self._where = where if is_writer else str(path_of("where", where))
        self.writer = where if is_writer else _writer_of(self._where)

    def __call__(self, table: RateTable) -> None:
        """Writes the table, with its call as the step."""
        for name, value in scalars(table).items():
            self.writer.add_scalar(name, value, table.call)
        self.writer.flush()

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorBoardLog:
        """Returns the log itself: its writer holds threads and cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Opens the writer of a folder again."""
        return type(self), (self._where,)


def _writer_of(folder: str) -> Any:
    with optional_import("tensorboard", extra="tensorboard", needed_for="event files"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder)  # type: ignore[no-untyped-call]


def scalars(table: RateTable) -> dict[str, float]:
    """The numbers of a table by the names that they have in a log, such as `alpha/fc`."""
    check_type("table", table, RateTable, "a RateTable")
    alphas = [row.alpha for row in table if not math.isnan(row.alpha)]
    named = {"lr/base": table.base_lr}
    if alphas:
        named["alpha/mean"] = math.fsum(alphas) / len(alphas)
    for row in table:
        entries = {"alpha": row.alpha, "factor": row.factor, "lr": row.lr}
        named.update({f"{k}/{row.name}": v for k, v in entries.items() if not math.isnan(v)})
    return named


def logs_of(log: Logs) -> list[Log]:
    """Returns the logs as a list of functions; TypeError for anything that is no log."""
    if log is None:
        return []
    several = isinstance(log, Iterable) and not callable(log) and not isinstance(log, (str, bytes))
    entries: Any = log if several else [log]
    logs: list[Log] = []
    for entry in entries:
        if callable(entry):
            logs.append(entry)
        elif isinstance(entry, (str, os.PathLike)):
            logs.append(CsvLog(entry))
        else:
            raise TypeError(
                f"log: expected functions of a table or the path of a CSV, got {entry!r}"
            )
    return logs
