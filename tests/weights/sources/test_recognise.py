"""Files that are recognised by their content, and what the message says of those not read."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.sources import open_source
from farms_fast.weights.sources.recognise import (
    GGUF,
    HDF5,
    KERAS,
    MSGPACK,
    NPY,
    NPZ,
    ONNX,
    PICKLE,
    SAFETENSORS,
    FileKind,
    recognise,
)
from tests.support.checkpoints import WEIGHTS, assert_holds_weights, write_index

CONTENTS = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "GGML of before GGUF": b"tjgg" + bytes(60),
    "a file packed by gzip": b"\x1f\x8b" + bytes(60),
    "a web page": b"<!DOCTYPE html><html>",
    "TensorFlow Lite": b"\x1c\0\0\0TFL3" + bytes(60),
    "ExecuTorch": b"\x1c\0\0\0ET12" + bytes(60),
    "an SQLite file": b"SQLite format 3\0" + bytes(60),
    "an empty file": b"",
}


@pytest.mark.parametrize("suffix", ["", ".bin", ".safetensors", ".pt"])
@pytest.mark.parametrize("what", CONTENTS)
def test_message_names_what_is_not_read(tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(CONTENTS[what])
    with pytest.raises(ValueError, match=rf"model{suffix}: expected weights as .*, got {what}"):
        open_source(path)


@pytest.mark.parametrize(
    "name", ["model.mlmodel", "model.engine", "graph.pb", "notes.txt", "model"]
)
def test_message_names_the_file_that_is_not_known_by_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x" * 64)
    with pytest.raises(ValueError, match=rf"{name}: expected weights as .*, got "):
        open_source(tmp_path / name)


def _zip(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")


def test_archives_are_told_apart(tmp_path: Path) -> None:
    def is_kind(name: str, kind: FileKind) -> bool:
        return recognise(tmp_path / name) is kind

    torch.save(WEIGHTS, tmp_path / "zip")
    torch.save(WEIGHTS, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "plain").write_bytes(pickle.dumps({"a": 1}))
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays")
    np.save(tmp_path / "array.npy", np.ones(3))
    _zip(tmp_path / "keras", "model.weights.h5")
    _zip(tmp_path / "other", "readme")
    assert all(is_kind(name, PICKLE) for name in ("zip", "old", "plain"))
    assert is_kind("arrays", NPZ)
    assert is_kind("array.npy", NPY)
    assert is_kind("keras", KERAS)
    assert "a zip archive" in recognise(tmp_path / "other").name
    with tarfile.open(tmp_path / "model.pth.tar", "w") as archive:
        archive.add(tmp_path / "zip")
    assert "a tar archive" in recognise(tmp_path / "model.pth.tar").name


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"GGUF\x03\0\0\0" + bytes(20), GGUF),
        (b"\x89HDF\r\n\x1a\n" + bytes(20), HDF5),
        (bytes(512) + b"\x89HDF\r\n\x1a\n" + bytes(20), HDF5),
        (b"\x08\x07\x12\x07pytorch", ONNX),
        (b"\x08\x0a:\x80\x01", ONNX),
        (b"\x81\xa6params\x81\xa1a\xc0", MSGPACK),
        (b"\xde\x00\x10\xa1a\xc0", MSGPACK),
        ((2).to_bytes(8, "little") + b"{}", SAFETENSORS),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_format_by_its_first_bytes(
    tmp_path: Path, content: bytes, kind: FileKind, suffix: str
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    weak = kind in (ONNX, MSGPACK)  # which have no magic: a name that says otherwise wins
    assert recognise(path) is (PICKLE if weak and suffix else kind)


def test_suffix_does_not_hide_the_format(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path / "pytorch_model.bin"))
    assert_holds_weights(open_source(tmp_path))
    torch.save(WEIGHTS, tmp_path / "0af3")
    assert_holds_weights(open_source(tmp_path / "0af3"))


def test_shards_have_one_format(tmp_path: Path) -> None:
    save_file({"a.weight": WEIGHTS["a.weight"]}, tmp_path / "1.bin")
    torch.save({"b.weight": WEIGHTS["b.weight"]}, tmp_path / "2.bin")
    write_index(tmp_path, {"a.weight": "1.bin", "b.weight": "2.bin"}, "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2.bin: expected safetensors, as 1.bin is, got a pickle"):
        open_source(tmp_path)


def test_config_given_as_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json: .*got JSON: give the path of the weights"):
        open_source(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "config.json",
        "quantize_config.json",
        "adapter_config.json",
        "adapter_model.bin",
        "model_index.json",
        "other.gguf",
    ],
)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    if name in ("config.json", "quantize_config.json"):
        save_file(WEIGHTS, tmp_path / "model.safetensors")
    if name == "adapter_model.bin":
        (tmp_path / "adapter_config.json").write_text("{}")
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    with pytest.raises(ValueError, match="expected") as error:
        open_source(tmp_path, base=WEIGHTS if name == "adapter_model.bin" else None)
    assert str(tmp_path) in str(error.value)
