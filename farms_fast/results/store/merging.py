"""Several stores into one, as the processes of a distributed run leave them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing

from farms_fast.core.arguments import path_of
from farms_fast.results.store.file import StoreFile
from farms_fast.results.store.results_store import (
    COLUMNS,
    insert_run,
    newest_run,
    read_skipped,
    write_layer,
    write_skipped,
)
from farms_fast.results.store.rows import LayerRow


def merge(
    target: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 60.0,
) -> None:
    """Copies the runs of stores into another one.

    A run of a part goes into the target's newest run with the same `run_key`, or becomes a new run
    there; of several runs with one key in a part the newest counts. A layer that the target has for
    the same weights stays as it is, so merging a part again changes nothing. Each part is one
    transaction: after a kill the target has it whole or not at all, and merging again goes on.
    Parts are not changed.

    A part that a killed process left is merged as far as it came: its whole layers, which may be
    none (an empty file). Where a part does not exist, nothing is merged.
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
    with closing(StoreFile(target, timeout, create=True)) as into:
        for part in parts:
            # create: an empty file is one whose process was killed before it made the tables.
            with closing(StoreFile(part, timeout, create=True)) as source:
                _copy_runs(source, into)


def _copy_runs(source: StoreFile, into: StoreFile) -> None:
    with source.reading() as old, into.writing() as new:
        runs = old.execute(
            "SELECT id, finished, skipped, key, settings, versions, started, total FROM runs "
            "WHERE id IN (SELECT max(id) FROM runs GROUP BY key) ORDER BY id"
        ).fetchall()
        for number, finished, skipped, *values in runs:
            there = newest_run(new, values[0])
            run = insert_run(new, values) if there is None else there
            layers = old.execute(
                f"SELECT id, position, {COLUMNS} FROM layers WHERE run = ? ORDER BY id", (number,)
            )
            for layer, position, *columns in layers:
                spectrum = old.execute(
                    "SELECT windows, k, evals FROM spectra WHERE layer = ? ORDER BY part", (layer,)
                ).fetchall()
                write_layer(new, run, position, LayerRow(tuple(columns), spectrum))
            (known,) = new.execute("SELECT skipped FROM runs WHERE id = ?", (run,)).fetchone()
            both = into.parsed(read_skipped, known) + source.parsed(read_skipped, skipped)
            write_skipped(new, run, list(dict.fromkeys(both)))
            if there is None:
                # A run that comes whole from one part is as finished as it was there.
                new.execute("UPDATE runs SET finished = ? WHERE id = ?", (finished, run))
