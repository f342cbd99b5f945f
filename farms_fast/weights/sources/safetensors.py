"""Tensors of safetensors files, read one at a time.

A memory map counts as the process's memory once it has been touched, for as long as it exists. So
no file stays mapped: a large tensor has a map of its own bytes, which goes with the tensor.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farms_fast.core.json_files import parse_json
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.file_source import Files, FileSource, file_changed, file_state
from farms_fast.weights.stacks import Skipped, TensorHeader

# Smaller tensors are read into memory: each map costs an open file.
_MAPPED_FROM = 16 * 2**20
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


class SafetensorsSource(FileSource):
    """Tensors of safetensors files, which keep no order: sorted by name, numbers as numbers."""

    def __init__(self, files: Files, description: str, config: ModelConfig | None = None) -> None:
        self._extents: dict[Path, dict[str, _Extent]] = {}
        super().__init__(files, description, config)
        self.headers.sort(key=lambda header: _natural_order(header.name))

    def _load(self, name: str, stored: Path) -> Tensor:
        extent = self._extents[stored][name]
        if extent.bytes == 0:
            return torch.empty(extent.shape, dtype=extent.dtype, device="cpu")
        with stored.open("rb") as file:
            same = file_state(file.fileno()) == self._states[stored]
            content = _bytes_of(file.fileno(), extent) if same else None
        if content is None:
            raise file_changed(stored)
        return content.view(extent.dtype).view(extent.shape)

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        entries, start = _safetensors_header(path)
        self._states[path] = file_state(path)
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
    content = torch.empty(extent.bytes, dtype=torch.uint8, device="cpu")
    target, done = content.numpy().data, 0
    while done < extent.bytes:
        count = os.preadv(descriptor, [target[done:]], extent.offset + done)
        if count == 0:
            return None
        done += count
    return content


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    """Numbers by their digits: Python makes no integer of very many."""
    pieces = [piece for piece in re.split(r"([0-9]+)", name) if piece]
    digits = [piece.lstrip("0") if piece[0] in "0123456789" else None for piece in pieces]
    return [
        (1, 0, piece) if number is None else (0, len(number), number)
        for piece, number in zip(pieces, digits, strict=True)
    ]
