"""Rules that turn one weight tensor, known by name, shape and dtype alone, into stacks of matrices.

A rule answers with the parts (layers) that a tensor gives, or with the reason why it gives none.
No rule reads a value: planning needs headers only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from farms_fast.core.arrays import FLOATING
from farms_fast.weights.rules.header_index import (
    GPT2_LEAVES,
    HeaderIndex,
    is_transposed_c_attn,
    is_weight,
    leaf_name,
)
from farms_fast.weights.rules.operator_layers import spectral_parts
from farms_fast.weights.stacks import (
    AsStored,
    HeadRows,
    Part,
    Rows,
    TensorHeader,
    TrailingPositions,
)

__all__ = [
    "convolution_part",
    "embedding_part",
    "expert_parts",
    "is_stack",
    "linear_parts",
    "matrix_parts",
    "parts_by_name",
    "stacked_part",
    "unusable",
]


# Families that store q, k and v one after the other. `query_key_value` (GPT-NeoX, BLOOM) is not
# among them: its rows go head by head, q, k and v of one head together, so a third of the rows is
# a mixture of all three, and the head count that would sort them is in no header but in the config.
_FUSED_QKV_LEAVES = frozenset({"qkv", "c_attn", "Wqkv", "qkv_proj", "to_qkv"})
_SEPARATE_QKV = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(?:_reverse)?)?")
_GATES = {4: ("lstm", "ifgo"), 3: ("gru", "rzn"), 1: ("rnn", "")}
_NOT_WEIGHTS = (
    (re.compile(r"(^|_)bias(_|$)"), "a bias"),
    (re.compile(r"(^|_)mask$"), "a mask"),
    (re.compile(r"^(cos|sin)_cached$|^freqs_cis$|^inv_freq$"), "a table of rotary positions"),
    (re.compile(r"^(input|output|k|v)_scale$"), "a scale of activations"),
    (
        re.compile(r"(^|weight_|proj_)scales?(_inv|_2)?$|^q?zeros$|^weight_zero_point$|^SCB$"),
        "the scale of a quantised weight",
    ),
)


def _is_gate_and_up(name: str, rows: int, index: HeaderIndex) -> bool:
    """Whether the rows are as many as two layers give that feed the neighbouring `down_proj`."""
    down = index.sibling(f"{name}.weight", "down_proj")
    if down is None:
        return rows % 2 == 0
    return len(down.shape) == 2 and rows == 2 * down.shape[1]


def unusable(header: TensorHeader) -> str:
    """Why no rule can take a spectrum of the tensor; empty when one may."""
    dtype = str(header.dtype).removeprefix("torch.")
    if dtype.startswith("float8") or dtype.startswith("float4"):
        return f"dtype {dtype} is quantised, in a format that is not read"
    if header.dtype not in FLOATING and not header.dtype.is_complex:
        return f"dtype {dtype} is not floating point: indices, flags or quantised weights"
    if math.prod(header.shape) == 0:
        return "empty tensor"
    if len(header.shape) == 0:
        return "scalar"
    if len(header.shape) == 1:
        return "vector, not a matrix"
    return ""


def matrix_parts(
    name: str,
    shape: tuple[int, ...],
    *,
    kind: str = "linear",
    transposed: bool = False,
    roles: str = "",
) -> list[Part]:
    """A 2-D weight whole, or cut in one equal block of rows for each letter of `roles`."""
    rows, cols = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    block = rows // max(1, len(roles))
    return [
        Part(
            f"{name}.{role}" if role else name,
            kind,
            (1, block, cols),
            Rows(index * block, block, transposed=transposed),
        )
        for index, role in enumerate(roles or [""])
    ]


def linear_parts(
    name: str, shape: tuple[int, ...], index: HeaderIndex, *, transposed: bool = False
) -> list[Part]:
    """A 2-D weight of a linear map; fused q, k, v and fused gate, up projections are cut."""
    rows, cols = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    leaf, config = leaf_name(name), index.config
    groups = config.grouped_heads(leaf)
    if groups is not None and not transposed:
        heads = groups[0] * (groups[1] + 2)
        if rows == heads * config.head_dim:
            sizes = {"q": groups[0] * groups[1], "k": groups[0], "v": groups[0]}
            return [
                Part(
                    f"{name}.{role}",
                    "attention",
                    (1, size * config.head_dim, cols),
                    HeadRows(role, *groups),
                )
                for role, size in sizes.items()
            ]
    if leaf in _FUSED_QKV_LEAVES:
        if rows == 3 * cols:
            return matrix_parts(name, shape, kind="attention", transposed=transposed, roles="qkv")
        # Fewer key than query heads, or heads wider than the model: the config tells where to cut.
        query, key = config.heads * config.head_dim, config.key_heads * config.head_dim
        if query and rows == query + 2 * key:
            cuts = (("q", 0, query), ("k", query, key), ("v", query + key, key))
            return _row_parts(name, "attention", cols, cuts, transposed)
    if leaf == "gate_up_proj" and _is_gate_and_up(name, rows, index):
        half = rows // 2
        halves = (("gate", 0, half), ("up", half, half))
        return _row_parts(name, "linear", cols, halves, transposed)
    return matrix_parts(name, shape, transposed=transposed)


def _row_parts(
    name: str, kind: str, cols: int, cuts: Iterable[tuple[str, int, int]], transposed: bool
) -> list[Part]:
    """A layer of so many rows from a first one on, for each role."""
    return [
        Part(f"{name}.{role}", kind, (1, count, cols), Rows(start, count, transposed=transposed))
        for role, start, count in cuts
    ]


def expert_parts(header: TensorHeader, index: HeaderIndex) -> list[Part]:
    """A 3-D weight of experts as out x in matrices, gate and up apart where names tell them.

    `gate_up_proj` and `down_proj` of one module tell by their shapes whether they are stored
    `(experts, out, in)` or `(experts, in, out)`. Gate comes before up, but for gpt-oss, whose
    rows alternate: it is the one of these families whose experts have a bias.
    """
    name, shape = index.layer_name(header.name), header.shape
    own, other = leaf_name(name), {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}
    neighbour = index.sibling(header.name, other[own]) if own in other else None
    if neighbour is None or len(neighbour.shape) != 3 or neighbour.shape[0] != shape[0]:
        return [stacked_part(name, shape, kind="experts")]
    fused, down = (shape, neighbour.shape) if own == "gate_up_proj" else (neighbour.shape, shape)
    if (fused[1], fused[2]) == (2 * down[2], down[1]):
        transposed = False
    elif (fused[2], fused[1]) == (2 * down[1], down[2]):
        transposed = True
    else:
        return [stacked_part(name, shape, kind="experts")]
    count = shape[0]
    rows, cols = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
    if own == "down_proj":
        stack = Rows(0, rows, transposed=transposed)
        return [Part(name, "experts", (count, rows, cols), stack)]
    half = rows // 2
    alternate = index.sibling(header.name, "gate_up_proj_bias") is not None
    return [
        Part(
            f"{name}.{role}",
            "experts",
            (count, half, cols),
            Rows(
                number if alternate else number * half,
                half,
                step=2 if alternate else 1,
                transposed=transposed,
            ),
        )
        for number, role in enumerate(("gate", "up"))
    ]


def convolution_part(
    name: str, shape: tuple[int, ...], *, groups: int = 1, transposed: bool = False
) -> Part:
    """A kernel as one out x in matrix per group and kernel position.

    Args:
        name: layer name.
        shape: `(out, in/groups, *kernel)`; `(in, out/groups, *kernel)` when `transposed`.
        groups: of the convolution.
        transposed: whether it is a transposed convolution.
    """
    first, second = shape[0] // groups, shape[1]
    rows, cols = (second, first) if transposed else (first, second)
    kind = f"conv_transpose{len(shape) - 2}d" if transposed else f"conv{len(shape) - 2}d"
    count = groups * math.prod(shape[2:])
    return Part(name, kind, (count, rows, cols), TrailingPositions(groups, transposed))


def stacked_part(name: str, shape: tuple[int, ...], *, kind: str) -> Part:
    """A 3-D weight that is a stack already."""
    return Part(name, kind, (shape[0], shape[1], shape[2]), AsStored())


def is_stack(header: TensorHeader) -> bool:
    """Whether a 3-D weight looks like `(steps, in, out)`, not like a kernel `(out, in, width)`.

    Such as one matrix for each time step or block: fewer of them than channels, as a kernel has
    fewer positions than channels.
    """
    shape = header.shape
    return len(shape) == 3 and not header.dtype.is_complex and shape[0] < shape[2]


def embedding_part(name: str, shape: tuple[int, ...]) -> Part:
    """A table of embeddings, `(rows, dim)` or `(1, rows, dim)`: left out unless asked for."""
    stack = (1, shape[-2], shape[-1])
    hint = f"embedding, left out by default: include={name!r} analyses it"
    return Part(name, "embedding", stack, AsStored(), hint)


def parts_by_name(header: TensorHeader, index: HeaderIndex) -> list[Part] | str:
    """The parts of a tensor as its name, shape and neighbours tell them, or why there are none."""
    name, shape, rank = index.layer_name(header.name), header.shape, len(header.shape)
    for pattern, what in _NOT_WEIGHTS:
        if pattern.search(leaf_name(header.name)):
            return f"{what}, not a weight"
    bias = index.beside(header.name, "bias") if is_weight(header.name) else None
    if bias is not None and bias.shape == shape:
        return "elementwise scale (its bias has the same shape), not a matrix"
    spectral = spectral_parts(header, name, index)
    if spectral:
        return spectral
    if rank == 2:
        return _matrix_by_name(header, index, has_bias=bias is not None)
    if rank == 3 and _is_stack_of_experts(name):
        return expert_parts(header, index)
    if rank == 3 and shape[0] == 1 and _is_embedding(name):
        return [embedding_part(name, shape)]
    if is_stack(header) and not leaf_name(header.name).startswith("weight"):
        return [stacked_part(name, shape, kind="stacked")]
    if rank <= 5:
        transposed = index.stored_in_by_out(header)
        return [convolution_part(name, shape, transposed=transposed)]
    return f"{rank}-D tensor: no rule makes matrices of it"


def _matrix_by_name(
    header: TensorHeader, index: HeaderIndex, *, has_bias: bool
) -> list[Part] | str:
    name, shape, leaf = index.layer_name(header.name), header.shape, leaf_name(header.name)
    parent, dot, _ = header.name.rpartition(".")
    if leaf == "in_proj_weight" and shape[0] == 3 * shape[1]:
        return matrix_parts(f"{parent}{dot}in_proj", shape, kind="attention", roles="qkv")
    if leaf in _SEPARATE_QKV:
        role_name = f"{parent}{dot}in_proj.{_SEPARATE_QKV[leaf]}"
        return matrix_parts(role_name, shape, kind="attention")
    if _RECURRENT.fullmatch(leaf):
        return _recurrent_parts(header, index)
    # A table of embeddings has no bias; a projection whose name says "embed" usually has one.
    if _is_embedding(name) and not has_bias:
        return [embedding_part(name, shape)]
    transposed = index.stored_in_by_out(header) or (
        # A square weight proves nothing by itself, but the layout is one for the whole model.
        leaf_name(name) in GPT2_LEAVES
        and (
            is_transposed_c_attn(header)
            or (shape[0] == shape[1] and index.has_transposed_gpt2_layers)
        )
    )
    return linear_parts(name, shape, index, transposed=transposed)


def _recurrent_parts(header: TensorHeader, index: HeaderIndex) -> list[Part]:
    """Weights of a recurrent layer cut by gate, in torch's order of gates."""
    match = _RECURRENT.fullmatch(leaf_name(header.name))
    assert match is not None  # the caller has matched the name
    which, suffix = match[1], match[2] or ""
    if which == "hr":  # the projection of the hidden state, which only an LSTM has
        return matrix_parts(header.name, header.shape, kind="lstm")
    hidden = index.beside(header.name, f"weight_hh{suffix}")
    projection = index.beside(header.name, f"weight_hr{suffix}")
    if hidden is None or len(hidden.shape) != 2:
        return matrix_parts(header.name, header.shape)
    # weight_hh is (gates * size, size), or (gates * size, projected) beside a projection.
    size = projection.shape[-1] if projection is not None and projection.shape else hidden.shape[1]
    gates = hidden.shape[0] // size if size and hidden.shape[0] % size == 0 else 0
    if gates not in _GATES or header.shape[0] != hidden.shape[0]:
        return matrix_parts(header.name, header.shape)
    kind, roles = _GATES[gates]
    return matrix_parts(header.name, header.shape, kind=kind, roles=roles)


def _is_stack_of_experts(name: str) -> bool:
    """Whether the name speaks of experts together, not of one expert by its number."""
    parts = name.lower().split(".")
    # Granite's and JetMoe's experts say so in the name of their block only.
    if parts[-1] in ("input_linear", "output_linear") and any("moe" in part for part in parts):
        return True
    return any(
        "expert" in part and not (following.isdigit() or part[-1].isdigit())
        for part, following in zip(parts, [*parts[1:], ""], strict=True)
    )


def _is_embedding(name: str) -> bool:
    leaf = leaf_name(name).lower()
    return name == "shared" or (
        leaf != "embed_out"  # GPT-NeoX's output layer
        and (
            "embed" in leaf
            or "emb" in leaf.split("_")
            or leaf in ("wte", "wpe", "relative_attention_bias")
        )
    )
