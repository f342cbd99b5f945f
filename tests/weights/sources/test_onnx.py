"""ONNX models: initialisers in torch's layout, data in other files, and graphs that lie."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from farms_fast.weights.sources import open_source
from tests.support.checkpoints import loaded, unimportable

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RNG = np.random.default_rng(0)


def _array(*shape: int, dtype: str = "f4") -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def _model(nodes: list[Any], tensors: list[Any], name: str = "g") -> Any:
    return helper.make_model(helper.make_graph(nodes, name, [], [], tensors))


def _write(path: Path, nodes: list[Any], arrays: dict[str, np.ndarray]) -> Path:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    path.write_bytes(_model(nodes, tensors).SerializeToString())
    return path


def _tensors(path: Path) -> dict[str, np.ndarray]:
    source = open_source(path)
    tensors = {header.name: source.load(header.name) for header in source.headers}
    shapes = {header.name: header.shape for header in source.headers}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_layout_is_that_of_torch(tmp_path: Path) -> None:
    arrays = {
        "mm": _array(4, 3),
        "left": _array(4, 3),
        "gemm": _array(4, 3),
        "gemm_t": _array(4, 3),
        "conv.weight": _array(8, 4, 3, 3),
        "both": _array(4, 3),
        "unused.weight": _array(4, 3),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "mm"], ["a"]),
        helper.make_node("MatMul", ["left", "x"], ["b"]),
        helper.make_node("Gemm", ["x", "gemm"], ["c"]),
        helper.make_node("Gemm", ["x", "gemm_t"], ["d"], transB=1),
        helper.make_node("Conv", ["x", "conv.weight"], ["e"]),
        helper.make_node("MatMul", ["x", "both"], ["f"]),
        helper.make_node("Transpose", ["both"], ["g"]),
    ]
    tensors = _tensors(_write(tmp_path / "m.onnx", nodes, arrays))
    for name, array in arrays.items():
        expected = array.T if name in ("mm", "gemm") else array
        assert np.array_equal(tensors[name], expected), name


def test_made_up_names_become_those_of_the_nodes(tmp_path: Path) -> None:
    arrays = {"onnx::MatMul_12": _array(4, 3), "onnx::MatMul_13": _array(4, 5), "7": _array(6, 3)}
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_12"], ["a"], "/model/layers.0/q/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_13"], ["b"]),
        helper.make_node("Gemm", ["x", "7"], ["c"], "/head/Gemm_1", transB=1),
    ]
    path = _write(tmp_path / "m.onnx", nodes, arrays)
    assert set(_tensors(path)) == {"model.layers.0.q.weight", "onnx::MatMul_13", "head.weight"}
    layers, _ = open_source(path).layers()
    assert [layer.name for layer in layers] == ["model.layers.0.q", "onnx::MatMul_13", "head"]


def test_what_is_no_weight_of_a_map_is_listed(tmp_path: Path) -> None:
    arrays = {
        "mask": _array(8, 8),
        "table": _array(50, 8),
        "stack": _array(3, 8, 4),
        "bytes": RNG.integers(0, 9, (8, 8)).astype("i1"),
    }
    nodes = [
        helper.make_node("Where", ["c", "mask", "x"], ["a"]),
        helper.make_node("Gather", ["table", "x"], ["b"]),
        helper.make_node("MatMul", ["x", "stack"], ["d"]),
    ]
    path = _write(tmp_path / "m.onnx", nodes, arrays)
    layers, skipped = open_source(path).layers()
    assert layers == []
    reasons = {tensor.name: tensor.reason for tensor in skipped}
    assert reasons["mask"] == "a constant of Where, no weight of a map"
    assert reasons["stack"].startswith("a stack of factors of MatMul")
    assert reasons["table.embedding"].startswith("embedding, left out by default")
    assert "int8" in reasons["bytes"]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers_are_those_of_torch(
    tmp_path: Path, cls: type[nn.RNNBase], bidirectional: bool
) -> None:
    module = cls(5, 4, bidirectional=bidirectional)
    order = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}[cls.__name__]
    arrays = {}
    for name, leaf in (("W", "weight_ih_l0"), ("R", "weight_hh_l0")):
        directions = [
            torch.cat([getattr(module, leaf + end).detach().chunk(len(order))[g] for g in order])
            for end in ("", "_reverse")[: 1 + bidirectional]
        ]
        arrays[name] = torch.stack(directions).numpy()
    node = helper.make_node(cls.__name__, ["x", "W", "R"], ["y"], "/rnn")
    stacks = loaded(open_source(_write(tmp_path / "m.onnx", [node], arrays)))
    expected = loaded(open_source(nn.ModuleDict({"rnn": module})))
    assert stacks.keys() == expected.keys()
    assert all(torch.equal(stacks[name], stack) for name, stack in expected.items())


DTYPES = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "COMPLEX64", "INT64", "FLOAT8E4M3FN", "BOOL"]


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_every_type(tmp_path: Path, dtype: str, raw: bool) -> None:
    values = np.array([0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1], dtype="f4")
    kind = getattr(TensorProto, dtype)
    data = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor = helper.make_tensor("w", kind, (4, 3), data.tobytes() if raw else data, raw=raw)
    (tmp_path / "m.onnx").write_bytes(_model([], [tensor]).SerializeToString())
    source = open_source(tmp_path / "m.onnx")
    weight = source.load("w")
    assert weight.dtype == source.headers[0].dtype
    expected = torch.from_numpy(values).view(4, 3)
    real = weight.real if weight.is_complex() else weight
    assert torch.equal(real.float(), expected)


def test_constants_and_graphs_in_graphs(tmp_path: Path) -> None:
    constant = helper.make_node(
        "Constant", [], ["k"], value=numpy_helper.from_array(_array(4, 3), "inner")
    )
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "deep"], ["z"])],
        "body",
        [],
        [],
        [numpy_helper.from_array(_array(6, 5), "deep")],
    )
    nodes = [
        constant,
        helper.make_node("MatMul", ["x", "k"], ["y"]),
        helper.make_node("If", ["c"], ["i"], then_branch=body, else_branch=body),
    ]
    source = open_source(_write(tmp_path / "m.onnx", nodes, {}))
    shapes = [(header.name.partition("_")[0], header.shape) for header in source.headers]
    assert shapes == [("k", (3, 4)), ("deep", (5, 6)), ("deep", (6, 5))]


def _external(name: str, shape: tuple[int, ...], **entries: object) -> Any:
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def test_data_in_another_file(tmp_path: Path) -> None:
    array = _array(4, 3)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.data").write_bytes(b"pad!" + array.tobytes())
    entries = {"location": "sub/m.data", "offset": 4, "length": 48}
    tensors = [_external("w", (4, 3), **entries)]
    (tmp_path / "m.onnx").write_bytes(_model([], tensors).SerializeToString())
    source = open_source(tmp_path / "m.onnx")
    assert np.array_equal(source.load("w").numpy(), array)
    os.truncate(tmp_path / "sub" / "m.data", 20)
    with pytest.raises(ValueError, match=r"m.data: expected the file as it was"):
        source.load("w")


@pytest.mark.parametrize(
    "location", ["../out.data", "/etc/passwd", "", ".", "a/../../out.data", "C:out", "..\\out"]
)
def test_data_cannot_lie_elsewhere(tmp_path: Path, location: str) -> None:
    (tmp_path / "out.data").write_bytes(bytes(48))
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = [_external("w", (4, 3), location=location)]
    (folder / "m.onnx").write_bytes(_model([], tensors).SerializeToString())
    with pytest.raises(ValueError, match=r"m.onnx: expected the path of a file in the same folder"):
        open_source(folder / "m.onnx")


@pytest.mark.parametrize(
    "entries", [{"offset": 4}, {"length": 40}, {"offset": -1}, {"offset": "x"}, {"length": 2**60}]
)
def test_data_that_are_not_there(tmp_path: Path, entries: dict[str, object]) -> None:
    (tmp_path / "m.data").write_bytes(bytes(48))
    tensors = [_external("w", (4, 3), location="m.data", **entries)]
    (tmp_path / "m.onnx").write_bytes(_model([], tensors).SerializeToString())
    with pytest.raises(ValueError, match=r"m.data: expected 48 bytes for 'w'"):
        open_source(tmp_path / "m.onnx")


def test_missing_and_strange_data_files(tmp_path: Path) -> None:
    tensors = [_external("w", (4, 3), location="m.data")]
    (tmp_path / "m.onnx").write_bytes(_model([], tensors).SerializeToString())
    with pytest.raises(FileNotFoundError, match=r"m.data"):
        open_source(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "m.data")
    with pytest.raises(ValueError, match=r"m.data: expected a regular file, got a FIFO"):
        open_source(tmp_path / "m.onnx")


def _raw_tensor(shape: tuple[int, ...], data: bytes) -> bytes:
    tensor = TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, raw_data=data)
    return _model([], [tensor]).SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        b"\x08\x07",
        _raw_tensor((4, 3), bytes(48))[:-9],
        _raw_tensor((4, 3), bytes(40)),
        _raw_tensor((2**40, 2**40), bytes(40)),
        _raw_tensor((-4, 3), bytes(48)),
        _raw_tensor((1,) * 100, bytes(4)),
        b"\x3a" + b"\xff" * 9 + b"\x01",
        b"\x3a" + b"\xff" * 20,
        b"\x3b\x08",
        b"\x3a\x04\x2a\x7f\x08\x01",
    ],
)
def test_model_that_lies_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lie.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"lie.onnx: expected sound ONNX, got a broken one"):
        open_source(tmp_path / "lie.onnx")


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    content = _raw_tensor((4, 3), bytes(48)).replace(b"\x42\x01w", b"\x42\x01\xff")
    (tmp_path / "m.onnx").write_bytes(content)
    assert [header.name for header in open_source(tmp_path / "m.onnx").headers] == ["\\xff"]


def test_too_few_values_fail_when_they_are_loaded(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=(2**20, 2**20), data_type=TensorProto.FLOAT)
    tensor.float_data.extend([1.0] * 5)
    (tmp_path / "m.onnx").write_bytes(_model([], [tensor]).SerializeToString())
    with pytest.raises(ValueError, match=r"m.onnx: expected sound values of 'w'"):
        open_source(tmp_path / "m.onnx").load("w")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "m.onnx", [], {"w": _array(4, 3)})
    unimportable(monkeypatch, "onnx")
    with pytest.raises(ImportError, match=r"m.onnx: ONNX: .*pip install 'farms-fast\[onnx\]'"):
        open_source(path)
