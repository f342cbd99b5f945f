"""Weights from pickled checkpoints: what is read, as what, and what is refused."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from farms_fast.weights.sources import PickleSource, open_source
from tests.support.checkpoints import WEIGHTS, assert_holds_weights, loaded, write_index

# Both kinds of file that torch has written.
both_kinds = pytest.mark.parametrize("zipped", [True, False])


def saved(thing: object, path: Path, zipped: bool = True) -> Path:
    torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    return path


def reasons(source: Any) -> dict[str, str]:
    return {s.name: s.reason for s in source.layers()[1]}


def rewritten(path: Path, changes: dict[str, bytes] | None = None, method: int = 0) -> Path:
    """Writes the archive anew with other members, or compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {next(n for n in members if n.endswith(k)): v for k, v in (changes or {}).items()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_pickled_tensors_of_one_memory_are_analysed_once(tmp_path: Path) -> None:
    weight = torch.ones(3, 3)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    assert isinstance(source, PickleSource)
    layers, skipped = source.layers()
    assert [layer.name for layer in layers] == ["a", "c"]
    assert [(s.name, s.reason) for s in skipped] == [("b", "tied to a")]


def test_pickle_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    source.load("a.weight")
    assert_holds_weights(pickle.loads(pickle.dumps(source)))


@pytest.mark.parametrize(
    "name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.pth.tar", "m.pkl", "m.pickle"]
)
@both_kinds
def test_pickled_state_dict(tmp_path: Path, name: str, zipped: bool) -> None:
    path = saved(WEIGHTS, tmp_path / name, zipped)
    source = open_source(path)
    assert_holds_weights(source)
    assert [layer.name for layer in source.layers()[0]] == ["b", "a"]
    before = path.read_bytes()
    source.load("a.weight").zero_()
    assert path.read_bytes() == before


def test_folder_with_a_pickle(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save({"b.weight": WEIGHTS["b.weight"]}, tmp_path / "p-1.bin")
    torch.save({k: WEIGHTS[k] for k in ("a.weight", "a.bias")}, tmp_path / "p-2.bin")
    shards = {"b.weight": "p-1.bin", "a.weight": "p-2.bin", "a.bias": "p-2.bin"}
    write_index(tmp_path, shards, "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


# --- tensors of every kind ---

BASE = torch.randn(6, 8)
VIEWS = {
    "transposed": BASE.T,
    "strided": BASE[::2, 1::3],
    "from_the_middle": BASE[2:5],
    "expanded": torch.randn(5, 1).expand(5, 4),
    "permuted": torch.randn(3, 4, 5).permute(2, 0, 1),
    "conjugated": torch.randn(4, 3, dtype=torch.complex64).conj(),
    "negated": torch.randn(4, 3, dtype=torch.complex64).conj().imag,
    "empty": torch.empty(0, 3),
    "number": torch.tensor(3.5),
    "parameter": nn.Parameter(torch.randn(3, 2)),
}
DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.complex128, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.float8_e4m3fn, torch.uint16, torch.uint32, torch.uint64),
]


def test_loaded_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    tensors = dict(VIEWS)
    tensors |= {str(dtype): torch.arange(12).view(3, 4).to(dtype) for dtype in DTYPES}
    for zipped in (True, False):
        source = open_source(saved(tensors, tmp_path / "m.pt", zipped))
        assert [header.name for header in source.headers] == list(tensors)
        for header in source.headers:
            tensor, expected = source.load(header.name), tensors[header.name]
            assert (header.shape, header.dtype) == (tuple(expected.shape), expected.dtype)
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)
            assert not tensor.requires_grad


def test_compressed_archive_is_read_as_what_it_holds(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(300, 400), "b.weight": torch.zeros(2000, 300)}
    tensors["c.weight"] = tensors["a.weight"][200:]
    path = rewritten(saved(tensors, tmp_path / "m.pt"), method=zipfile.ZIP_DEFLATED)
    source = open_source(path)
    assert all(torch.equal(source.load(name), tensor) for name, tensor in tensors.items())


