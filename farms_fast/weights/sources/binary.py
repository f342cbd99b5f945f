"""Reading the fields of a file's header one after the other, never beyond its end."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

_WINDOW = 2**20


class FieldReader:
    """Little-endian fields of an open file; what would lie beyond its end is a ValueError."""

    def __init__(self, file: BinaryIO, path: Path, size: int, what: str) -> None:
        self._file, self._path, self._size, self._what = file, path, size, what
        self.offset = file.tell()

    def broken(self, why: str) -> ValueError:
        """The error for a file that is not sound."""
        return ValueError(f"{self._path}: expected sound {self._what}, got a broken one: {why}")

    def bytes(self, count: int, most: int = _WINDOW) -> bytes:
        """The next `count` bytes, of which more than `most` are an error."""
        if count > most:
            raise self.broken(f"{count:,} bytes where at most {most:,} are expected")
        self._check(count)
        content = self._file.read(count)
        if len(content) != count:
            raise self.broken("it ends early")
        self.offset += count
        return content

    def fields(self, layout: str) -> tuple[Any, ...]:
        """The next fields, as `struct` names them."""
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def skip(self, count: int) -> None:
        """Goes on behind the next `count` bytes."""
        self._check(count)
        self._file.seek(count, 1)
        self.offset += count

    def skip_texts(self, count: int) -> None:
        """Goes on behind so many texts, each with its length before it in 8 bytes."""
        window, start, offset = b"", 0, self.offset
        for _ in range(count):
            if offset + 8 > start + len(window):
                if offset + 8 > self._size:
                    raise self.broken("it ends early")
                self._file.seek(offset)
                window, start = self._file.read(_WINDOW), offset
                if len(window) < 8:
                    raise self.broken("it ends early")
            at = offset - start
            offset += 8 + int.from_bytes(window[at : at + 8], "little")
        self._file.seek(self.offset)
        self.skip(offset - self.offset)

    def count(self, value: int, least_bytes: int, most: int) -> int:
        """A count of things that take at least so many bytes each, which the file has room for."""
        if value > min(most, (self._size - self.offset) // least_bytes):
            raise self.broken(f"{value:,} entries are more than it can have")
        return value

    def _check(self, count: int) -> None:
        if count > self._size - self.offset:
            raise self.broken(f"it ends {count - (self._size - self.offset):,} bytes too early")
