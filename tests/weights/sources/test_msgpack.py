"""Flax's msgpack files, written as flax.serialization does, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast.weights.sources import open_source
from tests.support.checkpoints import unimportable

msgpack = pytest.importorskip("msgpack")

KERNEL = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


def _packed(array: np.ndarray, dtype: str = "") -> Any:
    content = (array.shape, dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def _chunked(array: np.ndarray, length: int) -> dict[str, Any]:
    flat = array.reshape(-1)
    chunks = [flat[start : start + length] for start in range(0, flat.size, length)]
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(array.shape)},
        "chunks": {str(i): _packed(chunk) for i, chunk in enumerate(chunks)},
    }


def _write(path: Path, tree: Any) -> Path:
    path.write_bytes(msgpack.packb(tree, use_bin_type=True, strict_types=False))
    return path


def test_tree_of_modules(tmp_path: Path) -> None:
    tree = {
        "encoder": {
            "0": {"kernel": _packed(KERNEL), "bias": _packed(KERNEL[0])},
            "1": {"kernel": _chunked(KERNEL + 1, 20)},
        },
        "step": 7,
        "rate": msgpack.ExtType(3, b"scalar"),
    }
    for path in (_write(tmp_path / "flax_model.msgpack", tree), tmp_path):
        source = open_source(path)
        names = [header.name for header in source.headers]
        assert names == ["encoder.0.kernel", "encoder.0.bias", "encoder.1.kernel"]
        assert np.array_equal(source.load("encoder.0.kernel").numpy(), KERNEL)
        assert np.array_equal(source.load("encoder.1.kernel").numpy(), KERNEL + 1)
        assert {"step", "rate"} <= {tensor.name for tensor in source.skipped}


def test_weights_of_a_train_state_and_keys(tmp_path: Path) -> None:
    tree = {
        "params": {"fc": {"kernel": _packed(KERNEL)}},
        "ema": {"fc": {"kernel": _packed(KERNEL + 1)}},
        "opt_state": {"0": {"mu": {"fc": {"kernel": _packed(KERNEL + 2)}}}},
    }
    path = _write(tmp_path / "state.msgpack", tree)
    assert np.array_equal(open_source(path).load("fc.kernel").numpy(), KERNEL)
    assert np.array_equal(open_source(path, key="ema").load("fc.kernel").numpy(), KERNEL + 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64", "int8", "bool"])
def test_values_of_every_type(tmp_path: Path, dtype: str) -> None:
    expected = torch.ones(4, 3).to(getattr(torch, dtype))
    content = expected.view(torch.uint8).numpy() if dtype != "bool" else expected.numpy()
    array = msgpack.ExtType(1, msgpack.packb(((4, 3), dtype, content.tobytes())))
    source = open_source(_write(tmp_path / "m.msgpack", {"a": {"kernel": array}}))
    assert source.headers[0].dtype == expected.dtype
    assert torch.equal(source.load("a.kernel"), expected)


def test_type_that_torch_lacks_is_listed(tmp_path: Path) -> None:
    tree = {"a": _packed(KERNEL), "b": _packed(KERNEL, "int4")}
    source = open_source(_write(tmp_path / "m.msgpack", tree))
    assert [header.name for header in source.headers] == ["a"]
    assert [(tensor.name, "int4" in tensor.reason) for tensor in source.skipped] == [("b", True)]


def _nested(depth: int) -> Any:
    tree: Any = _packed(KERNEL)
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def _array(shape: Any, dtype: Any, content: Any) -> bytes:
    return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((shape, dtype, content)))})


@pytest.mark.parametrize(
    "content",
    [
        msgpack.packb({"a": _packed(KERNEL)})[:-9],
        msgpack.packb({"a": _packed(KERNEL)}) + b"\x01",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        b"\x81\xa1a\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a",
        b"\x81\xa1a\xc1",
        msgpack.packb(_nested(300)),
        _array((4, 3), "float32", bytes(40)),
        _array((2**40, 2**40), "float32", bytes(48)),
        _array((-4, -3), "float32", bytes(48)),
        _array(4, "float32", bytes(16)),
        _array((4, 3), 7, bytes(48)),
        _array((4, 3), "float32", "text"),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
    ],
)
def test_file_that_lies_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lie.msgpack").write_bytes(content)
    with pytest.raises(ValueError, match=r"lie.msgpack: expected sound msgpack, got a broken one"):
        open_source(tmp_path / "lie.msgpack")


def test_file_that_changes_gives_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.msgpack", {"a": _packed(KERNEL)})
    source = open_source(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match=r"m.msgpack: expected the file as it was"):
        source.load("a")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "m.msgpack", {"a": _packed(KERNEL)})
    unimportable(monkeypatch, "msgpack")
    with pytest.raises(ImportError, match=r"m.msgpack: msgpack .*install 'farms-fast\[flax\]'"):
        open_source(path)