def test_compression_that_is_not_read_is_refused(tmp_path: Path) -> None:
    path = rewritten(saved(WEIGHTS, tmp_path / "m.pt"), method=zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match=r"m.pt: expected .*compressed by a method that is not"):
        open_source(path)


def test_archive_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3), "c": torch.randn(3, 2, dtype=torch.complex128)}
    path = saved(tensors, tmp_path / "m.pt")
    swapped = {"byteorder": b"big"}
    for key, tensor in enumerate(tensors.values()):
        array = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        swapped[f"data/{key}"] = array.numpy().byteswap().tobytes()
    source = open_source(rewritten(path, swapped))
    assert all(torch.equal(source.load(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="byteorder is neither little nor big"):
        open_source(rewritten(path, {"byteorder": b"middle"}))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_tensors_without_plain_values_are_listed(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8)
    tensors = {
        **WEIGHTS,
        "sparse": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        "quantised": quantised,
        "meta": torch.ones(3, 3, device="meta"),
    }
    source = open_source(saved(tensors, tmp_path / "m.pt"))
    assert set(loaded(source)) == {"a", "b"}
    assert reasons(source) == {
        "a.bias": "vector, not a matrix",
        "sparse": "layout sparse_coo: make it dense first",
        "rows": "layout sparse_csr: make it dense first",
        "quantised": "dtype qint8 is torch's quantisation, which is not read",
        "meta": "on the meta device: it has no values",
    }


class Rebuilt:
    """Saved as a tensor of a storage, with these sizes and strides."""

    def __init__(self, *view: Any, storage: Any = None) -> None:
        self.view = view
        self.storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.ones(12).storage() if self.storage is None else self.storage
        return torch._utils._rebuild_tensor_v2, (storage, *self.view, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "view",
    [
        (0, (4, 4), (4, 1)),
        (10, (3, 1), (1, 1)),
        (0, (3, 4), (100, 1)),
        (0, (2, 2), (-1, 1)),
        (-1, (2, 2), (2, 1)),
        (0, (2, 2), (2,)),
        (0, (2.0, 2), (2, 1)),
        (0, (True, 2), (2, 1)),
        (0, (1,) * 70, (1,) * 70),
        (0, (2**40, 2**40), (0, 0)),
        ("0", (2, 2), (2, 1)),
    ],
)
@both_kinds
def test_tensor_beyond_its_storage_is_an_error(tmp_path: Path, view: Any, zipped: bool) -> None:
    path = saved({"w": Rebuilt(*view)}, tmp_path / "m.pt", zipped)
    with pytest.raises(ValueError, match=r"m.pt: expected 'w' in its storage, got "):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"too short"])
def test_storage_that_is_too_short_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = rewritten(saved({"w": torch.ones(3, 4)}, tmp_path / "m.pt"), {"data/0": content})
    with pytest.raises(ValueError, match=r"m.pt: expected 'w' in its storage, got \d bytes of"):
        open_source(path)


@both_kinds
def test_file_that_is_cut_after_it_was_opened_is_an_error(tmp_path: Path, zipped: bool) -> None:
    path = saved({"w": torch.ones(300, 400)}, tmp_path / "m.pt", zipped)
    source = open_source(path)
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match=r"m.pt: expected the file as it was"):
        source.load("w")


# --- what is beside the weights ---


class Color(enum.Enum):
    RED = 1


def config_of_another_package() -> object:
    """An object of a package that is not there when the file is read."""
    module = types.ModuleType("some_training_package")

    class Config(dict):
        __module__ = "some_training_package"
        __qualname__ = "Config"

    module.Config = Config  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    config = Config(width=3)
    config.parent = config
    return config


BESIDE = {
    "args": argparse.Namespace(lr=0.1, path=Path("data")),
    "best": np.float64(93.1),
    "history": np.arange(4),
    "date": datetime.datetime(2020, 1, 2),
    "color": Color.RED,
    "activation": functools.partial(nn.functional.gelu, approximate="tanh"),
    "function": torch._C._nn.gelu,
    "names": {"a", "b"},
    "counts": defaultdict(int, x=3),
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "size": torch.Size([3, 4]),
    "bytes": b"abc" * 1000,
    "generator": np.random.default_rng(0),
    "complex": 3 + 4j,
}


