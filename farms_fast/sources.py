"""Where weights come from: a module, a mapping of tensors, or a checkpoint on disk.

A source tells its layers from headers alone and loads one tensor at a time. Nothing here writes to
a caller's tensor or to a file, and nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from farms_fast.arrays import from_numpy

from .layers import (
    LayerSpec,
    Skipped,
    TensorHeader,
    layers_from_headers,
    layers_from_module,
    module_tensor,
    sparse_layout,
    tensor_identity,
)

__all__ = ["MappingSource", "ModuleSource", "SafetensorsSource", "Source", "open_source"]

Patterns = str | Sequence[str] | None

_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Names under which training scripts put the weights, beside an optimiser's state and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


class Source(Protocol):
    """What the rest of the package asks of a place that holds weights."""

    @property
    def description(self) -> str:
        """A path or a class name, for titles."""

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """Layers to analyse, and what is not analysed with the reason; reads no weight."""

    def load(self, name: str) -> torch.Tensor:
        """One tensor, named as in `LayerSpec.tensors`, where it lives; not to be written."""


class ModuleSource:
    """The parameters of a module, as they are at the time of each `load`."""

    def __init__(self, module: nn.Module) -> None:
        """Read from ``module``, which is neither run nor changed."""
        self.module = module

    @property
    def description(self) -> str:
        """The module's class name."""
        return type(self.module).__name__

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_module`."""
        return layers_from_module(self.module, include, exclude)

    def load(self, name: str) -> torch.Tensor:
        """The parameter, detached; raises ValueError for a name that the module does not have."""
        return module_tensor(self.module, name)


class MappingSource:
    """Tensors or NumPy arrays by name, such as a state dict or an unpickled checkpoint.

    Args:
        tensors: Names to tensors; a state dict wrapped under ``state_dict``, ``model_state_dict``,
            ``model`` or ``module`` is unwrapped.
        description: For titles and messages.
        skipped: What is known beforehand not to be analysed.

    Raises:
        TypeError: A key is not a string, or an array's dtype has no counterpart in torch.
        ValueError: There is no tensor in it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "state dict",
        skipped: Sequence[Skipped] = (),
    ) -> None:
        """Take the mapping's items as they are now; the tensors themselves are shared."""
        self.description = description
        self._skipped = list(skipped)
        self._values: dict[str, torch.Tensor | np.ndarray[Any, Any]] = {}
        self._headers: list[TensorHeader] = []
        for name, value in self._unwrapped(tensors).items():
            if not isinstance(name, str):
                raise TypeError(f"{description}: expected names as keys, got {name!r}")
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                reason = f"not a tensor: {type(value).__name__}"
                self._skipped.append(Skipped(name, (), reason))
            elif isinstance(value, torch.Tensor) and sparse_layout(value):
                self._skipped.append(Skipped(name, tuple(value.shape), sparse_layout(value)))
            else:
                self._values[name] = value
                self._headers.append(_header(name, value))
        if not self._values:
            keys = ", ".join(repr(key) for key in list(tensors)[:5])
            raise ValueError(
                f"{description}: expected tensors by name, got a mapping without any tensor"
                f" (keys: {keys or 'none'})"
            )

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_headers`; values that are not tensors are listed as skipped."""
        layers, skipped = layers_from_headers(self._headers, include, exclude)
        return layers, skipped + self._skipped

    def load(self, name: str) -> torch.Tensor:
        """The tensor, detached; an array as a tensor of the same memory where torch allows it."""
        if name not in self._values:
            raise _no_such_tensor(self.description, name)
        value = self._values[name]
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
            return value.detach()
        return from_numpy(value)

    def _unwrapped(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """The innermost state dict; its neighbours on the way are noted as skipped."""
        while not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in tensors.values()):
            wrapper = next((w for w in _WRAPPERS if isinstance(tensors.get(w), Mapping)), None)
            if wrapper is None:
                break
            self._skipped.extend(
                Skipped(str(key), (), f"beside {wrapper!r}, which holds the weights")
                for key in tensors
                if key != wrapper
            )
            tensors = tensors[wrapper]
        return tensors


class SafetensorsSource:
    """Tensors of one safetensors file or of several, memory-mapped.

    safetensors keeps no order of its own, so layers come in the order of their names, with numbers
    compared as numbers.

    Args:
        files: Each file with the names to read from it, or with None for all of its names.
        description: For titles and messages.

    Raises:
        ValueError: A file is not a sound safetensors file, or lacks a name that is expected in it.
    """

    def __init__(self, files: Mapping[Path, Sequence[str] | None], description: str) -> None:
        """Read the headers of all files."""
        self.description = description
        self._file_of: dict[str, Path] = {}
        self._open_files: dict[Path, Any] = {}
        self._skipped: list[Skipped] = []
        headers: list[TensorHeader] = []
        for path, names in files.items():
            headers.extend(self._read_headers(path, names))
        self._headers = sorted(headers, key=lambda header: _natural_order(header.name))

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_headers`."""
        layers, skipped = layers_from_headers(self._headers, include, exclude)
        return layers, skipped + self._skipped

    def load(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU; its pages come from the file when they are read."""
        if name not in self._file_of:
            raise _no_such_tensor(self.description, name)
        path = self._file_of[name]
        try:
            return cast(torch.Tensor, self._open(path).get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read {name!r}: {error}") from None

    def __getstate__(self) -> dict[str, object]:
        """A source can be sent to another process, which opens the files anew."""
        return {**self.__dict__, "_open_files": {}}

    def _open(self, path: Path) -> Any:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: expected a sound safetensors file, got a broken one: {error}"
                ) from None
        return self._open_files[path]

    def _read_headers(self, path: Path, names: Sequence[str] | None) -> list[TensorHeader]:
        opened = self._open(path)
        stored = list(opened.keys())
        expected = set(stored if names is None else names)
        lacking = sorted(expected - set(stored))
        if lacking:
            raise ValueError(f"{path}: expected the tensor {lacking[0]!r} of the index in it")
        headers: list[TensorHeader] = []
        for name in stored:
            entry = opened.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
            if name not in expected:
                self._skipped.append(Skipped(name, shape, _not_in_index(path)))
            elif dtype not in _SAFETENSORS_DTYPES:
                reason = f"dtype {dtype} is quantised: dequantise it with its scale first"
                self._skipped.append(Skipped(name, shape, reason))
            else:
                self._file_of[name] = path
                headers.append(TensorHeader(name, shape, _SAFETENSORS_DTYPES[dtype]))
        return headers


def open_source(
    model: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
) -> ModuleSource | MappingSource | SafetensorsSource:
    """Open whatever holds weights.

    Args:
        model: A module; a mapping of names to tensors or NumPy arrays; or a path. A path may be a
            ``.safetensors`` file, a pickled state dict (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), or
            a folder with, in this order of preference, ``model.safetensors``, an index of
            safetensors shards, a single safetensors file, ``pytorch_model.bin`` or its index.

    Returns:
        A source. Pickles are read with ``weights_only``: what is not plain tensors is refused.

    Raises:
        FileNotFoundError: The path, or a file that an index names, does not exist.
        ValueError: The file or folder holds no readable weights, an index names a file outside its
            folder, or a mapping holds no tensor.
        TypeError: ``model`` is none of these, or an array in a mapping is not of numbers.

    Example:
        >>> import torch
        >>> source = open_source({"fc.weight": torch.ones(4, 3)})
        >>> layers, skipped = source.layers()
        >>> layers[0].to_stack(source.load(layers[0].tensors[0])).shape
        torch.Size([1, 4, 3])
    """
    if isinstance(model, nn.Module):
        return ModuleSource(model)
    if isinstance(model, Mapping):
        return MappingSource(model, f"state dict of {len(model)} entries")
    if not isinstance(model, (str, os.PathLike)) or not isinstance(os.fspath(model), str):
        raise TypeError(
            "model: expected a torch.nn.Module, a mapping of names to tensors, or a path, "
            f"got {type(model).__name__}"
        )
    if not os.fspath(model):
        raise ValueError("model: expected a path, got an empty string")
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(
            f"model: expected a file or folder of weights, got {str(path)!r}, which does not exist"
            " (a model of a hub has to be downloaded first)"
        )
    if path.suffix == ".safetensors":
        return SafetensorsSource({path: None}, str(path))
    if path.suffix in _PICKLE_SUFFIXES:
        return MappingSource(_read_pickle(path), str(path))
    raise ValueError(
        f"model: expected a folder or a file ending in .safetensors, {', '.join(_PICKLE_SUFFIXES)}"
        f", got {str(path)!r}"
    )


def _open_folder(folder: Path) -> MappingSource | SafetensorsSource:
    single = folder / "model.safetensors"
    if single.exists():
        return SafetensorsSource({single: None}, str(folder))
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    # Hugging Face writes "model", diffusers "diffusion_pytorch_model": any one index will do.
    indexes = [p for p in visible if p.name.endswith(".safetensors.index.json")]
    main_index = folder / "model.safetensors.index.json"
    if main_index in indexes or len(indexes) == 1:
        shards = _read_index(main_index if main_index in indexes else indexes[0])
        return SafetensorsSource(shards, str(folder))
    files = [p for p in visible if p.suffix == ".safetensors"]
    if len(files) == 1:
        return SafetensorsSource({files[0]: None}, str(folder))
    pickled, pickled_index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if pickled.exists():
        return MappingSource(_read_pickle(pickled), str(folder))
    if pickled_index.exists():
        return _open_pickled_shards(_read_index(pickled_index), str(folder))
    if files:
        found = ", ".join(p.name for p in files[:5])
        raise ValueError(
            f"{folder}: expected one safetensors file or an index, got {len(files)} files without"
            f" an index ({found}): give the path of one"
        )
    raise ValueError(
        f"{folder}: expected model.safetensors, pytorch_model.bin or an index of shards,"
        " got a folder without weights"
    )


def _open_pickled_shards(shards: Mapping[Path, Sequence[str]], folder: str) -> MappingSource:
    tensors: dict[str, Any] = {}
    unlisted: list[Skipped] = []
    for path, names in shards.items():
        stored = _read_pickle(path)
        expected = set(names)
        lacking = sorted(expected - set(stored))
        if lacking:
            raise ValueError(f"{path}: expected the tensor {lacking[0]!r} of the index in it")
        tensors.update({name: stored[name] for name in names})
        unlisted.extend(
            Skipped(str(name), tuple(getattr(stored[name], "shape", ())), _not_in_index(path))
            for name in stored
            if name not in expected
        )
    return MappingSource(tensors, folder, unlisted)


def _read_index(path: Path) -> dict[Path, list[str]]:
    """Shards of an index and the tensors of each, all beside the index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        entries = [(str(name), shard) for name, shard in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f'{path}: expected JSON with a "weight_map" of tensor names to file names'
        ) from None
    shards: dict[Path, list[str]] = {}
    for name, shard in entries:
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


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A pickled mapping, by torch's restricted reader; memory-mapped if the format allows."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():  # its warnings are about files that it then refuses
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # A damaged pickle can raise anything. torch's own message is not passed on: it advises to
        # load the file with arbitrary code allowed.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = f"one that holds {refused[1]}" if refused else "one that is damaged or not of torch"
        if "TorchScript" in str(error):
            got = "a TorchScript archive"
        raise ValueError(f"{path}: expected a pickle of plain tensors only, got {got}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{path}: expected a mapping of names to tensors, got {type(loaded).__name__}"
        )
    return loaded


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]


def _header(name: str, value: torch.Tensor | np.ndarray[Any, Any]) -> TensorHeader:
    if isinstance(value, torch.Tensor):
        return TensorHeader(name, tuple(value.shape), value.dtype, tensor_identity(value))
    try:
        dtype = torch.from_numpy(np.empty(0, value.dtype.newbyteorder("="))).dtype
    except TypeError:
        raise TypeError(
            f"{name}: expected an array of numbers that torch can hold, got dtype {value.dtype}"
        ) from None
    memory = (value.ctypes.data, value.shape, value.strides, dtype) if value.size else None
    return TensorHeader(name, value.shape, dtype, memory)


def _not_in_index(path: Path) -> str:
    return f"in {path.name} but not in its index"


def _no_such_tensor(description: str, name: str) -> ValueError:
    return ValueError(f"name: expected a tensor of {description}, got {name!r}")
