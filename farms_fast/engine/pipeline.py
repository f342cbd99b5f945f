"""Three stages at once: while one batch is solved, the next is read and the last is finished.

On CUDA the reading and the finishing have a thread and a stream each, and solving only launches
work, by turns on two streams, so the device always has a batch to solve and fills what one leaves
idle with the next. On the CPU, where the stages would take each other's cores, only the reading,
which waits for the disk, has a thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle, zip_longest
from typing import Any, Protocol, TypeVar

import torch

from farms_fast.engine.plan import Batch

Given = TypeVar("Given")
Result = TypeVar("Result")


class Stages(Protocol):
    """What is done with a batch, each stage on the current stream of the thread that calls it."""

    def read(self, batch: Batch) -> Any:
        """Brings the batch's weights to the device."""

    def solve(self, loaded: Any) -> Any:
        """Launches the batch's eigenvalues."""

    def finish(self, solved: Any) -> None:
        """Waits for them and keeps what comes of them; doing so again changes nothing."""

    def give_up(self, batch: Batch, error: str) -> None:
        """Takes note that a batch of one layer does not fit into the device's memory."""


def run(
    batches: Sequence[Batch], stages: Stages, device: torch.device, overlapping: bool = True
) -> None:
    """Takes every batch through its stages; they are finished in the order given.

    Up to three batches are under way at a time. One for which the device's memory does not suffice
    goes on alone, and in halves if need be.

    Args:
        batches: what to do.
        stages: how.
        device: where.
        overlapping: False for one batch at a time, where the memory holds no more.

    Raises:
        BaseException: what a stage raised. No other stage is under way any more, and what was
            being finished is finished.
    """
    if not overlapping:
        for batch in batches:
            _alone(batch, stages, device)
        return
    with _Lane(device, True) as reader, _Lane(device, device.type == "cuda") as finisher:
        turns = cycle(_streams_after_the_callers(device))
        ahead: Future[Any] | None = None
        unfinished: tuple[Batch, Future[Any]] | None = None
        for batch, following in zip_longest(batches, batches[1:]):
            with next(turns):
                solved = None
                with contextlib.suppress(torch.OutOfMemoryError):
                    loaded = reader.take(ahead or reader.submit(stages.read, batch))
                    ahead = reader.submit(stages.read, following) if following else None
                    solved = stages.solve(loaded)
                loaded = None
                again = _settle(unfinished, finisher)
                unfinished = None
                if solved is None or again:
                    # Both give back what they hold, and so does what was read ahead.
                    solved, again = None, [*again, batch]
                    _drop(ahead)
                    ahead = None
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    for failed in again:
                        _alone(failed, stages, device)
                else:
                    unfinished = batch, finisher.submit(stages.finish, solved)
        for failed in _settle(unfinished, finisher):
            _alone(failed, stages, device)


def _streams_after_the_callers(
    device: torch.device,
) -> Sequence[contextlib.AbstractContextManager[Any]]:
    """Contexts of two streams that start with what the caller's stream has been given so far."""
    if device.type != "cuda":
        return [contextlib.nullcontext()]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return [torch.cuda.stream(stream) for stream in streams]


def _settle(unfinished: tuple[Batch, Future[Any]] | None, finisher: _Lane) -> list[Batch]:
    """Waits for a batch to be finished; the batch if the memory did not suffice for it."""
    if unfinished is not None:
        try:
            finisher.take(unfinished[1])
        except torch.OutOfMemoryError:
            return [unfinished[0]]
    return []


def _drop(ahead: Future[Any] | None) -> None:
    if ahead is not None:
        # Whatever is wrong with that batch comes up again when it is its turn.
        with contextlib.suppress(Exception):
            ahead.result()


def _alone(batch: Batch, stages: Stages, device: torch.device) -> None:
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
        _alone(half, stages, device)


class _Lane:
    """A place where stages run one after the other: a thread and a stream, or right here."""

    def __init__(self, device: torch.device, own_thread: bool) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1) if own_thread else None
        on_stream = own_thread and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_stream else None

    def __enter__(self) -> _Lane:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[Given], Result], given: Given) -> Future[Any]:
        """Starts work that follows what the caller's stream has been given so far."""
        if self._thread is None:
            done: Future[Any] = Future()
            try:
                done.set_result((work(given), None))
            except torch.OutOfMemoryError as error:
                done.set_exception(error)
            return done
        before = None if self._stream is None else torch.cuda.current_stream(self._device)
        return self._thread.submit(
            self._run, work, given, None if before is None else before.record_event()
        )

    def take(self, done: Future[Any]) -> Any:
        """The work's result; what the caller's stream is given from now on follows the work."""
        result, after = done.result()
        if after is not None:
            torch.cuda.current_stream(self._device).wait_event(after)
        return result

    def _run(
        self, work: Callable[[Given], Result], given: Given, before: torch.cuda.Event | None
    ) -> tuple[Result, torch.cuda.Event | None]:
        if self._stream is None or before is None:
            return work(given), None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            return work(given), self._stream.record_event()
