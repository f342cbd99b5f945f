"""Several stores into one, as the processes of a distributed run leave them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence

from farms_fast.core.arguments import path_of
from farms_fast.results.store.file import StoreFile
from farms_fast.results.store.results_store import insert_run, newest_run, write_layer
from farms_fast.results.store.rows import LAYER_COLUMNS, LayerRow

__all__ = ["merge"]

_COLUMNS = ", ".join(f'"{name}"' for name in LAYER_COLUMNS)


def merge(
    target: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 60.0,
) -> None:
    """Copies the runs of stores into another one.

    A run of a part becomes part of the target's newest run with the same deciding settings, or a
    new run there; of several runs with the same deciding settings in one part the newest counts.
    A layer that the target has for the same weights stays as it is, so merging a part again changes
    nothing. Each part is one transaction: after a kill the target has it whole
    or not at all, and merging again goes on. Parts are not changed.

    A part that a killed process left is merged as far as it came: its whole layers, which may be
    none (an empty file).

    Args:
        target: the store to write to, made if there is none.
        parts: the stores to read.
        timeout: seconds to wait for other writers.

    Raises:
        FileNotFoundError: if a part does not exist; nothing is merged then.
        OSError: if a file cannot be read or written.
        TypeError: if an argument is of another kind.
        ValueError: if a part is the target, or a file is not a results store.

    Example:
        >>> import tempfile
        >>> from farms_fast.results.record import LayerRecord
        >>> from farms_fast.results.store import ResultsStore
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = [f"{folder}/rank{rank}.sqlite" for rank in range(2)]
        ...     for rank, path in enumerate(paths):
        ...         with ResultsStore(path) as store:
        ...             record = LayerRecord(f"fc{rank}", "linear", (1, 4, 4), "ok")
        ...             store.run({"xmin": "median"}).put(rank, record, "")
        ...     merge(f"{folder}/run.sqlite", paths)
        ...     with ResultsStore(f"{folder}/run.sqlite") as store:
        ...         [layer.name for layer in store.read()[0]]
        ['fc0', 'fc1']
    """
    path_of("target", target)
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        raise TypeError(f"parts: expected a sequence of paths, got {type(parts).__name__}")
    parts = [path_of("parts", part) for part in parts]
    for part in parts:
        if not os.path.exists(part):
            raise FileNotFoundError(f"parts: {os.fspath(part)!r} does not exist")
        if os.path.exists(target) and os.path.samefile(part, target):
            raise ValueError(f"parts: {os.fspath(part)!r} is the target itself")
    into = StoreFile(target, timeout, create=True)
    try:
        for part in parts:
            # create: an empty file is one whose process was killed before it made the tables.
            source = StoreFile(part, timeout, create=True)
            try:
                with source.reading() as old, into.writing() as new:
                    _copy_runs(old, new)
            finally:
                source.close()
    finally:
        into.close()


def _copy_runs(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    runs = old.execute(
        "SELECT id, finished, key, settings, versions, started, total FROM runs "
        "WHERE id IN (SELECT max(id) FROM runs GROUP BY key) ORDER BY id"
    ).fetchall()
    for number, finished, key, *rest in runs:
        run = newest_run(new, key)
        made = run is None
        if run is None:
            run = insert_run(new, (key, *rest))
        layers = old.execute(
            f"SELECT id, position, {_COLUMNS} FROM layers WHERE run = ? ORDER BY id", (number,)
        )
        for layer, position, *values in layers:
            spectrum = old.execute(
                "SELECT windows, k, evals FROM spectra WHERE layer = ? ORDER BY part", (layer,)
            ).fetchall()
            write_layer(new, run, position, LayerRow(tuple(values), spectrum))
        _copy_skipped(old, new, number, run)
        if made:
            # A run that comes whole from one part is as finished as it was there.
            new.execute("UPDATE runs SET finished = ? WHERE id = ?", (finished, run))


def _copy_skipped(old: sqlite3.Connection, new: sqlite3.Connection, number: int, run: int) -> None:
    query = "SELECT name, shape, reason FROM skipped WHERE run = ? ORDER BY position"
    there = new.execute(query, (run,)).fetchall()
    missing = [row for row in old.execute(query, (number,)) if row not in there]
    new.executemany(
        "INSERT INTO skipped VALUES (?, ?, ?, ?, ?)",
        [(run, len(there) + i, *row) for i, row in enumerate(missing)],
    )
