"""What all sources of files share: each tensor belongs to one file, which must not change."""

from __future__ import annotations

import mmap
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from farms_fast.core.regular_files import open_regular
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.memory import HeaderSource
from farms_fast.weights.stacks import Skipped, TensorHeader

# Each file with the names to read from it, or with None for all of its names.
Files = Mapping[Path, Sequence[str] | None]

# Longer reads are shared out over threads, in pieces of this size.
_PIECE = 8 * 2**20
_THREADS = max(1, min(8, os.cpu_count() or 1))


@dataclass(frozen=True)
class Extent:
    """The bytes of a tensor in a file."""

    offset: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


# What a format keeps of a tensor to load it by.
Located = TypeVar("Located")


class FileSource(HeaderSource, Generic[Located]):
    """Tensors of files of one format; a format says what a file holds and loads one tensor.

    A tensor that an index names and its file lacks is a ValueError. `key` is the dotted path of the
    mapping to take from files of mappings in mappings.
    """

    takes_key: ClassVar[bool] = False
    # For formats that keep no order: by name, numbers as numbers.
    _in_natural_order: ClassVar[bool] = False

    def __init__(
        self,
        files: Files,
        description: str,
        config: ModelConfig | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(description, config)
        if key is not None and not self.takes_key:
            raise no_keys(description, key)
        self._key = key
        self._states: dict[Path, tuple[int, int]] = {}
        self._located: dict[tuple[Path, str], Located] = {}
        for path, names in files.items():
            with open_regular(path) as file:
                self._states[path] = file_state(file.fileno())
            stored = self._read_headers(path)
            expected = dict.fromkeys(stored if names is None else names)
            if lacking := sorted(set(expected) - set(stored)):
                raise ValueError(f"{path}: expected the tensor {lacking[0]!r} of the index in it")
            for name, item in stored.items():
                if name not in expected:
                    reason = f"in {path.name} but not in its index"
                    self.skipped.append(Skipped(name, item.shape, reason))
                elif isinstance(item, Skipped):
                    self.skipped.append(item)
            for name in expected:
                item = stored[name]
                if isinstance(item, TensorHeader):
                    self.headers.append(item)
                    self._stored[name] = path
        if self._in_natural_order:
            self.headers.sort(key=lambda header: natural_order(header.name))

    @abstractmethod
    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        """The tensors of a file, and what else it holds with the reason."""

    def _size(self, path: Path) -> int:
        """Bytes of a file when it was opened."""
        return self._states[path][0]

    def _read(self, path: Path, offset: int, count: int) -> Tensor:
        """`count` bytes of a file as uint8; ValueError when it is not as it was.

        Nothing is mapped: a map of a file that is cut meanwhile would end the process.
        """
        with open_regular(path) as file:
            same = file_state(file.fileno()) == self._states[path]
            content = _bytes_at(file.fileno(), offset, count) if same else None
        if content is None:
            raise file_changed(path)
        return content

    def _read_tensor(self, path: Path, extent: Extent) -> Tensor:
        """A tensor that a file holds as it is."""
        content = self._read(path, extent.offset, extent.bytes)
        return content.view(extent.dtype).view(extent.shape)


def no_keys(description: object, key: str) -> ValueError:
    """The error for a key into what has no mappings to choose from."""
    return ValueError(
        f"key: expected None, because {description} is no mapping of mappings, got {key!r}"
    )


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that compares runs of digits as numbers, however long they are."""
    pieces = re.split(r"([0-9]+)", name)
    numbers = [piece.lstrip("0") for piece in pieces[1::2]]
    order = [(1, 0, piece) for piece in pieces]
    order[1::2] = [(0, len(number), number) for number in numbers]
    return [key for key, piece in zip(order, pieces, strict=True) if piece]


def file_state(file: Path | int) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def file_changed(path: Path) -> ValueError:
    """The error for a file that is not as it was when it was opened."""
    return ValueError(f"{path}: expected the file as it was when it was opened, it has changed")


def _bytes_at(descriptor: int, offset: int, count: int) -> Tensor | None:
    """uint8; None where the file has become too short."""
    if count <= _PIECE:
        content = torch.empty(count, dtype=torch.uint8, device="cpu")
        whole = _fill(descriptor, content.numpy().data, offset)
        return content if whole else None
    # Small pages and one thread take five times as long as large pages and a few threads.
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    content = torch.frombuffer(pages, dtype=torch.uint8)
    target = content.numpy().data
    starts = range(0, count, _PIECE)
    with ThreadPoolExecutor(_THREADS) as pool:
        pieces = [
            pool.submit(_fill, descriptor, target[start : start + _PIECE], offset + start)
            for start in starts
        ]
        whole = all([piece.result() for piece in pieces])
    return content if whole else None


def _fill(descriptor: int, target: memoryview, offset: int) -> bool:
    """Whether the file had bytes for all of the target."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True
