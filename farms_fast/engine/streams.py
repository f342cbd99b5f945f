"""Streams side by side: kernels of small batches leave part of a device idle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

# More than two were measured to gain nothing (benchmarks/NOTES.md).
LANES = 2


def beside(main: torch.cuda.Stream) -> list[torch.cuda.Stream]:
    """That stream, and others of its device to go beside it."""
    return [main, *(torch.cuda.Stream(main.device) for _ in range(LANES - 1))]


@contextlib.contextmanager
def side_by_side(
    streams: Sequence[torch.cuda.Stream],
) -> Iterator[Sequence[contextlib.AbstractContextManager[object]]]:
    """Contexts of the streams, all after the first and before what follows on it.

    What they leave in memory is theirs until the first stream has come so far, so it may be freed
    as any tensor of the first.

    Args:
        streams: those of `beside`; none on the CPU, where the contexts do nothing.

    Example:
        >>> with side_by_side([]) as lanes:
        ...     len(lanes)
        2
    """
    if not streams:
        yield [contextlib.nullcontext()] * LANES
        return
    main, *others = streams
    for stream in others:
        stream.wait_stream(main)
    try:
        yield [torch.cuda.stream(stream) for stream in streams]
    finally:
        for stream in others:
            main.wait_stream(stream)
