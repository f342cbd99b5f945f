"""Folders of checkpoints: which of their files are the model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from farms_fast.core.regular_files import resolve_links
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.components import (
    PIPELINE_INDEX,
    ComponentsSource,
    component_folders,
)
from farms_fast.weights.sources.file_formats import is_read, open_files
from farms_fast.weights.sources.file_source import Files, no_keys
from farms_fast.weights.sources.hub import CACHE_PREFIX, snapshot_of
from farms_fast.weights.sources.indexes import numbered_shards, read_index, read_json_object
from farms_fast.weights.sources.memory import HeaderSource
from farms_fast.weights.sources.recognise import WEIGHT_SUFFIXES

_INDEX = ".index.json"
# How the names of a checkpoint's files end; analyses that lie beside them have other names.
_PARTS = (
    *(*WEIGHT_SUFFIXES, _INDEX, "config.json", PIPELINE_INDEX),
    *("tokenizer.json", "vocab.json", "tokens.json", "tokens_map.json"),
)
# What goes before other files of its folder, in this order.
_FIRST = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_SECOND = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")
# What training saves beside the weights.
_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states)\b.*|.*\.metadata"
    r"|rng_state_\d+\.pth|optimizer_\d+\.bin"
)
_MOST_LISTED = 5
_MOST_RECOGNISED = 100


def open_folder(folder: Path, key: str | None = None) -> HeaderSource:
    """The weights of a model's folder; see `open_source` for the order and for `key`."""
    if folder.name.startswith(CACHE_PREFIX) and (folder / "snapshots").is_dir():
        return open_folder(snapshot_of(folder), key)
    if os.path.lexists(folder / PIPELINE_INDEX):
        if key is not None:
            raise no_keys(folder, key)
        return _open_pipeline(folder)
    return open_files(_files_of(folder), str(folder), model_config(folder), key)


def model_config(folder: Path) -> ModelConfig | None:
    """What a folder's config.json says of its model."""
    path = folder / "config.json"
    entries = read_json_object(path) if os.path.lexists(path) else {}
    # GPTQ's own file, from before config.json had an entry for it.
    own = folder / "quantize_config.json"
    if os.path.lexists(own) and not entries.get("quantization_config"):
        quantization = {"quant_method": "gptq", **read_json_object(own)}
        entries = {**entries, "quantization_config": quantization}
    return ModelConfig.of(entries) if entries else None


def checkpoint_holds(checkpoint: Path, file: Path) -> bool:
    """Whether writing a file would change a checkpoint, or what lies beside a checkpoint's file.

    Links are followed, because caches of downloads store files as links.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    target = resolve_links(file)
    parts = [checkpoint]
    with contextlib.suppress(OSError):
        parts += [part for part in folder.iterdir() if part.name.endswith(_PARTS)]
    if any(os.path.realpath(part) == str(target) for part in parts):
        return True
    # A new file of such a name would count as a part of the model from then on.
    new = checkpoint.is_dir() and str(target.parent) == os.path.realpath(folder)
    return new and target.name.endswith(_PARTS)


def _open_pipeline(folder: Path) -> ComponentsSource:
    components = {
        name: open_folder(path)
        for name, path in component_folders(folder).items()
        if _has_weights(path)
    }
    if not components:
        raise ValueError(f"{folder}: expected weights of some component of {PIPELINE_INDEX}")
    return ComponentsSource(components, str(folder))


def _files_of(folder: Path) -> Files:
    """The files of the model, each with the names that an index gives it."""
    if first := _by_name(folder, _FIRST):
        return first
    visible = _visible(folder)
    indexes = [path for path in visible if path.name.endswith(f".safetensors{_INDEX}")]
    if len(indexes) == 1:
        return read_index(indexes[0])
    files = [path for path in visible if path.suffix == ".safetensors"]
    if len(files) == 1:
        return {files[0]: None}
    if second := _by_name(folder, _SECOND):
        return second
    candidates = _candidates(visible)
    if len(candidates) == 1:
        return dict.fromkeys(numbered_shards(candidates[0]))
    if candidates:
        raise ValueError(
            f"{folder}: expected one file of weights or an index of shards, got {len(candidates)}"
            f" files without an index ({_listed(candidates)}): give the path of one"
        )
    raise ValueError(f"{folder}: expected weights, got {_without_weights(folder, visible)}")


def _by_name(folder: Path, names: Iterable[str]) -> Files:
    """The first file of these names that is there, or its shards; empty for none.

    A link to nothing counts, so that opening it says what is missing.
    """
    for name in names:
        if os.path.lexists(folder / name):
            return {folder / name: None}
        if os.path.lexists(folder / f"{name}{_INDEX}"):
            return read_index(folder / f"{name}{_INDEX}")
    return {}


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _candidates(visible: Iterable[Path]) -> list[Path]:
    """Files that hold weights by their names, else by their content; one for each set of shards."""
    files = [path for path in visible if path.is_file() and not _STATE.fullmatch(path.name)]
    named = [path for path in files if path.name.lower().endswith(WEIGHT_SUFFIXES)]
    if not named:
        unnamed = [path for path in files if not re.fullmatch(r"\.\D\w*", path.suffix)]
        with contextlib.suppress(OSError):
            named = [path for path in unnamed[:_MOST_RECOGNISED] if is_read(path)]
    numbers = re.compile(r"-\d{5}-of-(\d{5}\.gguf)$")
    return list({numbers.sub(r"-\1", path.name): path for path in reversed(named)}.values())[::-1]


def _has_weights(folder: Path) -> bool:
    visible = _visible(folder)
    return bool(_candidates(visible)) or any(path.name.endswith(_INDEX) for path in visible)


def _without_weights(folder: Path, visible: list[Path]) -> str:
    """What a folder is that has no file of weights, and the way out."""
    names = {path.name for path in visible}
    if (folder / ".metadata").exists() and any(name.endswith(".distcp") for name in names):
        return (
            "a torch.distributed.checkpoint, whose .metadata is a pickle that may run code: make a"
            " file of it with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
            f" {folder} model.pt`"
        )
    if "saved_model.pb" in names or any(re.search(r"\.data-\d{5}-of-\d{5}$", n) for n in names):
        return "a model of TensorFlow: load it in TensorFlow and save its weights as .weights.h5"
    if "manifest.ocdbt" in names or "_CHECKPOINT_METADATA" in names or "_METADATA" in names:
        return "a checkpoint of Orbax: restore it and pass the tree of arrays to analyze"
    if "Manifest.json" in names and "Data" in names:
        return "a Core ML package: give the model that it was converted from"
    below = [path for path in visible if path.is_dir() and _has_weights_or_none(path)]
    if below:
        return f"a folder whose weights are in {_listed(below)}: give the path of one"
    if any("tokenizer" in name or name.startswith("vocab") for name in names):
        return "a folder with a tokenizer but without weights"
    return "a folder without weights"


def _has_weights_or_none(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return _has_weights(folder)
    return False


def _listed(paths: list[Path]) -> str:
    more = ", ..." if len(paths) > _MOST_LISTED else ""
    return ", ".join(path.name for path in paths[:_MOST_LISTED]) + more
