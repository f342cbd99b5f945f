"""Tables of rates written down: as CSV, and as scalars for TensorBoard."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from farms_fast.adapters.layer_rates.rate_table import RateTable
from farms_fast.arguments import check_type, path_of
from farms_fast.extras import optional_import

__all__ = ["CSV_COLUMNS", "CsvLog", "Log", "TensorBoardLog", "logs_of", "scalars"]

# What is told of every new table of rates.
Log = Callable[[RateTable], object]

CSV_COLUMNS = (
    "call", "base_lr", "name", "alpha", "D", "n_evals", "status", "message", "block", "score",
    "factor", "lr",
)  # fmt: skip


class CsvLog:
    """Appends every table to a CSV file, one line a layer.

    Args:
        path: the file; its header is written when it is new or empty.

    Example:
        >>> import tempfile
        >>> from farms_fast.adapters.layer_rates.rate_table import LayerRate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = CsvLog(Path(folder) / "rates.csv")
        ...     log(RateTable(3, 0.1, (LayerRate("fc", alpha=2.5, lr=0.15),)))
        ...     print(log.path.read_text().splitlines()[1])
        3,0.1,fc,2.5,nan,0,ok,,,nan,1.0,0.15
    """

    def __init__(self, path: str | Path) -> None:
        """Touches no file; TypeError for what is no path."""
        self.path = path_of("path", path)

    def __call__(self, table: RateTable) -> None:
        """Appends the table; OSError if the file cannot be written."""
        check_type("table", table, RateTable, "a RateTable")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(CSV_COLUMNS)
            for row in table:
                own = [getattr(row, column) for column in CSV_COLUMNS[2:]]
                writer.writerow([table.call, table.base_lr, *own])


class TensorBoardLog:
    """Writes alpha, factor and rate of every layer as TensorBoard scalars.

    Args:
        where: a folder for the event files, or a writer that has `add_scalar`.

    Raises:
        ImportError: a folder is given and tensorboard is not installed.
        TypeError: neither is given.
    """

    def __init__(self, where: Any) -> None:
        """Opens the writer."""
        if hasattr(where, "add_scalar"):
            self.writer = where
            return
        folder = str(path_of("where", where))
        with optional_import("tensorboard", extra="tensorboard", needed_for="event files"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder)  # type: ignore[no-untyped-call]

    def __call__(self, table: RateTable) -> None:
        """Writes the table at its call."""
        for name, value in scalars(table).items():
            self.writer.add_scalar(name, value, table.call)
        self.writer.flush()


def scalars(table: RateTable) -> dict[str, float]:
    """The numbers of a table by the names that they have in a log.

    Example:
        >>> from farms_fast.adapters.layer_rates.rate_table import LayerRate
        >>> row = LayerRate("fc", alpha=2.5, factor=1.5)
        >>> scalars(RateTable(0, 0.1, (row,)))
        {'lr/base': 0.1, 'alpha/mean': 2.5, 'alpha/fc': 2.5, 'factor/fc': 1.5}
    """
    check_type("table", table, RateTable, "a RateTable")
    alphas = [row.alpha for row in table if not math.isnan(row.alpha)]
    named = {"lr/base": table.base_lr}
    if alphas:
        named["alpha/mean"] = math.fsum(alphas) / len(alphas)
    for row in table:
        entries = {"alpha": row.alpha, "factor": row.factor, "lr": row.lr}
        named.update({f"{k}/{row.name}": v for k, v in entries.items() if not math.isnan(v)})
    return named


def logs_of(log: Log | Sequence[Log] | str | Path | None) -> list[Log]:
    """One function or several as a list; the path of a CSV file as its log.

    Raises:
        TypeError: something else is among them.
    """
    if log is None:
        return []
    if isinstance(log, (str, Path)):
        return [CsvLog(log)]
    found: list[Any] = [*log] if isinstance(log, Iterable) and not callable(log) else [log]
    wrong = next((entry for entry in found if not callable(entry)), None)
    if wrong is not None:
        raise TypeError(f"log: expected functions of a table or the path of a CSV, got {wrong!r}")
    return found
