"""`farms-fast export` and `farms-fast runs`: what a results store holds, in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_fast.cli.console import check_outputs, echo, one_line_errors
from farms_fast.cli.options import AnalysisJson, MetricsCsv
from farms_fast.cli.saved import layers_done, load_run
from farms_fast.core.text import printable
from farms_fast.results.store import ResultsStore

__all__ = ["export", "register", "runs"]

Store = Annotated[
    Path, typer.Argument(help="The file of `farms-fast analyze --store`.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to an application."""
    app.command()(export)
    app.command()(runs)


def export(
    store: Store,
    run: Annotated[
        int | None, typer.Option(help="A run by its number.", show_default="the newest")
    ] = None,
    csv: MetricsCsv = None,
    json: AnalysisJson = None,
    parquet: Annotated[
        Path | None,
        typer.Option(help="Write the metrics to this Parquet file (needs pyarrow)."),
    ] = None,
    safetensors: Annotated[
        Path | None, typer.Option(help="Write every layer's eigenvalues to this file.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(help="Write every layer's eigenvalues to this file of NumPy.")
    ] = None,
) -> None:
    """Write the results of a store to other files.

    A run that is not finished gives the layers that are there, with a note on stderr.

    Exit codes: 0 written, 2 bad usage or bad input, 130 interrupted.
    """
    with one_line_errors():
        given = {
            "csv": csv,
            "json": json,
            "parquet": parquet,
            "safetensors": safetensors,
            "npz": npz,
        }
        if not any(given.values()):
            raise ValueError(f"expected at least one of {', '.join(f'--{name}' for name in given)}")
        check_outputs(store=store, **given)
        analysis, info = load_run(store, run)
        if csv is not None:
            analysis.to_csv(csv)
        if json is not None:
            analysis.to_json(json)
        if parquet is not None:
            analysis.to_parquet(parquet)
        if safetensors is not None:
            analysis.spectra_to_safetensors(safetensors)
        if npz is not None:
            analysis.spectra_to_npz(npz)
        if info.finished is None:
            typer.echo(f"note: run {info.id} is not finished: {layers_done(info)} layers", err=True)


def runs(store: Store) -> None:
    """List the runs of a store, the oldest first.

    Exit codes: 0 listed, 2 bad usage or bad input, 130 interrupted.
    """
    with one_line_errors():
        with ResultsStore(store, create=False) as opened:
            known = opened.runs()
        rows = [("run", "started", "finished", "layers", "source")]
        rows += [
            (
                str(info.id),
                info.started,
                info.finished or "-",
                layers_done(info),
                printable(info.settings.source),
            )
            for info in known
        ]
        # The last column ends the line, and all before it are ASCII.
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        for *cells, source in rows:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            echo("  ".join((*padded, source)))
