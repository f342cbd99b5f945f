"""The fields of protobuf messages in a file, without reading the long ones.

The library's own parser takes a message as a whole, and none of 2 GiB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_WINDOW = 2**16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Field(NamedTuple):
    """A field of a message: its number, where it begins with its tag, and where its value lies."""

    number: int
    begin: int
    start: int
    end: int


class MessageReader:
    """Messages in an open file of so many bytes; what is not sound is a ValueError."""

    def __init__(self, file: BinaryIO, path: Path, size: int, what: str) -> None:
        self._file, self._path, self._what = file, path, what
        self.size = size
        self._window, self._at = b"", 0

    def broken(self, why: str) -> ValueError:
        """The error for a file that is not sound."""
        return ValueError(f"{self._path}: expected sound {self._what}, got a broken one: {why}")

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message at these bytes."""
        position = start
        while position < end:
            tag, value = self._varint(position)
            kind, number = tag & 7, tag >> 3
            after = value
            if kind == _VARINT:
                _, after = self._varint(value)
            elif kind in (_FIXED64, _FIXED32):
                after += 8 if kind == _FIXED64 else 4
            elif kind == _BYTES:
                length, value = self._varint(value)
                after = value + length
            else:
                raise self.broken(f"a field of type {kind}")
            if number == 0 or after > end:
                raise self.broken(f"a field at byte {position:,} ends behind its message")
            yield Field(number, position, value, after)
            position = after

    def parsed(
        self, message: Any, start: int, end: int, left_out: Collection[int], most: int
    ) -> list[Field]:
        """Parses a message but for the fields left out, which it returns.

        The rest has to have at most `most` bytes.
        """
        content, others = bytearray(), []
        for field in self.fields(start, end):
            if field.number in left_out:
                others.append(field)
                continue
            if len(content) + field.end - field.begin > most:
                raise self.broken(f"more than {most:,} bytes about one thing")
            content += self.bytes(field.begin, field.end)
        try:
            message.ParseFromString(bytes(content))
        except Exception as error:  # of protobuf's own types, which differ by its version
            raise self.broken(" ".join(str(error).split())) from None
        return others

    def bytes(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`."""
        begin = start - self._at
        if begin < 0 or end > self._at + len(self._window):
            self._file.seek(start)
            self._window, self._at = self._file.read(max(_WINDOW, end - start)), start
            begin = 0
        content = self._window[begin : begin + end - start]
        if len(content) != end - start:
            raise self.broken("it ends early")
        return content

    def _varint(self, position: int) -> tuple[int, int]:
        """A number of variable length, and where it ends."""
        encoded = self.bytes(position, min(position + 10, self.size))
        value = 0
        for count, byte in enumerate(encoded):
            value |= (byte & 127) << 7 * count
            if byte < 128:
                return value, position + count + 1
        raise self.broken("it ends early" if len(encoded) < 10 else "a number of too many bytes")
