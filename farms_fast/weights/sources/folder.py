"""Folders of checkpoints as Hugging Face and PEFT write them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from farms_fast.core.json_files import parse_json
from farms_fast.weights.formats.lora import ADAPTER_PREFIX, Adapter
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.memory import HeaderSource, ModuleSource
from farms_fast.weights.sources.pickles import PICKLE_SUFFIXES, PickleSource
from farms_fast.weights.sources.safetensors import SafetensorsSource
from farms_fast.weights.stacks import Globs, Layers

_ADAPTER_CONFIG = "adapter_config.json"
# How the names of a checkpoint's files end; analyses that lie beside them have other names.
_PARTS = (
    *(".safetensors", *PICKLE_SUFFIXES, ".index.json", "config.json"),
    *("tokenizer.json", "vocab.json", "tokens.json", "tokens_map.json"),
)


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


def open_folder(folder: Path, key: str | None = None) -> PickleSource | SafetensorsSource:
    """The weights of a model's folder; see `open_source` for the order and for `key`."""
    config = _model_config(folder)
    single = folder / "model.safetensors"
    if single.exists():
        return SafetensorsSource({single: None}, str(folder), config)
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    # Hugging Face writes "model", diffusers "diffusion_pytorch_model": any one index will do.
    indexes = [p for p in visible if p.name.endswith(".safetensors.index.json")]
    main_index = folder / "model.safetensors.index.json"
    if main_index in indexes or len(indexes) == 1:
        shards = _read_index(main_index if main_index in indexes else indexes[0])
        return SafetensorsSource(shards, str(folder), config)
    files = [p for p in visible if p.suffix == ".safetensors"]
    if len(files) == 1:
        return SafetensorsSource({files[0]: None}, str(folder), config)
    pickled, pickled_index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if pickled.exists():
        return PickleSource({pickled: None}, str(folder), config, key)
    if pickled_index.exists():
        return PickleSource(_read_index(pickled_index), str(folder), config, key)
    if files:
        names = ", ".join(p.name for p in files[:5])
        raise ValueError(
            f"{folder}: expected one safetensors file or an index, got {len(files)} files without"
            f" an index ({names}): give the path of one"
        )
    raise ValueError(
        f"{folder}: expected model.safetensors, pytorch_model.bin or an index of shards,"
        " got a folder without weights"
    )


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The entries of a PEFT adapter's config; None for a folder of another kind."""
    path = folder / _ADAPTER_CONFIG
    return _json_object(path) if path.exists() else None


def named_base(config: Mapping[str, Any]) -> Path | None:
    """The base that an adapter's config names, if that is a path that exists."""
    named = config.get("base_model_name_or_path")
    local = Path(named).expanduser() if isinstance(named, str) and named else None
    return local if local is not None and local.exists() else None


def checkpoint_holds(checkpoint: Path, file: Path) -> bool:
    """Whether writing a file would change a checkpoint, or what lies beside a checkpoint's file.

    Links are followed, because caches of downloads store files as links.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    target = file.resolve()
    parts = [checkpoint]
    with contextlib.suppress(OSError):
        parts += [part for part in folder.iterdir() if part.name.endswith(_PARTS)]
    if any(part.resolve() == target for part in parts):
        return True
    # A new file of such a name would count as a part of the model from then on.
    new = checkpoint.is_dir() and target.parent == folder.resolve()
    return new and target.name.endswith(_PARTS)


def open_adapter(folder: Path) -> PickleSource | SafetensorsSource:
    """The tensors of a PEFT adapter."""
    stored = folder / "adapter_model.safetensors"
    if stored.exists():
        return SafetensorsSource({stored: None}, str(folder))
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        return PickleSource({pickled: None}, str(folder))
    raise FileNotFoundError(
        f"{folder}: expected adapter_model.safetensors or adapter_model.bin beside"
        f" {_ADAPTER_CONFIG}, got neither"
    )


def _model_config(folder: Path) -> ModelConfig | None:
    path = folder / "config.json"
    entries = _json_object(path) if path.exists() else {}
    # GPTQ's own file, from before config.json had an entry for it.
    own = folder / "quantize_config.json"
    if own.exists() and not entries.get("quantization_config"):
        entries = {**entries, "quantization_config": {"quant_method": "gptq", **_json_object(own)}}
    return ModelConfig.of(entries) if entries else None


def _json_object(path: Path, what: str = "a JSON object") -> dict[str, Any]:
    entries = parse_json(path, path.read_bytes())
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected {what}")
    return entries


def _read_index(path: Path) -> dict[Path, list[str]]:
    """Shards of an index and the tensors of each, all beside the index."""
    what = 'JSON with a "weight_map" of tensor names to file names'
    weight_map = _json_object(path, what).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected {what}")
    shards: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        # A plain name, so that a downloaded index cannot point elsewhere. The name itself may be a
        # symbolic link: caches of downloads store files so. Backslash and colon are for Windows.
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):
            raise ValueError(
                f"{path}: expected the plain name of a file in the same folder for {name!r}, "
                f"got {shard!r}"
            )
        shards.setdefault(path.parent / shard, []).append(name)
    for shard_path in shards:
        if not shard_path.is_file():
            raise FileNotFoundError(f"{path}: names the file {shard_path.name!r}, which is missing")
    if not shards:
        raise ValueError(f"{path}: expected at least one tensor in weight_map, got none")
    return shards
