"""``farms-fast prune`` in this process, on small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from farms_fast.cli import main as cli
from tests.support.language_models import small_model, small_tokenizer

CALIBRATION = ("--samples", "8", "--seqlen", "16")
WINDOWS = ("--rows", "16", "--per-dim", "3")


def run(*arguments: str | Path) -> Result:
    env = {"COLUMNS": "120", "TERM": "dumb"}
    return CliRunner().invoke(cli.app, ["prune", *map(str, arguments)], env=env)


def settings_of(out: Path) -> Any:
    return json.loads((out / "farms_fast_pruning.json").read_text())


def save_checkpoint(folder: Path, model: Any = None) -> Path:
    """A small Llama, or the given model, with a tokenizer."""
    (small_model() if model is None else model).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
