"""Constant tables that their values tell, where names and shapes do not: masks and sinusoids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from farms_fast.weights.recipes import Computed
from farms_fast.weights.sources.memory import ModuleSource, Source
from farms_fast.weights.stacks import Layers, LayerSpec, Skipped, leaf_name

# Of a tensor that may be a table: more are no usual one, and reading them takes time.
_MOST_NUMBERS = 2**24
# That tell most tensors to be none, before all of the numbers are looked at.
_SAMPLE = 4096
_ROWS = 64
_KINDS = ("linear", "stacked", "conv1d", "conv2d", "conv3d")
# Numbers that stand for minus infinity in masks are at most this.
_FORBIDDEN = -1e4


def without_constants(
    source: Source, layers: Sequence[LayerSpec], skipped: list[Skipped]
) -> Layers:
    """Moves layers whose values are those of a fixed table to the skipped ones, with the reason.

    Looks at tensors of files and mappings that are not called a weight or a kernel and have at most
    2^24 numbers; buffers of modules are no layers anyway. A tensor that cannot be read stays a
    layer, whose result tells why.
    """
    if isinstance(source, ModuleSource):
        return list(layers), skipped
    kept: list[LayerSpec] = []
    found: list[Skipped] = []
    for spec in layers:
        reason = _constant(source, spec) if _may_be_table(spec) else ""
        if reason:
            found.append(Skipped(spec.name, spec.shape, reason))
        else:
            kept.append(spec)
    return kept, [*skipped, *found]


def _may_be_table(spec: LayerSpec) -> bool:
    leaf = leaf_name(spec.tensors[0])
    return (
        spec.kind in _KINDS
        and len(spec.tensors) == 1
        and not isinstance(spec.to_stack, Computed)
        and "weight" not in leaf
        and "kernel" not in leaf
        and math.prod(spec.shape) <= _MOST_NUMBERS
        and not spec.dtype.is_complex
    )


def _constant(source: Source, spec: LayerSpec) -> str:
    """What kind of table a tensor is; empty for a weight."""
    try:
        tensor = source.load(spec.tensors[0])
        if is_mask(tensor):
            return "a table of two values, a mask by its numbers, not a weight"
        if is_sinusoidal(tensor):
            return "a table of sines along its positions by its numbers, not a weight"
    # Whatever is wrong with a tensor is told when the layer is read.
    except Exception:
        return ""
    return ""


def is_mask(tensor: Tensor) -> bool:
    """Whether all numbers are 0 or 1, or 0 or forbiddingly negative, and both are there.

    Example:
        >>> is_mask(torch.ones(4, 4).tril()), is_mask(torch.eye(4) - 0.5)
        (True, False)
    """
    flat = tensor.reshape(-1)
    for numbers in (flat[:_SAMPLE], flat):
        is_zero = numbers == 0
        if not bool((is_zero | (numbers == 1)).all() or (is_zero | (numbers <= _FORBIDDEN)).all()):
            return False
    return bool(is_zero.any()) and not bool(is_zero.all())


def is_sinusoidal(tensor: Tensor) -> bool:
    """Whether each column, or each row, is a sine of the position.

    A sine of any frequency and phase has x[p + 1] + x[p - 1] = 2 cos(w) x[p].

    Example:
        >>> angles = torch.arange(50.0)[:, None] * torch.tensor([1.0, 0.3, 0.01])
        >>> is_sinusoidal(torch.cat([angles.sin(), angles.cos()], 1))
        True
        >>> is_sinusoidal(torch.randn(50, 6))
        False
    """
    table = tensor.squeeze()
    if table.dim() != 2:
        return False
    tolerance = max(1e-4, 4 * torch.finfo(table.dtype).eps)
    return any(_rows_oscillate(along, tolerance) for along in (table, table.T))


def _rows_oscillate(table: Tensor, tolerance: float) -> bool:
    # Some tables begin with rows for padding.
    rows = table[2 : 2 + _ROWS].to(torch.float64)
    if len(rows) < 8 or rows.shape[1] < 2 or not 0.5 < float(rows.abs().max()) < 1 + tolerance:
        return False
    middle, sums = rows[1:-1], rows[2:] + rows[:-2]
    factors = (sums * middle).sum(0) / (middle * middle).sum(0).clamp_min(1e-300)
    follows = ((sums - factors * middle).abs() <= 4 * tolerance).all(0)
    moves = rows.amax(0) - rows.amin(0) > 0.1
    return bool(follows.all()) and bool(moves.any())
