"""What reading a checkpoint costs in memory, and what is kept open for it."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.digest import layer_digest_of
from farms_fast.weights.sources import (
    PickleSource,
    SafetensorsSource,
    file_source,
    open_source,
)
from tests.support.sparse_checkpoints import write_hollow_pickle

MIB = 2**20
SIDE = 2048  # of float32 matrices of 16 MiB
LAYERS = 24


def resident() -> int:
    """Bytes of this process in memory, mapped files among them."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Safetensors of 384 MiB, all of it a hole: reading it costs no disk."""
    size = SIDE * SIDE * 4
    header = {
        f"l.{i}.weight": {
            "dtype": "F32",
            "shape": [SIDE, SIDE],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(LAYERS)
    }
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + LAYERS * size)
    return path


def growth(source: SafetensorsSource | PickleSource, use: Callable[[str], object]) -> int:
    """The most that using one tensor after the other adds to this process."""
    before, most = resident(), 0
    for layer in source.layers()[0]:
        use(layer.tensors[0])
        most = max(most, resident() - before)
    return most


def test_safetensors_takes_no_more_than_the_tensors_in_use(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    assert isinstance(source, SafetensorsSource)
    source.load("l.0.weight").sum()  # what torch takes once
    opened = open_files()

    def use(name: str) -> None:
        assert source.load(name).sum() == 0

    assert growth(source, use) < 40 * MIB
    assert open_files() == opened


def test_digests_of_a_checkpoint_take_no_more_than_the_tensors_in_use(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    specs = {layer.tensors[0]: layer for layer in source.layers()[0]}
    layer_digest_of(specs["l.0.weight"], [source.load("l.0.weight")])
    digests: set[str] = set()

    def add(name: str) -> None:
        digests.add(layer_digest_of(specs[name], [source.load(name)]))

    assert growth(source, add) < 60 * MIB
    assert len(digests) == LAYERS


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_torch_files_take_no_more_than_the_tensors_in_use(tmp_path: Path, method: int) -> None:
    path = tmp_path / "m.pt"
    torch.save({f"l.{i}.weight": torch.ones(SIDE, SIDE) for i in range(8)}, path)
    if method == zipfile.ZIP_DEFLATED:
        deflated = tmp_path / "deflated.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(deflated, "w", method) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name), compresslevel=1)
        path = deflated
    source = open_source(path)
    assert isinstance(source, PickleSource)
    source.load("l.0.weight").sum()
    opened = open_files()

    def use(name: str) -> None:
        assert source.load(name).sum() == SIDE * SIDE

    assert growth(source, use) < 40 * MIB  # of 128
    assert open_files() == opened


def test_pickle_of_five_gigabytes_takes_the_memory_of_a_tensor(tmp_path: Path) -> None:
    shapes = {f"l.{i}.weight": (SIDE, SIDE) for i in range(300)}
    path = write_hollow_pickle(tmp_path / "m.pkl", shapes)
    assert path.stat().st_size > 5 * 10**9
    before = resident()
    source = open_source(path)
    assert resident() - before < 10 * MIB
    assert len(source.headers) == 300
    source.load("l.0.weight").sum()
    for name in ("l.1.weight", "l.150.weight", "l.299.weight"):
        assert source.load(name).sum() == 0
        assert resident() - before < 40 * MIB


def test_tensors_outlive_their_source(checkpoint: Path, tmp_path: Path) -> None:
    weight = torch.randn(SIDE, SIDE)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    torch.save({"w": weight}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        source = open_source(tmp_path / name)
        tensor = source.load("w")
        row = tensor[7]
        del source, tensor
        (tmp_path / name).unlink()
        assert torch.equal(row, weight[7])


@pytest.mark.parametrize("piece", [64, 2**40])
def test_tensors_read_in_pieces_and_at_once_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(file_source, "_PIECE", piece)
    tensors = {
        "a": torch.randn(300, 70),
        "b": torch.randn(11, 7, dtype=torch.float64),
        "c": torch.randn(3, 5).bfloat16(),
        "d": torch.randint(0, 255, (1001,), dtype=torch.uint8),
        "e": torch.randn(3, 5, dtype=torch.complex64),
        "none": torch.empty(0, 4),
        "one": torch.tensor(7),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    source = open_source(tmp_path)
    for name, tensor in tensors.items():
        found = source.load(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        if found.numel():
            found.view(-1)[0] = 0
    assert torch.equal(source.load("a"), tensors["a"])


def test_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    header = {
        "pad": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [3, 51]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "m.safetensors"
    content = struct.pack("<Q", len(text)) + text + b"abc" + weight.numpy().tobytes()
    path.write_bytes(content)
    assert torch.equal(open_source(path).load("w"), weight)


def test_file_that_is_cut_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(50, 60)}, path)
    source = open_source(path)
    monkeypatch.setattr(file_source, "_PIECE", 4096)
    fill = file_source._fill

    def cut(*arguments: Any) -> bool:
        os.truncate(path, 9000)
        return fill(*arguments)

    monkeypatch.setattr(file_source, "_fill", cut)
    with pytest.raises(ValueError, match=r"m.safetensors: expected the file as it was"):
        source.load("w")
