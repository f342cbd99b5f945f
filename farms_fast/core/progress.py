"""How far a run is: a bar on a terminal, silence elsewhere, or a call of the caller's function."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from farms_fast.core.text import printable

Progress = Callable[[int, int, str], None]

_clock = time.monotonic


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream shows a bar; one that was closed before Python began is None."""
    return stream is not None and stream.isatty()


@contextlib.contextmanager
def reporter(
    progress: bool | Progress, layers: int, windows: int, unit: str = "windows"
) -> Iterator[Callable[[str, int, bool], None]]:
    """A function `report(name, windows, computed)` to call with every layer that is done.

    Windows that were not computed do not count for the rate since the start and the time left. Of
    `progress` see `farms_fast.analyze`; `unit` is what windows are called where they are none.
    """
    done = 0

    def count_layer(name: str, count: int, computed: bool) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, layers, name)

    if callable(progress) or not progress or not is_terminal(sys.stderr):
        yield count_layer
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[layers]}", markup=False),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit, markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    start = _clock()
    with bar:
        task = bar.add_task("", total=windows, layers=f"0/{layers} layers", rate="")
        computed = known = 0

        def show(name: str, count: int, is_new: bool) -> None:
            nonlocal computed, known
            count_layer(name, count, is_new)
            if is_new:
                computed += count
            else:
                # What was there already is not work: it shortens the bar instead of moving it.
                known += count
            bar.update(
                task,
                completed=computed,
                total=windows - known,
                description=printable(name[-40:])[-40:],
                layers=f"{done}/{layers} layers",
                rate=pace(computed, windows - known - computed, _clock() - start),
            )

        yield show


def pace(done: int, left: int, seconds: float) -> str:
    """How fast it goes and how long it will take, from all that was done since the start.

    The layers of a batch come all at once, so the time between two reports says nothing.

    Example:
        >>> pace(1800, 900, 60.0), pace(0, 900, 60.0), pace(5, 9000, 10.0)
        ('30/s, 0:00:30 left', '', '0.5/s, 5:00:00 left')
    """
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    left_seconds = round(left / rate)
    time_left = f"{left_seconds // 3600}:{left_seconds // 60 % 60:02}:{left_seconds % 60:02}"
    return f"{rate:,.0f}/s, {time_left} left" if rate >= 10 else f"{rate:.2g}/s, {time_left} left"
