"""Weights in files, read one tensor at a time.

A memory map counts as the process's memory once it has been touched, for as long as it exists. So
no file stays mapped: of safetensors, each large tensor has a map of its own bytes, which goes with
the tensor; of pickles, one file at a time is mapped, and mapped anew when enough was read of it.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from farms_fast.weights.layers import Skipped, TensorHeader
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.base import HeaderSource, no_such_tensor
from farms_fast.weights.sources.memory import MappingSource

__all__ = ["PickleSource", "SafetensorsSource"]

# Smaller tensors are read into memory: each map costs an open file.
_MAPPED_FROM = 16 * 2**20
# What may be read of a pickle before its map is dropped.
_PICKLE_BYTES = 2**29
_DTYPES = {
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
    "F8_E8M0": torch.float8_e8m0fnu,
}


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are."""

    path: Path
    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsSource(HeaderSource):
    """Tensors of one safetensors file or of several.

    safetensors keeps no order of its own, so layers come in the order of their names, with numbers
    compared as numbers.

    Args:
        files: each file with the names to read from it, or with None for all of its names.
        description: for titles and messages.
        config: of the model.

    Raises:
        ValueError: a file is not a sound safetensors file, or lacks a name that is expected in it.
    """

    def __init__(
        self,
        files: Mapping[Path, Sequence[str] | None],
        description: str,
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__(description, config)
        self._places: dict[str, _Place] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        headers: list[TensorHeader] = []
        for path, names in files.items():
            headers.extend(self._read_headers(path, names))
        self.headers = sorted(headers, key=lambda header: _natural_order(header.name))

    def load(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU; of a large one, pages come from the file when they are read.

        Raises:
            ValueError: there is no tensor of this name, or its file has changed meanwhile.
        """
        if name not in self._places:
            raise no_such_tensor(self.description, name)
        place = self._places[name]
        if place.bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        with place.path.open("rb") as file:
            if _state(file.fileno()) != self._states[place.path]:
                raise _changed(place.path)
            content = _bytes_of(file.fileno(), place)
        return content.view(place.dtype).view(place.shape)

    def _read_headers(self, path: Path, names: Sequence[str] | None) -> list[TensorHeader]:
        stored, start = _safetensors_header(path)
        self._states[path] = _state(path)
        expected = _expected(path, stored, names)
        headers: list[TensorHeader] = []
        for name, entry in stored.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            begin, end = entry["data_offsets"]
            if name not in expected:
                self.skipped.append(Skipped(name, shape, _not_in_index(path)))
            elif dtype not in _DTYPES:
                reason = f"dtype {dtype} is quantised, in a format that is not read"
                self.skipped.append(Skipped(name.removesuffix(".weight"), shape, reason))
            else:
                held = _DTYPES[dtype]
                self._places[name] = _Place(path, start + begin, end - begin, shape, held)
                headers.append(TensorHeader(name, shape, held))
        return headers


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a file that safetensors itself finds sound, and where its data begin."""
    repeated: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            repeated.append(next(name for name in names if names.count(name) > 1))
        return entries

    try:
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            stored = json.loads(file.read(size), object_pairs_hook=once)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a sound safetensors file, got a broken one: {error}"
        ) from None
    if repeated:
        raise ValueError(f"{path}: expected each name once, got {repeated[0]!r} more than once")
    stored.pop("__metadata__", None)
    return stored, 8 + size


def _bytes_of(descriptor: int, place: _Place) -> torch.Tensor:
    """uint8; a private map of the file where the tensor is large and torch can take it from there.

    The map goes when the last tensor that uses it does.
    """
    if place.bytes >= _MAPPED_FROM and place.offset % place.dtype.itemsize == 0:
        start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        before = place.offset - start
        try:
            held = mmap.mmap(
                descriptor, before + place.bytes, access=mmap.ACCESS_COPY, offset=start
            )
        except OSError:
            pass  # too many open files or maps: read instead
        else:
            return torch.frombuffer(held, dtype=torch.uint8, count=place.bytes, offset=before)
    content = torch.empty(place.bytes, dtype=torch.uint8)
    target, done = content.numpy().data, 0
    while done < place.bytes:
        count = os.preadv(descriptor, [target[done:]], place.offset + done)
        if count == 0:
            raise _changed(place.path)
        done += count
    return content


class PickleSource(HeaderSource):
    """Pickled state dicts in one file or several, by torch's restricted reader.

    Files in torch's zip format are memory-mapped, one at a time. The older format cannot be: one
    file at a time is held in memory then.

    Args:
        files: each file with the names to read from it, or with None for all of its names.
        description: for titles and messages.
        config: of the model.

    Raises:
        ValueError: a file is damaged, holds more than plain tensors, or lacks an expected name.
    """

    def __init__(
        self,
        files: Mapping[Path, Sequence[str] | None],
        description: str,
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__(description, config)
        self._paths: dict[str, Path] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        self._opened: tuple[Path, MappingSource] | None = None
        self._handed_out = 0
        for path, names in files.items():
            self._read_headers(path, names)

    def load(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU.

        Raises:
            ValueError: there is no tensor of this name, or its file has changed meanwhile.
        """
        if name not in self._paths:
            raise no_such_tensor(self.description, name)
        path = self._paths[name]
        if self._opened is None or self._opened[0] != path or self._handed_out > _PICKLE_BYTES:
            self._opened = None  # the old map goes before the new one comes
            self._opened = (path, self._open(path))
        tensor = self._opened[1].load(name)
        self._handed_out += tensor.numel() * tensor.element_size()
        return tensor

    def __getstate__(self) -> dict[str, object]:
        """A source can be sent to another process, which opens the files anew."""
        return {**self.__dict__, "_opened": None}

    def _open(self, path: Path) -> MappingSource:
        self._handed_out = 0
        if self._states.setdefault(path, _state(path)) != _state(path):
            raise _changed(path)
        return MappingSource(_read_pickle(path), str(path))

    def _read_headers(self, path: Path, names: Sequence[str] | None) -> None:
        opened = self._open(path)
        self.skipped.extend(opened.skipped)
        stored = {header.name: header for header in opened.headers}
        expected = _expected(path, stored, names)
        for name in stored if names is None else names:
            header = stored[name]
            # Another file's tensors may come to lie at the same address later.
            tied = None if header.identity is None else (str(path), header.identity)
            self.headers.append(replace(header, identity=tied))
            self._paths[name] = path
        self.skipped.extend(
            Skipped(name, header.shape, _not_in_index(path))
            for name, header in stored.items()
            if name not in expected
        )


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
        got = "one that is damaged or not of torch"
        if refused:
            got = (
                f"one that holds {refused[1]}; save model.state_dict() instead, or load the file "
                "yourself and pass the module"
            )
        if "TorchScript" in str(error):
            got = "a TorchScript archive"
        raise ValueError(f"{path}: expected a pickle of plain tensors only, got {got}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{path}: expected a mapping of names to tensors, got {type(loaded).__name__}"
        )
    return loaded


def _expected(path: Path, stored: Mapping[str, object], names: Sequence[str] | None) -> set[str]:
    """The names to read from a file, all of which it must have; None is what it has."""
    expected = set(stored if names is None else names)
    if lacking := sorted(expected - set(stored)):
        raise ValueError(f"{path}: expected the tensor {lacking[0]!r} of the index in it")
    return expected


def _state(file: Path | int) -> tuple[int, int]:
    """Size and time of the last change."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _changed(path: Path) -> ValueError:
    return ValueError(f"{path}: expected the file as it was when it was opened, it has changed")


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]


def _not_in_index(path: Path) -> str:
    return f"in {path.name} but not in its index"
