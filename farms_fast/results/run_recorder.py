"""Where records go as layers are finished: into memory, or into a store that a run resumes from."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from farms_fast.engine.distributed import Ranks
from farms_fast.engine.stages import LayerState
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from farms_fast.results.settings import AnalysisSettings
from farms_fast.results.store import ResultsStore, StoredRun, merge
from farms_fast.weights.stacks import Skipped

_LOCK = ".lock"
# Layers are saved together for so long: a transaction waits for the disk.
_SECONDS_TO_SAVE = 0.25

_clock = time.monotonic


class RunRecorder:
    """Records in memory; the main rank collects those of all ranks at the end."""

    # Whether layers' contents have to be told apart by a digest.
    needs_digests = False

    def __init__(self, ranks: Ranks, settings: AnalysisSettings) -> None:
        self._ranks = ranks
        self._settings = settings
        self._records: dict[int, LayerRecord] = {}

    def is_known(self, name: str, digest: str) -> bool:
        """Whether a layer need not be computed again."""
        return False

    def take(
        self, states: Sequence[LayerState], positions: Sequence[int], eps: float
    ) -> Iterator[LayerState]:
        """Takes layers finished together and gives back each when it is safe.

        `positions` are those in the model, by index in the plan.
        """
        for state in states:
            self._records[positions[state.layer.index]] = LayerRecord.of(state, eps)
            yield state

    def analysis(self, names: Sequence[str], skipped: Sequence[Skipped]) -> Analysis:
        """The whole model's analysis on the main rank, that of a rank's own layers on the others.

        The names are those of the model's layers in order.
        """
        merged = dict(self._records)
        for records in self._ranks.gather(self._records):
            merged |= records
        return Analysis([merged[position] for position in sorted(merged)], skipped, self._settings)


class _StoreRecorder(RunRecorder):
    """Records in a store as soon as they are there, and nothing of them in memory.

    Ranks on the machine of the main one write to the store itself. On other machines each writes to
    a file of its own beside it, which the main rank merges at the end: nothing then depends on how
    well a network's file system lets many machines write to one file. `main` is the run in the
    store, `mine` the one that this rank writes to, and `part` closes this rank's own file.
    """

    needs_digests = True

    def __init__(
        self,
        ranks: Ranks,
        settings: AnalysisSettings,
        store: ResultsStore,
        main: StoredRun,
        mine: StoredRun,
        part: ExitStack,
    ) -> None:
        super().__init__(ranks, settings)
        self._store = store
        self._main = main
        self._mine = mine
        self._part = part
        self._names: set[str] = set()
        self._saved_at = _clock()

    def is_known(self, name: str, digest: str) -> bool:
        return self._main.finished(name, digest) is not None

    def take(
        self, states: Sequence[LayerState], positions: Sequence[int], eps: float
    ) -> Iterator[LayerState]:
        rest = list(states)

        def save(until: float) -> list[LayerState]:
            """Saves layers from the front, at least one, until that time has come."""
            saved: list[LayerState] = []
            records = []
            for state in rest:
                saved.append(state)
                if not state.known:
                    record = LayerRecord.of(state, eps)
                    records.append((positions[state.layer.index], record, state.digest))
                if _clock() >= until:
                    break
            self._mine.put_many(records)
            del rest[: len(saved)]
            self._names |= {state.layer.spec.name for state in saved}
            self._saved_at = _clock()
            return saved

        # What interrupts, be it the caller's own progress function, costs none of the others.
        try:
            while rest:
                yield from save(self._saved_at + _SECONDS_TO_SAVE)
        finally:
            save(math.inf)

    def what_is_saved(self) -> str:
        """What an interruption leaves, and how to go on."""
        (info,) = (info for info in self._store.runs() if info.id == self._main.id)
        total = "" if info.total is None else f" of {info.total}"
        return (
            f"{info.layers}{total} layers are in {self._store.path!r}, and the same call goes on "
            "from there (without force, which begins anew)"
        )

    def analysis(self, names: Sequence[str], skipped: Sequence[Skipped]) -> Analysis:
        self._part.close()
        self._ranks.gather(None)
        if self._ranks.is_main:
            _collect(Path(self._store.path))
            self._main.put_skipped(skipped)
            self._main.complete(names)
        self._ranks.wait()
        layers, _, _ = self._store.read(self._main.id)
        if not self._ranks.is_main:
            layers = [layer for layer in layers if layer.name in self._names]
        return Analysis(layers, skipped, self._settings)


@contextlib.contextmanager
def recording(
    store: str | os.PathLike[str] | None,
    settings: AnalysisSettings,
    ranks: Ranks,
    layers: int,
    force: bool = False,
) -> Iterator[RunRecorder]:
    """Opens where the records of a model of so many layers go: a store's file, or memory for None.

    With `force` everything is computed anew, in a run of its own.
    """
    if store is None:
        yield RunRecorder(ranks, settings)
        return
    path = Path(store)
    with ExitStack() as opened:
        # The main rank makes the run, the others find it.
        if not ranks.is_main:
            ranks.wait()
        target = opened.enter_context(ResultsStore(path))
        if ranks.is_main:
            _collect(path)
        main = target.run(settings, total=layers, force=force and ranks.is_main)
        if ranks.is_main:
            ranks.wait()
        part = opened.enter_context(ExitStack())
        mine = main
        if not ranks.on_main_machine():
            own = part.enter_context(_own_part(path, ranks.rank))
            mine = part.enter_context(ResultsStore(own)).run(settings)
        recorder = _StoreRecorder(ranks, settings, target, main, mine, part)
        try:
            yield recorder
        except KeyboardInterrupt as interruption:
            with contextlib.suppress(OSError, ValueError):
                raise KeyboardInterrupt(recorder.what_is_saved()) from interruption
            raise


@contextlib.contextmanager
def _own_part(path: Path, rank: int) -> Iterator[Path]:
    """A name for a rank's file, and a lock that lasts as long as the process works on it."""
    part = path.with_name(f"{path.name}.rank{rank}-{secrets.token_hex(4)}")
    with open(f"{part}{_LOCK}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield part


def _collect(path: Path) -> None:
    """Merges what ranks have left and takes it away, save the files of those that are at work."""
    for lock_path in sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*{_LOCK}")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(lock_path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part = Path(str(lock_path).removesuffix(_LOCK))
            if part.exists():
                merge(path, [part])
            for file in (part, Path(f"{part}-journal"), lock_path):
                file.unlink(missing_ok=True)
