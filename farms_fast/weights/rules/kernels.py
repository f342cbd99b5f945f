"""Kernels as Keras, Flax and TensorFlow store them: `(*positions, in, out)`, channels last.

A layout is proven by the shape, where only one puts the larger sizes on the channels, by the length
of the bias, or by the other kernels of the model, which have one layout. Otherwise the caller says.
"""

from __future__ import annotations

import math

from farms_fast.weights.recipes import LeadingPositions, MergedDims, Rows
from farms_fast.weights.rules.header_index import MOST_POSITIONS, Weight
from farms_fast.weights.stacks import Part

_FROM_EMBEDDING = ("query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj")
_TO_EMBEDDING = ("out", "o", "o_proj", "out_proj", "attention_output")
_FUSED = ("qkv", "kv", "c_attn", "query_key_value")
# By the number of gates: the kind, and the gates in Keras's order.
_GATES = {4: ("lstm", "ifgo"), 3: ("gru", "zrn"), 1: ("rnn", "")}
# A weight of few inputs and outputs with larger kernels than this is hardly one of torch.
_FEW_CHANNELS = 7


def kernel_layers(weight: Weight) -> list[Part] | str | None:
    """The layers of a kernel with channels last, or why there are none; None for other weights."""
    layout = weight.index.layout
    if layout == "torch" or not 1 < weight.rank < 6 or weight.header.dtype.is_complex:
        return None
    if weight.rank == 2:
        return _recurrent(weight)
    if not weight.is_kernel:
        return _of_any_name(weight)
    if weight.role in _FUSED or _is_attention(weight):
        return _attention(weight)
    if _is_depthwise(weight):
        return "depthwise kernel: one filter for each channel, no matrix"
    if layout == "auto":
        layout = weight.proven_layout or weight.index.kernel_layout
    if layout == "torch":
        return None
    return _positions_first(weight) if layout else _ambiguous(weight)


def _ambiguous(weight: Weight) -> str:
    return (
        f"kernel of shape {tuple(weight.shape)}: (out, in, *positions) or (*positions, in, out)? "
        "layout='torch' or layout='channels_last' says which"
    )


def _of_any_name(weight: Weight) -> list[Part] | str | None:
    """What the caller's layout makes of a kernel of any name, or why torch's cannot be right."""
    shape, count = weight.shape, weight.rank - 2
    if weight.index.layout == "channels_last":
        return _positions_first(weight)
    if weight.rank == 3:
        return None
    bias = weight.bias.shape if weight.bias is not None else ()
    if bias in (shape[:1], shape[1:2]):
        return None
    if bias == shape[-1:] and weight.proven_layout == "channels_last":
        return _positions_first(weight)
    few = len(set(shape[:count])) == 1 and max(shape[:2]) <= _FEW_CHANNELS
    return _ambiguous(weight) if few and max(shape[2:]) > MOST_POSITIONS else None


def _is_depthwise(weight: Weight) -> bool:
    """Whether each input channel has filters of its own: by name, or by a bias for each filter."""
    if "depthwise" in f"{weight.leaf} {weight.role}":
        return True
    shape = weight.shape
    bias = weight.bias.shape if weight.bias is not None else ()
    return bias == (shape[-2] * shape[-1],) and not {*bias} & {*shape[-2:], *shape[:2]}


def _positions_first(weight: Weight) -> list[Part]:
    count, rows, cols = math.prod(weight.shape[:-2]), *weight.shape[-2:]
    is_stack = weight.rank == 3 and "conv" not in weight.name.lower()
    kind = "stacked" if is_stack else f"conv{weight.rank - 2}d"
    return [Part(weight.name, kind, (count, rows, cols), LeadingPositions())]


def _is_attention(weight: Weight) -> bool:
    """Whether it is one of several projections of an attention by heads, told by their names."""
    if weight.role not in _FROM_EMBEDDING + _TO_EMBEDDING:
        return False
    module, name = weight.header.module, weight.header.name
    block, rest = module[: len(module) - len(weight.role)], name[len(module) :]
    others = (weight.index.by_name.get(block + role + rest) for role in _FROM_EMBEDDING)
    return sum(other is not None and len(other.shape) == weight.rank for other in others) > 1


def _attention(weight: Weight) -> list[Part] | str:
    """A projection to heads, `(embed, heads, size)`, or from them, `(heads, size, embed)`."""
    shape = weight.shape
    if weight.rank != 3 or weight.role in _FUSED:
        return f"{weight.rank}-D kernel of an attention: no rule makes matrices of it"
    rows = 1 if weight.role in _FROM_EMBEDDING else 2
    matrix = (1, math.prod(shape[:rows]), math.prod(shape[rows:]))
    return [Part(weight.name, "attention", matrix, MergedDims(rows))]


def _recurrent(weight: Weight) -> list[Part] | None:
    """A recurrent layer's kernel `(in, gates * units)`, cut by gate; None for a dense one."""
    if weight.leaf not in ("kernel", "recurrent_kernel"):
        return None
    recurrent = weight.same_module("recurrent_kernel")
    if recurrent is None or weight.same_module("kernel") is None or len(recurrent.shape) != 2:
        return None
    units, width = recurrent.shape
    gates = width // units if units and width % units == 0 else 0
    if gates not in _GATES or weight.shape[1] != width:
        return None
    kind, roles = _GATES[gates]
    return [
        Part(
            f"{weight.name}.{role}" if role else weight.name,
            kind,
            (1, units, weight.shape[0]),
            Rows(number * units, units, transposed=True),
        )
        for number, role in enumerate(roles or [""])
    ]
