"""What reading a checkpoint costs in memory, and what is kept open for it."""

from __future__ import annotations

import json
import os
import struct
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
    pickles,
)

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


def test_pickles_take_no_more_than_is_read_between_two_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "_PICKLE_BYTES", 48 * MIB)
    weight = torch.ones(SIDE, SIDE)
    weight_map = {}
    for shard in range(2):
        tensors = {f"l.{shard}.{i}.weight": weight.clone() for i in range(8)}
        torch.save(tensors, tmp_path / f"p-{shard}.bin")
        weight_map.update(dict.fromkeys(tensors, f"p-{shard}.bin"))
    index = {"weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = open_source(tmp_path)
    assert isinstance(source, PickleSource)
    source.load("l.0.0.weight").sum()

    def use(name: str) -> None:
        assert source.load(name).sum() == SIDE * SIDE

    assert growth(source, use) < 100 * MIB  # of 128 in each of two files


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
