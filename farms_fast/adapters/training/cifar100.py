"""CIFAR-100 from the archive that its authors publish, read without running its pickles."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from farms_fast.core.arguments import path_of

__all__ = ["Cifar100", "load_cifar100"]

# Checksums of the published files, which are in the archive or its folder.
_FILE_MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
_FOLDER = "cifar-100-python"
_ARCHIVE = "cifar-100-python.tar.gz"


@dataclass(frozen=True)
class Cifar100:
    """The data set.

    Attributes:
        train_images: uint8 (N, 3, 32, 32); 50,000 as published.
        train_labels: int64 (N,), of the 100 fine classes.
        test_images: uint8 (M, 3, 32, 32); 10,000 as published.
        test_labels: int64 (M,).
        classes: the names of the fine classes.
        published: whether every file has the published checksum.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    published: bool


def load_cifar100(path: str | os.PathLike[str], *, verify: bool = True) -> Cifar100:
    """Reads CIFAR-100 (Krizhevsky, 2009) as its authors publish it for Python.

    It unpacks nothing to disk. Its unpickler makes NumPy arrays and plain values only.

    Args:
        path: `cifar-100-python.tar.gz`, the folder `cifar-100-python` that is in it, or a folder
            that holds either.
        verify: demand the published checksums; otherwise only the structure is checked.

    Raises:
        FileNotFoundError: there is neither the archive nor its folder.
        TypeError: `path` is no path.
        ValueError: a file is damaged, is not as published, or holds something else.

    Example:
        >>> load_cifar100("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: path: expected cifar-100-python.tar.gz or its folder, got no/such/folder
    """
    contents = _contents(path_of("path", path))
    published = True
    for name, data in contents.items():
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        published = published and md5 == _FILE_MD5[name]
        if verify and not published:
            raise ValueError(
                f"path: expected the published file {name!r} (MD5 {_FILE_MD5[name]}), got MD5 "
                f"{md5}; verify=False reads it by its structure alone"
            )
    values = {name: _unpickled(name, data) for name, data in contents.items()}
    names = values["meta"].get("fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("path: expected a list 'fine_label_names' in the file 'meta'")
    train, test = (_images(part, values[part], len(names)) for part in ("train", "test"))
    return Cifar100(*train, *test, tuple(names), published)


def _contents(path: Path) -> dict[str, bytes]:
    """The files of the data set by name."""
    for folder in (path, path / _FOLDER):
        if all((folder / name).is_file() for name in _FILE_MD5):
            return {name: (folder / name).read_bytes() for name in _FILE_MD5}
    archive = path / _ARCHIVE if path.is_dir() else path
    if not archive.is_file():
        raise FileNotFoundError(f"path: expected {_ARCHIVE} or its folder, got {path}")
    contents = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for name in _FILE_MD5:
                file = f"{_FOLDER}/{name}"
                member = tar.extractfile(file) if file in tar.getnames() else None
                if member is None:
                    raise ValueError(f"path: expected {file} in {archive}, got none")
                contents[name] = member.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"path: expected a whole tar archive, got {archive}: {error}") from error
    return contents


def _empty_array(kind: type, shape: tuple[int, ...], dtype: object) -> np.ndarray[Any, Any]:
    """An array that the pickle's next instruction fills."""
    return np.ndarray((0,), dtype=np.uint8)


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    return text.encode("latin-1")


class _ArraysOnly(pickle.Unpickler):
    """Makes NumPy arrays and plain values; refuses whatever else a pickle asks for."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _empty_array,
        ("numpy._core.multiarray", "_reconstruct"): _empty_array,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._ALLOWED[module, name]


def _unpickled(name: str, data: bytes) -> dict[str, Any]:
    try:
        # Python 2 wrote the published files; its strings are bytes.
        value = _ArraysOnly(io.BytesIO(data), encoding="latin-1").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"path: expected arrays, lists and text in the file {name!r}: {error}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"path: expected a dict in the file {name!r}, got {type(value).__name__}")
    return value


def _images(part: str, value: Any, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    data, labels = value.get("data"), value.get("fine_labels")
    is_array = isinstance(data, np.ndarray)
    if not is_array or (data.dtype, data.ndim, data.shape[-1:]) != (np.uint8, 2, (3 * 32 * 32,)):
        got = f"{data.dtype} {data.shape}" if is_array else type(data).__name__
        raise ValueError(f"path: expected uint8 (N, 3072) as 'data' of {part!r}, got {got}")
    complete = isinstance(labels, list) and len(labels) == len(data)
    if not complete or not all(isinstance(n, int) and 0 <= n < classes for n in labels):
        raise ValueError(
            f"path: expected {len(data)} labels below {classes} as 'fine_labels' of {part!r}"
        )
    images = torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)
