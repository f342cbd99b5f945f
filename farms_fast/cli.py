"""The command ``farms-fast``: a checkpoint in, a table of its layers out.

Names of layers come from files that anyone may have written. Nothing of them reaches the terminal
before :func:`farms_fast.results.printable`, and nothing is printed through rich's markup.
"""

from __future__ import annotations

import math
import re
import shutil
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farms_fast.commands.console import (
    EXIT_LAYERS_FAILED,
    check_writable,
    echo,
    one_line_errors,
)
from farms_fast.records import LayerRecord
from farms_fast.results import Analysis, printable

if TYPE_CHECKING:
    import torch

__all__ = ["app", "format_table", "main", "parse_memory"]

app = typer.Typer(
    name="farms-fast",
    help="Spectra of neural-network weights: the power-law exponent alpha of every layer, without "
    "the bias of the layer's aspect ratio (FARMS).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_UNITS = {
    "": 1,
    **{unit: 1000**i for i, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**i for i, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}


# ---------------------------------------------------------------------------------------- the table


def _cells(text: str) -> int:
    """Columns on a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _shorten(text: str, width: int) -> str:
    """Text of at most that many columns, cut in its middle.

    Three quarters of what stays come from the end, where the names of a model's layers differ.
    """
    if _cells(text) <= width:
        return text
    left, right = list(text), list[str]()
    while left and _cells("".join(left)) > (width - 1) // 4:
        left.pop()
    for c in reversed(text):
        if _cells("".join(right)) + _cells(c) > width - 1 - _cells("".join(left)):
            break
        right.insert(0, c)
    return "".join(left) + "…" + "".join(right)


def _pad(text: str, width: int, *, right: bool) -> str:
    fill = " " * (width - _cells(text))
    return fill + text if right else text + fill


def _fixed(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _significant(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _shape(record: LayerRecord) -> str:
    stack, rows, cols = record.shape
    return f"{rows}x{cols}" if stack == 1 else f"{stack}x{rows}x{cols}"


# Heading, importance (the least important goes first when the terminal is narrow), and the text.
_COLUMNS: tuple[tuple[str, int, Callable[[LayerRecord], str]], ...] = (
    ("shape", 4, _shape),
    ("windows", 3, lambda r: str(r.windows)),
    ("alpha", 10, lambda r: _fixed(r.alpha)),
    ("±", 8, lambda r: _fixed(r.alpha_se)),
    ("split", 6, lambda r: _fixed(r.split_half)),
    ("D", 7, lambda r: _fixed(r.D)),
    ("xmin", 5, lambda r: _significant(r.xmin)),
    ("stable rank", 2, lambda r: _significant(r.stable_rank)),
    ("log λmax", 1, lambda r: _fixed(r.log_spectral_norm)),
    ("status", 9, lambda r: printable(r.status)),
)
_GAP = 2
_NAME_FLOOR = 28
_LEAST_NAME = 8


def format_table(records: Sequence[LayerRecord], width: int) -> str:
    """Lays the records out as a plain table of at most that many columns.

    Columns are left out, the least important first, until the names have room; then names are
    shortened in their middle. Numbers are never cut: name and alpha stay even where they are wider
    than the terminal.

    Args:
        records: The layers.
        width: Columns of the terminal.

    Returns:
        Lines without trailing spaces, the heading first.

    Example:
        >>> from farms_fast.records import LayerRecord
        >>> print(format_table([LayerRecord("fc", "linear", (1, 8, 4), "ok", alpha=2.5)], 26))
        name      alpha  ±  status
        fc        2.500  -  ok
    """
    names = [printable(record.name) for record in records]
    longest = max((_cells(name) for name in names), default=0)
    columns = [(head, rank, [text(r) for r in records]) for head, rank, text in _COLUMNS]

    def width_of(column: tuple[str, int, list[str]]) -> int:
        return max(map(_cells, (column[0], *column[2])))

    def room_for_names() -> int:
        return width - sum(_GAP + width_of(column) for column in columns)

    floor = max(_LEAST_NAME, min(longest, _NAME_FLOOR))
    while room_for_names() < floor and len(columns) > 1:
        if len(columns) <= 3 and room_for_names() >= _LEAST_NAME:
            break  # a name that is shortened more says more than a missing column
        columns.remove(min(columns, key=lambda column: column[1]))
    name_width = max(_LEAST_NAME, min(longest, room_for_names()))

    lines = []
    for row in range(-1, len(records)):
        line = _pad(
            "name" if row < 0 else _shorten(names[row], name_width), name_width, right=False
        )
        for column in columns:
            text = column[0] if row < 0 else column[2][row]
            line += " " * _GAP + _pad(text, width_of(column), right=column[0] != "status")
        lines.append(line.rstrip())
    return "\n".join(lines)


def _summary(analysis: Analysis, seconds: float) -> str:
    failed = len(analysis.failed)
    parts = [
        f"{len(analysis) - failed} layers ok",
        f"{failed} failed",
        f"{len(analysis.skipped)} tensors skipped",
        f"mean alpha {_fixed(analysis.mean_alpha)}",
        f"{seconds:.1f} s",
    ]
    return ", ".join(parts)


def _skipped_lines(analysis: Analysis, names: bool) -> Iterator[str]:
    """The skipped tensors by reason, the commonest first."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for tensor in analysis.skipped:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        by_reason[tensor.reason].append(f"{printable(tensor.name)}  {shape}")
    if by_reason:
        yield "skipped:" if names else "skipped (--show-skipped lists the names):"
    for reason, tensors in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"  {len(tensors)}  {printable(reason)}"
        if names:
            yield from (f"       {tensor}" for tensor in tensors)


# ------------------------------------------------------------------------------ options and errors


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``40GiB``, ``500 MB`` or ``1073741824``.

    Args:
        text: A positive number and optionally B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB,
            TiB (powers of 1024), in any case.

    Raises:
        ValueError: If it is nothing of that kind or less than one byte.

    Example:
        >>> parse_memory("1.5KiB"), parse_memory("2 MB")
        (1536, 2000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(
            f"memory: expected a size such as 40GiB, 500MB or a number of bytes, got {text!r}"
        )
    return size


def _parse_dtype(text: str) -> torch.dtype:
    import torch

    known = {"float64": torch.float64, "float32": torch.float32}
    if text not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {text!r}")
    return known[text]


# ---------------------------------------------------------------------------------------- commands


def _print_version(wanted: bool) -> None:
    if wanted:
        import farms_fast

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
def info() -> None:
    """Print how this installation was built and what it can use."""
    import farms_fast

    for key, value in farms_fast.build_info().items():
        echo(f"{key}: {value}")


@app.command()
def analyze(
    path: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint: a folder, a .safetensors file, or a .pt, .pth, .bin or .ckpt file.",
            show_default=False,
        ),
    ],
    rows: Annotated[int | None, typer.Option(help="Rows of a window.", show_default="2000")] = None,
    q: Annotated[
        float | None,
        typer.Option(help="Aspect ratio of a window, columns / rows.", show_default="1"),
    ] = None,
    per_dim: Annotated[
        int | None,
        typer.Option(help="Windows along each dimension, at least.", show_default="15"),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Take whole matrices instead of windows (biased by shape)."),
    ] = False,
    xmin: Annotated[
        str, typer.Option(help="Rule for the start of the tail: median, ks or peak.")
    ] = "median",
    xmin_pos: Annotated[
        float, typer.Option(help="median: the tail starts at the N / this-th eigenvalue of N.")
    ] = 2.0,
    bins: Annotated[int, typer.Option(help="peak: bins of the histogram.")] = 100,
    bootstrap: Annotated[
        int, typer.Option(help="Resamplings for the standard error of alpha; 0 for none.")
    ] = 100,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one, else cpu"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic: float64, or float32 (less accurate).")
    ] = "float64",
    solver: Annotated[
        str | None, typer.Option(help="Eigensolver by name.", show_default="by window size")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most device memory to use, such as 40GiB or 500MB.",
            show_default="by what is free",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only layers whose name matches this glob; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Not the layers whose name matches this glob; may be repeated."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the metrics of every layer to this CSV file.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write layers, settings and skipped tensors to this JSON file."),
    ] = None,
    show_skipped: Annotated[
        bool, typer.Option("--show-skipped", help="List the skipped tensors by name.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress bar and no table, only errors.")
    ] = False,
) -> None:
    """Fit the spectrum of every layer of a checkpoint and print a table.

    The table has per layer: alpha, its standard error over the windows (±), the difference of
    alpha between even and odd windows (split), the Kolmogorov-Smirnov distance D of the tail from
    the power law, the tail's start xmin, the stable rank, and log10 of the largest eigenvalue. A
    narrow terminal gets fewer columns; --csv and --json have everything.

    Exit codes: 0 every layer is ok, 1 some layers failed, 2 bad usage or bad input,
    130 interrupted.
    """
    with one_line_errors():
        from farms_fast.analysis import analyze as analyze_model
        from farms_fast.windows import FixedAspectSampling, FullMatrix

        sampling: FixedAspectSampling | FullMatrix
        if full:
            given = {"--rows": rows, "--q": q, "--per-dim": per_dim}
            clashing = ", ".join(option for option, value in given.items() if value is not None)
            if clashing:
                raise ValueError(f"full: takes whole matrices, so it cannot go with {clashing}")
            sampling = FullMatrix()
        else:
            default = FixedAspectSampling()
            sampling = FixedAspectSampling(
                rows=default.rows if rows is None else rows,
                q=default.q if q is None else q,
                per_dim=default.per_dim if per_dim is None else per_dim,
            )
        check_writable("csv", csv)
        check_writable("json", json)

        start = time.perf_counter()
        analysis = analyze_model(
            path,
            sampling,
            xmin,
            xmin_pos=xmin_pos,
            bins=bins,
            bootstrap=bootstrap,
            device=device,
            dtype=_parse_dtype(dtype),
            solver=solver,
            memory=None if memory is None else parse_memory(memory),
            include=include or None,
            exclude=exclude or None,
            progress=not quiet,
        )
        seconds = time.perf_counter() - start

        if csv is not None:
            analysis.to_csv(csv)
        if json is not None:
            analysis.to_json(json)
        if not quiet:
            _report(analysis, seconds, show_skipped)
        if not len(analysis):
            raise ValueError(
                f"path: {str(path)!r} has no layer to analyse, "
                f"all of its {len(analysis.skipped)} tensors were skipped"
            )
    if analysis.failed:
        raise typer.Exit(EXIT_LAYERS_FAILED)


def _report(analysis: Analysis, seconds: float, show_skipped: bool) -> None:
    # COLUMNS if set, the terminal's width if there is one, else 100.
    width = shutil.get_terminal_size(fallback=(100, 24)).columns
    if len(analysis):
        echo(format_table(analysis.layers, width))
        echo("")
    for record in analysis.failed:
        echo(f"failed: {printable(record.name)}: {record.status}: {printable(record.message)}")
    echo(_summary(analysis, seconds))
    for line in _skipped_lines(analysis, show_skipped):
        echo(line)


def main() -> None:
    """Runs the command line and exits."""
    app()
