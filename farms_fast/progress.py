"""Reports how far a run is: a bar on a terminal, silence elsewhere, or the caller's function."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from farms_fast.results import printable

Progress = Callable[[int, int, str], None]


@contextlib.contextmanager
def reporter(
    progress: bool | Progress, layers: int, windows: int, unit: str = "windows"
) -> Iterator[Callable[[str, int, bool], None]]:
    """A function to call with every layer that is done.

    Args:
        progress: True for a bar on stderr where that is a terminal, False for nothing, or a
            function that is called in the bar's place with layers done, layers in all and a name.
        layers: how many there are.
        windows: how many windows they have together.
        unit: what these are called, where they are something else.

    Yields:
        `report(name, windows, computed)`: the layer's name, its windows, and whether they had to be
        computed; the rate and the time left count only those.
    """
    done = 0

    def tell(name: str, count: int, computed: bool) -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, layers, name)

    if callable(progress) or not progress or not sys.stderr.isatty():
        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[layers]}", markup=False),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit, markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=windows, layers=f"0/{layers} layers", rate="")
        known = 0

        def show(name: str, count: int, computed: bool) -> None:
            nonlocal known
            tell(name, count, computed)
            if not computed:
                # What was there already is not work: it shortens the bar instead of moving it.
                known += count
                bar.update(task, total=windows - known)
            else:
                bar.update(task, advance=count)
            speed = bar.tasks[task].speed
            bar.update(
                task,
                description=printable(name)[-40:],
                layers=f"{done}/{layers} layers",
                rate=f"{speed:,.0f}/s" if speed else "",
            )

        yield show
