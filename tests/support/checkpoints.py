"""A small checkpoint, its files, and what a source makes of them."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.sources import Source

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


def unimportable(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Makes importing a package fail as if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
