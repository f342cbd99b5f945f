"""Checkpoints of large models' shapes, whose data are holes that take no room."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

Shape = tuple[int, ...]
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Llama:
    """The sizes that give a LLaMA its shapes; `kv` is the width of keys and values."""

    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int = 32_000

    def shapes(self) -> dict[str, Shape]:
        """Every tensor of the checkpoint, by its name."""
        hidden, wide = self.hidden, self.intermediate
        block: dict[str, Shape] = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, wide),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (self.kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (self.kv, hidden),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            **{
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(self.layers)
                for name, shape in block.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }


LLAMA_7B = Llama(layers=32, hidden=4096, intermediate=11_008, kv=4096)
LLAMA_70B = Llama(layers=80, hidden=8192, intermediate=28_672, kv=1024)


def write_hollow(
    folder: Path, shapes: Mapping[str, Shape], dtype: str = "F16", shard_bytes: int = 5 * 10**9
) -> Path:
    """Writes a folder of safetensors shards and their index whose tensors are holes, read as zeros.

    The files have the sizes of real ones and take a few blocks each of a file system with holes.

    Args:
        folder: made if it is not there.
        shapes: of the tensors, by name.
        dtype: of all of them, by safetensors' name.
        shard_bytes: of tensors in a shard at most, if it holds more than one.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(shapes, _ITEM_BYTES[dtype], shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name in names:
            begin, end = end, end + prod(shapes[name]) * _ITEM_BYTES[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(shapes[name]),
                "data_offsets": [begin, end],
            }
            weight_map[name] = path.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_hollow_pickle(path: Path, shapes: Mapping[str, Shape]) -> Path:
    """Writes a pickle of float32 arrays by name, whose numbers are holes."""
    with path.open("wb") as file:
        file.write(b"\x80\x05}(")
        for name, shape in shapes.items():
            size = 4 * prod(shape)
            file.write(b"X" + len(name.encode()).to_bytes(4, "little") + name.encode())
            file.write(b"cnumpy._core.numeric\n_frombuffer\n(\x8e" + size.to_bytes(8, "little"))
            file.seek(size, os.SEEK_CUR)
            sizes = "".join(f"I{count}\n" for count in shape).encode()
            file.write(b"cnumpy\ndtype\nX\x02\0\0\0f4\x89\x88\x87R(" + sizes + b"tU\x01CtR")
        file.write(b"u.")
    return path


def _shards(shapes: Mapping[str, Shape], item: int, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        tensor = prod(shape) * item
        if names and size + tensor > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor
    yield names
