"""Tensors of safetensors files, read one at a time.

The header is read and checked here rather than by `safe_open`, which maps the whole file: that
fails for a file larger than the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from farms_fast.core.json_files import parse_json
from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.file_source import Extent, FileSource
from farms_fast.weights.stacks import Skipped, TensorHeader

# The format's own limit.
HEADER_BYTES = 100_000_000
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
_BITS = {name: 8 * dtype.itemsize for name, dtype in _DTYPES.items()}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class SafetensorsSource(FileSource[Extent]):
    """Tensors of safetensors files, which keep no order: sorted by name, numbers as numbers."""

    _in_natural_order = True

    def _load(self, name: str, stored: Path) -> Tensor:
        return self._read_tensor(stored, self._located[stored, name])

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        try:
            entries, start = _header(path)
            _check_extents(entries, self._size(path) - start)
        except _Unsound as error:
            expected = "expected a sound safetensors file, got a broken one"
            raise ValueError(f"{path}: {expected}: {error}") from None
        stored: dict[str, TensorHeader | Skipped] = {}
        for name, entry in entries.items():
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            begin, end = entry["data_offsets"]
            if known := _DTYPES.get(dtype):
                self._located[path, name] = Extent(start + begin, end - begin, shape, known)
                stored[name] = TensorHeader(name, shape, known)
            else:
                reason = f"dtype {dtype} is quantised, in a format that is not read"
                stored[name] = Skipped(name.removesuffix(".weight"), shape, reason)
        return stored


class _Unsound(Exception):
    """What is wrong with a header."""


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a file's header, not yet checked, and where its data begin."""
    with open_regular(path) as file:
        first = file.read(8)
        size = int.from_bytes(first, "little")
        if len(first) < 8:
            raise _Unsound(f"{len(first)} bytes are no header")
        if size > HEADER_BYTES:
            raise _Unsound(f"a header of {size:,} bytes, more than {HEADER_BYTES:,}")
        text = file.read(size)
    if len(text) < size:
        raise _Unsound(f"a header of {size:,} bytes in a file that ends after {len(text):,} of it")
    entries = parse_json(path, text)
    if not isinstance(entries, dict):
        raise _Unsound("its header is no JSON object")
    entries.pop("__metadata__", None)
    return entries, 8 + size


def _check_extents(entries: Mapping[str, Any], data_bytes: int) -> None:
    """Raises `_Unsound` unless the tensors are the data, each byte of them once."""
    extents = []
    for name, entry in entries.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (_are_counts(shape, 64) and _are_counts(offsets, 2) and len(offsets) == 2):
            raise _Unsound(f"no shape and offsets for {name!r}")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise _Unsound(f"dtype {dtype!r} of {name!r} is unknown")
        bits = math.prod(shape) * _BITS[dtype]
        if bits != 8 * (offsets[1] - offsets[0]):
            raise _Unsound(f"{name!r} has {offsets[1] - offsets[0]} bytes for {dtype} of {shape}")
        extents.append((offsets[0], offsets[1], name))
    position = 0
    for begin, end, name in sorted(extents):
        if begin != position:
            raise _Unsound(f"{name!r} begins at byte {begin} of the data, expected {position}")
        position = end
    if position != data_bytes:
        raise _Unsound(f"its tensors take {position} bytes, and it has {data_bytes}")


def _are_counts(values: object, most: int) -> TypeGuard[list[int]]:
    """Whether it is a list of at most so many sizes; more dimensions than 64 no tensor has."""
    if not isinstance(values, list) or len(values) > most:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)
