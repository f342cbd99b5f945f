"""Files with bytes changed, cut and put in at random: read, or one error that names the file."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.sources import open_source

# FARMS_FAST_MUTATIONS=2000 tries more of them.
COUNT = int(os.environ.get("FARMS_FAST_MUTATIONS", "60"))
ARRAYS = {f"l.{i}.weight": np.full((4, 32), i + 1, np.float32) for i in range(3)}


def _safetensors(path: Path) -> None:
    save_file({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


def _gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d" * 40] * 10)
    for name, array in ARRAYS.items():
        writer.add_tensor(name, array)
    writer.add_tensor(
        "q.weight", np.full((4, 34), 44, np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _h5(path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in ARRAYS.items():
            file.create_dataset(name.replace(".", "/"), data=array)
        file.create_dataset("z", data=np.ones((64, 64)), chunks=(16, 16), compression="gzip")


def _onnx(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in ARRAYS.items()]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "l.0.weight"], ["y"], "/l/MatMul"),
        onnx.helper.make_node("Gemm", ["x", "l.1.weight"], ["z"], transB=1),
        onnx.helper.make_node("Constant", [], ["k"], value=tensors[0]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors))
    path.write_bytes(model.SerializeToString())


def _msgpack(path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    packed = {
        name: msgpack.ExtType(1, msgpack.packb((array.shape, "float32", array.tobytes())))
        for name, array in ARRAYS.items()
    }
    path.write_bytes(msgpack.packb({"params": {"a": packed, "b": {"step": 1}}, "opt": [1, 2]}))


def _mutated(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = min(rng.randrange(4096 if rng.random() < 0.8 else len(content)), len(changed) - 1)
        kind = rng.random()
        if kind < 0.4:
            changed[at] = rng.randrange(256)
        elif kind < 0.6:
            changed[at : at + 4] = b"\xff" * 4
        elif kind < 0.8:
            changed[at : at + 8] = (1 << rng.randrange(63)).to_bytes(8, "little")
        elif kind < 0.9:
            del changed[at : at + rng.randrange(1, 9)]
        else:
            changed[at:at] = bytes(rng.randrange(1, 9))
    return bytes(changed[: rng.randrange(1, len(changed))] if rng.random() < 0.05 else changed)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".safetensors", _safetensors),
        (".gguf", _gguf),
        (".h5", _h5),
        (".onnx", _onnx),
        (".msgpack", _msgpack),
    ],
)
def test_mutated_file_is_read_or_one_error(
    tmp_path: Path, suffix: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / f"m{suffix}"
    write(path)
    assert len(open_source(path).headers) > 2
    content, errors = path.read_bytes(), []
    for number in range(COUNT):
        path.write_bytes(_mutated(content, random.Random(number)))
        try:
            source = open_source(path)
            for layer in source.layers()[0]:
                layer.to_stack(*map(source.load, layer.tensors))
        except ValueError as error:
            errors.append(str(error))
    assert all(path.name in error for error in errors)
    assert COUNT / 20 < len(errors) < COUNT * 19 / 20
