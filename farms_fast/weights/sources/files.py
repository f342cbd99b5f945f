"""Weights in files, read one tensor at a time.

A memory map counts as the process's memory once it has been touched, for as long as it exists. So
no file stays mapped. A large tensor of safetensors has a map of its own bytes, which goes with the
tensor. Of pickles one file at a time is mapped, and mapped anew when enough was read of it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.memory import HeaderSource, MappingSource
from farms_fast.weights.stacks import Skipped, TensorHeader

# Each file with the names to read from it, or with None for all of its names.
Files = Mapping[Path, Sequence[str] | None]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Smaller tensors are read into memory: each map costs an open file.
_MAPPED_FROM = 16 * 2**20
# What may be read of a pickle before its map is dropped.
_PICKLE_BYTES = 2**29
_DTYPES = {
    f"{letter}{bits}": getattr(torch, f"{kind}{bits}")
    for letter, kind in (("U", "uint"), ("I", "int"), ("F", "float"))
    for bits in (8, 16, 32, 64)
    if hasattr(torch, f"{kind}{bits}")
}
_DTYPES |= {"BOOL": torch.bool, "BF16": torch.bfloat16, "C64": torch.complex64}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz}
_DTYPES |= {"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz}
_DTYPES |= {"F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class _Extent:
    """The bytes of a tensor in a file."""

    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _FileSource(HeaderSource):
    def __init__(self, files: Files, description: str, config: ModelConfig | None = None) -> None:
        super().__init__(description, config)
        self._states: dict[Path, tuple[int, int]] = {}
        for path, names in files.items():
            stored = self._read_headers(path)
            expected = dict.fromkeys(stored if names is None else names)
            if lacking := sorted(set(expected) - set(stored)):
                raise ValueError(f"{path}: expected the tensor {lacking[0]!r} of the index in it")
            for name, item in stored.items():
                if name not in expected:
                    reason = f"in {path.name} but not in its index"
                    self.skipped.append(Skipped(name, item.shape, reason))
                elif isinstance(item, Skipped):
                    self.skipped.append(item)
            for name in expected:
                item = stored[name]
                if isinstance(item, TensorHeader):
                    self.headers.append(item)
                    self._stored[name] = path

    @abstractmethod
    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        """The tensors of a file, and what else it holds with the reason."""


class SafetensorsSource(_FileSource):
    """Tensors of safetensors files, which keep no order: sorted by name, numbers as numbers."""

    def __init__(self, files: Files, description: str, config: ModelConfig | None = None) -> None:
        self._extents: dict[Path, dict[str, _Extent]] = {}
        super().__init__(files, description, config)
        self.headers.sort(key=lambda header: _natural_order(header.name))

    def _load(self, name: str, stored: Path) -> Tensor:
        extent = self._extents[stored][name]
        if extent.bytes == 0:
            return torch.empty(extent.shape, dtype=extent.dtype)
        with stored.open("rb") as file:
            same = _state(file.fileno()) == self._states[stored]
            content = _bytes_of(file.fileno(), extent) if same else None
        if content is None:
            raise _changed(stored)
        return content.view(extent.dtype).view(extent.shape)

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        entries, start = _safetensors_header(path)
        self._states[path] = _state(path)
        extents = self._extents[path] = {}
        stored: dict[str, TensorHeader | Skipped] = {}
        for name, entry in entries.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            begin, end = entry["data_offsets"]
            if dtype in _DTYPES:
                extents[name] = _Extent(start + begin, end - begin, shape, _DTYPES[dtype])
                stored[name] = TensorHeader(name, shape, _DTYPES[dtype])
            else:
                reason = f"dtype {dtype} is quantised, in a format that is not read"
                stored[name] = Skipped(name.removesuffix(".weight"), shape, reason)
        return stored


def parse_json(path: Path, text: bytes) -> Any:
    """The content of a JSON file, None where it has none; ValueError for a name given twice."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            repeated.append(next(name for name in names if names.count(name) > 1))
        return entries

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        content = None
    if repeated:
        raise ValueError(f"{path}: expected each name once, got {repeated[0]!r} more than once")
    return content


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a sound file, and where its data begin."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        expected = "expected a sound safetensors file, got a broken one"
        raise ValueError(f"{path}: {expected}: {error}") from None
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = parse_json(path, file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def _bytes_of(descriptor: int, extent: _Extent) -> Tensor | None:
    """uint8, mapped where large; None where the file has become too short."""
    if extent.bytes >= _MAPPED_FROM and extent.offset % extent.dtype.itemsize == 0:
        before = extent.offset % mmap.ALLOCATIONGRANULARITY
        start, size = extent.offset - before, before + extent.bytes
        with contextlib.suppress(OSError):  # too many open files or maps: read instead
            pages = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY, offset=start)
            return torch.frombuffer(pages, dtype=torch.uint8, count=extent.bytes, offset=before)
    content = torch.empty(extent.bytes, dtype=torch.uint8)
    target, done = content.numpy().data, 0
    while done < extent.bytes:
        count = os.preadv(descriptor, [target[done:]], extent.offset + done)
        if count == 0:
            return None
        done += count
    return content


class PickleSource(_FileSource):
    """Pickled state dicts; one file at a time is mapped, or held in memory if not a zip file."""

    _opened: tuple[Path, MappingSource] | None = None
    _read_bytes = 0

    def _load(self, name: str, stored: Path) -> Tensor:
        if self._opened is None or self._opened[0] != stored or self._read_bytes > _PICKLE_BYTES:
            self._opened = None  # the old map goes before the new one comes
            self._opened = (stored, self._open(stored))
        tensor = self._opened[1].load(name)
        self._read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __getstate__(self) -> dict[str, object]:
        """Another process opens the files anew."""
        return {**self.__dict__, "_opened": None}

    def _open(self, path: Path) -> MappingSource:
        self._read_bytes = 0
        if self._states.setdefault(path, _state(path)) != _state(path):
            raise _changed(path)
        return MappingSource(_read_pickle(path), str(path))

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        opened = self._open(path)
        self.skipped.extend(opened.skipped)
        headers: dict[str, TensorHeader] = {}
        for header in opened.headers:
            # Another file's tensors may come to lie at the same address later.
            identity = None if header.identity is None else (str(path), header.identity)
            headers[header.name] = replace(header, identity=identity)
        return headers


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A pickled mapping, by torch's restricted reader."""
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
        if "TorchScript" in str(error):
            got = "a TorchScript archive"
        elif refused:
            got = (
                f"one that holds {refused[1]}; save model.state_dict() instead, or load the file "
                "yourself and pass the module"
            )
        raise ValueError(f"{path}: expected a pickle of plain tensors only, got {got}") from None
    if not isinstance(loaded, Mapping):
        got = type(loaded).__name__
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {got}")
    return loaded


def _state(file: Path | int) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> ValueError:
    return ValueError(f"{path}: expected the file as it was when it was opened, it has changed")


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    pieces = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p]
