"""Reads the language model that `farms-fast prune` works on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farms_fast.core.optional import optional_import

if TYPE_CHECKING:
    from farms_fast.adapters.pruning.blocks import Blocks

__all__ = ["Checkpoint", "check_layers", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        model: a causal language model, on the CPU.
        tokenizer: its tokenizer.
        unknown: tensors of the checkpoint that the model has no place for.
    """

    model: Any
    tokenizer: Any
    unknown: tuple[str, ...]


def load_checkpoint(name: str, dtype: str, progress: bool) -> Checkpoint:
    """A model of transformers and its tokenizer, from a folder or by its name on the hub.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown dtype, what cannot be loaded, or weights that are missing.
    """
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"model-dtype: expected auto, float32, float16 or bfloat16, got {dtype!r}")
    with optional_import("transformers", extra="pruning", needed_for="prune"):
        import transformers
    if not progress or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # A path that is not there would be taken for a name on the hub.
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
    except Exception as error:  # of many kinds, by what is damaged: pickle's, safetensors', torch's
        what = str(error) or type(error).__name__
        raise ValueError(f"model: {name!r} could not be loaded: {what}") from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers makes them at random, and they would be saved as if they were read
        raise ValueError(
            f"model: expected all weights of a causal language model, got {name!r}, which has "
            f"nothing for {missing[0]!r} of {type(model).__name__} ({len(missing)} missing)"
        )
    return Checkpoint(model, tokenizer, tuple(sorted(loaded["unexpected_keys"])))


def check_layers(blocks: Blocks, pattern: tuple[int, int] | None) -> None:
    """What only the weights tell, before anything is computed.

    Raises:
        ValueError: NaN or infinity in a layer, or groups that do not divide its columns.
    """
    from farms_fast.adapters.pruning.masks import check_weight

    for layer in blocks.layers:
        check_weight(layer.matrix, layer.name)
        if pattern is not None and layer.shape[1] % pattern[1]:
            raise ValueError(
                f"n-m: groups of {pattern[1]} do not divide the {layer.shape[1]} inputs of layer "
                f"{layer.name!r}"
            )
