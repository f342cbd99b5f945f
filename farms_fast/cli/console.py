"""Exit codes, one-line errors, and output that any terminal can show, for all commands."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import typer

from farms_fast.core.files import check_writable
from farms_fast.core.regular_files import resolve_links
from farms_fast.core.text import printable
from farms_fast.weights.sources import checkpoint_holds, checkpoints_of

EXIT_LAYERS_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# That of a program that SIGPIPE ends.
EXIT_READER_LEFT = 141
# Of an error: a name in it may be of any length.
_LONGEST_LINE = 4000


def echo(text: str) -> None:
    """Prints text with escapes for characters that the output's encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate({ord("…"): "~", ord("±"): "s", ord("λ"): "l"})
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    typer.echo(text)


def terminal_width() -> int:
    """Columns for a table: COLUMNS if set, else the terminal's, else 100."""
    return shutil.get_terminal_size(fallback=(100, 24)).columns


def check_outputs(
    checkpoint: Path | None = None,
    base: Path | None = None,
    read: Mapping[str, Path] | None = None,
    **written: Path | None,
) -> None:
    """Checks, before the work, that every file can be written, none twice, and none that is read.

    `checkpoint` and `base` are models that are read; `read` and `written` are files by their
    options.
    """
    models = [] if checkpoint is None else checkpoints_of(checkpoint, base)
    taken: dict[Path, str] = {}
    for option, path in {**(read or {}), **written}.items():
        if path is None:
            continue
        if str(path) == "-":
            raise ValueError(f"{option}: expected a file, got '-' (/dev/stdout writes to a pipe)")
        if path.is_dir():
            raise IsADirectoryError(f"{option}: {str(path)!r} is a directory, expected a file")
        resolved = resolve_links(path)
        if not resolved.parent.is_dir():
            raise FileNotFoundError(f"{option}: the directory of {str(path)!r} does not exist")
        other = taken.setdefault(resolved, option)
        if other != option:
            raise ValueError(f"{option}: {str(path)!r} is the file of {other} too")
        for model in models:
            if checkpoint_holds(model, path):
                raise ValueError(
                    f"{option}: {str(path)!r} would overwrite a file of the checkpoint "
                    f"{str(model)!r}, which is only read"
                )
        if option in written:
            check_writable(option, path)


@contextlib.contextmanager
def cli_errors(**names: str) -> Iterator[None]:
    """Turns bad input into one line and exit code 2, and an interruption into 130.

    `names` has the command's names of arguments, by those that begin messages, where they differ.
    """
    try:
        yield
    except BrokenPipeError:
        # The reader of the table has left, as `head` does. Redirected, the buffered rest cannot
        # fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_READER_LEFT) from None
    except (ValueError, TypeError, OSError, KeyError, ImportError) as error:
        # str of a KeyError is the repr of its argument.
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join(text.split()) or type(error).__name__
        argument, colon, rest = line.partition(": ")
        line = f"{names.get(argument, argument)}{colon}{rest}"
        if len(line) > _LONGEST_LINE:
            line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
        typer.echo(f"error: {printable(line)}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt as interruption:
        what_is_saved = f": {printable(str(interruption))}" if interruption.args else ""
        typer.echo(f"error: interrupted{what_is_saved}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
