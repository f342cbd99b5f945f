"""Arrays in NumPy's .npy and .npz files; arrays of Python objects, which are pickles, are not read.

Only headers are read to know the arrays, also of compressed members.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.containers import TreeView, find_weights
from farms_fast.weights.sources.pickles import StoredTensorSource
from farms_fast.weights.sources.stored_tensors import (
    BrokenContent,
    FileBytes,
    Location,
    StoredTensor,
    bytes_of,
    dense_strides,
    dtype_of_numpy,
)
from farms_fast.weights.sources.zip_archives import zip_members
from farms_fast.weights.stacks import Skipped, TensorHeader

# NumPy itself takes headers up to 10,000 bytes.
_HEADER_BYTES = 2**14
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class NumpySource(StoredTensorSource):
    """Arrays of .npy and .npz files. An .npz file's names may have slashes: such are nested.

    The array of an .npy file is named after the file.
    """

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        try:
            with open_regular(path) as file:
                is_archive = file.read(2) == b"PK"
                file.seek(0)
                size = self._size(path)
                arrays = {} if is_archive else {path.stem: _array(file, FileBytes(0, size))}
            if is_archive:
                arrays = self._members(path)
        except BrokenContent as error:
            raise ValueError(f"{path}: expected arrays of NumPy, got {error}") from None
        weights = find_weights(_nested(arrays), _VIEW, str(path), self._key)
        self.skipped += weights.skipped
        return self._headers(path, weights.tensors)

    def _members(self, path: Path) -> dict[str, StoredTensor]:
        arrays = {}
        for name, member in zip_members(path).items():
            if member.defect:
                raise BrokenContent(member.defect)
            if not name.endswith(".npy"):
                self.skipped.append(Skipped(name, (), "a file that is no array"))
                continue
            start = bytes_of(member, 0, min(member.size, _HEADER_BYTES), partial(self._read, path))
            arrays[name.removesuffix(".npy")] = _array(io.BytesIO(start.numpy().tobytes()), member)
        return arrays


def _array(file: BinaryIO, location: Location) -> StoredTensor:
    """The array whose header a file begins with."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise BrokenContent(f"a header of version {version}, which is not read")
        with warnings.catch_warnings():  # about files of Python 2
            warnings.simplefilter("ignore")
            shape, fortran, dtype = _HEADERS[version](file)
    except BrokenContent:
        raise
    except Exception:  # NumPy's parser raises many things
        raise BrokenContent("a header that is damaged, or none") from None
    known, swapped = dtype_of_numpy(dtype.str)
    reason = "" if known is not None else f"dtype {dtype.str} is none of torch's"
    if dtype.hasobject:
        reason = "an array of Python objects, which are pickled: not read"
    item = dtype.itemsize if known is None else known.itemsize
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(
        location=location,
        size=count * item,
        shape=shape,
        stride=dense_strides(shape, fortran),
        dtype=known or torch.uint8,
        begin=file.tell(),
        swapped=swapped,
        reason=reason,
    )


def _nested(arrays: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Mappings by the parts of names between slashes."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        mapping: Any = tree
        for part in path:
            mapping = mapping.setdefault(part, {}) if isinstance(mapping, dict) else None
        if isinstance(mapping, dict) and leaf not in mapping:
            mapping[leaf] = array
        else:  # a name that goes on where another ends
            tree[name] = array
    return tree


_VIEW = TreeView(
    children=lambda value: value if isinstance(value, dict) else None,
    shape=lambda value: value.shape if isinstance(value, StoredTensor) else None,
)
