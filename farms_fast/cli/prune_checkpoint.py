"""Reads the language model that `farms-fast prune` works on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farms_fast.core.optional import optional_import


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model on the CPU, its tokenizer, and tensors that the model lacks."""

    model: Any
    tokenizer: Any
    unknown: tuple[str, ...]


def load_checkpoint(name: str, dtype: str, progress: bool) -> Checkpoint:
    """Loads a model of transformers and its tokenizer, from a folder or the hub.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the folder does not exist.
        ValueError: the dtype is unknown, the model cannot be loaded, or it lacks weights.
    """
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"model-dtype: expected auto, float32, float16 or bfloat16, got {dtype!r}")
    with optional_import("transformers", extra="pruning", needed_for="prune"):
        import transformers
    if not progress or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # transformers would take a missing path for a name on the hub.
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or folder.exists():
        if not folder.is_dir():
            raise FileNotFoundError(f"model: expected a folder, got {name!r}, which is none")
        name = str(folder)
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many types: pickle's, safetensors', torch's
        what = str(error) or type(error).__name__
        raise ValueError(f"model: {name!r} could not be loaded: {what}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers initialises them at random
        raise ValueError(
            f"model: expected all weights of a causal language model, got {name!r}, which has "
            f"nothing for {missing[0]!r} of {type(model).__name__} ({len(missing)} missing)"
        )
    return Checkpoint(model, tokenizer, tuple(sorted(loaded["unexpected_keys"])))
