"""The SQLite file under a results store: its tables, transactions, and errors in plain words."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from farms_fast.core.arguments import not_negative
from farms_fast.results.record import CSV_COLUMNS, INT_COLUMNS, TEXT_FIELDS

T = TypeVar("T")

# Each was a transaction that had ended.
_SAFE = "the finished layers in it are safe"
# "FARM", in the header of the file.
_APPLICATION_ID = 0x4641524D
# Also raised where alphas change their meaning, so that a resumed run does not mix them.
FORMAT_VERSION = 3


def _layer_column(name: str) -> str:
    if name in TEXT_FIELDS:
        return f'"{name}" TEXT NOT NULL'
    if name in INT_COLUMNS:
        return f'"{name}" INTEGER NOT NULL'
    # No type: a column of type REAL would drop the sign of -0.0. NaN is NULL.
    return f'"{name}"'


# AUTOINCREMENT: the number of a row that is gone never comes back for another.
_TABLES = {
    "runs": """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL,
        settings TEXT NOT NULL,
        versions TEXT NOT NULL,
        started TEXT NOT NULL,
        finished TEXT,
        total INTEGER,
        skipped TEXT NOT NULL DEFAULT '[]'
    )""",
    "layers": f"""CREATE TABLE layers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER,
        digest TEXT NOT NULL,
        {", ".join(map(_layer_column, CSV_COLUMNS))},
        window_alphas BLOB NOT NULL,
        UNIQUE (run, name)
    )""",
    "spectra": """CREATE TABLE spectra (
        layer INTEGER NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
        part INTEGER NOT NULL,
        windows INTEGER NOT NULL,
        k INTEGER NOT NULL,
        evals BLOB NOT NULL,
        PRIMARY KEY (layer, part)
    )""",
}


class StoreFile:
    """An opened store, for one process; its threads take turns.

    The journal is SQLite's rollback journal: a write-ahead log needs memory shared by all writers,
    which network file systems do not give, and leaves two more files beside the store.
    `synchronous=FULL` makes a committed layer survive a loss of power: one fsync per commit is
    little beside the time that a layer takes. Arguments and errors are those of `ResultsStore`.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float, *, create: bool) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.timeout = not_negative("timeout", timeout)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        if os.path.isdir(self.path):
            raise IsADirectoryError(errno.EISDIR, "expected a results store", self.path)
        if not create and not os.path.exists(self.path):
            raise FileNotFoundError(f"store: no such results store: {self.path!r}")
        if not os.path.isdir(os.path.dirname(self.path)):
            raise FileNotFoundError(f"store: the directory of {self.path!r} does not exist")
        # A pipe would be waited for, and a device has no end.
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError(f"store: expected a regular file, got {self.path!r}")
        # SQLite takes a file of one byte for an empty one. It is not read here: to close a file
        # drops all locks of the process on it, those of another connection's transaction too.
        if os.path.exists(self.path) and os.path.getsize(self.path) == 1:
            raise ValueError(f"store: {self.path!r} is not a results store")
        mode = "rwc" if create else "rw"
        with self._errors():
            self._connection = sqlite3.connect(
                f"{Path(self.path).as_uri()}?mode={mode}",
                uri=True,
                timeout=timeout,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise

    def _prepare(self, create: bool) -> None:
        with self._errors():
            connection = self._open()
            # The file may come from anyone: nothing in its schema may call functions.
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = FULL")
        with self.reading() as connection:
            ready = self._is_ready(connection)
        if ready:
            return
        if not create:
            raise ValueError(f"store: {self.path!r} is empty, it holds no results")
        with self.writing() as connection:
            # Another process may have made the tables since.
            if not self._is_ready(connection):
                for table in _TABLES.values():
                    connection.execute(table)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def _is_ready(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there; False for an empty file, ValueError for any other."""
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner == _APPLICATION_ID:
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"store: {self.path!r} has format version {version}, this release reads "
                    f"version {FORMAT_VERSION}: name a new file, or use the release that wrote it"
                )
            self._check_schema(connection)
            return True
        if owner or version or tables:
            raise ValueError(f"store: {self.path!r} is a database of another program")
        return False

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Raises ValueError unless the tables are those of this package and nothing acts on them.

        The file may come from anyone: a view computes what it gives, and a trigger changes more
        than what is written.
        """
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        made_by = {name: " ".join(str(sql).split()) for _, name, sql in rows}
        for kind, name, _ in rows:
            if kind == "trigger":
                raise ValueError(
                    f"store: {self.path!r} is no results store: expected no trigger, got {name!r}"
                )
        for name, sql in _TABLES.items():
            if made_by.get(name) != " ".join(sql.split()):
                raise ValueError(
                    f"store: {self.path!r} is damaged: expected the table {name!r} as format "
                    f"version {FORMAT_VERSION} has it"
                )

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ValueError(f"store: {self.path!r} has been closed")
        return self._connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the file, whatever others write meanwhile."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are all kept, or none of them if anything raises."""
        # IMMEDIATE: a transaction that reads first and then wants to write can only fail when
        # another one does the same.
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors(writing=begin != "BEGIN"):
            connection = self._open()
            try:
                # Inside: an interruption may come as soon as the transaction is open.
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # A full disk has rolled back by itself.
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._in_plain_words(error, writing) from error

    def _in_plain_words(self, error: sqlite3.Error, writing: bool) -> Exception:
        # Python 3.10 has no error codes of SQLite, so the text has to tell.
        text = str(error)
        if "is full" in text:
            message = f"no space left for the results store; {_SAFE}"
            return OSError(errno.ENOSPC, message, self.path)
        if "locked" in text:
            message = f"the results store has been locked by another process for {self.timeout:g} s"
            return TimeoutError(errno.ETIMEDOUT, message, self.path)
        if "not a database" in text or "malformed" in text:
            return ValueError(f"store: {self.path!r} is not a results store or is damaged ({text})")
        if "readonly" in text:
            return PermissionError(errno.EACCES, "cannot write the results store", self.path)
        if "unable to open" in text:
            return OSError(errno.EACCES, f"cannot open the results store ({text})", self.path)
        if isinstance(error, sqlite3.OperationalError) and "no such" not in text:
            message = f"cannot {'write' if writing else 'read'} the results store ({text})"
            return OSError(errno.EIO, f"{message}; {_SAFE}" if writing else message, self.path)
        return ValueError(f"store: {self.path!r} is damaged ({text})")

    def parsed(self, parse: Callable[[str], T], text: str) -> T:
        """What a text of the file means; ValueError if it is damaged."""
        try:
            return parse(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"store: {self.path!r} is damaged ({error})") from error

    def close(self) -> None:
        """Closes the file; closing again does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