@both_kinds
def test_objects_beside_the_weights_do_no_harm(tmp_path: Path, zipped: bool) -> None:
    beside = {**BESIDE, "config": config_of_another_package()}
    path = saved({"state_dict": WEIGHTS, **beside}, tmp_path / "m.pt", zipped)
    del sys.modules["some_training_package"]
    source = open_source(path)
    assert_holds_weights_alone(source)
    told = reasons(source)
    assert {name: told[name] for name in beside} == dict.fromkeys(
        beside, "beside 'state_dict', which holds the weights"
    )
    assert "some_training_package" not in sys.modules


def assert_holds_weights_alone(source: Any) -> None:
    stacks = loaded(source)
    assert set(stacks) == {"a", "b"}
    assert all(torch.equal(stacks[n][0], WEIGHTS[f"{n}.weight"]) for n in stacks)


def test_function_among_the_entries_of_a_state_dict(tmp_path: Path) -> None:
    """A state dict's `_metadata` may hold an activation function."""
    state = {**WEIGHTS, "_metadata": {"activation": torch._C._nn.gelu}}
    source = open_source(saved(state, tmp_path / "m.pt"))
    assert_holds_weights_alone(source)
    assert reasons(source)["_metadata"] == "not a tensor: dict"


def test_state_dict_that_keeps_its_metadata(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(3, 4)).state_dict()
    state._metadata["fn"] = torch._C._nn.gelu  # type: ignore[attr-defined]
    source = open_source(saved(state, tmp_path / "m.pt"))
    assert [header.name for header in source.headers] == ["0.weight", "0.bias"]


