"""Tensors in files that keep them as plain memory: torch's storages and NumPy's arrays."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What reads bytes of one file: an offset and a count to uint8.
Read = Callable[[int, int], Tensor]
MOST_DIMENSIONS = 64
_INFLATED_AT_ONCE = 2**20
_OF_NUMPY = {
    np.dtype(name).newbyteorder("=").str: getattr(torch, name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
}


class BrokenContent(ValueError):
    """What is wrong with the content of a file; the message has no file."""


@dataclass(frozen=True)
class FileBytes:
    """Bytes of a file; `is_text` where they are UTF-8 that stands for one byte a character."""

    offset: int
    size: int
    is_text: bool = False


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip archive.

    Attributes:
        name: its path in the archive.
        start: where its bytes begin in the file; None where they are not to be found.
        stored: bytes that it takes.
        size: bytes that it has.
        method: 0 for bytes as they are, 8 for deflated ones; others are not read.
        crc: checksum of its bytes. That of bytes as they are may be wrong: torch can leave it out.
    """

    name: str
    start: int | None
    stored: int
    size: int
    method: int
    crc: int

    @property
    def defect(self) -> str:
        """Why it cannot be read; empty where it can."""
        if self.method not in (0, 8):
            return f"{self.name} is compressed by a method that is not read"
        if self.start is None or (self.method == 0 and self.stored != self.size):
            return f"{self.name} is damaged"
        return ""


# Where the bytes of a storage are.
Location = FileBytes | ZipMember | bytes


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose values are in a file.

    Attributes:
        location: the storage that it is a view of; None where there is none.
        size: bytes of the storage, by what the file says of it.
        offset: of the first element in the storage, in elements.
        begin: bytes of the location before the storage.
        swapped: whether the bytes of a number are in the other order.
        conjugated: whether the values are the conjugates of those stored.
        negated: whether the values are the negatives of those stored.
        reason: why it is not read; empty where it is.
    """

    location: Location | None
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0
    begin: int = 0
    swapped: bool = False
    conjugated: bool = False
    negated: bool = False
    reason: str = ""

    @property
    def identity(self) -> Hashable | None:
        """Equal for two tensors of the same values in one file."""
        location = id(self.location) if isinstance(self.location, bytes) else self.location
        ways = self.dtype, self.swapped, self.conjugated, self.negated
        return location, self.begin, self.offset, self.shape, self.stride, ways

    @property
    def defect(self) -> str:
        """What is wrong with what the file says of it; empty where nothing is."""
        if len(self.shape) != len(self.stride) or len(self.shape) > MOST_DIMENSIONS:
            return f"{len(self.stride)} strides for {len(self.shape)} dimensions"
        numbers = (*self.shape, *self.stride, self.offset, self.size)
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            return "a shape, strides and an offset that are no sizes"
        if math.prod(self.shape) >= 2**62:
            return "more elements than there can be"
        if self._end > self.size:
            return f"an end at byte {self._end:,} of a storage of {self.size:,}"
        location = self.location
        if isinstance(location, ZipMember) and location.defect:
            return location.defect
        there = len(location or b"") if isinstance(location, bytes | None) else location.size
        lacks = there < self.begin + self.size and not getattr(location, "is_text", False)
        return f"{max(0, there - self.begin):,} bytes of {self.size:,}" if lacks else ""

    @property
    def _start(self) -> int:
        return self.offset * self.dtype.itemsize

    @property
    def _end(self) -> int:
        """The byte behind the last one that it reads."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize

    def load(self, read: Read) -> Tensor:
        """The tensor; `read` reads its file. `BrokenContent` where it is damaged."""
        if self.location is None or self.reason or self.defect:
            raise BrokenContent(self.reason or self.defect or "it has no values")
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        start = self.begin + self._start
        raw = bytes_of(self.location, start, self._end - self._start, read)
        if self.swapped:
            unit = self.dtype.itemsize // (2 if self.dtype.is_complex else 1)
            raw = raw.view(-1, unit).flip(1).reshape(-1)
        tensor = raw.view(self.dtype).as_strided(self.shape, self.stride)
        if self.conjugated:
            tensor = tensor.conj()
        return tensor.neg() if self.negated else tensor


def bytes_of(location: Location, offset: int, count: int, read: Read) -> Tensor:
    """Bytes of a storage, as uint8; `BrokenContent` where they are damaged."""
    if isinstance(location, bytes):
        return torch.frombuffer(bytearray(location[offset : offset + count]), dtype=torch.uint8)
    if isinstance(location, FileBytes):
        if not location.is_text:
            return read(location.offset + offset, count)
        text = read(location.offset, location.size).numpy().tobytes()
        return bytes_of(text.decode().encode("latin-1"), offset, count, read)
    if location.defect or location.start is None:
        raise BrokenContent(location.defect)
    if location.method == 0:
        return read(location.start + offset, count)
    return _inflated(location, location.start, offset, count, read)


def _inflated(member: ZipMember, start: int, offset: int, count: int, read: Read) -> Tensor:
    """Bytes of a deflated member; no more of it is held than these."""
    content = torch.empty(count, dtype=torch.uint8, device="cpu")
    target = content.numpy().data
    engine, compressed, taken = zlib.decompressobj(-zlib.MAX_WBITS), b"", 0
    done, crc = -offset, 0
    try:
        while done < count:
            if not compressed and taken < member.stored:
                size = min(_INFLATED_AT_ONCE, member.stored - taken)
                compressed = read(start + taken, size).numpy().tobytes()
                taken += size
            piece = engine.decompress(compressed, min(_INFLATED_AT_ONCE, count - done))
            if not piece and (engine.eof or taken == member.stored):
                raise BrokenContent(f"{member.name} is damaged")
            compressed = engine.unconsumed_tail
            kept = piece[max(0, -done) :]
            first = max(0, done)
            target[first : first + len(kept)] = kept
            done += len(piece)
            crc = zlib.crc32(piece, crc)
    except zlib.error:
        raise BrokenContent(f"{member.name} is damaged") from None
    if offset + count == member.size and crc != member.crc:
        raise BrokenContent(f"{member.name} is damaged")
    return content


def dense_strides(shape: Sequence[int], fortran: bool = False) -> tuple[int, ...]:
    """Of an array without gaps, in elements."""
    strides, step = [], 1
    for size in shape if fortran else reversed(shape):
        strides.append(step)
        step *= size
    return tuple(strides if fortran else reversed(strides))


def dtype_of_numpy(name: str) -> tuple[torch.dtype | None, bool]:
    """The dtype of torch, if there is one, and whether numbers have their bytes in other order."""
    if re.fullmatch(r"[<>=|]?[?a-zA-Z][0-9]{0,3}", name) is None:
        return None, False
    try:
        dtype = np.dtype(name)
    except TypeError:
        return None, False
    return _OF_NUMPY.get(dtype.newbyteorder("=").str), not dtype.isnative
