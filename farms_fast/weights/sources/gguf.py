"""Tensors of GGUF files, as llama.cpp writes them, dequantised one at a time.

The header is walked here and checked against the file's size: the library's own reader maps the
file and trusts its counts. The library knows the types and their values.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import open_regular
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources.binary import FieldReader
from farms_fast.weights.sources.file_source import Extent, FileSource
from farms_fast.weights.stacks import Skipped, TensorHeader

_NAME_BYTES = 2**16
_MOST_DIMENSIONS = 8
_DEEPEST = 4
_MOST_TENSORS = 2**20
_MOST_ENTRIES = 2**25
# Scalars of the metadata by their type's number, as `struct` names them.
_SCALARS: dict[int, str] = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Values of a quantised tensor that are computed at once.
_VALUES = 2**20
# Depthwise kernels, which llama.cpp stores without their dimension of size one.
_DEPTHWISE = re.compile(r"(^|\.)(ssm_conv1d(_[qkv])?|shortconv\.conv|conv_dw)\.weight$")
_STATE_SPACE = re.compile(r"(^|\.)ssm_a$")


@dataclass(frozen=True)
class _Quantised:
    """Where a tensor lies in a file, and what its type is."""

    extent: Extent
    kind: int


class GGUFSource(FileSource[_Quantised]):
    """Tensors of GGUF files by the names that llama.cpp gives them, numbers as numbers.

    Shapes are those of torch, `(out, in)`; quantised tensors are float32.
    """

    _layout = "torch"
    _in_natural_order = True

    def _load(self, name: str, stored: Path) -> Tensor:
        tensor = self._located[stored, name]
        extent = tensor.extent
        gguf = _gguf(stored)
        kind = gguf.GGMLQuantizationType(tensor.kind)
        if kind.name in _PLAIN:
            return self._read_tensor(stored, extent)
        values, size = gguf.GGML_QUANT_SIZES[kind]
        weight = torch.empty(extent.shape, dtype=torch.float32, device="cpu")
        flat = weight.view(-1)
        step = _VALUES // values * values
        for start in range(0, flat.numel(), step):
            count = min(step, flat.numel() - start)
            offset = extent.offset + start // values * size
            blocks = self._read(stored, offset, count // values * size)
            flat[start : start + count] = torch.from_numpy(_values(gguf, kind, blocks.numpy()))
        return weight

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        gguf = _gguf(path)
        with open_regular(path) as file:
            reader = FieldReader(file, path, self._size(path), "GGUF")
            _, version, tensors, entries = reader.fields("4sIQQ")
            if version not in (2, 3):
                got = (
                    "big-endian numbers" if version in (2 << 24, 3 << 24) else f"version {version}"
                )
                raise ValueError(
                    f"{path}: expected little-endian GGUF of version 2 or 3, got {got}"
                )
            metadata = _metadata(reader, entries)
            count = reader.count(tensors, 24, _MOST_TENSORS)
            infos = [_tensor_info(reader) for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment > 2**20:
            raise reader.broken(f"an alignment of {alignment!r}")
        data = -(-reader.offset // alignment) * alignment
        if self._config is None:
            self._config = _model_config(metadata)
        stored: dict[str, TensorHeader | Skipped] = {}
        for name, shape, number, offset in infos:
            if name in stored:
                raise reader.broken(f"the name {name!r} twice")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                reason = f"of a type that the gguf library does not know: {number}"
                stored[name] = Skipped(name.removesuffix(".weight"), shape, reason)
                continue
            values, size = gguf.GGML_QUANT_SIZES[kind]
            if shape and shape[-1] % values:
                raise reader.broken(f"rows of {name!r} are no whole blocks of {kind.name}")
            count = math.prod(shape) // values * size
            if data + offset + count > self._size(path):
                raise reader.broken(f"{name!r} ends behind the file's end")
            dtype = _PLAIN.get(kind.name, torch.float32)
            reason = ""
            if kind.name not in _PLAIN and not _is_known(gguf, kind):
                reason = f"of type {kind.name}, which the gguf library does not dequantise"
            elif _DEPTHWISE.search(name):
                reason = "depthwise: its matrices have one singular value, no spectrum"
            elif _STATE_SPACE.search(name):
                reason = "the decay of a state space, not a matrix"
            if reason:
                stored[name] = Skipped(name.removesuffix(".weight"), shape, reason)
                continue
            extent = Extent(data + offset, count, shape, dtype)
            self._located[path, name] = _Quantised(extent, number)
            stored[name] = TensorHeader(name, shape, dtype)
        return stored


def _gguf(path: Path) -> Any:
    with optional_import("gguf", extra="gguf", needed_for=f"{path}: GGUF"):
        import gguf
    return gguf


def _values(gguf: Any, kind: Any, blocks: NDArray[Any]) -> NDArray[Any]:
    """The values of whole blocks, in one dimension."""
    with np.errstate(all="ignore"):  # scales of a damaged file may be infinite
        values: NDArray[Any] = gguf.dequantize(blocks, kind)
    return values.reshape(-1)


def _is_known(gguf: Any, kind: Any) -> bool:
    """Whether the library computes the values of a type, tried with one block."""
    try:
        _values(gguf, kind, np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8))
    except NotImplementedError:
        return False
    return True


def _model_config(metadata: Mapping[str, Any]) -> ModelConfig:
    """What tells where fused projections are cut."""
    architecture = metadata.get("general.architecture")
    keys = {
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "hidden_size": "embedding_length",
    }
    entries = {name: metadata.get(f"{architecture}.{key}") for name, key in keys.items()}
    return ModelConfig.of(entries)


def _tensor_info(reader: FieldReader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape as torch has it, number of the type, and offset from where the data begin."""
    name = _text(reader, _NAME_BYTES)
    (dimensions,) = reader.fields("I")
    if dimensions > _MOST_DIMENSIONS:
        raise reader.broken(f"{dimensions:,} dimensions")
    shape = reader.fields(f"{dimensions}Q")[::-1]
    number, offset = reader.fields("IQ")
    return name, shape, number, offset


def _text(reader: FieldReader, most: int) -> str:
    (length,) = reader.fields("Q")
    try:
        return reader.bytes(length, most).decode()
    except UnicodeDecodeError:
        raise reader.broken("a name that is no UTF-8") from None


def _metadata(reader: FieldReader, entries: int) -> dict[str, Any]:
    """The scalars of the metadata; texts, vocabularies and other arrays are passed over."""
    metadata: dict[str, Any] = {}
    for _ in range(reader.count(entries, 13, _MOST_ENTRIES)):
        name = _text(reader, _NAME_BYTES)
        (kind,) = reader.fields("I")
        value = _value(reader, kind, 0)
        if value is not None:
            metadata[name] = value
    return metadata


def _value(reader: FieldReader, kind: int, depth: int) -> Any:
    """A scalar or a short text; None for what is passed over."""
    if kind in _SCALARS:
        return reader.fields(_SCALARS[kind])[0]
    if kind == _STRING:
        (length,) = reader.fields("Q")
        if length <= 256:
            return reader.bytes(length).decode("utf-8", "replace")
        reader.skip(length)
        return None
    if kind != _ARRAY or depth > _DEEPEST:
        raise reader.broken(f"metadata of type {kind}")
    inner, count = reader.fields("IQ")
    if inner in _SCALARS:
        reader.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
    elif inner == _STRING:
        reader.skip_texts(reader.count(count, 8, _MOST_ENTRIES))
    else:
        for _ in range(reader.count(count, 12, _MOST_ENTRIES)):
            _value(reader, inner, depth + 1)
    return None
