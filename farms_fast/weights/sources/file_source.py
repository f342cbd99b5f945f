"""What all sources of files share: each tensor belongs to one file, which must not change."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.memory import HeaderSource
from farms_fast.weights.stacks import Skipped, TensorHeader

# Each file with the names to read from it, or with None for all of its names.
Files = Mapping[Path, Sequence[str] | None]


class FileSource(HeaderSource):
    """Tensors of files of one format; a format says what a file holds and loads one tensor.

    A tensor that an index names and its file lacks is a ValueError.
    """

    def __init__(self, files: Files, description: str, config: ModelConfig | None = None) -> None:
        super().__init__(description, config)
        self._states: dict[Path, tuple[int, int]] = {}
        for path, names in files.items():
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

    @abstractmethod
    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        """The tensors of a file, and what else it holds with the reason."""


def file_state(file: Path | int) -> tuple[int, int]:
    """Size and time of the last change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def file_changed(path: Path) -> ValueError:
    """The error for a file that is not as it was when it was opened."""
    return ValueError(f"{path}: expected the file as it was when it was opened, it has changed")
