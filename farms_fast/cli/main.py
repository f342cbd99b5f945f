"""The command `farms-fast`: a checkpoint in, a table of its layers out.

Names of layers come from files that anyone may have written. Nothing of them reaches the terminal
before `printable`, and nothing is printed through rich's markup.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

import farms_fast
from farms_fast import run_analysis
from farms_fast.cli import options
from farms_fast.cli.compare import compare
from farms_fast.cli.console import (
    EXIT_LAYERS_FAILED,
    check_outputs,
    cli_errors,
    echo,
    terminal_width,
)
from farms_fast.cli.export import export, runs
from farms_fast.cli.machine import info, tune
from farms_fast.cli.plan import plan
from farms_fast.cli.prune import prune
from farms_fast.cli.report import report
from farms_fast.cli.tables import all_skipped, counted, fit_table, skipped_lines
from farms_fast.core.arguments import parse_memory
from farms_fast.core.text import fixed, printable, significant
from farms_fast.engine.distributed import Ranks, local_device, torchrun_group
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord

app = typer.Typer(
    name="farms-fast",
    help="Spectra of neural-network weights: the power-law exponent alpha of every layer, without "
    "the bias of the layer's aspect ratio (FARMS).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _shape(record: LayerRecord) -> str:
    stack, rows, cols = record.shape
    return f"{rows}x{cols}" if stack == 1 else f"{stack}x{rows}x{cols}"


# Heading, importance (the least important goes first when the terminal is narrow), and the text.
_COLUMNS: tuple[tuple[str, int, Callable[[LayerRecord], str]], ...] = (
    ("shape", 4, _shape),
    ("windows", 3, lambda r: str(r.windows)),
    ("alpha", 10, lambda r: fixed(r.alpha)),
    ("±", 8, lambda r: fixed(r.alpha_se)),
    ("split", 6, lambda r: fixed(r.split_half)),
    ("D", 7, lambda r: fixed(r.D)),
    ("xmin", 5, lambda r: significant(r.xmin)),
    ("stable rank", 2, lambda r: significant(r.stable_rank)),
    ("log λmax", 1, lambda r: fixed(r.log_spectral_norm)),
    ("status", 9, lambda r: printable(r.status)),
)


def format_table(records: Sequence[LayerRecord], width: int) -> str:
    """The records as a plain table, in at most `width` columns if name and alpha fit (`fit_table`).

    Example:
        >>> from farms_fast.results.record import LayerRecord
        >>> print(format_table([LayerRecord("fc", "linear", (1, 8, 4), "ok", alpha=2.5)], 26))
        name      alpha  ±  status
        fc        2.500  -  ok
    """
    names = [printable(record.name) for record in records]
    columns = [(head, rank, [text(r) for r in records]) for head, rank, text in _COLUMNS]
    return fit_table(names, columns, width, left=("status",))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"farms-fast {farms_fast.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def analyze(
    path: options.CheckpointPath,
    rows: options.Rows = None,
    q: options.AspectRatio = None,
    per_dim: options.PerDim = None,
    full: options.Full = False,
    xmin: options.Xmin = "median",
    xmin_pos: Annotated[
        float, typer.Option(help="median: the tail starts at the N / this-th eigenvalue of N.")
    ] = 2.0,
    bins: Annotated[int, typer.Option(help="peak: bins of the histogram, at most 2^20.")] = 100,
    bootstrap: options.Bootstrap = 100,
    device: options.Device = None,
    dtype: options.Dtype = "float64",
    solver: options.Solver = None,
    memory: options.Memory = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    layout: options.Layout = "auto",
    csv: options.MetricsCsv = None,
    json: options.AnalysisJson = None,
    base: options.Base = None,
    download: options.Download = False,
    key: options.Key = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Write every layer to this SQLite file when it is finished. The same command goes "
            "on where a run with it has ended."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --store: compute all layers anew.")
    ] = False,
    show_skipped: options.ShowSkipped = False,
    quiet: options.Quiet = False,
) -> None:
    """Fit the spectrum of every layer of a checkpoint and print a table.

    The table has per layer: alpha, its standard error over the windows (±), the difference of
    alpha between even and odd windows (split), the Kolmogorov-Smirnov distance D of the tail from
    the power law, the tail's start xmin, the stable rank, and log10 of the largest eigenvalue. A
    narrow terminal gets fewer columns; --csv and --json have everything.

    Under torchrun the layers are shared out over its processes, one for each GPU of each machine:
    torchrun --nproc-per-node=4 -m farms_fast analyze PATH. The first one prints.

    Exit codes: 0 every layer is ok, 1 some layers failed, 2 bad usage or bad input,
    130 interrupted, 141 the reader of the table has left.
    """
    with (
        cli_errors(model="path"),
        _interruption_told(store),
        contextlib.ExitStack() as context,
    ):
        sampling = options.sampling_of(rows, q, per_dim, full)
        check_outputs(path, base, store=store, csv=csv, json=json)
        group = context.enter_context(torchrun_group())
        is_main = Ranks.of(group).is_main
        where = device if device is not None else local_device()

        start = time.perf_counter()
        analysis = run_analysis.analyze(
            path,
            sampling,
            xmin,
            xmin_pos=xmin_pos,
            bins=bins,
            bootstrap=bootstrap,
            device=where,
            dtype=options.parse_dtype(dtype),
            solver=solver,
            memory=None if memory is None else parse_memory(memory),
            include=include or None,
            exclude=exclude or None,
            layout=layout,
            base=base,
            download=download,
            key=key,
            store=store,
            force=force,
            process_group=group,
            progress=not quiet and is_main,
        )
        seconds = time.perf_counter() - start
        if not is_main:
            return

        if csv is not None:
            analysis.to_csv(csv)
        if json is not None:
            analysis.to_json(json)
        if not quiet:
            _report(analysis, seconds, show_skipped)
        if not len(analysis):
            raise ValueError(
                f"path: {str(path)!r} has no layer to analyse, {all_skipped(len(analysis.skipped))}"
            )
    if analysis.failed:
        raise typer.Exit(EXIT_LAYERS_FAILED)


@contextlib.contextmanager
def _interruption_told(store: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interruption:
        if store is None and not interruption.args:
            reason = "nothing is saved; with --store FILE the finished layers would be"
            raise KeyboardInterrupt(reason) from None
        raise


def _report(analysis: Analysis, seconds: float, show_skipped: bool) -> None:
    failed = analysis.failed
    if len(analysis):
        echo(format_table(analysis.layers, terminal_width()))
        echo("")
    for record in failed:
        echo(f"failed: {printable(record.name)}: {record.status}: {printable(record.message)}")
    echo(
        f"{counted(len(analysis) - len(failed), 'layer')} ok, {len(failed)} failed, "
        f"{counted(len(analysis.skipped), 'tensor')} skipped, "
        f"mean alpha {fixed(analysis.mean_alpha)}, {seconds:.1f} s"
    )
    for line in skipped_lines(analysis.skipped, show_skipped):
        echo(line)


for _command in (info, tune, plan, prune, export, runs, report, compare):
    app.command()(_command)


def main() -> None:
    """Runs the command line and exits."""
    app()
