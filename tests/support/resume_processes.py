"""Analyses that are killed, or shared by several processes; test_resume.py runs this file."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from farms_fast import Analysis, FixedAspectSampling, analyze
from farms_fast.engine import distributed
from farms_fast.engine.distributed import torchrun_group
from farms_fast.engine.stages import LayerState
from farms_fast.results.run_recorder import RunRecorder, _StoreRecorder
from farms_fast.results.store import ResultsStore
from tests.run_analysis.test_resume import assert_equal, weights_of
from tests.support.records import stored

SAMPLING = FixedAspectSampling(rows=8, per_dim=3)
LAYERS = 30


def weights() -> dict[str, torch.Tensor]:
    made = weights_of(LAYERS)
    # An order of its own for every layer, so that each is a batch of its own.
    return {name: torch.cat([w, w], dim=1)[: i + 2] for i, (name, w) in enumerate(made.items())}


def logging_to(path: Path) -> None:
    """Has every layer that is computed written to a file, before it is stored."""
    for kind in (RunRecorder, _StoreRecorder):

        def logged(
            self: Any, states: Sequence[LayerState], *rest: Any, take: Any = kind.take
        ) -> Iterator[LayerState]:
            with path.open("a") as log:
                log.writelines(f"{state.layer.spec.name}\n" for state in states if not state.known)
            return take(self, states, *rest)  # type: ignore[no-any-return]

        kind.take = logged  # type: ignore[method-assign]


def logged(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def same(found: Analysis, expected: Analysis) -> bool:
    try:
        assert_equal(found, expected)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return False
    return True


def finished(path: Path) -> set[str]:
    if not path.exists():
        return set()
    with ResultsStore(path) as store:
        return {layer.name for layer in stored(store)} if store.runs() else set()


def kill(path: Path, kills: int) -> dict[str, object]:
    """Runs that are killed at random moments, each going on where the last one was."""
    random.seed(7)
    log = path.with_suffix(".log")
    twice: list[str] = []
    middle = 0
    for number in range(kills):
        before = finished(path)
        if len(before) == LAYERS:
            path.unlink()
            before = set()
        log.unlink(missing_ok=True)
        ready, tell = os.pipe()
        # Nothing has run in parallel before the fork, so the child may.
        pid = os.fork()
        if pid == 0:
            logging_to(log)
            os.write(tell, b"1")
            analyze(weights(), SAMPLING, store=path, device="cpu", bootstrap=10)
            os._exit(0)
        os.read(ready, 1)
        # Counted in layers and not in seconds, which say little on a busy machine.
        layers = random.randint(0, 4)
        while len(logged(log)) < layers and not os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        after = finished(path)
        middle += 0 < len(after) < LAYERS
        twice += sorted(before & set(logged(log)))
        assert before <= after, f"kill {number} lost {sorted(before - after)}"
    found = analyze(weights(), SAMPLING, store=path, device="cpu", bootstrap=10)
    unbroken = analyze(weights(), SAMPLING, device="cpu", bootstrap=10)
    return {
        "kills": kills,
        "kills in the middle": middle,
        "computed twice": twice,
        "equal to an unbroken run": same(found, unbroken),
    }


def machine_of_its_own() -> None:
    """Every rank takes itself for a machine, as if they were far from each other."""
    distributed._machine = lambda: os.environ["RANK"]


def share(folder: Path) -> None:
    """One rank of a shared analysis, in memory and with a store."""
    with torchrun_group() as group:
        rank = int(os.environ["RANK"])
        log = folder / f"log{rank}"
        logging_to(log)
        options: dict[str, Any] = {"device": "cpu", "bootstrap": 10}
        found = analyze(weights(), SAMPLING, **options, process_group=group)
        computed = logged(log)
        stored = analyze(
            weights(), SAMPLING, **options, process_group=group, store=folder / "run.sqlite"
        )
        told: dict[str, object] = {
            "computed": computed,
            "returned": [layer.name for layer in found],
            "returned, stored": [layer.name for layer in stored],
        }
        if rank == 0:
            alone = analyze(weights(), SAMPLING, **options)
            told["all"] = sorted(layer.name for layer in alone)
            told["equal to one process"] = same(found, alone)
            told["equal to one process, stored"] = same(stored, alone)
        (folder / f"rank{rank}.json").write_text(json.dumps(told))


def die(folder: Path) -> None:
    """A shared analysis of which one rank ends without a word after its third layer."""
    with torchrun_group() as group:
        rank = int(os.environ["RANK"])

        def progress(done: int, total: int, name: str) -> None:
            if rank == 1 and done == 3:
                os._exit(3)

        path = folder / "run.sqlite"
        analyze(
            weights(), SAMPLING, device="cpu", process_group=group, store=path, progress=progress
        )


def resume(folder: Path) -> dict[str, object]:
    log = folder / "log"
    logging_to(log)
    found = analyze(weights(), SAMPLING, device="cpu", store=folder / "run.sqlite")
    computed = logged(log)
    names = sorted(layer.name for layer in found)
    return {
        "all": names,
        "computed": computed,
        "known": [name for name in names if name not in computed],
        "equal to an unbroken run": same(found, analyze(weights(), SAMPLING, device="cpu")),
    }


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "kill":
        print(json.dumps(kill(Path(where), int(rest[0]))))
    elif what == "resume":
        print(json.dumps(resume(Path(where))))
    else:
        if what.endswith("_apart"):
            machine_of_its_own()
        {"share": share, "die": die}[what.removesuffix("_apart")](Path(where))
