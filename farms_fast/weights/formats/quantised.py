"""Quantised weights as common formats store them: which tensors belong together.

`dequantised_headers` finds them by names, dtypes and shapes, and puts one header in the place of
each group: float32, `(out, in)`. A recipe computes the values when a layer is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

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

__all__ = ["QUANTISED_BUFFERS", "dequantised_headers"]

_FLOAT8 = (
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2, torch.float8_e5m2fnuz),
)
_PACKED = (torch.uint8, torch.int8, torch.int32)
# Under these names modules hold parts of quantised weights as buffers.
QUANTISED_BUFFERS = {"qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed"}
QUANTISED_BUFFERS |= {"weight_scale", "weight_scale_inv", "weight_zero_point"}

Headers = Mapping[str, TensorHeader]


def dequantised_headers(
    headers: Sequence[TensorHeader], config: ModelConfig | None = None
) -> list[WeightCandidate]:
    """Puts the header of the weight in the place of those that a quantised one is stored as.

    Args:
        headers: of all tensors of a model.
        config: its config.json, for what headers do not tell: block sizes and bits.

    Returns:
        One entry for each weight and for each other tensor, in order. Quantised weights of formats
        that are not read have a reason with the format's name.

    Example:
        >>> import torch
        >>> headers = [TensorHeader("fc.weight", (4, 8), torch.float8_e4m3fn),
        ...            TensorHeader("fc.weight_scale", (4, 1), torch.float32)]
        >>> ((weight, _),) = dequantised_headers(headers)
        >>> weight.name, weight.dtype, weight.tensors
        ('fc.weight', torch.float32, ('fc.weight', 'fc.weight_scale'))
    """
    by_name = {header.name: header for header in headers}
    weights = [_weight_of(header, by_name, config or ModelConfig()) for header in headers]
    used = {
        name for weight in weights if weight and not weight.reason for name in weight.header.stored
    }
    return [
        weight or WeightCandidate(header)
        for header, weight in zip(headers, weights, strict=True)
        if weight or header.stored[0] not in used
    ]


def _weight_of(
    header: TensorHeader, headers: Headers, config: ModelConfig
) -> WeightCandidate | None:
    """The weight of which this is the main tensor; None for any other tensor."""
    name = header.name
    base, _, leaf = name.rpartition(".")
    if leaf == "qweight" and header.dtype == torch.int32 and len(header.shape) == 2:
        return _gptq_or_awq(header, headers, config)
    if leaf == "weight_packed":
        return _compressed_pack(header, headers, config)
    if name.endswith("_blocks") and header.dtype == torch.uint8 and len(header.shape) > 2:
        return _mxfp4(header, headers)
    if leaf.endswith("qdata") and _first(headers, name[: -len("qdata")], ("scale",)):
        return _not_read(header, name[: -len("qdata")].rstrip("_:."), "torchao")
    if header.dtype in _FLOAT8 and len(header.shape) > 1:
        return _scaled(header, headers, config)
    if leaf != "weight" or header.dtype not in _PACKED or len(header.shape) < 2:
        return None
    if header.dtype == torch.int8:
        if f"{base}.SCB" in headers or (not base and "SCB" in headers):
            return _bitsandbytes_int8(header, headers)
        if f"{name}_scale" in headers:
            return _scaled(header, headers, config)
    if f"{name}.absmax" in headers:
        prefix = f"{name}.quant_state.bitsandbytes__"
        kind = next((n[len(prefix) :] for n in headers if n.startswith(prefix)), "4-bit")
        return _not_read(header, name, f"bitsandbytes {kind}")
    if f"{name}_scale_2" in headers:
        return _not_read(header, name, "NVFP4 (ModelOpt)")
    if config.quantised_by:
        return _not_read(header, name, f"quant_method {config.quantised_by!r}")
    return None


def _not_read(header: TensorHeader, weight: str, what: str) -> WeightCandidate:
    dtype = str(header.dtype).removeprefix("torch.")
    reason = f"quantised weight in a format that is not read: {what}, stored as {dtype}"
    return WeightCandidate(TensorHeader(weight, header.shape, header.dtype), reason)


def _misfit(weight: str, parts: Sequence[TensorHeader], what: str) -> WeightCandidate:
    shapes = ", ".join(f"{p.name.rpartition('.')[2]} {tuple(p.shape)}" for p in parts)
    reason = f"quantised weight whose tensors do not fit together as {what}: {shapes}"
    return WeightCandidate(TensorHeader(weight, parts[0].shape, parts[0].dtype), reason)


def _computed(
    name: str, shape: tuple[int, ...], parts: Sequence[TensorHeader], recipe: Recipe
) -> WeightCandidate:
    return WeightCandidate(TensorHeader.computed(name, shape, torch.float32, parts, recipe))


def _first(headers: Headers, start: str, ends: Sequence[str]) -> TensorHeader | None:
    return next((headers[start + end] for end in ends if start + end in headers), None)


def _scaled(header: TensorHeader, headers: Headers, config: ModelConfig) -> WeightCandidate | None:
    name = header.name
    base = name.removesuffix("weight")
    scale = _first(headers, name, ("_scale", "_scale_inv"))
    if scale is None and base != name:
        scale = _first(headers, base, ("scale_weight", "scale"))
    if scale is None:
        if config.quantised_by:
            method = f"quant_method {config.quantised_by!r}"
            reason = f"quantised weight without a scale beside it ({method})"
            return WeightCandidate(header, reason)
        # Without a scale, eight-bit floats are a dtype like any other.
        return _computed(name, header.shape, [header], Scaled())
    block = config.quantization.get("weight_block_size")
    configured = tuple(block) if isinstance(block, (list, tuple)) else ()
    if not all(isinstance(size, int) and size > 0 for size in configured):
        configured = ()
    parts = [header, scale]
    zero_point = headers.get(f"{name}_zero_point")
    if zero_point is not None:
        if zero_point.shape != scale.shape:
            return _misfit(name, [*parts, zero_point], "weight, scale and zero point")
        parts.append(zero_point)
    layout = scale_layout(header.shape, scale.shape, configured)
    if layout is None:
        return _misfit(name, parts, f"weight and scale, in blocks of {configured or 'any size'}")
    return _computed(name, header.shape, parts, Scaled(layout))


def _bitsandbytes_int8(header: TensorHeader, headers: Headers) -> WeightCandidate:
    base = header.name.removesuffix("weight")
    parts = [header, headers[f"{base}SCB"]]
    if f"{base}weight_format" in headers:
        parts.append(headers[f"{base}weight_format"])
    if math.prod(parts[1].shape) != header.shape[0] or len(header.shape) != 2:
        return _misfit(header.name, parts, "bitsandbytes int8")
    return _computed(header.name, header.shape, parts, BitsAndBytesInt8())


def _gptq_or_awq(header: TensorHeader, headers: Headers, config: ModelConfig) -> WeightCandidate:
    base = header.name.removesuffix("qweight")
    name = f"{base}weight"
    zeros, scales = headers.get(f"{base}qzeros"), headers.get(f"{base}scales")
    if zeros is None or scales is None or len(scales.shape) != 2 or len(zeros.shape) != 2:
        what = config.quantised_by or "GPTQ or AWQ"
        return _not_read(header, name, f"{what} without two-dimensional qzeros and scales")
    parts = [header, zeros, scales]
    groups, out = scales.shape
    bits = config.quantization.get("bits", config.quantization.get("w_bit"))
    index = headers.get(f"{base}g_idx")
    if out and out % 8 == 0 and header.shape[1] == out // 8 and header.shape[1] != out:
        version = str(config.quantization.get("version", "gemm")).lower()
        inputs = header.shape[0]
        if version != "gemm" or bits not in (4, None):
            return _not_read(header, name, f"AWQ, version {version!r}, {bits} bits")
        if not groups or inputs % groups or zeros.shape != (groups, out // 8):
            return _misfit(name, parts, "AWQ")
        return _computed(name, (out, inputs), parts, GroupQuantised(4, inputs // groups, awq=True))
    if index is not None:
        parts.append(index)
        if bits is None and header.shape[0]:
            bits = 32 * header.shape[0] // max(1, math.prod(index.shape))
    bits = 4 if bits is None else bits
    if bits not in (2, 4, 8):
        return _not_read(header, name, f"GPTQ, {bits} bits")
    inputs, count = header.shape[0] * 32 // bits, 32 // bits
    size = config.quantization.get("group_size")
    if not isinstance(size, int) or size <= 0:
        size = inputs // groups if groups and inputs % groups == 0 else 0
    fits = (
        header.shape[1] == out
        and (zeros.shape == (groups, -(-out // count)) and out % count == 0)
        and (index is None or index.shape == (inputs,))
        and (index is not None or (size and -(-inputs // size) == groups))
    )
    if not fits:
        return _misfit(name, parts, "GPTQ")
    # The first format, which is still the usual one, stores each zero point less one.
    second = str(config.quantization.get("checkpoint_format", "gptq")) == "gptq_v2"
    recipe = GroupQuantised(bits, size or inputs, awq=False, zero_offset=0 if second else 1)
    return _computed(name, (out, inputs), parts, recipe)


def _compressed_pack(
    header: TensorHeader, headers: Headers, config: ModelConfig
) -> WeightCandidate:
    base = header.name.removesuffix("weight_packed")
    name, what = f"{base}weight", "compressed-tensors pack-quantized"
    if header.dtype != torch.int32 or f"{base}weight_global_scale" in headers:
        return _not_read(header, name, "compressed-tensors 4-bit floats (NVFP4)")
    scale = headers.get(f"{base}weight_scale")
    bits = _compressed_bits(config)
    if scale is None or bits not in (4, 8) or len(header.shape) != 2:
        return _not_read(header, name, f"{what}, {bits or 'unknown'} bits")
    for other in ("weight_zero_point", "weight_g_idx"):
        if f"{base}{other}" in headers:
            return _not_read(header, name, f"{what} with {other}")
    shape = (header.shape[0], header.shape[1] * (32 // bits))
    layout = scale_layout(shape, scale.shape, ())
    parts = [header, scale]
    if f"{base}weight_shape" in headers:
        parts.append(headers[f"{base}weight_shape"])
    if layout is None:
        return _misfit(name, parts, what)
    return _computed(name, shape, parts, Packed(bits, layout))


def _compressed_bits(config: ModelConfig) -> int:
    """Bits of the weights, 0 when the config does not say or has several."""
    groups = config.quantization.get("config_groups")
    all_bits: set[object] = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        all_bits.add(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    bits = all_bits.pop() if len(all_bits) == 1 else None
    return bits if isinstance(bits, int) else 0


def _mxfp4(header: TensorHeader, headers: Headers) -> WeightCandidate | None:
    name = header.name.removesuffix("_blocks")
    scales = headers.get(f"{name}_scales")
    if scales is None or scales.dtype != torch.uint8:
        return None
    if header.shape[-1] != 16 or scales.shape != header.shape[:-1]:
        return _misfit(name, [header, scales], "MXFP4")
    shape = (*header.shape[:-2], header.shape[-2] * 32)
    return _computed(name, shape, [header, scales], Mxfp4())
