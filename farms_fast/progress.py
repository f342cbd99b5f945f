"""Reports how far a run is: a bar on a terminal, silence elsewhere, or the caller's function."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from farms_fast.results import printable

Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def reporter(progress: bool | Progress) -> Iterator[Progress]:
    """A function to call with layers done, layers in all, and the last layer's name.

    Args:
        progress: True for a bar on stderr where that is a terminal, False for nothing, or a
            function that is called in the bar's place.
    """
    if callable(progress):
        yield progress
        return
    if not progress or not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=printable(name)[-40:])

        yield show
