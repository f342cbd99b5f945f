"""Where weights come from: a module, a mapping of tensors, or a checkpoint on disk.

A source tells its layers from headers alone and loads one tensor at a time; it writes nowhere, and
nothing in a file is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from farms_fast.weights.sources.folder import (
    AdapterSource,
    adapter_config,
    checkpoint_holds,
    named_base,
    open_adapter,
    open_folder,
)
from farms_fast.weights.sources.memory import HeaderSource, MappingSource, ModuleSource, Source
from farms_fast.weights.sources.pickles import PICKLE_SUFFIXES, PickleSource
from farms_fast.weights.sources.safetensors import SafetensorsSource

__all__ = [
    "AdapterSource",
    "MappingSource",
    "ModuleSource",
    "PickleSource",
    "SafetensorsSource",
    "Source",
    "checkpoint_holds",
    "checkpoints_of",
    "open_source",
]

Model = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


def open_source(
    model: Model, *, base: Model | None = None, key: str | None = None
) -> HeaderSource | ModuleSource | AdapterSource:
    """Opens whatever holds weights.

    Args:
        model: a module; a mapping of names to tensors or NumPy arrays; or a path. A path may be a
            `.safetensors` file, a pickled state dict (`.pt`, `.pth`, `.bin`, `.ckpt`), or a folder
            with, in this order of preference, `adapter_config.json` (a PEFT adapter),
            `model.safetensors`, an index of safetensors shards, a single safetensors file,
            `pytorch_model.bin` or its index. Its `config.json` tells what headers do not.
        base: for the folder of a LoRA adapter, the model that it changes: anything that `model`
            may be but an adapter. None takes the path that the adapter's config names.
        key: dotted path of the mapping that holds the weights, for a mapping or pickle that has
            several; None finds it.

    Returns:
        A source. Pickles are read with `weights_only`. An adapter has the layers of its base, with
        the weights that are in effect: an update alone is of low rank and has no spectrum to fit.
        The path of the adapter's file gives its factors as they are.

    Raises:
        FileNotFoundError: the path, or a file that an index names, does not exist.
        ValueError: there are no readable weights, an index names a file outside its folder, an
            adapter has no base, `base` is given for what is no adapter, or `key` leads to no
            tensors or is given for what has no keys.
        TypeError: `model` is none of these, or an array in a mapping has no numbers.

    Example:
        >>> import torch
        >>> source = open_source({"fc.weight": torch.ones(4, 3)})
        >>> layers, skipped = source.layers()
        >>> layers[0].to_stack(source.load(layers[0].tensors[0])).shape
        torch.Size([1, 4, 3])
    """
    path = _path_of("model", model)
    config = adapter_config(path) if path is not None and path.is_dir() else None
    if path is None or config is None:
        if base is not None:
            raise ValueError("base: expected None, because the model is no folder of an adapter")
        return _open("model", model, key)
    if key is not None:
        raise _no_keys(path, key)
    return AdapterSource(_open_base(path, config, base), open_adapter(path), config)


def checkpoints_of(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> list[Path]:
    """The paths that `open_source` reads for these arguments: an adapter's config may name one."""
    model = Path(path).expanduser()
    named = None if base is None else Path(base).expanduser()
    if base is None and model.is_dir() and (config := adapter_config(model)):
        named = named_base(config)
    return [model] if named is None else [model, named]


def _open_base(
    folder: Path, config: Mapping[str, Any], base: Model | None
) -> HeaderSource | ModuleSource:
    base = named_base(config) if base is None else base
    if base is None:
        named = config.get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: expected the base of this adapter, whose config names {named!r}, which is"
            " no path here: give it as base, or analyse the adapter's factors as they are by giving"
            " the path of its file"
        )
    path = _path_of("base", base)
    if path is not None and path.is_dir() and adapter_config(path) is not None:
        raise ValueError(f"base: expected a model, got another adapter: {str(path)!r}")
    return _open("base", base)


def _path_of(argument: str, model: object) -> Path | None:
    """The path of a model on disk, None of one in memory."""
    if isinstance(model, (nn.Module, Mapping)):
        return None
    if not isinstance(model, (str, os.PathLike)) or not isinstance(os.fspath(model), str):
        raise TypeError(
            f"{argument}: expected a torch.nn.Module, a mapping of names to tensors, or a path, "
            f"got {type(model).__name__}"
        )
    if not os.fspath(model):
        raise ValueError(f"{argument}: expected a path, got an empty string")
    return Path(model).expanduser()


def _open(argument: str, model: Model, key: str | None = None) -> HeaderSource | ModuleSource:
    if isinstance(model, nn.Module):
        source: HeaderSource | ModuleSource = ModuleSource(model)
    elif isinstance(model, Mapping):
        return MappingSource(model, f"state dict of {len(model)} entries", key)
    else:
        source = _open_path(argument, Path(model).expanduser(), key)
    if key is not None and not isinstance(source, PickleSource):
        raise _no_keys(source.description, key)
    return source


def _no_keys(model: object, key: str) -> ValueError:
    return ValueError(f"key: expected None, because {model} is no mapping of mappings, got {key!r}")


def _open_path(argument: str, path: Path, key: str | None) -> HeaderSource:
    if path.is_dir():
        return open_folder(path, key)
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}: expected a file or folder of weights, got {str(path)!r}, which does not"
            " exist (a model of a hub has to be downloaded first)"
        )
    if path.suffix == ".safetensors":
        return SafetensorsSource({path: None}, str(path))
    if path.suffix in PICKLE_SUFFIXES:
        return PickleSource({path: None}, str(path), key=key)
    arrays = path.suffix == ".npz"
    in_python = " (in Python, analyze(dict(numpy.load(path))) takes it)" if arrays else ""
    raise ValueError(
        f"{argument}: expected a folder or a file ending in .safetensors,"
        f" {', '.join(PICKLE_SUFFIXES)}, got {str(path)!r}{in_python}"
    )
