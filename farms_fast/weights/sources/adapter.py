"""Folders of LoRA adapters as PEFT writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from farms_fast.weights.formats.lora import ADAPTER_PREFIX, Adapter
from farms_fast.weights.sources.file_formats import open_files
from farms_fast.weights.sources.file_source import FileSource
from farms_fast.weights.sources.hub import local_path
from farms_fast.weights.sources.indexes import read_json_object
from farms_fast.weights.sources.memory import HeaderSource, ModuleSource
from farms_fast.weights.stacks import Globs, Layers

_ADAPTER_CONFIG = "adapter_config.json"


class AdapterSource:
    """The weights of a base model as an adapter changes them; `config` is `adapter_config.json`."""

    def __init__(
        self, base: HeaderSource | ModuleSource, adapter: HeaderSource, config: Mapping[str, Any]
    ) -> None:
        self.description = f"{base.description} with {adapter.description}"
        self.base = base
        self._adapter = adapter
        self._apply = Adapter(config, adapter.headers, adapter.description)

    def layers(
        self, include: Globs = None, exclude: Globs = None, *, layout: str = "auto"
    ) -> Layers:
        """The base's layers, in effect; ValueError when the adapter has none of its weights."""
        layers, skipped = self.base.layers(include, exclude, change=self._apply, layout=layout)
        return layers, skipped + self._adapter.skipped

    def load(self, name: str) -> Tensor:
        """One tensor of the base, or of the adapter where the name begins with `adapter:`."""
        if name.startswith(ADAPTER_PREFIX):
            return self._adapter.load(name.removeprefix(ADAPTER_PREFIX))
        return self.base.load(name)


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The entries of a PEFT adapter's config; None for a folder of another kind."""
    path = folder / _ADAPTER_CONFIG
    return read_json_object(path) if os.path.lexists(path) else None


def named_base(config: Mapping[str, Any]) -> Path | None:
    """The base that an adapter's config names, if it is on this machine."""
    named = config.get("base_model_name_or_path")
    local = local_path(named) if isinstance(named, str) and named else None
    return local if local is not None and local.exists() else None


def open_adapter(folder: Path) -> FileSource[Any]:
    """The tensors of a PEFT adapter."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if os.path.lexists(folder / name):
            return open_files({folder / name: None}, str(folder))
    raise FileNotFoundError(
        f"{folder}: expected adapter_model.safetensors or adapter_model.bin beside"
        f" {_ADAPTER_CONFIG}, got neither"
    )
