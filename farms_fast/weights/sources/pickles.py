"""Pickled state dicts; one file at a time is mapped, and mapped anew when enough was read of it.

A memory map counts as the process's memory once it has been touched, for as long as it exists.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_fast.weights.sources.file_source import FileSource, file_changed, file_state
from farms_fast.weights.sources.memory import MappingSource
from farms_fast.weights.stacks import Skipped, TensorHeader

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# What may be read of a pickle before its map is dropped.
_PICKLE_BYTES = 2**29


class PickleSource(FileSource):
    """Pickled state dicts; one file at a time is mapped, or held in memory if not a zip file."""

    _opened: tuple[Path, MappingSource] | None = None
    _read_bytes = 0
    takes_key = True

    def _load(self, name: str, stored: Path) -> Tensor:
        if self._opened is None or self._opened[0] != stored or self._read_bytes > _PICKLE_BYTES:
            self._opened = None  # the old map goes before the new one comes
            self._opened = (stored, self._open(stored))
        tensor = self._opened[1].load(name)
        self._read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __getstate__(self) -> dict[str, object]:
        """Another process opens the files anew."""
        return {**self.__dict__, "_opened": None}

    def _open(self, path: Path) -> MappingSource:
        self._read_bytes = 0
        if self._states.setdefault(path, file_state(path)) != file_state(path):
            raise file_changed(path)
        return MappingSource(_read_pickle(path), str(path), self._key)

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        opened = self._open(path)
        self.skipped.extend(opened.skipped)
        headers: dict[str, TensorHeader] = {}
        for header in opened.headers:
            # Another file's tensors may come to lie at the same address later.
            identity = None if header.identity is None else (str(path), header.identity)
            headers[header.name] = replace(header, identity=identity)
        return headers


def _read_pickle(path: Path) -> Mapping[str, Any]:
    """A pickled mapping, by torch's restricted reader."""
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():  # its warnings are about files that it then refuses
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        # A damaged pickle can raise anything. torch's own message is not passed on: it advises to
        # load the file with arbitrary code allowed.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = "one that is damaged or not of torch"
        if "TorchScript" in str(error):
            got = "a TorchScript archive"
        elif refused:
            got = (
                f"one that holds {refused[1]}; save model.state_dict() instead, or load the file "
                "yourself and pass the module"
            )
        raise ValueError(f"{path}: expected a pickle of plain tensors only, got {got}") from None
    if not isinstance(loaded, Mapping):
        got = type(loaded).__name__
        raise ValueError(f"{path}: expected a mapping of names to tensors, got {got}")
    return loaded
