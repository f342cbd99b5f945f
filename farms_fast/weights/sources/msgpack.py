"""Tensors of Flax's msgpack files, one read at a time: flax.serialization's arrays and chunks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.containers import TreeView, find_weights
from farms_fast.weights.sources.file_source import FileSource
from farms_fast.weights.stacks import Skipped, TensorHeader

_DEEPEST = 64
_MOST_ENTRIES = 2**21
_VALUE_BYTES = 2**24
# The head of an array: its shape and dtype.
_HEAD_BYTES = 1024
_ARRAY = 1  # flax.serialization's type of an extension
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
# The sizes of an extension's and of a binary value's length, by their first byte.
_EXTENSION_LENGTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_BINARY_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}


@dataclass(frozen=True)
class _Array:
    """An array in a file: where its pieces lie, offset and size; `dtype` as the file names it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]


class MsgpackSource(FileSource[_Array]):
    """Arrays of Flax's trees, with dots between the parts of their names."""

    takes_key = True
    _layout = "channels_last"

    def _load(self, name: str, stored: Path) -> Tensor:
        array = self._located[stored, name]
        pieces = [self._read(stored, offset, size) for offset, size in array.pieces]
        content = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return content.view(_DTYPES[array.dtype]).view(array.shape)

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        with optional_import("msgpack", extra="flax", needed_for=f"{path}: msgpack of Flax"):
            import msgpack
        with open_regular(path) as file:
            tree = _Tree(msgpack, file, path, self._size(path)).read()
        weights = find_weights(tree, _VIEW, str(path), self._key)
        self.skipped += weights.skipped
        stored: dict[str, TensorHeader | Skipped] = {}
        for name, array in weights.tensors.items():
            if array.dtype not in _DTYPES:
                reason = f"not a tensor that is read: dtype {array.dtype}"
                stored[name] = Skipped(name, array.shape, reason)
                continue
            self._located[path, name] = array
            stored[name] = TensorHeader(name, array.shape, _DTYPES[array.dtype])
        return stored


class _Tree:
    """The values of a file, with arrays by where they are."""

    def __init__(self, msgpack: Any, file: BinaryIO, path: Path, size: int) -> None:
        self._msgpack, self._file, self._path, self._size = msgpack, file, path, size
        self._entries = 0
        self._go_to(0)

    def read(self) -> Any:
        """The outermost value; ValueError for a file that is not sound."""
        try:
            tree = self._value(0)
            if self._offset() != self._size:
                raise self._broken("more than one value")
        except (
            *(self._msgpack.UnpackException, ValueError, TypeError, OverflowError),
            *(LookupError, RecursionError),
        ) as error:
            if isinstance(error, _Broken):
                raise
            raise self._broken(str(error) or type(error).__name__) from None
        return tree

    def _broken(self, why: str) -> _Broken:
        return _Broken(f"{self._path}: expected sound msgpack, got a broken one: {why}")

    def _go_to(self, offset: int) -> None:
        self._file.seek(offset)
        self._start = offset
        self._unpacker = self._msgpack.Unpacker(
            self._file, read_size=2**12, max_buffer_size=_VALUE_BYTES, strict_map_key=False
        )

    def _offset(self) -> int:
        return self._start + int(self._unpacker.tell())

    def _bytes(self, offset: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, offset)

    def _value(self, depth: int) -> Any:
        self._entries += 1
        if depth > _DEEPEST or self._entries > _MOST_ENTRIES:
            raise self._broken("more values, or deeper ones, than weights have")
        first = self._bytes(self._offset(), 1)[0]
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            count = self._unpacker.read_map_header()
            entries = {}
            for _ in range(count):
                key = self._unpacker.unpack()
                entries[key if isinstance(key, (str, int)) else repr(key)] = self._value(depth + 1)
            return self._joined(entries) if _CHUNKED in entries else entries
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            count = self._unpacker.read_array_header()
            return [self._value(depth + 1) for _ in range(count)]
        if first in _EXTENSION_LENGTHS or first in _FIXED_EXTENSIONS:
            return self._extension(first)
        return self._unpacker.unpack()

    def _extension(self, first: int) -> Any:
        """An array's place; None for what else an extension may be."""
        start = self._offset() + 1
        width = _EXTENSION_LENGTHS.get(first, 0)
        size = _FIXED_EXTENSIONS.get(first) or int.from_bytes(self._bytes(start, width), "big")
        kind = self._bytes(start + width, 1)[0]
        begin = start + width + 1
        if begin + size > self._size:
            raise self._broken("it ends early")
        value = self._array(begin, size) if kind == _ARRAY else None
        self._go_to(begin + size)
        return value

    def _array(self, begin: int, size: int) -> _Array:
        inner = self._msgpack.Unpacker()
        inner.feed(self._bytes(begin, min(size, _HEAD_BYTES)))
        parts = inner.read_array_header()
        shape, dtype = inner.unpack(), inner.unpack()
        offset = begin + int(inner.tell())
        width = _BINARY_LENGTHS[self._bytes(offset, 1)[0]]
        count = int.from_bytes(self._bytes(offset + 1, width), "big")
        offset += 1 + width
        if parts != 3 or not isinstance(dtype, str) or offset + count != begin + size:
            raise self._broken("an array that is none")
        return self._checked(_Array(_sizes(shape), dtype, ((offset, count),)))

    def _joined(self, entries: Mapping[Any, Any]) -> _Array:
        """An array that is cut into chunks of one dimension."""
        shape, chunks = entries.get("shape"), entries.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict):
            raise self._broken("chunks that are none")
        pieces = list(chunks.values())
        if not pieces or not all(isinstance(piece, _Array) for piece in pieces):
            raise self._broken("chunks that are none")
        if len({piece.dtype for piece in pieces}) > 1:
            raise self._broken("chunks of several dtypes")
        places = tuple(place for piece in pieces for place in piece.pieces)
        return self._checked(_Array(_sizes(list(shape.values())), pieces[0].dtype, places))

    def _checked(self, array: _Array) -> _Array:
        known = _DTYPES.get(array.dtype)
        size = sum(size for _, size in array.pieces)
        if known is not None and math.prod(array.shape) * known.itemsize != size:
            raise self._broken(f"{size:,} bytes for {array.dtype} of {array.shape}")
        return array


class _Broken(ValueError):
    """A file that is not sound; the message names it."""


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64:
        raise TypeError("a shape that is none")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise TypeError("a shape that is none")
    return tuple(values)


def _children(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, list):
        return {str(position): entry for position, entry in enumerate(value)}
    return value if isinstance(value, dict) else None


_VIEW = TreeView(_children, lambda value: value.shape if isinstance(value, _Array) else None)
