"""Weights from safetensors files, and what is refused."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.sources import (
    SafetensorsSource,
    open_source,
)
from tests.support.checkpoints import (
    WEIGHTS,
    assert_holds_weights,
    loaded,
    write_index,
    write_raw_safetensors,
    write_shards,
)


def test_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "any.safetensors"
    save_file(WEIGHTS, path)
    for model in (path, str(path)):
        source = open_source(model)
        assert isinstance(source, SafetensorsSource)
        assert source.description == str(path)
        assert_holds_weights(source)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_folder_with_one_safetensors_file(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / name)
    assert_holds_weights(open_source(tmp_path))


def test_model_safetensors_goes_before_everything_else(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    save_file({"c": torch.ones(3, 3)}, tmp_path / "c.safetensors")
    torch.save({"c": torch.ones(3, 3)}, tmp_path / "pytorch_model.bin")
    write_index(tmp_path, {"c": "c.safetensors"})
    assert_holds_weights(open_source(tmp_path))


def test_sharded_safetensors(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert_holds_weights(open_source(tmp_path))


def test_index_of_another_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x-1.safetensors")
    write_index(tmp_path, dict.fromkeys(WEIGHTS, "x-1.safetensors"), "diffusion.safetensors")
    assert_holds_weights(open_source(tmp_path))


def test_names_are_ordered_with_numbers_as_numbers(tmp_path: Path) -> None:
    names = ["h.10.w", "h.2.w", "a", "h.2.b.w", "h.1.w"]
    save_file({name: torch.ones(3, 3) for name in names}, tmp_path / "m.safetensors")
    layers, _ = open_source(tmp_path).layers()
    assert [layer.name for layer in layers] == ["a", "h.1.w", "h.2.b.w", "h.2.w", "h.10.w"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool],
)
def test_header_has_the_dtype_of_the_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.ones(4, 3).to(dtype)}, tmp_path / "m.safetensors")
    source = open_source(tmp_path)
    layers, skipped = source.layers()
    assert source.load("w").dtype == dtype
    if dtype.is_floating_point or dtype.is_complex:
        assert [layer.dtype for layer in layers] == [dtype]
    else:
        assert str(dtype).removeprefix("torch.") in skipped[0].reason


@pytest.mark.parametrize(("dtype", "bits"), [("F8_E8M0", 8), ("F4", 4)])
def test_quantised_floats_are_skipped(tmp_path: Path, dtype: str, bits: int) -> None:
    size = 16 * bits // 8
    entry = {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}
    write_raw_safetensors(tmp_path / "m.safetensors", {"w": entry}, bytes(size))
    layers, skipped = open_source(tmp_path).layers()
    assert layers == []
    assert [(s.name, s.shape) for s in skipped] == [("w", (4, 4))]
    assert "quantised" in skipped[0].reason


def test_writing_a_loaded_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(WEIGHTS, path)
    before = path.read_bytes()
    open_source(path).load("a.weight").zero_()
    assert path.read_bytes() == before


def test_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    write_shards(tmp_path)
    source = open_source(tmp_path)
    source.load("a.weight")
    assert_holds_weights(pickle.loads(pickle.dumps(source)))


def test_unknown_name_is_an_error(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    for model in (tmp_path, WEIGHTS):
        with pytest.raises(ValueError, match=r"name: expected a tensor of .*, got 'c.weight'"):
            open_source(model).load("c.weight")


@pytest.mark.parametrize("keep", [1, 4, 8, 20, 60, -1, -40])
def test_truncated_safetensors_is_one_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut.safetensors: expected .*safetensors") as error:
        open_source(path)
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [100, 100], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 1600]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [8, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [2, 2], "data_offsets": [0, 16]},
        {"shape": [2, 2]},
        {"dtype": "F32", "shape": [2, True], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": [1] * 62 + [2**31, 2**31, 2**31], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F4", "shape": [3, 3], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]},
        "F32",
    ],
)
def test_safetensors_header_that_lies_is_one_error(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "lie.safetensors"
    write_raw_safetensors(path, {"w": entry}, bytes(16))
    with pytest.raises(ValueError, match=r"lie.safetensors: expected .*safetensors"):
        open_source(path)


@pytest.mark.parametrize("offsets", [([0, 16], [8, 24]), ([0, 16], [20, 36]), ([4, 20], [20, 36])])
def test_tensors_that_overlap_or_leave_holes_are_one_error(
    tmp_path: Path, offsets: tuple[list[int], list[int]]
) -> None:
    entries = {
        name: {"dtype": "F32", "shape": [2, 2], "data_offsets": extent}
        for name, extent in zip("ab", offsets, strict=True)
    }
    path = tmp_path / "lie.safetensors"
    write_raw_safetensors(path, entries, bytes(offsets[1][1]))
    with pytest.raises(ValueError, match=r"lie.safetensors: expected a sound .*begins at byte"):
        open_source(path)


def test_file_larger_than_any_memory_is_opened_and_read(tmp_path: Path) -> None:
    small, large = 4 * 3 * 4, 2**43
    entries = {
        "w.weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, small]},
        "pad": {"dtype": "U8", "shape": [large], "data_offsets": [small, small + large]},
    }
    path = tmp_path / "m.safetensors"
    write_raw_safetensors(path, entries, b"")
    try:
        os.truncate(path, path.stat().st_size + small + large)
    except OSError:
        pytest.skip("the file system has no files of 8 TiB")
    assert loaded(open_source(path))["w"].eq(0).all()


def test_names_with_long_runs_of_digits_are_ordered(tmp_path: Path) -> None:
    names = [f"h.{digits}.w" for digits in ("9" * 5000, "10", "007", "8", "²")]
    save_file({name: torch.ones(3, 3) for name in names}, tmp_path / "m.safetensors")
    ordered = [header.name[2:-2][:4] for header in open_source(tmp_path).headers]
    assert ordered == ["007", "8", "10", "9999", "²"]


def test_tensor_outside_the_index_does_not_take_the_place_of_one_in_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 3)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(3, 3), "b": torch.ones(3, 3)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert torch.equal(open_source(tmp_path).load("a"), torch.ones(3, 3))


def test_safetensors_header_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"lie.safetensors: expected .*safetensors"):
        open_source(path)


def test_safetensors_with_a_name_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.safetensors"
    entry = '{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
    text = f'{{"w":{entry},"w":{entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"twice.safetensors: expected each name once, got 'w'"):
        open_source(path)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("what", ["other", "cut", "gone"])
def test_file_that_changes_after_it_was_opened_is_an_error(
    tmp_path: Path, kind: str, what: str
) -> None:
    path = tmp_path / f"m.{kind}"
    save = save_file if kind == "safetensors" else torch.save
    save(WEIGHTS, path)
    source = open_source(path)
    source.load("a.weight")
    source.load("b.weight")
    source = pickle.loads(pickle.dumps(source))  # which has no file open
    if what == "other":
        save({**WEIGHTS, "c.weight": torch.ones(50, 50)}, path)
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"m.{kind}"):
        source.load("a.weight")
