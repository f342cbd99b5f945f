"""`farms-fast compare`: two saved analyses, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from farms_fast.cli.console import check_outputs, cli_errors, echo, terminal_width
from farms_fast.cli.options import Quiet
from farms_fast.cli.saved import SavedAnalysis, load_saved
from farms_fast.cli.tables import fit_table
from farms_fast.core.text import fixed, printable
from farms_fast.results.comparison import Comparison, LayerDifference, nothing_in_common
from farms_fast.results.comparison import compare as compare_analyses

_SORTS: dict[str, Callable[[LayerDifference], float]] = {
    "difference": lambda layer: -abs(layer.difference),
    "z": lambda layer: -abs(layer.z),
}


def compare(
    a: SavedAnalysis,
    b: SavedAnalysis,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write an HTML file to look at.")
    ] = None,
    run_a: Annotated[
        int | None, typer.Option(help="A run of the store A by its number.", show_default="newest")
    ] = None,
    run_b: Annotated[
        int | None, typer.Option(help="A run of the store B by its number.", show_default="newest")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="Order of the table: model, difference or z, the largest first.")
    ] = "model",
    paired: Annotated[
        bool,
        typer.Option(
            "--paired/--unpaired",
            help="Take the errors of differences from one bootstrap of both spectra where their "
            "windows are the same, or as of independent alphas (faster).",
        ),
    ] = True,
    device: Annotated[
        str, typer.Option(help="Where to take that bootstrap: cpu, cuda or cuda:N.")
    ] = "cpu",
    csv: Annotated[
        Path | None, typer.Option(help="Write every layer's comparison to this CSV file.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write layers, settings and notes to this JSON file.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="the two names")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compare the layers of two analyses: fine-tuned, pruned, another seed.

    The table has per layer: alpha in A and in B, their difference with its standard error (±), and
    z, the difference over its error. Of unchanged layers one in twenty has a z beyond 1.96.

    Exit codes: 0 compared, 2 bad usage, bad input or no layer of the same name in both, 130
    interrupted.
    """
    with cli_errors():
        if sort not in ("model", *_SORTS):
            raise ValueError(f"sort: expected model, {' or '.join(_SORTS)}, got {sort!r}")
        # A and B may be two runs of one store.
        for name, path in (("a", a), ("b", b)):
            check_outputs(read={name: path}, output=output, csv=csv, json=json)
        first, second = load_saved(a, run_a, "run-a"), load_saved(b, run_b, "run-b")
        if reason := nothing_in_common(first, second):
            raise ValueError(reason)
        comparison = compare_analyses(
            first, second, paired=paired, device=device, progress=not quiet
        )
        if csv is not None:
            comparison.to_csv(csv)
        if json is not None:
            comparison.to_json(json)
        if output is not None:
            comparison.to_html(output, title=title, progress=not quiet)
        if not quiet:
            echo(format_comparison(comparison, terminal_width(), sort))


def format_comparison(comparison: Comparison, width: int, sort: str = "model") -> str:
    """The table of a comparison, its totals and its notes, in at most `width` columns.

    Example:
        >>> from farms_fast import Analysis, LayerRecord, compare
        >>> a, b = (Analysis([LayerRecord("fc", "linear", (1, 8, 4), "ok", alpha=alpha,
        ...                               alpha_se=0.03)]) for alpha in (2.5, 2.7))
        >>> print(format_comparison(compare(a, b), 60).splitlines()[1])
        fc          2.500    2.700      +0.200  0.042  +4.7
    """
    layers = list(comparison)
    if sort in _SORTS:
        key = _SORTS[sort]
        # NaN goes last.
        layers.sort(key=lambda layer: (math.isnan(key(layer)), key(layer)))
    columns = [
        ("alpha A", 8, [fixed(layer.a.alpha) if layer.a else "-" for layer in layers]),
        ("alpha B", 9, [fixed(layer.b.alpha) if layer.b else "-" for layer in layers]),
        ("difference", 10, [fixed(layer.difference, sign=True) for layer in layers]),
        ("±", 6, [fixed(layer.difference_se) for layer in layers]),
        ("z", 7, [fixed(layer.z, 1, sign=True) for layer in layers]),
        ("note", 5, [printable(layer.note) for layer in layers]),
    ]
    if not any(columns[-1][2]):
        columns.pop()
    names = [printable(layer.name) for layer in layers]
    lines = [fit_table(names, columns, width, left=("note",)), ""] if layers else []
    lines.append(
        f"compared {len(comparison.compared)}, only in A {len(comparison.only_a)}, only in B "
        f"{len(comparison.only_b)}; beyond 1.96 standard errors {len(comparison.different)}; "
        f"mean difference {fixed(comparison.mean_difference, 4, sign=True)}"
    )
    lines += [f"note: {printable(note)}" for note in comparison.notes]
    return "\n".join(lines)
