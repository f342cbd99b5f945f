"""Pickled checkpoints: files of torch.save, TorchScript archives, and pickles of arrays.

Only the pickle itself is read to know the tensors; each is read from the file when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from farms_fast.weights.sources.containers import find_weights
from farms_fast.weights.sources.file_source import FileSource
from farms_fast.weights.sources.stored_tensors import BrokenContent, StoredTensor
from farms_fast.weights.sources.torch_files.reader import read_checkpoint
from farms_fast.weights.stacks import Skipped, TensorHeader


class StoredTensorSource(FileSource[StoredTensor]):
    """Tensors that files keep as plain memory, in mappings that may wrap them or be nested.

    `key` is the dotted path of the mapping to take where there are several.
    """

    takes_key = True

    def _load(self, name: str, stored: Path) -> Tensor:
        try:
            return self._located[stored, name].load(partial(self._read, stored))
        except BrokenContent as error:
            raise ValueError(f"{stored}: expected {name!r} whole, got {error}") from None

    def _headers(
        self, path: Path, tensors: Mapping[str, StoredTensor]
    ) -> Mapping[str, TensorHeader | Skipped]:
        headers: dict[str, TensorHeader | Skipped] = {}
        for name, tensor in tensors.items():
            if tensor.reason:
                headers[name] = Skipped(name.removesuffix(".weight"), tensor.shape, tensor.reason)
                continue
            if tensor.defect:
                raise ValueError(f"{path}: expected {name!r} in its storage, got {tensor.defect}")
            self._located[path, name] = tensor
            identity = str(path), tensor.identity
            headers[name] = TensorHeader(name, tensor.shape, tensor.dtype, identity)
        return headers


class PickleSource(StoredTensorSource):
    """Tensors of pickled checkpoints, of which nothing is run."""

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        checkpoint = read_checkpoint(path, partial(self._read, path))
        weights = find_weights(checkpoint.tree, checkpoint.view(), str(path), self._key)
        self.skipped += weights.skipped
        tensors = {name: checkpoint.stored(value) for name, value in weights.tensors.items()}
        return self._headers(path, {name: t for name, t in tensors.items() if t is not None})
