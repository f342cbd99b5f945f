"""The results store: runs, each with its settings and the layers that it has finished."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import torch

from farms_fast.core.arguments import check_type, first_repeated, path_of
from farms_fast.core.extension import __version__
from farms_fast.core.json_files import (
    count_value,
    decode_json,
    text_value,
)
from farms_fast.core.solver_choice import decided_by
from farms_fast.results.record import LayerRecord, skipped_from
from farms_fast.results.settings import AnalysisSettings
from farms_fast.results.store.file import StoreFile
from farms_fast.results.store.rows import (
    LAYER_COLUMNS,
    LayerRow,
    pack,
    read_stored_evals,
    sql_text,
    unpack,
)
from farms_fast.weights.stacks import Skipped

COLUMNS = ", ".join(f'"{name}"' for name in LAYER_COLUMNS)
_RECORD = f"id, {COLUMNS}"
_INSERT = (
    f"INSERT INTO layers (run, position, {COLUMNS}) "
    f"VALUES ({', '.join('?' * (2 + len(LAYER_COLUMNS)))})"
)


@dataclass(frozen=True)
class RunInfo:
    """What a store knows of one run besides its layers.

    Attributes:
        id: its number in the store.
        started: when, UTC, ISO 8601.
        finished: when all of its layers were there; None until then.
        settings: how the layers are computed.
        versions: of farms_fast, Python, NumPy, torch and SQLite when it started; of a run on a GPU
            `solvers` as well, what chose them there.
        layers: layers that are stored.
        total: layers that the model has; None if nobody has said.
    """

    id: int
    started: str
    finished: str | None
    settings: AnalysisSettings
    versions: dict[str, str]
    layers: int
    total: int | None


class ResultsStore:
    """An SQLite file with the results of runs, written layer by layer.

    Each layer is one transaction: after a kill at any moment the file has it whole or not at all.
    Processes may write to one store at once; they wait for each other, at most `timeout` seconds.
    The threads of one process may share this object; a forked process opens its own.

    The tables are `runs`, `layers` (a column for each scalar of a record, NaN as NULL) and
    `spectra` (a CRC-32 and the eigenvalues, little-endian float64).

    Args:
        path: the file.
        timeout: seconds to wait for another writer.
        create: whether to make the file if there is none.

    Raises:
        FileNotFoundError: the file, or with `create` its directory, does not exist.
        OSError: it cannot be opened, read or written, here and in every method; a full disk names
            itself, and the layers that are in the file stay readable.
        TimeoutError: another process has locked it for longer than the timeout.
        ValueError: it is not a results store, damaged, or of another format version.

    Example:
        >>> import tempfile
        >>> settings = AnalysisSettings("model.safetensors")
        >>> record = LayerRecord("fc", "linear", (1, 4, 4), "ok", alpha=2.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ResultsStore(folder + "/run.sqlite") as store:
        ...         run = store.run(settings)
        ...         if run.finished("fc", "digest of its weights") is None:
        ...             run.put(0, record, "digest of its weights")
        ...         run.complete(["fc"])
        ...         store.read()[0][0].alpha
        2.5
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float = 60.0, create: bool = True
    ) -> None:
        self._file = StoreFile(path_of("path", path), timeout, create=create)
        self.path = self._file.path

    def __enter__(self) -> ResultsStore:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Records that came from it open it again for their spectra."""
        self._file.close()

    def run(
        self, settings: AnalysisSettings, *, total: int | None = None, force: bool = False
    ) -> StoredRun:
        """Continues the newest run with the same `settings.run_key`, or with `force` starts one.

        A run that is continued keeps the settings that it was started with. `total` is the number
        of layers that the model has, for `runs`.
        """
        check_type("settings", settings, AnalysisSettings, "AnalysisSettings")
        key = settings.run_key
        with self._file.writing() as connection:
            number = None if force else newest_run(connection, key)
            if number is None:
                values = (
                    key,
                    settings.to_json(),
                    json.dumps(_versions(settings.device)),
                    _now(),
                    total,
                )
                number = insert_run(connection, values)
            elif total is not None:
                connection.execute("UPDATE runs SET total = ? WHERE id = ?", (total, number))
        return StoredRun(self._file, number)

    def runs(self) -> list[RunInfo]:
        """The runs in the order in which they were started."""
        with self._file.reading() as connection:
            rows = connection.execute(
                "SELECT id, started, finished, settings, versions, (SELECT count(*) FROM layers "
                "WHERE run = runs.id AND position IS NOT NULL), total FROM runs ORDER BY id"
            ).fetchall()
        return [self._file.parsed(_run_info, row) for row in rows]

    def read(
        self, run: int | None = None
    ) -> tuple[list[LayerRecord], list[Skipped], AnalysisSettings]:
        """The layers of a run in the model's order, its skipped tensors and its settings.

        A run that is not finished gives the layers that are there. Spectra are read from the file
        when a record is first asked for them, so the file has to stay where it is.
        """
        with self._file.reading() as connection:
            runs = connection.execute("SELECT id, settings, skipped FROM runs ORDER BY id")
            known = {number: values for number, *values in runs}
            if not known:
                raise ValueError(f"store: {self.path!r} holds no run")
            number = max(known) if run is None else run
            if number not in list(known):  # what has no hash is no run either
                raise ValueError(
                    f"run: expected one of {', '.join(map(str, known))}, got {number!r}"
                )
            layers = connection.execute(
                f"SELECT {_RECORD} FROM layers WHERE run = ? AND position IS NOT NULL "
                "ORDER BY position, id",
                (number,),
            ).fetchall()
        settings, skipped = known[number]
        return (
            [read_record(self._file, row) for row in layers],
            self._file.parsed(read_skipped, skipped),
            self._file.parsed(AnalysisSettings.from_json, settings),
        )


class StoredRun:
    """One run of an opened store; `ResultsStore.run` makes them."""

    def __init__(self, file: StoreFile, number: int) -> None:
        self._file = file
        self.id = number

    def finished(self, name: str, digest: str) -> LayerRecord | None:
        """The record of a layer that need not be computed again.

        None if the run does not have the layer, has it for weights of another digest, or has it
        with status "error", which is worth another try.
        """
        with self._file.reading() as connection:
            row = connection.execute(
                f"SELECT {_RECORD} FROM layers WHERE run = ? AND name = ? AND digest = ? "
                "AND status <> 'error'",
                (self.id, sql_text(name), digest),
            ).fetchone()
        return None if row is None else read_record(self._file, row)

    def put(self, index: int, record: LayerRecord, digest: str) -> None:
        """Stores the layer at that position in the model, whole or not at all.

        Where the run has the layer for the same weights already, that record stays (a run in two
        processes computes some layers twice); any other is replaced.
        """
        self.put_many([(index, record, digest)])

    def put_many(self, layers: Iterable[tuple[int, LayerRecord, str]]) -> None:
        """Stores layers together, all or none; for each the arguments of `put`."""
        # Packing takes the longest, so it is done before others are kept from writing.
        rows = [(index, pack(record, digest)) for index, record, digest in layers]
        if not rows:
            return
        with self._file.writing() as connection:
            for index, row in rows:
                write_layer(connection, self.id, index, row)

    def put_skipped(self, skipped: Sequence[Skipped]) -> None:
        """Stores the tensors that are not layers, in place of those stored before."""
        with self._file.writing() as connection:
            write_skipped(connection, self.id, skipped)

    def complete(self, names: Sequence[str]) -> None:
        """Marks the run as finished, with these layers in this order.

        Stored layers that are not among them stay in the file, in case the model has them again,
        but are no part of the run's analysis.
        """
        if (twice := first_repeated(names)) is not None:
            raise ValueError(f"names: expected each layer once, got {twice!r} more than once")
        with self._file.writing() as connection:
            connection.execute("UPDATE layers SET position = NULL WHERE run = ?", (self.id,))
            for position, name in enumerate(names):
                changed = connection.execute(
                    "UPDATE layers SET position = ? WHERE run = ? AND name = ?",
                    (position, self.id, sql_text(name)),
                ).rowcount
                if not changed:
                    raise ValueError(f"names: layer {name!r} is not stored, the run is unfinished")
            connection.execute(
                "UPDATE runs SET finished = coalesce(finished, ?), total = ? WHERE id = ?",
                (_now(), len(names), self.id),
            )


def newest_run(connection: sqlite3.Connection, key: str) -> int | None:
    """The number of the newest run with that key."""
    (number,) = connection.execute("SELECT max(id) FROM runs WHERE key = ?", (key,)).fetchone()
    return None if number is None else int(number)


def insert_run(connection: sqlite3.Connection, values: Sequence[object]) -> int:
    """Starts a run with its key, settings, versions, start and total; returns its number."""
    cursor = connection.execute(
        "INSERT INTO runs (key, settings, versions, started, total) VALUES (?, ?, ?, ?, ?)", values
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def write_skipped(connection: sqlite3.Connection, run: int, skipped: Sequence[Skipped]) -> None:
    """Puts tensors that are not layers into a run, in place of those that are there."""
    text = json.dumps([dataclasses.astuple(tensor) for tensor in skipped])
    connection.execute("UPDATE runs SET skipped = ? WHERE id = ?", (text, run))


def read_skipped(text: str) -> list[Skipped]:
    """What `write_skipped` was given, from the column of a run."""
    return [skipped_from(*values) for values in decode_json(text)]


def write_layer(
    connection: sqlite3.Connection, run: int, position: int | None, row: LayerRow
) -> None:
    """Puts a layer into a run, unless it is there for the same weights without an error."""
    values = dict(zip(LAYER_COLUMNS, row.values, strict=True))
    there = connection.execute(
        "SELECT id, digest, status FROM layers WHERE run = ? AND name = ?", (run, values["name"])
    ).fetchone()
    if there is not None:
        number, digest, status = there
        if digest == values["digest"] and (status != "error" or values["status"] == "error"):
            if position is not None:
                connection.execute(
                    "UPDATE layers SET position = ? WHERE id = ?", (position, number)
                )
            return
        connection.execute("DELETE FROM layers WHERE id = ?", (number,))
    number = connection.execute(_INSERT, (run, position, *row.values)).lastrowid
    connection.executemany(
        "INSERT INTO spectra VALUES (?, ?, ?, ?, ?)",
        [(number, i, *part) for i, part in enumerate(row.parts)],
    )
    # A finished run that gets other layers is one to finish again.
    connection.execute("UPDATE runs SET finished = NULL WHERE id = ?", (run,))


def read_record(file: StoreFile, row: Sequence[Any]) -> LayerRecord:
    """The record of a row of the table of layers, its spectrum to be read when asked for."""
    number, _, *values = row
    record = unpack(values, file.path)
    record.defer_window_evals(
        partial(read_stored_evals, file.path, file.timeout, number, record.name)
    )
    return record


def _run_info(row: Sequence[Any]) -> RunInfo:
    """A row of the table of runs; ValueError or TypeError for a value of another kind."""
    number, started, finished, settings, versions, layers, total = row
    known = decode_json(versions)
    if not isinstance(known, dict):
        raise ValueError(f"versions: expected an object, got {type(known).__name__}")
    return RunInfo(
        number,
        text_value("started", started),
        None if finished is None else text_value("finished", finished),
        AnalysisSettings.from_json(settings),
        {name: text_value(f"versions: {name}", version) for name, version in known.items()},
        layers,
        None if total is None else count_value("total", total),
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions(device: str) -> dict[str, str]:
    solvers = decided_by(device)
    return {
        "farms_fast": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": str(torch.__version__),
        "sqlite": sqlite3.sqlite_version,
        **({"solvers": solvers} if solvers else {}),
    }
