"""A store that is killed, written by several processes at once, locked, or on a full disk."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from farms_fast.results.analysis import Analysis
from farms_fast.results.store import ResultsStore, merge
from farms_fast.results.store.results_store import write_layer
from farms_fast.results.store.rows import pack
from tests.support.records import assert_same, made_up, stored


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


def in_processes(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.store_processes", *map(str, arguments)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_killed_at_random_moments_and_resumed(path: Path) -> None:
    found = in_processes("kill", path, 20)
    layers = found["layers after each kill"]
    assert len(layers) >= 20
    # Kills that all came before the first layer, or after the last, would show nothing.
    assert len({n for n in layers if 0 < n < 240}) >= 5
    # No journal stays beside a finished store.
    assert sorted(os.listdir(path.parent)) == ["run.log", "run.sqlite"]


def test_runs_at_once_on_one_store(path: Path) -> None:
    assert in_processes("at-once", path, "different") == {"runs": 3}


def test_one_run_in_processes_at_once(path: Path) -> None:
    assert in_processes("at-once", path, "same") == {"runs": 1}


@pytest.mark.parametrize("windows", [6, 400])
def test_a_layer_half_written_is_undone(path: Path, windows: int) -> None:
    """Takes the files as they are while pages of a layer are already overwritten."""
    crashed = path.parent / "crashed"
    crashed.mkdir()
    with ResultsStore(path) as store:
        run = store.run({})
        for index in range(3):
            run.put(index, made_up(index), "d")
        # One page of cache, so that nearly all of the transaction reaches the file at once.
        store._file._open().execute("PRAGMA cache_size = 1")
        with store._file.writing() as connection:
            write_layer(connection, run.id, 1, pack(made_up(1, 1, windows), "other weights"))
            # By another process: to close the file in this one would drop the writer's lock.
            subprocess.run(["cp", "-r", *path.parent.glob("run.sqlite*"), crashed], check=True)
    journal = (crashed / "run.sqlite-journal").stat().st_size
    assert journal > 0
    with ResultsStore(crashed / "run.sqlite") as store:
        for index, record in enumerate(stored(store)):
            assert_same(record, made_up(index))
        assert store.run({}).finished("layer.1", "d") is not None
    assert os.listdir(crashed) == ["run.sqlite"]
    assert_same(Analysis.from_store(path)["layer.1"], made_up(1, 1, windows))


def test_full_disk(path: Path) -> None:
    with ResultsStore(path) as store:
        run = store.run({})
        run.put(0, made_up(0), "d")
    with ResultsStore(path) as store:
        run = store.run({})
        connection = store._file._open()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 20}")
        layers = [(index, made_up(index), "d") for index in range(1, 100)]
        with pytest.raises(OSError, match="no space left for the results store") as caught:
            deque((run.put(*layer) for layer in layers), maxlen=0)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == str(path)
        kept = len(stored(store))
        assert 1 < kept < 100
        for record in stored(store):
            assert_same(record, made_up(int(record.name.removeprefix("layer."))))
        assert run.finished("layer.0", "d") is not None
        # Space again: the same run goes on.
        connection.execute("PRAGMA max_page_count = 1000000")
        run.put(kept, made_up(kept), "d")
        assert len(stored(store)) == kept + 1


def test_a_write_that_fails_says_that_layers_are_safe(path: Path) -> None:
    with ResultsStore(path) as store:
        store.run({}).put(0, made_up(0), "d")
    limit = path.stat().st_size
    script = (
        "import resource, signal, sys\n"
        "from farms_fast.results.store import ResultsStore\n"
        "from tests.support.records import made_up\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    run = ResultsStore(sys.argv[1]).run({})\n"
        "    for index in range(1, 100): run.put(index, made_up(index), 'd')\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert "the finished layers in it are safe" in done.stdout
    assert str(path) in done.stdout
    assert_same(Analysis.from_store(path)["layer.0"], made_up(0))


def test_full_disk_while_merging(path: Path) -> None:
    parts = [path.parent / "a.sqlite", path.parent / "b.sqlite"]
    for number, part in enumerate(parts):
        with ResultsStore(part) as store:
            for index in range(number, 100, 2):
                store.run({}).put(index, made_up(index), "d")
    # The file may not grow beyond what it takes to hold the first part and half of the second.
    limit = parts[0].stat().st_size * 3 // 2
    script = (
        "import resource, signal, sys\n"
        "from farms_fast.results.store import merge\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: merge(sys.argv[1], sys.argv[2:])\n"
        "except OSError as error: print(type(error).__name__, error.filename, error.strerror)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path, *parts], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"OSError {path} "), done.stdout
    analysis = Analysis.from_store(path)
    assert [layer.name for layer in analysis] == [f"layer.{i}" for i in range(0, 100, 2)]
    merge(path, parts)
    for index, record in enumerate(Analysis.from_store(path)):
        assert_same(record, made_up(index))
    assert len(Analysis.from_store(path)) == 100


def test_locked_for_too_long(path: Path) -> None:
    with ResultsStore(path, timeout=0.05) as store:
        run = store.run({})
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(TimeoutError, match=r"locked by another process for 0\.05 s.*run\."):
                run.put(0, made_up(0), "d")
            other.execute("ROLLBACK")
        finally:
            other.close()
        run.put(0, made_up(0), "d")
        assert_same(stored(store)["layer.0"], made_up(0))


def test_store_that_cannot_be_written(path: Path) -> None:
    with ResultsStore(path) as store:
        store.run({"a": 1}).put(0, made_up(0), "d")
        # What SQLite says on a medium that cannot be written, whoever runs the test.
        store._file._open().execute("PRAGMA query_only = ON")
        assert_same(stored(store)["layer.0"], made_up(0))
        with pytest.raises(PermissionError, match=r"cannot write the results store.*run\.sqlite"):
            store.run({"a": 2})


def test_interrupted_in_the_middle_of_a_layer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ResultsStore(path) as store:
        run = store.run({})
        run.put(0, made_up(0), "d")

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("farms_fast.results.store.results_store.write_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.put(1, made_up(1), "d")
        monkeypatch.undo()
        run.put(2, made_up(2), "d")
        assert [layer.name for layer in stored(store)] == ["layer.0", "layer.2"]


def test_spectra_are_read_while_a_layer_is_being_written(path: Path) -> None:
    # Reading opens and closes the file again, which must not drop the writer's lock.
    with ResultsStore(path) as store:
        run = store.run({})
        run.put(0, made_up(0), "d")
        record = stored(store)["layer.0"]
        with store._file.writing() as connection:
            connection.execute("UPDATE runs SET total = 5")
            assert_same(record, made_up(0))
            script = (
                "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=0)\n"
                "try: c.execute('BEGIN IMMEDIATE')\n"
                "except sqlite3.OperationalError as error: print(error)\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
            )
            assert done.stdout == "database is locked\n"
        assert store.runs()[0].total == 5
