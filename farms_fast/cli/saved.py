"""Reads saved analyses for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_fast.core.regular_files import open_regular
from farms_fast.core.text import printable
from farms_fast.results.analysis import Analysis
from farms_fast.results.store import ResultsStore, RunInfo

SavedAnalysis = Annotated[
    Path,
    typer.Argument(help="A store of `farms-fast analyze --store`, or a JSON file of an analysis."),
]

_SQLITE = b"SQLite format 3\x00"


def load_saved(path: Path, run: int | None = None, option: str = "run") -> Analysis:
    """Reads an analysis from a store or a JSON file, with a note on stderr for an unfinished run.

    `run` is a run of a store by its number, by default the newest, and `option` its name in
    messages. FileNotFoundError and ValueError for what is missing, or is neither.
    """
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {str(path)!r}") from None
    with stream:
        is_store = stream.read(len(_SQLITE)) == _SQLITE
    if not is_store:
        if run is not None:
            raise ValueError(f"{option}: {str(path)!r} is no results store, it has no runs")
        try:
            return Analysis.from_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; expected a results store or such a file") from error
    analysis, info = load_run(path, run, option)
    if info.finished is None:
        text = f"note: run {info.id} of {path.name} is not finished: {layers_done(info)} layers"
        typer.echo(printable(text), err=True)
    return analysis


def load_run(path: Path, run: int | None, option: str = "run") -> tuple[Analysis, RunInfo]:
    """Reads a run of a store, the newest by default, with its `RunInfo`; errors as `load_saved`."""
    with ResultsStore(path, create=False) as store:
        infos = store.runs()
        known = [info.id for info in infos]
        if run is not None and run not in known:
            numbers = ", ".join(map(str, known)) or "none (it has no runs)"
            raise ValueError(f"{option}: expected one of {numbers}, got {run}")
        analysis = Analysis(*store.read(run))
    return analysis, infos[-1] if run is None else infos[known.index(run)]


def layers_done(info: RunInfo) -> str:
    """Finished layers of all layers; a question mark for a total that is not known yet."""
    return f"{info.layers}/{'?' if info.total is None else info.total}"
