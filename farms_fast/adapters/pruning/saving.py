"""Saves a pruned model and its report in a folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from farms_fast.adapters.pruning.sequential import PruningReport
from farms_fast.core.arguments import check_type
from farms_fast.core.extension import __version__
from farms_fast.core.files import check_writable
from farms_fast.core.jsonable import plain
from farms_fast.core.regular_files import expand_user

#: The report's file name in the folder of the model.
SETTINGS_FILE = "farms_fast_pruning.json"


def check_output(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to create; raises where something is in its place."""
    check_type("out", path, (str, os.PathLike), "the path of a folder")
    target = Path(os.path.abspath(expand_user(path)))
    if target.is_dir():
        if any(target.iterdir()):
            raise FileExistsError(f"out: expected a new or empty folder, got {str(path)!r}")
    elif target.exists() or target.is_symlink():
        raise FileExistsError(f"out: expected a folder, got {str(path)!r}, which is none")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"out: the folder that {str(path)!r} is in does not exist")
    check_writable("out", target)
    return target


def check_space(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Raises OSError where the disk of a folder to create is too full for the model's weights."""
    folder = check_output(path).parent
    size = sum(parameter.nbytes for parameter in model.parameters())
    if (free := shutil.disk_usage(folder).free) < size:
        reason = f"out: the model's weights take {size:,} bytes, and {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(path))


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder beside the target that takes the target's name at the end.

    An error deletes the folder; a killed process leaves it under a name that begins with a point
    and ends in `.partial`.
    """
    target = check_output(path)
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.partial")
    partial.mkdir()
    try:
        yield partial
        # Replaces an empty folder, and fails if something else was created there meanwhile.
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def report_as_dict(
    report: PruningReport, settings: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """The content of `SETTINGS_FILE`: settings, totals, and every layer and skipped tensor."""
    check_type("report", report, PruningReport, "a PruningReport")
    check_type("settings", settings, (Mapping, NoneType), "values by name")
    layers = [
        {"ratio": layer.target, "reached": layer.reached}
        | {name: value for name, value in vars(layer).items() if name != "target"}
        for layer in report.layers
    ]
    document = {
        "format": "farms_fast.pruning",
        "version": 1,
        "farms_fast": __version__,
        "method": report.method,
        "sparsity": report.sparsity if report.layers else None,
        "batch_size": report.batch_size,
        "settings": settings or {},
        "layers": layers,
        "skipped": [vars(tensor) for tensor in report.skipped],
    }
    values: dict[str, Any] = plain(document)
    return values


def _save_pretrained(saver: Any, folder: Path, out: str | os.PathLike[str]) -> None:
    try:
        saver.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of many types: safetensors has one of its own for a full disk
        raise OSError(f"out: {str(out)!r} could not be written: {error}") from error


def save_pruned(
    model: nn.Module,
    out: str | os.PathLike[str],
    report: PruningReport,
    *,
    tokenizer: Any = None,
    settings: Mapping[str, object] | None = None,
    recipe: str | None = None,
) -> None:
    """Saves a pruned model so that `from_pretrained` loads it.

    The folder also gets `farms_fast_pruning.json` with ratios, results and settings, and
    `recipe.yaml` if there is a recipe. It appears complete or not at all.

    Args:
        model: any with a `save_pretrained`, as models of transformers have.
        out: a folder that does not exist yet, or is empty.
        report: result of `prune_model`.
        tokenizer: saved too, if given.
        settings: how the ratios were made, in values that JSON can hold.
        recipe: the text of a recipe for llm-compressor.

    Raises:
        TypeError: the model or the tokenizer has no `save_pretrained`, or an argument has another
            type; nothing is written then.
        FileExistsError: the folder exists and is not empty.
        FileNotFoundError: its parent folder does not exist.
        OSError: it cannot be written.
    """
    for argument, saved in (("model", model), ("tokenizer", tokenizer)):
        if not hasattr(saved, "save_pretrained") and (saved is not None or argument == "model"):
            raise TypeError(
                f"{argument}: expected one with save_pretrained, as those of transformers have it, "
                f"got {type(saved).__name__}"
            )
    check_type("recipe", recipe, (str, NoneType), "a text")
    document = json.dumps(report_as_dict(report, settings), indent=1, allow_nan=False)
    with new_folder(out) as folder:
        for saver in (model, tokenizer):
            if saver is not None:
                _save_pretrained(saver, folder, out)
        (folder / SETTINGS_FILE).write_text(document + "\n", encoding="utf-8")
        if recipe is not None:
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
