"""The one way in for files of anyone: regular files only, of a bounded size where read whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# A config, an index of shards or a saved analysis: what is read whole into memory.
JSON_BYTES = 2**28


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Opening a FIFO waits for a writer and a device has no end, so neither is ever read.

    Raises:
        ValueError: it is a folder, FIFO, socket or device, or its links loop.
        OSError: it does not exist or may not be read; the error names the file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait before it could be told from a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: expected a file, got links that loop") from None
        if error.errno == errno.ENXIO:
            raise ValueError(f"{path}: expected a regular file, got a socket") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file, got {_kind(mode)}")
    return os.fdopen(descriptor, "rb")


def read_limited(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; ValueError for a longer one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # As much as there is, and a byte to see it grow: room for as much is made before reading.
        content = file.read(size + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        got = max(size, len(content))
        raise ValueError(f"{path}: expected at most {limit:,} bytes, got {got:,}")
    return content


def expand_user(path: str | os.PathLike[str]) -> Path:
    """The path with `~` as the home folder; as it is where there is no such user."""
    return Path(os.path.expanduser(os.fspath(path)))


def resolve_links(path: Path) -> Path:
    """The path without links, also of a file that does not exist; ValueError for a loop."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{path}: expected a file, got links that loop") from None
    return Path(os.path.realpath(path))


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((name for test, name in kinds if test(mode)), "something else")
