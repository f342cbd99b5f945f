"""Three stages at once: while one batch is solved, the next is read and the last is finished.

On CUDA, reading and finishing have a thread and a stream each. Solving only launches work, by turns
on two streams, so that the device always has a batch to solve and fills what one leaves idle with
the next. On the CPU the stages would take each other's cores, so only reading, which waits for the
disk, has a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import cycle, zip_longest
from typing import Protocol, TypeVar

import torch

from farms_fast.engine.plan import Batch
from farms_fast.engine.streams import Outcome, StreamThread, fork_join, make_streams

Loaded = TypeVar("Loaded")
Solved = TypeVar("Solved")


class Stages(Protocol[Loaded, Solved]):
    """What is done with a batch, each stage on the current stream of the thread that calls it."""

    def read(self, batch: Batch) -> Loaded:
        """Brings the batch's weights to the device."""

    def solve(self, loaded: Loaded) -> Solved:
        """Launches the batch's eigenvalues."""

    def finish(self, solved: Solved) -> None:
        """Waits for the eigenvalues and keeps what comes of them; a second call changes nothing."""

    def give_up(self, batch: Batch, error: str) -> None:
        """Notes that a batch of one layer does not fit into the device's memory."""


def run(
    batches: Sequence[Batch],
    stages: Stages[Loaded, Solved],
    device: torch.device,
    overlapping: bool = True,
) -> None:
    """Takes every batch through its stages, up to three at a time; they finish in order.

    A batch for which the device's memory does not suffice is run again by itself, and in halves if
    need be. Where a stage raises, no other is under way any more, and what was being finished is.
    """
    if not overlapping:
        for batch in batches:
            _run_serially(batch, stages, device)
        return
    with (
        StreamThread(device) as reader,
        StreamThread(device, own_thread=device.type == "cuda") as finisher,
        fork_join(make_streams(device)) as contexts,
    ):
        turns = cycle(contexts)
        next_read: Future[Outcome[Loaded]] | None = None
        unfinished: tuple[Batch, Future[Outcome[None]]] | None = None
        for batch, following in zip_longest(batches, batches[1:]):
            with next(turns):
                loaded: Loaded | None = None
                solved: Solved | None = None
                with contextlib.suppress(torch.OutOfMemoryError):
                    loaded = reader.take(next_read or reader.submit(stages.read, batch))
                    next_read = reader.submit(stages.read, following) if following else None
                    solved = stages.solve(loaded)
                loaded = None
                again = _wait_finished(unfinished, finisher)
                unfinished = None
                if solved is None or again:
                    # Both give back what they hold, and so does what was read ahead.
                    solved, again = None, [*again, batch]
                    _discard(next_read)
                    next_read = None
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    for failed in again:
                        _run_serially(failed, stages, device)
                else:
                    unfinished = batch, finisher.submit(stages.finish, solved)
        for failed in _wait_finished(unfinished, finisher):
            _run_serially(failed, stages, device)


def _wait_finished(
    unfinished: tuple[Batch, Future[Outcome[None]]] | None, finisher: StreamThread
) -> list[Batch]:
    """Waits for a batch to be finished; the batch if the memory did not suffice for it."""
    if unfinished is not None:
        try:
            finisher.take(unfinished[1])
        except torch.OutOfMemoryError:
            return [unfinished[0]]
    return []


def _discard(read: Future[Outcome[Loaded]] | None) -> None:
    if read is not None:
        # Whatever is wrong with that batch comes up again when it is its turn.
        with contextlib.suppress(Exception):
            read.result()


def _run_serially(batch: Batch, stages: Stages[Loaded, Solved], device: torch.device) -> None:
    """All stages of a batch with nothing else under way; in halves where it does not fit."""
    error: str | None = None
    try:
        stages.finish(stages.solve(stages.read(batch)))
    except torch.OutOfMemoryError as caught:
        error = str(caught)
    # Beyond the handler, where the failed stage's tensors are no longer held by its frames.
    if error is None:
        return
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(batch.layers) == 1:
        stages.give_up(batch, error)
        return
    for half in batch.halves():
        _run_serially(half, stages, device)
