"""The members of zip archives by where they lie in the file, so that parts of them can be read."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.stored_tensors import BrokenContent, ZipMember

# Of the directory of an archive: 400,000 members have as much.
_DIRECTORY_BYTES = 2**25
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 1
# What `zipfile` raises for a broken directory.
_BROKEN = (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error)


class _LimitedReads:
    """A file for `zipfile`, which reads an archive's directory at once, however long it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        most = _DIRECTORY_BYTES + 1
        content = self._file.read(most if count < 0 else min(count, most))
        if len(content) > _DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too long")
        return content


def zip_names(path: Path) -> list[str]:
    """The names of an archive's members; `BrokenContent` for what is no sound archive."""
    with open_regular(path) as file:
        return [entry.filename for entry in _entries(file)]


def zip_members(path: Path) -> dict[str, ZipMember]:
    """The members of an archive by their names; `BrokenContent` for what is no sound archive."""
    members: dict[str, ZipMember] = {}
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        for entry in _entries(file):
            name = entry.filename
            if name in members:
                raise BrokenContent(f"its zip archive has {name[:200]!r} twice")
            start = _start_of(file.fileno(), entry, size)
            method = -1 if entry.flag_bits & _ENCRYPTED else entry.compress_type
            members[name] = ZipMember(
                name, start, entry.compress_size, entry.file_size, method, entry.CRC
            )
    return members


def _entries(file: BinaryIO) -> list[zipfile.ZipInfo]:
    limited: Any = _LimitedReads(file)
    try:
        with zipfile.ZipFile(limited) as archive:
            return archive.infolist()
    except _BROKEN as error:
        raise BrokenContent(f"its zip archive is broken: {error}") from None


def _start_of(descriptor: int, entry: zipfile.ZipInfo, size: int) -> int | None:
    """Where a member's bytes begin; None where its header is broken or they end beyond the file."""
    if not 0 <= entry.header_offset <= size:
        return None
    header = os.pread(descriptor, _LOCAL_HEADER.size, entry.header_offset)
    if len(header) < _LOCAL_HEADER.size:
        return None
    magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    is_sound = magic == b"PK\x03\x04" and start + entry.compress_size <= size
    return start if is_sound else None
