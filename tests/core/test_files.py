"""Whether a file can be written, known before there is something to write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from farms_fast.core.files import check_writable


def test_nothing_is_left_and_no_file_is_touched(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    os.mkfifo(tmp_path / "pipe")
    for name in ("new", "old", "link", "pipe", "n" * 250):
        check_writable("csv", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["link", "old", "pipe"]
    assert (tmp_path / "old").read_text() == "old"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"csv: cannot be written \(No space left on device\): '.*/a'"
    ):
        check_writable("csv", tmp_path / "a")
    assert os.listdir(tmp_path) == []
