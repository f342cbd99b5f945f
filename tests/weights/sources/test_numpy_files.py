"""Arrays of .npy and .npz files, read from their headers on, and what is refused."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast.weights.sources import NumpySource, open_source

RNG = np.random.default_rng(0)
ARRAYS = {
    "up.weight": RNG.normal(size=(40, 30)).astype(np.float32),
    "down.weight": np.asfortranarray(RNG.normal(size=(30, 40))),
    "big": RNG.normal(size=(5, 4)).astype(">f4"),
    "half": RNG.normal(size=(3, 4)).astype(np.float16),
    "complex": RNG.normal(size=(3, 4)) + 1j,
    "steps": np.arange(3),
    "number": np.float64(3),
    "none": np.zeros((0, 3)),
}
savers = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


@savers
def test_arrays_are_those_that_were_saved(tmp_path: Path, save: Callable[..., Any]) -> None:
    path = tmp_path / "m.npz"
    save(path, **ARRAYS)
    source = open_source(path)
    assert isinstance(source, NumpySource)
    assert [header.name for header in source.headers] == list(ARRAYS)
    for header in source.headers:
        tensor = source.load(header.name)
        assert (tuple(tensor.shape), tensor.dtype) == (header.shape, header.dtype)
        assert np.array_equal(tensor.numpy(), ARRAYS[header.name])


@pytest.mark.filterwarnings("error")
def test_header_of_python_2(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    np.save(path, np.ones((30, 40)))
    path.write_bytes(path.read_bytes().replace(b"(30, 40), }  ", b"(30L, 40L), }"))
    assert open_source(path).headers[0].shape == (30, 40)


def test_single_array_is_named_after_its_file(tmp_path: Path) -> None:
    np.save(tmp_path / "fc.weight.npy", ARRAYS["down.weight"])
    source = open_source(tmp_path / "fc.weight.npy")
    assert [layer.name for layer in source.layers()[0]] == ["fc"]
    assert np.array_equal(source.load("fc.weight").numpy(), ARRAYS["down.weight"])


def test_names_with_slashes_are_a_tree(tmp_path: Path) -> None:
    path, weight = tmp_path / "m.npz", ARRAYS["half"]
    names = ["params/block_0/Dense_0/kernel", "params/head/kernel", "opt/state/kernel"]
    np.savez(path, **dict.fromkeys(names, weight))
    assert [h.name for h in open_source(path).headers] == ["block_0.Dense_0.kernel", "head.kernel"]
    assert [h.name for h in open_source(path, key="opt").headers] == ["state.kernel"]
    np.savez(path, **dict.fromkeys(["a", "a/b"], weight))
    assert [h.name for h in open_source(path).headers] == ["a", "a/b"]


def test_what_is_no_array_of_numbers_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    objects = np.array([[1, "a"], [2, None]], dtype=object)
    np.savez(path, w=np.ones((3, 3)), objects=objects, text=np.array(["a"]))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    source = open_source(path)
    assert [header.name for header in source.headers] == ["w"]
    assert {s.name: s.reason for s in source.skipped} == {
        "objects": "an array of Python objects, which are pickled: not read",
        "text": "dtype <U1 is none of torch's",
        "notes.txt": "a file that is no array",
    }


BROKEN = {
    "noise.npy": b"noise",
    "version.npy": b"\x93NUMPY\x09\0" + bytes(100),
    "header.npy": b"\x93NUMPY\1\0\x10\0" + b"('deep',[[[[[[[[" + bytes(64),
    "cut.npz": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_file_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=rf"{name}: expected arrays of NumPy, got ") as error:
        open_source(tmp_path / name)
    assert "\n" not in str(error.value)
    assert "allow_pickle" not in str(error.value)


def test_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    np.save(path, np.ones((30, 40)))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"expected 'm' in its storage, got 9,599 bytes of 9,600"):
        open_source(path)
    path.write_bytes(content.replace(b"(30, 40)", b"(-3, 40)"))
    with pytest.raises(ValueError, match=r"expected 'm' in its storage, got "):
        open_source(path)


def test_compressed_member_that_is_damaged_fails_when_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez_compressed(path, w=RNG.normal(size=(100, 100)), v=np.ones((4, 4)))
    content = bytearray(path.read_bytes())
    content[30_000:30_100] = bytes(100)
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(ValueError, match=r"m.npz: expected 'w' whole, got w.npy is damaged"):
        source.load("w")
    assert torch.equal(source.load("v"), torch.ones(4, 4, dtype=torch.float64))
