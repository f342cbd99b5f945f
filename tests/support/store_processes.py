"""Writes a store from processes that are killed or run at once; test_faults.py runs it.

A process of its own, because it forks: the children need not import torch again.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

from farms_fast.results.record import LayerRecord
from farms_fast.results.store import ResultsStore, StoredRun
from tests.support.records import assert_same, made_up

LAYERS = 240


# Made before the forks, so that what is killed is mostly writing.
@functools.cache
def record(index: int, weights: int = 0) -> LayerRecord:
    # Every tenth is larger than SQLite's cache, so that the file grows before the commit.
    windows, k = (40, 10_000) if index % 20 == 5 else (6, 64)
    return made_up(index, weights, windows, k)


def analyse(run: StoredRun, computed: Callable[[str], None], layers: int, weights: int = 0) -> None:
    """What an analysis does with a store: asks for each layer, computes, puts, completes."""
    for index in range(layers):
        name = f"layer.{index}"
        if run.finished(name, "digest") is None:
            computed(name)
            run.put(index, record(index, weights), "digest")
    run.complete([f"layer.{index}" for index in range(layers)])


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stored(path: Path) -> dict[str, int]:
    """The layers of the newest run by name, each with the number of its row; checks the file."""
    # The application's own way first: it is what has to mend the file.
    try:
        with ResultsStore(path, create=False) as store:
            found = store.read()[0] if store.runs() else []
            for layer in found:
                assert_same(layer, record(int(layer.name.removeprefix("layer."))))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        if "is empty" not in str(error):
            raise
        return {}
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        return dict(connection.execute("SELECT name, id FROM layers"))
    finally:
        connection.close()


def kill_again_and_again(path: Path, seed: int) -> dict[str, object]:
    """Kills the writer at random moments until the run is finished."""
    draw = random.Random(seed)
    for index in range(LAYERS):
        record(index)
    log = path.with_suffix(".log")
    kills: list[int] = []
    before = stored(path)
    while True:
        log.write_text("")
        left = LAYERS - len(before)

        def work() -> None:
            with ResultsStore(path) as store, log.open("a", buffering=1) as computed:
                analyse(store.run({"seed": 0}), lambda name: print(name, file=computed), LAYERS)

        pid = child(work)
        if len(kills) < 25:
            # The first ones while the file is being made, the others some layers later.
            layers = 0 if len(kills) < 5 else min(left, draw.randint(1, 8))
            while log.read_text().count("\n") < layers and not ended(pid):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0, status
        after, computed = stored(path), log.read_text().split()
        assert before.items() <= after.items(), "a finished layer was lost or written again"
        assert not before.keys() & set(computed), "a finished layer was computed again"
        before = after
        if not killed:
            break
        kills.append(len(after))
    with ResultsStore(path) as store:
        (info,) = store.runs()
        names = [layer.name for layer in store.read()[0]]
    assert info.finished is not None
    assert names == [f"layer.{index}" for index in range(LAYERS)]
    return {"layers after each kill": kills}


def at_once(path: Path, same_run: bool) -> dict[str, object]:
    """Three writers on one store, with one run or with one each."""
    layers = 80

    def work(number: int) -> None:
        with ResultsStore(path) as store:
            weights = 0 if same_run else number
            analyse(store.run({"weights": weights}), lambda name: None, layers, weights)

    pids = [child(lambda number=number: work(number)) for number in range(3)]
    statuses = [os.WEXITSTATUS(os.waitpid(pid, 0)[1]) for pid in pids]
    assert statuses == [0, 0, 0], statuses
    with ResultsStore(path) as store:
        infos = store.runs()
        assert all(info.finished is not None for info in infos)
        for info in infos:
            weights = info.settings["weights"]
            assert isinstance(weights, int)
            found = store.read(info.id)[0]
            assert len(found) == layers
            for index, layer in enumerate(found):
                assert_same(layer, record(index, weights))
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (spectra,) = connection.execute("SELECT count(*) FROM spectra").fetchone()
    finally:
        connection.close()
    assert spectra == layers * len(infos)
    return {"runs": len(infos)}


if __name__ == "__main__":
    what, where, value = sys.argv[1:]
    if what == "kill":
        result = kill_again_and_again(Path(where), int(value))
    else:
        result = at_once(Path(where), value == "same")
    print(json.dumps(result))
