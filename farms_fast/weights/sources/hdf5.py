"""Tensors of HDF5 files: weights of Keras (.h5, .weights.h5, .keras), and arrays of others.

Links to other files are not followed, and data in other files are not read.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from farms_fast.core.arrays import from_numpy
from farms_fast.core.json_files import parse_json
from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.file_source import FileSource, file_changed, file_state
from farms_fast.weights.stacks import Skipped, TensorHeader

_KERAS_MEMBER = "model.weights.h5"
_DEEPEST = 64
_MOST_OBJECTS = 2**20
_CONFIG_BYTES = 2**26
# What a compressed tensor may take more than its bytes in the file, and a chunk more than a tensor.
_INFLATED = 2**30
_CHUNK = 2**24
# Variables of Keras's layers in their order; files of Keras 3 have no names for them.
_VARIABLES = (
    (re.compile(r"embedding"), ("embeddings",)),
    (re.compile(r"cell$"), ("kernel", "recurrent_kernel", "bias")),
    (re.compile(r"separable_?conv"), ("depthwise_kernel", "pointwise_kernel", "bias")),
    (re.compile(r"depthwise_?conv"), ("depthwise_kernel", "bias")),
    (re.compile(r"batch_?norm"), ("gamma", "beta", "moving_mean", "moving_variance")),
    (re.compile(r"norm"), ("gamma", "beta")),
    (re.compile(r""), ("kernel", "bias")),
)
# Attributes of Keras's attention layers, by the names that its layers have elsewhere.
_ATTENTION = {
    "query_dense": "query",
    "key_dense": "key",
    "value_dense": "value",
    "output_dense": "attention_output",
}
_OF_KERAS = re.compile(r"/kernel:0$|/vars/\d+$")
_CONTAINERS = frozenset({"layers", "_layer_checkpoint_dependencies", "vars"})


class HDF5Source(FileSource[str]):
    """Datasets of HDF5 files, named by their groups with dots between, as Keras's layers are."""

    def _load(self, name: str, stored: Path) -> Tensor:
        with open_regular(stored) as file:
            if file_state(file.fileno()) != self._states[stored]:
                raise file_changed(stored)
            with _hdf5(file, stored) as root, _sound(stored):
                values = root[self._located[stored, name]][()]
        return from_numpy(np.asarray(values))

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        stored: dict[str, TensorHeader | Skipped] = {}
        with open_regular(path) as file:
            classes = _layer_classes(file, path)
            with _hdf5(file, path) as root, _sound(path):
                for place, item, address in _objects(root):
                    name = _name_of(place, classes)
                    if _OF_KERAS.search(place):
                        self._layout = "channels_last"
                    if name in stored:
                        name = place.replace("/", ".")
                    if isinstance(item, str):
                        stored[name] = Skipped(name, (), item)
                        continue
                    shape = tuple(item.shape or ())
                    if place.startswith(("optimizer/", "optimizer_weights/")):
                        stored[name] = Skipped(name, shape, "the state of an optimiser")
                    elif reason := _unreadable(item, self._size(path)):
                        stored[name] = Skipped(name, shape, reason)
                    else:
                        dtype = from_numpy(np.empty(0, item.dtype)).dtype
                        stored[name] = TensorHeader(name, shape, dtype, (str(path), address))
                        self._located[path, name] = place
        if not any(isinstance(item, TensorHeader) for item in stored.values()):
            raise ValueError(f"{path}: expected tensors, got HDF5 without any")
        return stored


class _Section(io.RawIOBase):
    """Bytes of a file from an offset on, as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a position, from the section's begin, the position or the section's end."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """The position in the section."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads at the position, at most to the section's end."""
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        done: int = self._file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._position += done
        return done


@contextlib.contextmanager
def _hdf5(file: BinaryIO, path: Path) -> Iterator[Any]:
    """The root of an HDF5 file, or of the one in a Keras archive."""
    with optional_import("h5py", extra="hdf5", needed_for=f"{path}: HDF5"):
        import h5py
    content: Any = file
    if _is_archive(file):
        content = _member(file, path)
    try:
        root = h5py.File(content, "r")
    except (OSError, RuntimeError, ValueError) as error:
        raise _broken(path, error) from None
    with root:
        yield root


@contextlib.contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Errors of the library, which can be of many types, name the file."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, UnicodeError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path}: expected sound HDF5, got a broken one: {reason[:200]}")


