"""`farms-fast report`: a saved analysis as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_fast.cli.console import check_outputs, cli_errors
from farms_fast.cli.saved import SavedAnalysis, load_saved


def report(
    source: SavedAnalysis,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file to write.",
            show_default="SOURCE with the ending .html",
        ),
    ] = None,
    run: Annotated[
        int | None, typer.Option(help="A run of a store by its number.", show_default="the newest")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="the checkpoint's name")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, only errors.")] = False,
) -> None:
    """Write an analysis as one HTML file to open in a browser.

    The file needs nothing else, no network either: a summary, alpha against depth, D, stable rank,
    a table to sort and filter, and for each layer its spectrum with the fitted tail. Spectra come
    from the store; a JSON file has them if it was written with them, and a page without them says
    so.

    Exit codes: 0 written, 2 bad usage or bad input, 130 interrupted.
    """
    with cli_errors():
        chosen = source.with_suffix(".html") if output is None else output
        check_outputs(read={"source": source}, output=chosen)
        analysis = load_saved(source, run)
        if not len(analysis):
            raise ValueError(f"source: {str(source)!r} holds no layer")
        analysis.to_html(chosen, title=title, progress=not quiet)
