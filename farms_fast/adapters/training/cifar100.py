"""CIFAR-100 from the archive that its authors publish, read without running what is in it."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from farms_fast.core.arguments import path_of

__all__ = ["Cifar100", "load_cifar100"]

# Of the published files, which are in the archive or its folder.
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

    Nothing is unpacked to disk, and the pickles in it are read by an unpickler that makes NumPy
    arrays and plain values only.

    Args:
        path: `cifar-100-python.tar.gz`, the folder `cifar-100-python` that is in it, or a folder
            that holds either.
        verify: demand the published checksums; otherwise only the structure is checked.

    Raises:
        FileNotFoundError: there is no archive and no folder of it.
        TypeError: `path` is none.
        ValueError: a file is damaged, is not as published, or holds something else.

    Example:
        >>> load_cifar100("no/such/folder")
        Traceback (most recent call last):
        FileNotFoundError: path: expected cifar-100-python.tar.gz or its folder, got no/such/folder
    """
    contents = {name: data for name, data in _files(path_of("path", path))}
    published = True
    for name, data in contents.items():
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != _FILE_MD5[name]:
            published = False
            if verify:
                raise ValueError(
                    f"path: expected the published file {name!r} (MD5 {_FILE_MD5[name]}), got MD5 "
                    f"{found}; verify=False reads it by its structure alone"
                )
    values = {name: _unpickled(name, data) for name, data in contents.items()}
    names = values["meta"].get("fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("path: expected a list 'fine_label_names' in the file 'meta'")
    train, test = (_images(part, values[part], len(names)) for part in ("train", "test"))
    return Cifar100(*train, *test, tuple(names), published)


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the data set by name."""
    for folder in (path, path / _FOLDER):
        if all((folder / name).is_file() for name in _FILE_MD5):
            for name in _FILE_MD5:
                yield name, (folder / name).read_bytes()
            return
    archive = path / _ARCHIVE if path.is_dir() else path
    if not archive.is_file():
        raise FileNotFoundError(f"path: expected {_ARCHIVE} or its folder, got {path}")
    with _opened(archive) as tar:
        for name in _FILE_MD5:
            try:
                member = tar.extractfile(f"{_FOLDER}/{name}")
            except KeyError:
                member = None
            if member is None:
                raise ValueError(f"path: expected {_FOLDER}/{name} in {archive}, got none")
            yield name, member.read()


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(archive, "r:*") as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"path: expected a whole tar archive, got {archive}: {error}") from error


class _ArraysOnly(pickle.Unpickler):
    """Makes NumPy arrays and plain values, whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in _MAKERS:
            return _MAKERS[name]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], dtype: object) -> np.ndarray[Any, Any]:
    """An array to be filled by the pickle's next instruction."""
    return np.ndarray((0,), dtype=np.uint8)


def _bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")


_MAKERS = {"_reconstruct": _empty_array}


def _unpickled(name: str, data: bytes) -> dict[str, Any]:
    stream: BinaryIO = io.BytesIO(data)
    try:
        # As published they were written by Python 2, whose strings are bytes.
        value = _ArraysOnly(stream, encoding="latin-1").load()
    except Exception as error:  # a damaged pickle raises whatever it comes upon
        raise ValueError(
            f"path: expected arrays, lists and text in the file {name!r}: {error}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"path: expected a dict in the file {name!r}, got {type(value).__name__}")
    return value


def _images(part: str, value: dict[str, Any], classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    data, labels = value.get("data"), value.get("fine_labels")
    if not (
        isinstance(data, np.ndarray)
        and data.dtype == np.uint8
        and data.ndim == 2
        and data.shape[1] == 3 * 32 * 32
    ):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"path: expected uint8 (N, 3072) as 'data' of {part!r}, got {got}")
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not all(isinstance(label, int) and 0 <= label < classes for label in labels)
    ):
        raise ValueError(
            f"path: expected {len(data)} labels below {classes} as 'fine_labels' of {part!r}"
        )
    images = torch.from_numpy(np.ascontiguousarray(data)).reshape(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)
