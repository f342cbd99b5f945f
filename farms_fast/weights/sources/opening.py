"""Opening whatever holds weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from farms_fast.weights.sources.adapter import (
    AdapterSource,
    adapter_config,
    named_base,
    open_adapter,
)
from farms_fast.weights.sources.file_formats import open_files
from farms_fast.weights.sources.file_source import no_keys
from farms_fast.weights.sources.folder import model_config, open_folder
from farms_fast.weights.sources.hub import download as download_model
from farms_fast.weights.sources.hub import hub_name, local_path
from farms_fast.weights.sources.indexes import numbered_shards, read_index
from farms_fast.weights.sources.memory import HeaderSource, MappingSource, ModuleSource
from farms_fast.weights.sources.recognise import INDEX, recognise

Model = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


def open_source(
    model: Model, *, base: Model | None = None, key: str | None = None, download: bool = False
) -> HeaderSource | ModuleSource | AdapterSource:
    """Opens whatever holds weights.

    Args:
        model: a module; a mapping of names to tensors or NumPy arrays; a path; or a name on the
            Hugging Face Hub, `org/model` or `hf://org/model[@revision][/file]`, whose files are in
            the local cache. A path may be a file of weights, whose format its first bytes tell, an
            index of shards, or a folder with, in this order of preference, `adapter_config.json` (a
            PEFT adapter), `model_index.json` (a pipeline of diffusers, whose components' names come
            before those of their tensors), `model.safetensors`, an index of safetensors shards, a
            single safetensors file, `pytorch_model.bin` or its index, or one file of weights of any
            other name. Its `config.json` tells what headers do not.
        base: for the folder of a LoRA adapter, the model that it changes: anything that `model`
            may be but an adapter. None takes what the adapter's config names.
        key: dotted path of the mapping that holds the weights, for a mapping or pickle that has
            several; None finds it.
        download: whether to fetch a model by its name on the Hub, weights and configs only.

    Returns:
        A source. No code in a file is run. An adapter has the layers of its base, with the weights
        that are in effect: an update alone is of low rank and has no spectrum to fit. The path of
        the adapter's file gives its factors as they are.

    Raises:
        FileNotFoundError: the path, or a file that an index names, does not exist.
        ValueError: there are no readable weights, an index names a file outside its folder, an
            adapter has no base, `base` is given for what is no adapter, or `key` leads to no
            tensors or is given for what has no keys. The message names what was recognised instead
            of weights, and the way out.
        TypeError: `model` is none of these, or an array in a mapping has no numbers.
        ImportError: the format needs a package that is not installed; the message has the extra.

    Example:
        >>> import torch
        >>> source = open_source({"fc.weight": torch.ones(4, 3)})
        >>> layers, skipped = source.layers()
        >>> layers[0].to_stack(source.load(layers[0].tensors[0])).shape
        torch.Size([1, 4, 3])
    """
    path = _path_of("model", model, download)
    config = adapter_config(path) if path is not None and path.is_dir() else None
    if path is None or config is None:
        if base is not None:
            raise ValueError("base: expected None, because the model is no folder of an adapter")
        return _open("model", model, path, key)
    if key is not None:
        raise no_keys(path, key)
    return AdapterSource(_open_base(path, config, base, download), open_adapter(path), config)


def checkpoints_of(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> list[Path]:
    """The paths that `open_source` reads for these arguments: an adapter's config may name one."""
    model = local_path(path)
    named = None if base is None else local_path(base)
    if base is None and model.is_dir() and (config := adapter_config(model)):
        named = named_base(config)
    return [model] if named is None else [model, named]


def _open_base(
    folder: Path, config: Mapping[str, Any], base: Model | None, download: bool
) -> HeaderSource | ModuleSource:
    base = named_base(config) if base is None else base
    if base is None:
        named = config.get("base_model_name_or_path")
        raise ValueError(
            f"{folder}: expected the base of this adapter, whose config names {named!r}, which is"
            " no path here: give it as base, or analyse the adapter's factors as they are by giving"
            " the path of its file"
        )
    path = _path_of("base", base, download)
    if path is not None and path.is_dir() and adapter_config(path) is not None:
        raise ValueError(f"base: expected a model, got another adapter: {str(path)!r}")
    return _open("base", base, path)


def _path_of(argument: str, model: object, download: bool) -> Path | None:
    """The path of a model on disk, fetched there if asked for; None of one in memory."""
    if isinstance(model, (nn.Module, Mapping)):
        return None
    if not isinstance(model, (str, os.PathLike)) or not isinstance(os.fspath(model), str):
        raise TypeError(
            f"{argument}: expected a torch.nn.Module, a mapping of names to tensors, or a path, "
            f"got {type(model).__name__}"
        )
    text = os.fspath(model)
    if not text:
        raise ValueError(f"{argument}: expected a path, got an empty string")
    path = local_path(text)
    name = hub_name(text)
    if name is None:
        return path
    if download and (str(path) != text or not os.path.lexists(path)):
        return download_model(name)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{argument}: expected a file or folder of weights, got {text!r}, which does not"
            " exist, nor has the local cache of the Hub a model of that name: --download"
            " (download=True in Python) fetches it"
        )
    return path


def _open(
    argument: str, model: Model, path: Path | None, key: str | None = None
) -> HeaderSource | ModuleSource:
    if isinstance(model, nn.Module):
        source = ModuleSource(model)
        if key is not None:
            raise no_keys(source.description, key)
        return source
    if isinstance(model, Mapping):
        return MappingSource(model, f"state dict of {len(model)} entries", key)
    assert path is not None
    if path.is_dir():
        return open_folder(path, key)
    if not os.path.lexists(path):
        raise FileNotFoundError(
            f"{argument}: expected a file or folder of weights, got {str(path)!r}, which does not"
            " exist"
        )
    if recognise(path) is INDEX:
        return open_files(read_index(path), str(path), model_config(path.parent), key)
    return open_files(dict.fromkeys(numbered_shards(path)), str(path), key=key)
