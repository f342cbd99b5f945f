"""Rules that turn one weight tensor, by name, shape, dtype and owner, into stacks of matrices.

Each answers with the layers that a tensor gives, with the reason why it gives none, or with None,
which leaves the tensor to the next rule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from farms_fast.core.arrays import COMPLEX, FLOATING
from farms_fast.weights.recipes import AsStored, HeadRows, Rows, TrailingPositions
from farms_fast.weights.rules.header_index import Weight
from farms_fast.weights.rules.kernels import kernel_layers
from farms_fast.weights.rules.operator_layers import spectral_layers
from farms_fast.weights.rules.tables import names_embedding, names_positions, not_a_weight
from farms_fast.weights.stacks import Part, TensorHeader, leaf_name

Answer = list[Part] | str | None

# Families that store q, k and v one after the other. `query_key_value` (GPT-NeoX, BLOOM) is not
# among them: its rows go head by head, q, k and v of one head together, so a third of the rows is
# a mixture of all three, and the head count that would sort them is in no header but in the config.
_FUSED_QKV_LEAVES = frozenset({"qkv", "c_attn", "Wqkv", "qkv_proj", "to_qkv", "attn_qkv"})
_SEPARATE_QKV = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(?:_reverse)?)?")
_GATES = {4: ("lstm", "ifgo"), 3: ("gru", "rzn"), 1: ("rnn", "")}


def _cut_rows(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int], kind: str, transposed: bool = False
) -> list[Part]:
    """A layer for each role, of so many rows, one after the other; the role "" adds no name."""
    parts: list[Part] = []
    start, cols = 0, shape[0] if transposed else shape[1]
    for role, count in sizes.items():
        rows = Rows(start, count, transposed=transposed)
        parts.append(Part(f"{name}.{role}" if role else name, kind, (1, count, cols), rows))
        start += count
    return parts


def linear(weight: Weight, *, transposed: bool = False) -> list[Part]:
    """A 2-D weight of a linear map; fused q, k, v and fused gate, up projections are cut."""
    name, shape, config = weight.name, weight.shape, weight.index.config
    rows, cols = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    leaf, size = leaf_name(name), config.head_dim
    heads = config.grouped_heads(leaf)
    if heads is not None and not transposed and rows == heads[0] * (heads[1] + 2) * size:
        counts = {"q": heads[0] * heads[1], "k": heads[0], "v": heads[0]}
        return [
            Part(f"{name}.{role}", "attention", (1, count * size, cols), HeadRows(role, *heads))
            for role, count in counts.items()
        ]
    kind, sizes = "linear", {"": rows}
    if leaf in _FUSED_QKV_LEAVES:
        query, key = config.heads * size, config.key_heads * size
        if rows == 3 * cols:
            kind, sizes = "attention", dict.fromkeys("qkv", cols)
        # Fewer key than query heads, or heads wider than the model: the config tells where to cut.
        elif query and rows == query + 2 * key:
            kind, sizes = "attention", {"q": query, "k": key, "v": key}
    elif leaf == "gate_up_proj" and _is_gate_and_up(weight, rows):
        sizes = dict.fromkeys(("gate", "up"), rows // 2)
    return _cut_rows(name, shape, sizes, kind, transposed)


def _is_gate_and_up(weight: Weight, rows: int) -> bool:
    """Whether the rows are as many as two layers give that feed the neighbouring `down_proj`."""
    down = weight.index.sibling_layer(f"{weight.name}.weight", "down_proj")
    if down is None:
        return rows % 2 == 0
    return len(down.shape) == 2 and rows == 2 * down.shape[1]


def convolution(weight: Weight, groups: int = 1, transposed: bool = False) -> list[Part]:
    """One out x in matrix for each group and position of a kernel `(out, in/groups, *positions)`.

    A `transposed` kernel is `(in, out/groups, *positions)`.
    """
    shape = weight.shape
    first, second = shape[0] // groups, shape[1]
    rows, cols = (second, first) if transposed else (first, second)
    kind = f"conv_transpose{weight.rank - 2}d" if transposed else f"conv{weight.rank - 2}d"
    count = groups * math.prod(shape[2:])
    return [Part(weight.name, kind, (count, rows, cols), TrailingPositions(groups, transposed))]


def stack(weight: Weight, *, kind: str) -> list[Part]:
    """A 3-D weight that is a stack already."""
    count, rows, cols = weight.shape
    return [Part(weight.name, kind, (count, rows, cols), AsStored())]


def embedding(weight: Weight) -> list[Part]:
    """A table of embeddings, `(rows, dim)` or `(1, rows, dim)`: left out unless asked for."""
    shape = (1, weight.shape[-2], weight.shape[-1])
    hint = f"embedding, left out by default: include={weight.name!r} analyses it"
    return [Part(weight.name, "embedding", shape, AsStored(), hint)]


def is_stack(weight: Weight) -> bool:
    """Whether a 3-D weight is `(steps, in, out)`, no kernel: it has fewer steps than channels."""
    shape = weight.shape
    return len(shape) == 3 and not weight.header.dtype.is_complex and shape[0] < shape[2]


def expert_stack(weight: Weight) -> list[Part]:
    """A 3-D weight of experts as out x in matrices, gate and up apart where names tell them.

    Gate comes before up, but for gpt-oss, whose rows alternate: it is the one of these families
    whose experts have a bias.
    """
    name, shape = weight.name, weight.shape
    transposed = _experts_transposed(weight)
    if transposed is None:
        return stack(weight, kind="experts")
    count = shape[0]
    rows, cols = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    if leaf_name(name) == "down_proj":
        return [Part(name, "experts", (count, rows, cols), Rows(0, rows, transposed=transposed))]
    half = rows // 2
    alternate = weight.index.sibling_layer(weight.header.name, "gate_up_proj_bias") is not None
    starts, step = ((0, 1), 2) if alternate else ((0, half), 1)
    return [
        Part(f"{name}.{role}", "experts", (count, half, cols), Rows(start, half, step, transposed))
        for role, start in zip(("gate", "up"), starts, strict=True)
    ]


def _experts_transposed(weight: Weight) -> bool | None:
    """Whether `gate_up_proj` or `down_proj` is `(experts, in, out)`; None where nothing tells."""
    other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
    own, shape = leaf_name(weight.name), weight.shape
    pair = weight.index.sibling_layer(weight.header.name, other[own]) if own in other else None
    if pair is None or len(pair.shape) != 3 or pair.shape[0] != shape[0]:
        return None
    fused, down = (shape, pair.shape) if own == "gate_up_proj" else (pair.shape, shape)
    if (fused[1], fused[2]) == (2 * down[2], down[1]):
        return False
    return True if (fused[2], fused[1]) == (2 * down[1], down[2]) else None


def layers_of(weight: Weight, owner: nn.Module | None = None) -> list[Part] | str:
    """What the first rule with an answer makes of a weight, or why there are no layers."""
    answer: Answer = unusable(weight.header)
    if not answer and owner is not None:
        answer = _by_owner(weight, owner)
    for rule in _RULES:
        answer = answer or rule(weight)
    answer = answer or _by_rank(weight)
    if isinstance(answer, str):
        return answer
    count, rows, cols = answer[0].shape
    if min(rows, cols) > 1:
        return answer
    what = "depthwise or single-channel: " if count > 1 else ""
    return f"{what}a {rows} x {cols} matrix has one singular value, no spectrum"


def unusable(header: TensorHeader) -> str | None:
    """Why no rule can take a spectrum of the tensor; None when one may."""
    rank = len(header.shape)
    if header.dtype not in FLOATING + COMPLEX:
        dtype = str(header.dtype).removeprefix("torch.")
        if dtype.startswith(("float8", "float4")):
            return f"dtype {dtype} is quantised, in a format that is not read"
        if header.dtype == torch.complex32:
            return "dtype complex32 has no arithmetic: convert it to complex64"
        return f"dtype {dtype} is not floating point: indices, flags or quantised weights"
    if 0 in header.shape:
        return "empty tensor"
    return ("scalar", "vector, not a matrix")[rank] if rank < 2 else None


def _not_a_weight(weight: Weight) -> Answer:
    if reason := not_a_weight(weight.leaf):
        return reason
    if weight.bias is not None and weight.bias.shape == weight.shape:
        return "elementwise scale (its bias has the same shape), not a matrix"
    return None


def _attention(weight: Weight) -> Answer:
    """q, k and v of `nn.MultiheadAttention`, together or apart."""
    shape, leaf = weight.shape, weight.leaf
    in_proj = weight.header.name.removesuffix(leaf) + "in_proj"
    if leaf == "in_proj_weight" and weight.rank == 2 and shape[0] == 3 * shape[1]:
        return _cut_rows(in_proj, shape, dict.fromkeys("qkv", shape[1]), "attention")
    if leaf in _SEPARATE_QKV and weight.rank == 2:
        return _cut_rows(in_proj, shape, {_SEPARATE_QKV[leaf]: shape[0]}, "attention")
    return None


def _recurrent(weight: Weight) -> Answer:
    """Weights of a recurrent layer cut by gate, in torch's order of gates."""
    match = _RECURRENT.fullmatch(weight.leaf) if weight.rank == 2 else None
    if match is None:
        return None
    name, shape = weight.header.name, weight.shape
    if match[1] == "hr":  # the projection of the hidden state, which only an LSTM has
        return _cut_rows(name, shape, {"": shape[0]}, "lstm")
    hidden, projection = (
        weight.same_module(f"weight_{which}{match[2] or ''}") for which in ("hh", "hr")
    )
    if hidden is None or len(hidden.shape) != 2:
        return _cut_rows(name, shape, {"": shape[0]}, "linear")
    # weight_hh is (gates * size, size), or (gates * size, projected) beside a projection.
    size = projection.shape[-1] if projection is not None and projection.shape else hidden.shape[1]
    gates = hidden.shape[0] // size if size and hidden.shape[0] % size == 0 else 0
    if gates not in _GATES or shape[0] != hidden.shape[0]:
        return _cut_rows(name, shape, {"": shape[0]}, "linear")
    kind, roles = _GATES[gates]
    return _cut_rows(name, shape, dict.fromkeys(roles or [""], shape[0] // gates), kind)


def _experts(weight: Weight) -> Answer:
    """A stack whose name speaks of experts together, not of one expert by its number."""
    if weight.rank != 3:
        return None
    parts = weight.name.lower().split(".")
    # Granite's and JetMoe's experts say so in the name of their block only.
    if (parts[-1] in ("input_linear", "output_linear") and any("moe" in p for p in parts)) or any(
        ("expert" in part or "exps" in part.split("_"))
        and not (following.isdigit() or part[-1].isdigit())
        for part, following in zip(parts, [*parts[1:], ""], strict=True)
    ):
        return expert_stack(weight)
    return None


def _embedding(weight: Weight) -> Answer:
    # A table of embeddings has no bias; a projection whose name says "embed" usually has one.
    flat_table = weight.rank == 2 and weight.bias is None
    if flat_table or (weight.rank == 3 and weight.shape[0] == 1):
        is_shared = weight.role == "shared" and not re.search("mlp|moe|expert", weight.name.lower())
        return embedding(weight) if is_shared or names_embedding(weight.role) else None
    positions = weight.leaf == weight.role and names_positions(weight.role)
    return "a table of positions, not a matrix" if positions else None


def _by_rank(weight: Weight) -> list[Part] | str:
    if weight.rank == 2:
        return linear(weight, transposed=weight.is_transposed)
    if is_stack(weight) and not weight.leaf.startswith("weight"):
        return stack(weight, kind="stacked")
    if weight.rank <= 5:
        groups = weight.index.config.position_groups if ".pos_conv" in weight.name else 0
        groups = groups if groups and weight.shape[0] % groups == 0 else 1
        return convolution(weight, groups, transposed=weight.bias_proves_transposed)
    return f"{weight.rank}-D tensor: no rule makes matrices of it"


def _by_owner(weight: Weight, owner: nn.Module) -> Answer:
    """What the type of the module that owns the tensor says."""
    if isinstance(owner, (nn.LayerNorm, nn.RMSNorm)):
        return "elementwise scale of a normalisation, not a matrix"
    kind, leaf = type(owner).__name__.lower(), weight.leaf
    if leaf == "weight":
        if isinstance(owner, nn.Linear):
            return linear(weight)
        if isinstance(owner, _ConvNd):
            return convolution(weight, owner.groups, owner.transposed)
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            return embedding(weight)
        if isinstance(owner, nn.Bilinear):
            return stack(weight, kind="bilinear")
        # Hugging Face's Conv1D is a linear layer that stores its weight (in, out).
        if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf") and weight.rank == 2:
            return linear(weight, transposed=True)
    if weight.rank == 3 and "expert" in kind and "bias" not in leaf:
        return expert_stack(weight)
    if leaf.startswith("weight") and is_stack(weight) and "conv" not in kind:
        return stack(weight, kind="stacked")
    return None


_RULES = (
    *(_not_a_weight, spectral_layers, _attention, _recurrent, _experts, _embedding),
    kernel_layers,
)