# --- whole modules ---


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 6, bias=False)
        self.again = self.model
        self.head.weight = nn.Parameter(torch.randn(6, 5))
        self.tied = nn.Linear(5, 6, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("table", torch.randn(7, 7))
        self.register_parameter("none", None)
        self.plain = torch.randn(8, 8)


@both_kinds
def test_whole_module_is_read_by_name_without_its_class(
    tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Shared()
    path = saved(module, tmp_path / "m.pt", zipped)
    monkeypatch.delattr(sys.modules[__name__], "Shared")
    source = open_source(path)
    layers, _ = source.layers()
    assert [layer.name for layer in layers] == ["model.0", "head"]
    state = module.state_dict()
    assert all(torch.equal(source.load(h.name), state[h.name]) for h in source.headers)
    told = reasons(source)
    assert told["table"] == "a buffer of its module, no weight"
    assert told["tied"] == "tied to head"
    assert told["again"] == "the same as model"
    assert "plain" not in told
    assert "model.1" not in told


def test_module_in_a_checkpoint(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    checkpoint = {"epoch": 3, "ema": None, "model": module, "optimizer": {"state": {}}}
    source = open_source(saved(checkpoint, tmp_path / "m.pt"))
    assert [layer.name for layer in source.layers()[0]] == ["0", "1"]
    networks = {"generator": module, "critic": module}
    with pytest.raises(ValueError, match="'generator', 'critic': say which"):
        open_source(saved(networks, tmp_path / "m.pt"))


def test_quantised_weights_of_a_module_are_its_buffers(tmp_path: Path) -> None:
    module = nn.Linear(4, 3, bias=False)
    del module.weight
    module.register_buffer("weight", torch.ones(3, 4, dtype=torch.int8))
    module.register_buffer("weight_scale", torch.ones(3, 1))
    source = open_source(saved(module, tmp_path / "m.pt"))
    assert [header.name for header in source.headers] == ["weight", "weight_scale"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm")
def test_parts_of_reparametrised_weights_of_a_module_are_there(tmp_path: Path) -> None:
    """One part of such a weight would be read as a weight by itself if the others were left out."""
    module = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    prune.l1_unstructured(module[0], "weight", 0.5)
    nn.utils.spectral_norm(module[1])
    source = open_source(saved(module, tmp_path / "m.pt"))
    assert {header.name for header in source.headers} == {
        *("0.weight_orig", "0.weight_mask"),
        *("1.weight_orig", "1.weight_u", "1.weight_v"),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_archive_is_read_by_its_tensors(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.LSTM(5, 4))
    path = tmp_path / "m.pt"
    torch.jit.script(module).save(path)
    source = open_source(path)
    state = module.state_dict()
    assert [h.name for h in source.headers] == [n for n, _ in module.named_parameters()]
    assert all(torch.equal(source.load(h.name), state[h.name]) for h in source.headers)
    assert reasons(source)["1.running_mean"] == "a buffer of its module, no weight"


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_frozen_torchscript_archive_has_its_weights_as_constants(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 5, bias=False)).eval()
    path = tmp_path / "m.pt"
    torch.jit.freeze(torch.jit.script(module)).save(path)
    (header,) = open_source(path).headers
    assert header.name.startswith("CONSTANTS.")
    assert sorted(header.shape) == [5, 6]


# --- pickles of arrays ---


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickle_of_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "a.weight": np.random.default_rng(0).normal(size=(40, 30)),
        "b.weight": np.asfortranarray(np.arange(12.0).reshape(3, 4).astype(">f4")),
        "c.weight": np.arange(12, dtype=np.float16).reshape(3, 4)[:, ::2],
        "t.weight": torch.randn(40, 30),
        "u.weight": torch.randn(3, 2),
    }
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    source = open_source(path)
    assert [header.name for header in source.headers] == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(source.load(name).numpy(), np.asarray(array))


def test_arrays_of_other_dtypes(tmp_path: Path) -> None:
    arrays = {
        "w": np.ones((3, 3)),
        "objects": np.array([[1, "a"], [2, None]], dtype=object),
        "text": np.array([["a", "b"]]),
        "records": np.zeros((2, 2), dtype=[("x", "f4")]),
        "dates": np.zeros((2, 2), dtype="M8[s]"),
        "wide": np.zeros((2, 2), dtype=np.longdouble),
    }
    source = open_source(saved(arrays, tmp_path / "m.pkl"))
    assert [header.name for header in source.headers] == ["w"]
    told = reasons(source)
    assert list(told) == list(arrays)[1:]
    assert told["text"] == "dtype <U1 is none of torch's"


def test_bfloat16_array_of_another_package(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"params": {"fc": {"kernel": array}}}))
    tensor = open_source(path).load("fc.kernel")
    assert torch.equal(tensor, torch.arange(6).view(2, 3).bfloat16())


# --- what is refused ---


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=rf"{path.name}: expected a pickled checkpoint") as error:
        open_source(path)
    assert "\n" not in str(error.value)
    assert error.value.__suppress_context__
    return str(error.value)


DAMAGED = {
    "noise": bytes(range(256)),
    "zip_only": b"PK\x03\x04" + bytes(40),
    "no_end": pickle.dumps({"a": 1})[:-1],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(DAMAGED))
def test_damaged_pickle_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(DAMAGED[name])
    refused(path)


def test_archives_of_other_kinds_are_told(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", b"N.")
    assert "without data.pkl (it holds 'a/b/data.pkl')" in refused(path)
    path.write_bytes(b"storages".ljust(512, b"\0"))
    assert "a tar file, which torch wrote before version 0.1.10" in refused(path)


@both_kinds
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.99])
def test_truncated_pickle_is_one_error(tmp_path: Path, fraction: float, zipped: bool) -> None:
    path = saved(WEIGHTS, tmp_path / "cut.pt", zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    refused(path)


@pytest.mark.parametrize("thing", [[1, 2], torch.ones(3, 3), 7, argparse.Namespace(a=3)])
def test_pickle_that_is_no_mapping_is_an_error(tmp_path: Path, thing: object) -> None:
    kind = type(thing).__name__
    with pytest.raises(ValueError, match=rf"m.pt: expected a mapping .*, got {kind}"):
        open_source(saved(thing, tmp_path / "m.pt"))
