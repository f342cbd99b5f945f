"""Quantised weights as common formats store them: which tensors belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from farms_fast.core.arrays import FLOATING
from farms_fast.weights.formats.dequantise import (
    BitsAndBytesInt8,
    GroupQuantised,
    Mxfp4,
    Packed,
    Scaled,
    scale_layout,
)
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.recipes import Recipe
from farms_fast.weights.stacks import TensorHeader, WeightCandidate

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_PACKED_NAMES = ("qdata", "weight_packed")
_PACKED = (torch.uint8, torch.int8, torch.int32)
# Under these names modules hold parts of quantised weights as buffers.
QUANTISED_BUFFERS = {"qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed"}
QUANTISED_BUFFERS |= {"weight_scale", "weight_scale_inv", "weight_zero_point"}


def dequantised_headers(
    headers: Sequence[TensorHeader], config: ModelConfig | None = None
) -> list[WeightCandidate]:
    """Puts the header of the float32 `(out, in)` weight in the place of what it is stored as.

    The config tells block sizes and bits. Weights of formats that are not read get a reason.
    """
    by_name = {header.name: header for header in headers}
    config = config or ModelConfig()
    weights = [
        _weight_of(_Stored(header, by_name, config)) if _may_be_quantised(header) else None
        for header in headers
    ]
    used = {
        name for weight in weights if weight and not weight.reason for name in weight.header.stored
    }
    return [
        weight or WeightCandidate(header)
        for header, weight in zip(headers, weights, strict=True)
        if weight or header.stored[0] not in used
    ]


def _may_be_quantised(header: TensorHeader) -> bool:
    """Whether its dtype or name can be that of a quantised weight; most tensors' cannot."""
    return header.dtype not in FLOATING or header.name.endswith(_PACKED_NAMES)


class _Stored:
    """A tensor that may be the main one of a quantised weight `name`, and the model around it."""

    def __init__(
        self, header: TensorHeader, headers: Mapping[str, TensorHeader], config: ModelConfig
    ) -> None:
        self.header, self.headers, self.config = header, headers, config
        self.shape, self.dtype, self.name = header.shape, header.dtype, header.name

    def same_module(self, leaf: str) -> TensorHeader | None:
        return self.headers.get(self.header.neighbour(leaf))

    def refused(self, why: str) -> WeightCandidate:
        header = TensorHeader(self.name, self.shape, self.dtype)
        return WeightCandidate(header, f"quantised weight {why}")

    def not_read(self, what: str) -> WeightCandidate:
        dtype = str(self.dtype).removeprefix("torch.")
        return self.refused(f"in a format that is not read: {what}, stored as {dtype}")

    def misfit(self, parts: Sequence[TensorHeader], what: str) -> WeightCandidate:
        shapes = ", ".join(f"{part.leaf} {tuple(part.shape)}" for part in parts)
        return self.refused(f"whose tensors do not fit together as {what}: {shapes}")

    def computed(
        self, shape: tuple[int, ...], parts: Sequence[TensorHeader], recipe: Recipe
    ) -> WeightCandidate:
        # A recipe computes with real numbers and would drop the imaginary parts.
        if complex_part := next((part for part in parts if part.dtype.is_complex), None):
            return self.refused(f"whose {complex_part.leaf} holds complex numbers")
        return WeightCandidate.computed(self.name, shape, torch.float32, parts, recipe)


def _weight_of(stored: _Stored) -> WeightCandidate | None:
    """The weight of which this is the main tensor; None for any other tensor."""
    name, leaf, dtype, rank = stored.name, stored.header.leaf, stored.dtype, len(stored.shape)
    if leaf == "qweight" and dtype == torch.int32 and rank == 2:
        return _gptq_or_awq(stored)
    if leaf == "weight_packed":
        return _compressed_pack(stored)
    if leaf.endswith("_blocks") and dtype == torch.uint8 and rank > 2:
        return _mxfp4(stored)
    if leaf.endswith("qdata") and f"{name.removesuffix('qdata')}scale" in stored.headers:
        stored.name = name.removesuffix("qdata").rstrip("_:.")
        return stored.not_read("torchao")
    if dtype in _FLOAT8 and rank > 1:
        return _scaled(stored)
    if leaf != "weight" or dtype not in _PACKED or rank < 2:
        return None
    if dtype == torch.int8 and stored.same_module("SCB"):
        return _bitsandbytes_int8(stored)
    if dtype == torch.int8 and stored.same_module("weight_scale"):
        return _scaled(stored)
    if stored.same_module("weight.absmax"):
        start = f"{name}.quant_state.bitsandbytes__"
        kinds = (other.removeprefix(start) for other in stored.headers if other.startswith(start))
        return stored.not_read(f"bitsandbytes {next(kinds, '4-bit')}")
    if stored.same_module("weight_scale_2"):
        return stored.not_read("NVFP4 (ModelOpt)")
    method = stored.config.quantised_by
    return stored.not_read(f"quant_method {method!r}") if method else None


