"""Where records go as layers are finished: into memory, or into a store that a run resumes from."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from farms_fast.engine.distributed import Ranks
from farms_fast.engine.stages import LayerState
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from farms_fast.results.store import ResultsStore, StoredRun, merge
from farms_fast.weights.layers import Skipped

# What decides a run's layers and their numbers. Another release may compute them otherwise; devices
# agree to within the error of the eigenvalues, so a run may go on on another one.
_DECIDING = (
    "source",
    "base",
    "include",
    "exclude",
    "sampling",
    "xmin",
    "xmin_pos",
    "bins",
    "bootstrap",
    "dtype",
    "solver",
    "farms_fast",
)


_LOCK = ".lock"


@dataclass(frozen=True)
class FinishedLayer:
    """A layer that a run has finished.

    Attributes:
        position: in the model.
        record: its record.
        digest: of the weights that the record comes from.
    """

    position: int
    record: LayerRecord
    digest: str


class RunRecorder:
    """Records in memory, collected from all ranks at the end.

    Args:
        ranks: the processes that share the run.
    """

    #: Whether layers' contents have to be told apart by a digest.
    needs_digests = False

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._records: dict[int, LayerRecord] = {}

    def is_known(self, name: str, digest: str) -> bool:
        """Whether a layer need not be computed again."""
        return False

    def take(self, states: Sequence[LayerState], positions: Sequence[int], eps: float) -> None:
        """Takes layers that were finished together.

        Args:
            states: the layers.
            positions: in the model, by the layers' index in the plan.
            eps: unit roundoff of the arithmetic that gave the eigenvalues.
        """
        new = []
        for state in states:
            name, position = state.layer.spec.name, positions[state.layer.index]
            if state.known:
                self._records[position] = self._known_record(name, state.digest)
            else:
                new.append(FinishedLayer(position, LayerRecord.of(state, eps), state.digest))
        self._keep(new)

    def _known_record(self, name: str, digest: str) -> LayerRecord:
        raise KeyError(name)

    def _keep(self, layers: Sequence[FinishedLayer]) -> None:
        self._records |= {layer.position: layer.record for layer in layers}

    def analysis(
        self, names: Sequence[str], skipped: Sequence[Skipped], settings: Mapping[str, object]
    ) -> Analysis:
        """Everything that was kept; on ranks that do not lead, what they themselves kept."""
        merged = dict(self._records)
        for records in self._ranks.gather(self._records):
            merged |= records
        return Analysis([merged[position] for position in sorted(merged)], skipped, settings)


class _StoreRecorder(RunRecorder):
    """Records in a store as soon as they are there.

    Ranks on the machine of the leading one write to the store itself. On other machines each writes
    to a file of its own beside it, which the leading one merges at the end: nothing then depends on
    how well a network's file system lets many machines write to one file.
    """

    needs_digests = True

    def __init__(
        self, ranks: Ranks, path: Path, main: StoredRun, mine: StoredRun, part: ExitStack
    ) -> None:
        super().__init__(ranks)
        self._path = path
        self._main = main
        self._mine = mine
        self._part = part
        self._known: dict[tuple[str, str], LayerRecord] = {}

    def is_known(self, name: str, digest: str) -> bool:
        record = self._main.finished(name, digest)
        if record is not None:
            self._known[name, digest] = record
        return record is not None

    def _known_record(self, name: str, digest: str) -> LayerRecord:
        return self._known.pop((name, digest))

    def _keep(self, layers: Sequence[FinishedLayer]) -> None:
        if layers:
            self._mine.put_many([(x.position, x.record, x.digest) for x in layers])
        for layer in layers:
            # What can be read again takes no memory until it is asked for.
            stored = self._mine.finished(layer.record.name, layer.digest)
            self._records[layer.position] = stored or layer.record

    def analysis(
        self, names: Sequence[str], skipped: Sequence[Skipped], settings: Mapping[str, object]
    ) -> Analysis:
        self._part.close()
        self._ranks.gather(None)
        if self._ranks.is_main:
            _collect(self._path)
            self._main.put_skipped(skipped)
            self._main.complete(names)
        self._ranks.wait()
        with ResultsStore(self._path, create=False) as store:
            layers, _, _ = store.read(self._main.id)
        if not self._ranks.is_main:
            own = {record.name for record in self._records.values()}
            layers = [layer for layer in layers if layer.name in own]
        return Analysis(layers, skipped, settings)


@contextlib.contextmanager
def recording(
    store: str | os.PathLike[str] | None,
    settings: Mapping[str, object],
    ranks: Ranks,
    layers: int,
    force: bool = False,
) -> Iterator[RunRecorder]:
    """Opens where a run's records go.

    Args:
        store: the file of a results store, made if there is none; None for memory.
        settings: of the analysis.
        ranks: the processes that share the run.
        layers: how many layers the model has.
        force: compute everything anew, in a run of its own.

    Raises:
        OSError: the store cannot be opened or written.
        ValueError: it is not a results store.
    """
    if store is None:
        yield RunRecorder(ranks)
        return
    path = Path(store)
    with contextlib.ExitStack() as opened:
        # The leading rank makes the run, the others find it.
        if not ranks.is_main:
            ranks.wait()
        target = opened.enter_context(ResultsStore(path))
        if ranks.is_main:
            _collect(path)
        main = target.run(settings, deciding=_DECIDING, total=layers, force=force and ranks.is_main)
        if ranks.is_main:
            ranks.wait()
        part = opened.enter_context(contextlib.ExitStack())
        mine = main
        if not ranks.on_main_machine():
            own = part.enter_context(_own_part(path, ranks.rank))
            mine = part.enter_context(ResultsStore(own)).run(settings, deciding=_DECIDING)
        yield _StoreRecorder(ranks, path, main, mine, part)


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
