"""Saves a pruned model and its report in a folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
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
from farms_fast.core.extension import __version__
from farms_fast.core.jsonable import plain

__all__ = ["SETTINGS_FILE", "check_output", "new_folder", "report_as_dict", "save_pruned"]

#: The report's file name in the folder of the model.
SETTINGS_FILE = "farms_fast_pruning.json"


def check_output(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to create.

    Raises:
        TypeError: it is no path.
        FileExistsError: it is a file, or a folder that is not empty.
        FileNotFoundError: its parent folder does not exist.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"out: expected the path of a folder, got {type(path).__name__}")
    target = Path(os.path.abspath(Path(path).expanduser()))
    if target.is_dir():
        if any(target.iterdir()):
            raise FileExistsError(f"out: expected a new or empty folder, got {str(path)!r}")
    elif target.exists() or target.is_symlink():
        raise FileExistsError(f"out: expected a folder, got {str(path)!r}, which is none")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"out: the folder that {str(path)!r} is in does not exist")
    return target


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder beside the target that takes the target's name at the end.

    After an error the folder is deleted, and nothing has the target's name. A killed process leaves
    it under a name that begins with a point and ends in `.partial`. Errors are those of
    `check_output`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with new_folder(parent + "/out") as folder:
        ...         _ = (folder / "a.txt").write_text("a")
        ...     sorted(p.name for p in Path(parent).rglob("*"))
        ['a.txt', 'out']
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
    """The content of `SETTINGS_FILE`: settings, totals, and every layer and skipped tensor.

    Example:
        >>> report = PruningReport("magnitude", (), (), 0.0, 0)
        >>> list(report_as_dict(report, {"sparsity": 0.5}))[3:]
        ['method', 'sparsity', 'batch_size', 'settings', 'layers', 'skipped']
    """
    if not isinstance(report, PruningReport):
        raise TypeError(f"report: expected a PruningReport, got {type(report).__name__}")
    if not isinstance(settings, (Mapping, NoneType)):
        raise TypeError(f"settings: expected values by name, got {type(settings).__name__}")
    layers = [
        {
            "name": layer.name,
            "block": layer.block,
            "shape": layer.shape,
            "ratio": layer.target,
            "n_m": layer.n_m,
            "zeros": layer.zeros,
            "zeros_before": layer.zeros_before,
            "reached": layer.reached,
            "pruned_by": layer.pruned_by,
        }
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
    if not isinstance(recipe, (str, NoneType)):
        raise TypeError(f"recipe: expected a text, got {type(recipe).__name__}")
    document = json.dumps(report_as_dict(report, settings), indent=1, allow_nan=False)
    with new_folder(out) as folder:
        saver: Any = model
        saver.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / SETTINGS_FILE).write_text(document + "\n", encoding="utf-8")
        if recipe is not None:
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