def _scaled(stored: _Stored) -> WeightCandidate:
    """One stored number a weight, times a scale: float8, int8."""
    header, name, headers = stored.header, stored.name, stored.headers
    base = name.removesuffix("weight")
    names = [f"{name}_scale", f"{name}_scale_inv"]
    names += [f"{base}scale_weight", f"{base}scale"] if base != name else []
    scale = next((headers[name] for name in names if name in headers), None)
    if scale is None:
        if method := stored.config.quantised_by:
            what = f"quantised weight without a scale beside it (quant_method {method!r})"
            return WeightCandidate(header, what)
        # Without a scale, eight-bit floats are a dtype like any other.
        return stored.computed(header.shape, [header], Scaled())
    block = stored.config.quantization.get("weight_block_size")
    configured = tuple(block) if isinstance(block, (list, tuple)) else ()
    if not all(isinstance(size, int) and size > 0 for size in configured):
        configured = ()
    parts = [header, scale]
    if zero_point := headers.get(f"{name}_zero_point"):
        parts.append(zero_point)
        if zero_point.shape != scale.shape:
            return stored.misfit(parts, "weight, scale and zero point")
    layout = scale_layout(header.shape, scale.shape, configured)
    if layout is None:
        what = f"weight and scale, in blocks of {configured or 'any size'}"
        return stored.misfit(parts, what)
    return stored.computed(header.shape, parts, Scaled(layout))


def _bitsandbytes_int8(stored: _Stored) -> WeightCandidate:
    parts = [stored.header, *filter(None, map(stored.same_module, ("SCB", "weight_format")))]
    if len(stored.shape) != 2 or math.prod(parts[1].shape) != stored.shape[0]:
        return stored.misfit(parts, "bitsandbytes int8")
    return stored.computed(stored.shape, parts, BitsAndBytesInt8())


def _gptq_or_awq(stored: _Stored) -> WeightCandidate:
    stored.name = stored.header.neighbour("weight")
    header, config = stored.header, stored.config.quantization
    zeros, scales, index = map(stored.same_module, ("qzeros", "scales", "g_idx"))
    if zeros is None or scales is None or len(scales.shape) != 2 or len(zeros.shape) != 2:
        what = stored.config.quantised_by or "GPTQ or AWQ"
        return stored.not_read(f"{what} without two-dimensional qzeros and scales")
    parts = [header, zeros, scales]
    groups, out = scales.shape
    bits = config.get("bits", config.get("w_bit"))
    if out and out % 8 == 0 and header.shape[1] == out // 8 and header.shape[1] != out:
        version = str(config.get("version", "gemm")).lower()
        inputs = header.shape[0]
        if version != "gemm" or bits not in (4, None):
            return stored.not_read(f"AWQ, version {version!r}, {bits} bits")
        if not groups or inputs % groups or zeros.shape != (groups, out // 8):
            return stored.misfit(parts, "AWQ")
        return stored.computed((out, inputs), parts, GroupQuantised(4, inputs // groups, awq=True))
    if index is not None:
        parts.append(index)
        if bits is None and header.shape[0]:
            bits = 32 * header.shape[0] // max(1, math.prod(index.shape))
    bits = 4 if bits is None else bits
    if bits not in (2, 4, 8):
        return stored.not_read(f"GPTQ, {bits} bits")
    inputs, count = header.shape[0] * 32 // bits, 32 // bits
    size = config.get("group_size")
    if not isinstance(size, int) or size <= 0:
        size = inputs // groups if groups and inputs % groups == 0 else 0
    fits = header.shape[1] == out and zeros.shape == (groups, -(-out // count)) and out % count == 0
    if index is None:
        fits = fits and size > 0 and -(-inputs // size) == groups
    elif index.shape != (inputs,):
        fits = False
    if not fits:
        return stored.misfit(parts, "GPTQ")
    # The first format, which is still the usual one, stores each zero point less one.
    second = str(config.get("checkpoint_format", "gptq")) == "gptq_v2"
    recipe = GroupQuantised(bits, size or inputs, awq=False, zero_offset=0 if second else 1)
    return stored.computed((out, inputs), parts, recipe)


def _compressed_pack(stored: _Stored) -> WeightCandidate:
    stored.name = stored.header.neighbour("weight")
    what = "compressed-tensors pack-quantized"
    if stored.dtype != torch.int32 or stored.same_module("weight_global_scale"):
        return stored.not_read("compressed-tensors 4-bit floats (NVFP4)")
    scale, bits = stored.same_module("weight_scale"), _compressed_bits(stored.config)
    if scale is None or bits not in (4, 8) or len(stored.shape) != 2:
        return stored.not_read(f"{what}, {bits or 'unknown'} bits")
    for other in ("weight_zero_point", "weight_g_idx"):
        if stored.same_module(other):
            return stored.not_read(f"{what} with {other}")
    shape = (stored.shape[0], stored.shape[1] * (32 // bits))
    layout = scale_layout(shape, scale.shape, ())
    parts = [stored.header, scale, *filter(None, [stored.same_module("weight_shape")])]
    if layout is None:
        return stored.misfit(parts, what)
    return stored.computed(shape, parts, Packed(bits, layout))


def _compressed_bits(config: ModelConfig) -> int:
    """Bits of the weights, 0 when the config does not say or has several."""
    groups = config.quantization.get("config_groups")
    all_bits: set[object] = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        all_bits.add(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    bits = all_bits.pop() if len(all_bits) == 1 else None
    return bits if isinstance(bits, int) else 0


def _mxfp4(stored: _Stored) -> WeightCandidate | None:
    stored.name = stored.name.removesuffix("_blocks")
    scales, shape = stored.headers.get(f"{stored.name}_scales"), stored.shape
    if scales is None or scales.dtype != torch.uint8:
        return None
    parts = [stored.header, scales]
    if shape[-1] != 16 or scales.shape != shape[:-1]:
        return stored.misfit(parts, "MXFP4")
    return stored.computed((*shape[:-2], shape[-2] * 32), parts, Mxfp4())
