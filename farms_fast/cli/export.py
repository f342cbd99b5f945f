"""`farms-fast export` and `farms-fast runs`: what a results store holds, in other forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_fast.cli.console import check_outputs, cli_errors, echo
from farms_fast.cli.options import AnalysisJson, MetricsCsv
from farms_fast.cli.saved import layers_done, load_run
from farms_fast.cli.tables import text_table
from farms_fast.core.text import printable
from farms_fast.results.store import ResultsStore

Store = Annotated[Path, typer.Argument(help="The file of `farms-fast analyze --store`.")]


def export(
    store: Store,
    run: Annotated[
        int | None, typer.Option(help="A run by its number.", show_default="the newest")
    ] = None,
    csv: MetricsCsv = None,
    json: AnalysisJson = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Write the metrics to this Parquet file (needs pyarrow).")
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
    with cli_errors():
        spectra = {"safetensors": safetensors, "npz": npz}
        given = {"csv": csv, "json": json, "parquet": parquet, **spectra}
        if not any(given.values()):
            raise ValueError(f"expected at least one of {', '.join(f'--{name}' for name in given)}")
        check_outputs(read={"store": store}, **given)
        analysis, info = load_run(store, run)
        writers = (
            analysis.to_csv,
            analysis.to_json,
            analysis.to_parquet,
            analysis.spectra_to_safetensors,
            analysis.spectra_to_npz,
        )
        for path, write in zip(given.values(), writers, strict=True):
            if path is not None:
                write(path)
        if info.finished is None:
            typer.echo(f"note: run {info.id} is not finished: {layers_done(info)} layers", err=True)


def runs(store: Store) -> None:
    """List the runs of a store, the oldest first.

    Exit codes: 0 listed, 2 bad usage or bad input, 130 interrupted.
    """
    with cli_errors():
        with ResultsStore(store, create=False) as opened:
            known = opened.runs()
        rows = [
            (
                str(info.id),
                printable(info.started),
                printable(info.finished or "-"),
                layers_done(info),
                printable(info.settings.source),
            )
            for info in known
        ]
        headings = ("run", "started", "finished", "layers", "source")
        for line in text_table(headings, rows, left=headings):
            echo(line)
