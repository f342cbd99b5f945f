"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from farms_fast.core.arguments import path_of
from farms_fast.core.regular_files import resolve_links

FilePath = str | os.PathLike[str]


def write_text(path: FilePath, text: str) -> None:
    """Writes a file of UTF-8, whole or not at all; what UTF-8 has no form for as escapes."""
    with atomic_file(path) as stream:
        stream.write(utf8(text))


def utf8(text: str) -> bytes:
    """Text as UTF-8; what UTF-8 has no form for as escapes."""
    return text.encode("utf-8", errors="backslashreplace")


@contextlib.contextmanager
def atomic_file(path: FilePath) -> Iterator[BinaryIO]:
    """A stream beside the target that takes its place at the end.

    No reader ever sees half a file, and an error leaves the old one.
    """
    path = path_of("path", path)
    target = resolve_links(path)
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        # A directory is an error of open; a pipe or a device cannot be replaced by a file.
        with _errors_of(path, path), path.open("wb") as stream:
            yield stream
        return
    # Replacing a link would cut it off from the file that it stands for.
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the directory of {str(path)!r} does not exist")
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    with _errors_of(path, partial):
        try:
            with partial.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def check_writable(argument: str, path: Path) -> None:
    """Raises OSError, naming the argument, unless a file could be written there now.

    A page is written beside it, as `atomic_file` does, and deleted: permissions do not tell of
    read-only and full file systems. What is no regular file is not tried.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return
    target = path.resolve()
    probe = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        reason = f"{argument}: cannot be written ({error.strerror})"
        raise OSError(error.errno, reason, str(path)) from error


@contextlib.contextmanager
def _errors_of(path: Path, written: Path) -> Iterator[None]:
    """Errors of a file that is written, or of no file, name the path that was asked for."""
    try:
        yield
    except OSError as error:
        # What is read meanwhile, as a store is for its spectra, names itself.
        if error.errno is None or error.filename not in (None, str(written)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
