"""Regular files only, of a bounded size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from farms_fast.core.regular_files import open_regular, read_limited


def test_reads_a_file_and_a_link_to_it(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"content")
    link.symlink_to(file)
    assert read_limited(file) == read_limited(link) == b"content"


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    fifo, loop, bound = tmp_path / "fifo", tmp_path / "loop", tmp_path / "socket"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
        for path, got in (
            (fifo, "a FIFO"),
            (tmp_path, "a folder"),
            (loop, "links that loop"),
            (bound, "a socket"),
            (Path("/dev/zero"), "a character device"),
        ):
            with pytest.raises(ValueError, match=f"^{path}: .*got {got}"):
                open_regular(path)


def test_bounds_what_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_limited(file, limit=5) == b"12345"
    with pytest.raises(ValueError, match="expected at most 4 bytes, got 5"):
        read_limited(file, limit=4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        open_regular(tmp_path / "missing")
