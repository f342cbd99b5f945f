"""Recipes of quantised weights: new float32 tensors; only number times scale is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.weights.recipes import Recipe

_USUAL_BLOCK = 128  # DeepSeek's, when no config says otherwise
# 4-bit numbers e2m1, by their code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# AWQ: nibble i of a word holds column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class ScaleLayout:
    """How a scale lies over a weight: seen as `view`, each entry for `blocks` of the weight."""

    view: tuple[int, ...]
    blocks: tuple[int, ...]

    def spread(self, scale: Tensor, shape: Sequence[int], *, last_only: bool) -> Tensor:
        """float32, repeated along the last or along every blocked dimension."""
        spread = scale.to(torch.float32).reshape(self.view)
        for dim in range(len(shape) - 1 if last_only else 0, len(shape)):
            if spread.shape[dim] not in (1, shape[dim]):
                spread = spread.repeat_interleave(self.blocks[dim], dim).narrow(dim, 0, shape[dim])
        return spread


@dataclass(frozen=True)
class Scaled(Recipe, name="scaled/1"):
    """`(weight - zero_point) * scale`, or the weight alone where there is no scale."""

    layout: ScaleLayout | None = None

    def __call__(
        self, weight: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """float32, of the weight's shape."""
        values = weight.to(torch.float32)
        if self.layout is None or scale is None:
            return values
        if zero_point is not None:
            values -= self.layout.spread(zero_point, weight.shape, last_only=False)
        factors = self.layout.spread(scale, weight.shape, last_only=True)
        rows, block = weight.shape[-2], self.layout.blocks[-2]
        if block == 1 or factors.shape[-2] == 1:
            return values.mul_(factors)
        # Block by block of rows: no second tensor of the weight's size.
        for number, start in enumerate(range(0, rows, block)):
            part = values[..., start : start + block, :]
            part.mul_(factors[..., number : number + 1, :])
        return values


def scale_layout(
    shape: tuple[int, ...], scale: tuple[int, ...], configured: tuple[int, ...]
) -> ScaleLayout | None:
    """How a scale of one shape lies over a weight of another; None when it does not."""
    rank = len(shape)
    if math.prod(scale) == 1:
        return ScaleLayout((1,) * rank, shape)
    if len(scale) < rank and scale == shape[: len(scale)]:  # one for each output channel
        scale = (*scale, *(1,) * (rank - len(scale)))
    if len(scale) != rank:
        return None
    blocks: list[int] = []
    for dim, (size, count) in enumerate(zip(shape, scale, strict=True)):
        entry = dim - (rank - len(configured))
        usual = configured[entry] if configured and entry >= 0 else _USUAL_BLOCK
        if count in (1, size):
            blocks.append(size if count == 1 else 1)
        elif -(-size // usual) == count:
            blocks.append(usual)
        elif not configured and count and size % count == 0:
            blocks.append(size // count)
        else:
            return None
    return ScaleLayout(scale, tuple(blocks))


@dataclass(frozen=True)
class BitsAndBytesInt8(Recipe, name="bitsandbytes-int8/1"):
    """`weight * SCB / 127` by row (LLM.int8, arXiv 2208.07339)."""

    def __call__(self, weight: Tensor, scb: Tensor, weight_format: Tensor | None = None) -> Tensor:
        """float32, of the weight's shape; ValueError when its rows are not in order."""
        if weight_format is not None and int(weight_format) != 0:
            raise ValueError(
                f"weight_format: expected 0 (rows in order), got {int(weight_format)}: a weight"
                " stored in the order of one kind of GPU"
            )
        return weight.to(torch.float32).mul_((scb.to(torch.float32) / 127).reshape(-1, 1))


def _unpacked(words: Tensor, bits: int, dim: int, order: Sequence[int]) -> Tensor:
    """uint8 numbers along `dim`: bits `bits * i` onwards of each word are its `order[i]`-th."""
    numbers = words.new_empty((*words.shape, 32 // bits), dtype=torch.uint8)
    for low, position in enumerate(order):
        numbers[..., position] = (words >> (bits * low)) & (2**bits - 1)
    return numbers.movedim(-1, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class GroupQuantised(Recipe, name="group-quantised/1"):
    """GPTQ and AWQ: `(q - zero) * scale`, each group of input channels with its own.

    Words are packed along the inputs (`awq` False) or, in another order, along the outputs.
    `zero_offset` is what GPTQ's first format subtracts from a zero point before it stores it.
    """

    bits: int
    group_size: int
    awq: bool
    zero_offset: int = 0

    def __call__(
        self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
    ) -> Tensor:
        """float32 `(out, in)`; ValueError when `g_idx` names a group that is not there."""
        if g_idx is not None and g_idx.numel():
            first, last = (int(group) for group in g_idx.aminmax())
            if first < 0 or last >= len(scales):
                raise ValueError(
                    f"GPTQ: expected g_idx within the {len(scales)} groups of scales, got "
                    f"{first} to {last}"
                )
        order = _AWQ_ORDER if self.awq else range(32 // self.bits)
        numbers = _unpacked(qweight, self.bits, 1 if self.awq else 0, order)  # (in, out)
        zeros = _unpacked(qzeros, self.bits, 1, order)  # (groups, out)
        zeros = ((zeros.to(torch.int32) + self.zero_offset) & (2**self.bits - 1)).to(torch.float32)
        factors = scales.to(torch.float32)
        values = numbers.to(torch.float32).contiguous()
        in_order = torch.arange(len(values), device=values.device) // self.group_size
        group = in_order if g_idx is None else g_idx.to(torch.int64)
        if torch.equal(group, in_order) and len(values) % self.group_size == 0:
            groups = values.view(len(factors), self.group_size, -1)
            groups.sub_(zeros.unsqueeze(1)).mul_(factors.unsqueeze(1))
        else:
            values.sub_(zeros[group]).mul_(factors[group])
        return values.T


@dataclass(frozen=True)
class Packed(Recipe, name="packed/1"):
    """compressed-tensors' pack-quantized: signed numbers along the inputs, times their scale."""

    bits: int
    layout: ScaleLayout

    def __call__(self, packed: Tensor, scale: Tensor, shape: Tensor | None = None) -> Tensor:
        """float32 `(out, in)`; ValueError when `shape` holds another."""
        numbers = _unpacked(packed, self.bits, 1, range(32 // self.bits))
        if shape is not None and tuple(shape.tolist()) != tuple(numbers.shape):
            raise ValueError(
                f"weight_shape: expected {tuple(numbers.shape)} from the packed weight, "
                f"got {tuple(shape.tolist())}"
            )
        values = numbers.to(torch.float32).sub_(2 ** (self.bits - 1))
        return values.mul_(self.layout.spread(scale, values.shape, last_only=False))


@dataclass(frozen=True)
class Mxfp4(Recipe, name="mxfp4/1"):
    """Microscaling e2m1 numbers, 32 to a power of two (OCP MX specification 1.0)."""

    def __call__(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """float32, the last dimension that of all blocks together."""
        signed = [*_E2M1, *(-value for value in _E2M1)]
        table = torch.tensor(signed, dtype=torch.float32, device=blocks.device)
        values = torch.empty((*blocks.shape, 2), dtype=torch.float32, device=blocks.device)
        values[..., 0] = table[(blocks & 15).int()]
        values[..., 1] = table[(blocks >> 4).int()]
        powers = scales.view(torch.float8_e8m0fnu).to(torch.float32)
        return values.flatten(-2).mul_(powers.unsqueeze(-1)).flatten(-2)
