"""CUDA streams: work side by side on one device, and a thread with a stream of its own.

Kernels of small batches leave part of a device idle, which a second stream fills. On the CPU there
are no streams, and everything here runs where it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given")
Result = TypeVar("Result")
# A result, and the event after which it may be used; None where it may be used at once.
Outcome: TypeAlias = tuple[Result, torch.cuda.Event | None]

# More than two streams were measured to gain nothing (benchmarks/NOTES.md).
STREAMS = 2


def make_streams(
    device: torch.device, first: torch.cuda.Stream | None = None
) -> list[torch.cuda.Stream]:
    """Streams of a device for `fork_join`, none on the CPU; `first` is taken as the first one."""
    if device.type != "cuda":
        return []
    given = [] if first is None else [first]
    return given + [torch.cuda.Stream(device) for _ in range(STREAMS - len(given))]


@contextlib.contextmanager
def fork_join(
    streams: Sequence[torch.cuda.Stream],
) -> Iterator[Sequence[contextlib.AbstractContextManager[object]]]:
    """Contexts of the streams, which start after the current stream and join it on exit.

    The current stream may be one of them. A tensor made inside may be freed after the exit like any
    tensor of the current stream.
    """
    if not streams:
        yield [contextlib.nullcontext()] * STREAMS
        return
    current = torch.cuda.current_stream(streams[0].device)
    others = [stream for stream in streams if stream != current]
    for stream in others:
        stream.wait_stream(current)
    try:
        yield [torch.cuda.stream(stream) for stream in streams]
    finally:
        for stream in others:
            current.wait_stream(stream)


def use_on_current_stream(tensor: Tensor) -> None:
    """Keeps the allocator from reusing memory of another thread's stream too early."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class StreamThread:
    """A thread with a stream of its own, which runs one piece of work after the other.

    Without `own_thread` the work runs where it is submitted, on the current stream.
    """

    def __init__(self, device: torch.device, own_thread: bool = True) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1) if own_thread else None
        on_stream = own_thread and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_stream else None

    def __enter__(self) -> StreamThread:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def submit(self, work: Callable[[Given], Result], given: Given) -> Future[Outcome[Result]]:
        """Starts work that follows what the caller's stream has been given so far."""
        if self._thread is not None:
            before = None
            if self._stream is not None:
                before = torch.cuda.current_stream(self._device).record_event()
            return self._thread.submit(self._run, work, given, before)
        done: Future[Outcome[Result]] = Future()
        try:
            done.set_result((work(given), None))
        except torch.OutOfMemoryError as error:
            done.set_exception(error)
        return done

    def take(self, done: Future[Outcome[Result]]) -> Result:
        """The work's result; what the caller's stream is given from now on follows the work."""
        result, after = done.result()
        if after is not None:
            torch.cuda.current_stream(self._device).wait_event(after)
        return result

    def _run(
        self, work: Callable[[Given], Result], given: Given, before: torch.cuda.Event | None
    ) -> Outcome[Result]:
        if self._stream is None or before is None:
            return work(given), None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(before)
            return work(given), self._stream.record_event()