def _is_archive(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def _member(file: BinaryIO, path: Path) -> _Section:
    """The weights of a Keras archive, which are stored as they are."""
    info = _archive_info(file, path, _KERAS_MEMBER)
    if info is None:
        raise ValueError(f"{path}: expected a Keras archive with {_KERAS_MEMBER}, got none")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(
            f"{path}: expected {_KERAS_MEMBER} as it is, got it compressed: unzip the archive and"
            " give the path of that file"
        )
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return _Section(file, info.header_offset + 30 + name + extra, info.file_size)


def _archive_info(file: BinaryIO, path: Path, name: str) -> zipfile.ZipInfo | None:
    try:
        with zipfile.ZipFile(file) as archive:
            return next((info for info in archive.infolist() if info.filename == name), None)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise ValueError(f"{path}: expected a sound archive, got a broken one: {error}") from None


def _layer_classes(file: BinaryIO, path: Path) -> dict[str, str]:
    """The classes of a Keras archive's layers by name, in lower case; empty for other files."""
    if not _is_archive(file):
        return {}
    info = _archive_info(file, path, "config.json")
    if info is None or info.file_size > _CONFIG_BYTES:
        return {}
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as member:
            config = parse_json(path, member.read(_CONFIG_BYTES))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, RuntimeError):
        return {}
    classes: dict[str, str] = {}
    rest = [config]
    while rest:
        entry = rest.pop()
        if isinstance(entry, dict):
            inner = entry.get("config")
            if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                classes[inner["name"]] = str(entry.get("class_name", "")).lower()
        if isinstance(entry, (dict, list)):
            rest += entry.values() if isinstance(entry, dict) else entry
    return classes


def _objects(root: Any) -> Iterator[tuple[str, Any, int]]:
    """Path, dataset and address of each dataset; for other things, the reason to skip them."""
    import h5py

    visited = {h5py.h5o.get_info(root.id).addr}
    rest = [("", root, 0)]
    count = 0
    while rest:
        prefix, group, depth = rest.pop()
        inner = []
        for name in group:
            count += 1
            if count > _MOST_OBJECTS or depth > _DEEPEST:
                raise ValueError("more groups and datasets than weights have")
            place = f"{prefix}{name}"
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                yield place, "a link, which is not followed", 0
                continue
            item = group[name]
            address = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Dataset):
                yield place, item, address
            elif isinstance(item, h5py.Group) and address not in visited:
                visited.add(address)
                inner.append((f"{place}/", item, depth + 1))
        rest += reversed(inner)


def _unreadable(dataset: Any, file_bytes: int) -> str:
    """Why a dataset is no tensor that can be read; empty for one that can."""
    if dataset.shape is None:
        return "an empty dataset"
    try:
        torch.from_numpy(np.empty(0, dataset.dtype.newbyteorder("=")))
    except TypeError:
        return f"not a tensor: dtype {dataset.dtype}"
    if dataset.external or dataset.is_virtual:
        return "its data are in other files, which are not read"
    size, filled = dataset.nbytes, dataset.id.get_storage_size()
    if filled > file_bytes:
        return f"of {filled:,} bytes in a file of {file_bytes:,}"
    limit = filled
    if dataset.chunks is not None:
        if int(np.prod(dataset.chunks, dtype=object)) * dataset.dtype.itemsize > size + _CHUNK:
            return f"its chunks of {dataset.chunks} are larger than it is"
        if dataset.id.get_create_plist().get_nfilters():
            limit += _INFLATED
    return f"only {filled:,} of its {size:,} bytes are in the file" if size > limit else ""


def _name_of(place: str, classes: Mapping[str, str]) -> str:
    """A dataset's name as that of a layer and its variable: `conv1.kernel`."""
    parts = [part.partition(":")[0] for part in place.split("/")]
    if len(parts) > 1 and parts[0] == "model_weights":
        parts = parts[1:]
    # Keras before 3 has a group for each layer, in which names begin with the layer's again.
    if len(parts) > 2 and parts[0] == parts[1]:
        parts = parts[1:]
    if len(parts) > 2 and parts[-2] == "vars" and parts[-1].isdecimal():
        parts[-1] = _variable(parts[-3], int(parts[-1]), classes)
        parts = [_ATTENTION.get(part, part) for part in parts if part not in _CONTAINERS]
    return ".".join(parts)


def _variable(layer: str, number: int, classes: Mapping[str, str]) -> str:
    kind = classes.get(layer, layer.lower())
    names = next(names for pattern, names in _VARIABLES if pattern.search(kind))
    return names[number] if number < len(names) else f"variable_{number}"
