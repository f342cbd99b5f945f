"""Rules that turn one weight tensor, known by name, shape and dtype alone, into stacks of matrices.

A rule answers with the parts (layers) that a tensor gives, or with the reason why it gives none.
No rule reads a value: planning needs headers only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from farms_fast.arrays import FLOATING

__all__ = [
    "HeaderIndex",
    "LayerSpec",
    "Part",
    "Skipped",
    "TensorHeader",
    "convolution_part",
    "embedding_part",
    "linear_parts",
    "matrix_parts",
    "parts_by_name",
    "stacked_part",
    "unusable",
]


@dataclass(frozen=True)
class LayerSpec:
    """One layer: which tensors it reads and how they become a stack of matrices.

    Attributes:
        name: Module name, or tensor name without a trailing ``.weight``; a part of a fused tensor
            has its role appended (``attn.in_proj.q``, ``lstm.weight_ih_l0.f``).
        kind: ``linear``, ``attention``, ``conv1d``..``conv3d``, ``conv_transpose1d``..
            ``conv_transpose3d``, ``lstm``, ``gru``, ``rnn``, ``experts``, ``bilinear``,
            ``spectral`` or ``embedding``.
        tensors: Names of the source tensors, in the order in which ``to_stack`` takes them.
        shape: ``(S, R, C)``: S equal matrices of R rows and C columns.
        dtype: Of the stored tensor. A ``spectral`` layer of a real dtype (an AFNO block weight,
            which stores real and imaginary parts apart) gives a complex stack all the same.
        to_stack: Loaded tensors to the ``(S, R, C)`` stack: a view wherever strides allow one, and
            never written. Picklable.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    to_stack: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Skipped:
    """A tensor, or a part of one, that is not analysed, and why.

    Attributes:
        name: Its layer name.
        shape: Of the tensor; of the stack when a whole layer was left out.
        reason: One line for the reader of a report.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a tensor before it is loaded.

    Attributes:
        name: Its name in the checkpoint or module.
        shape: Its dimensions.
        dtype: As stored.
        identity: Equal for two names of one and the same memory, None when that is not known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: Hashable | None = None


@dataclass(frozen=True)
class Part:
    """A layer as a rule proposes it.

    Attributes:
        name: Layer name.
        kind: As in `LayerSpec`.
        shape: ``(S, R, C)``.
        to_stack: As in `LayerSpec`.
        left_out: Why the layer is analysed only when an include pattern asks for it; empty for a
            layer that is analysed by default.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    to_stack: Callable[..., torch.Tensor]
    left_out: str = ""


# The callables are classes, not closures, so that a plan can be sent to another process.


@dataclass(frozen=True)
class _RowBlock:
    """Block ``index`` of ``blocks`` equal blocks of rows of a matrix, transposed first if asked."""

    index: int = 0
    blocks: int = 1
    transposed: bool = False

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.mT if self.transposed else weight
        rows = matrix.shape[0] // self.blocks
        return matrix.narrow(0, self.index * rows, rows).unsqueeze(0)


@dataclass(frozen=True)
class _TrailingPositions:
    """``(a, b, *positions)`` to one matrix per group and position.

    Group-major. Matrices are (a/groups) x b, or b x (a/groups) when ``transposed``.
    """

    groups: int = 1
    transposed: bool = False

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        kernels = weight.flatten(2)
        grouped = kernels.reshape(self.groups, -1, *kernels.shape[1:])  # (g, a/g, b, positions)
        order = (0, 3, 2, 1) if self.transposed else (0, 3, 1, 2)
        # With several groups and several positions the two have no common stride: that case copies.
        return grouped.permute(order).flatten(0, 1)


@dataclass(frozen=True)
class _AsStored:
    """``(S, R, C)``, or ``(R, C)`` as a stack of one."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if weight.dim() == 3 else weight.unsqueeze(0)


@dataclass(frozen=True)
class _RealAndImaginary:
    """``(2, S, R, C)`` with real parts first to S complex matrices (always a copy)."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype in (torch.float16, torch.bfloat16):  # torch has no complex type for these
            weight = weight.float()
        return torch.complex(weight[0], weight[1])


class HeaderIndex:
    """The headers of a whole model, for rules that need a tensor's neighbours."""

    def __init__(self, headers: Iterable[TensorHeader]) -> None:
        """Index ``headers`` by name."""
        self.by_name = {header.name: header for header in headers}

    def layer_name(self, tensor_name: str) -> str:
        """The tensor's name without a trailing ``.weight``, unless another tensor has that name."""
        base = tensor_name.removesuffix(".weight")
        return tensor_name if base in self.by_name else base

    def beside(self, tensor_name: str, leaf: str) -> TensorHeader | None:
        """The tensor ``leaf`` of the same module, if there is one."""
        parent, dot, _ = tensor_name.rpartition(".")
        return self.by_name.get(parent + dot + leaf)

    def stored_in_by_out(self, header: TensorHeader) -> bool:
        """Whether the bias proves a weight to be stored (in, out, ...), not (out, in, ...)."""
        if not _is_weight(header.name) or len(header.shape) < 2:
            return False
        bias = self.beside(header.name, "bias")
        out, inputs = header.shape[:2]
        return bias is not None and bias.shape == (inputs,) and inputs != out

    @cached_property
    def has_transposed_gpt2_layers(self) -> bool:
        """Whether some ``c_*`` weight is proven to be stored (in, out), so that all of them are."""
        return any(
            self.stored_in_by_out(header) or _is_transposed_c_attn(header)
            for header in self.by_name.values()
            if _leaf(self.layer_name(header.name)) in _GPT2_LEAVES and len(header.shape) == 2
        )


_GPT2_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
# Families that store q, k and v one after the other. `query_key_value` (GPT-NeoX, BLOOM) is not
# among them: its rows go head by head, q, k and v of one head together, so a third of the rows is
# a mixture of all three, and the head count that would sort them is in no header.
_FUSED_QKV_LEAVES = frozenset({"qkv", "c_attn", "Wqkv", "qkv_proj", "to_qkv"})
_SEPARATE_QKV = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}
_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(?:_reverse)?)?")
_GATES = {4: ("lstm", "ifgo"), 3: ("gru", "rzn"), 1: ("rnn", "")}
_NOT_WEIGHTS = (
    (re.compile(r"(^|_)bias(_|$)"), "a bias"),
    (re.compile(r"(^|_)mask$"), "a mask"),
    (re.compile(r"^(cos|sin)_cached$|^freqs_cis$|^inv_freq$"), "a table of rotary positions"),
    (re.compile(r"^(weight_)?scales?(_inv)?$|^q?zeros$"), "the scale of a quantised weight"),
)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_weight(tensor_name: str) -> bool:
    return _leaf(tensor_name) == "weight"


def _is_transposed_c_attn(header: TensorHeader) -> bool:
    rows, cols = header.shape
    return _leaf(header.name.removesuffix(".weight")) == "c_attn" and cols == 3 * rows


def unusable(header: TensorHeader) -> str:
    """Why no rule can take a spectrum of the tensor; empty when one may."""
    dtype = str(header.dtype).removeprefix("torch.")
    if dtype.startswith("float8") or dtype.startswith("float4"):
        return f"dtype {dtype} is quantised: dequantise it with its scale first"
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
    """A 2-D weight whole, or cut in one equal block of rows for each letter of ``roles``."""
    rows, cols = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    blocks = max(1, len(roles))
    return [
        Part(
            f"{name}.{roles[index]}" if roles else name,
            kind,
            (1, rows // blocks, cols),
            _RowBlock(index, blocks, transposed),
        )
        for index in range(blocks)
    ]


def linear_parts(name: str, shape: tuple[int, ...], *, transposed: bool = False) -> list[Part]:
    """A 2-D weight of a linear map; a fused q, k, v projection is cut in three."""
    rows, cols = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    # Fewer key than query heads make rows != 3 * cols; where to cut is then in no header.
    if _leaf(name) in _FUSED_QKV_LEAVES and rows == 3 * cols:
        return matrix_parts(name, shape, kind="attention", transposed=transposed, roles="qkv")
    return matrix_parts(name, shape, transposed=transposed)


def convolution_part(
    name: str, shape: tuple[int, ...], *, groups: int = 1, transposed: bool = False
) -> Part:
    """A kernel as one out x in matrix per group and kernel position.

    Args:
        name: Layer name.
        shape: ``(out, in/groups, *kernel)``; ``(in, out/groups, *kernel)`` when ``transposed``.
        groups: Of the convolution.
        transposed: Whether it is a transposed convolution.
    """
    first, second = shape[0] // groups, shape[1]
    rows, cols = (second, first) if transposed else (first, second)
    kind = f"conv_transpose{len(shape) - 2}d" if transposed else f"conv{len(shape) - 2}d"
    count = groups * math.prod(shape[2:])
    return Part(name, kind, (count, rows, cols), _TrailingPositions(groups, transposed))


def stacked_part(name: str, shape: tuple[int, ...], *, kind: str) -> Part:
    """A 3-D weight that is a stack already."""
    return Part(name, kind, (shape[0], shape[1], shape[2]), _AsStored())


def embedding_part(name: str, shape: tuple[int, ...]) -> Part:
    """A table of embeddings, ``(rows, dim)`` or ``(1, rows, dim)``: left out unless asked for."""
    stack = (1, shape[-2], shape[-1])
    hint = f"embedding, left out by default: include={name!r} analyses it"
    return Part(name, "embedding", stack, _AsStored(), hint)


def parts_by_name(header: TensorHeader, index: HeaderIndex) -> list[Part] | str:
    """The parts of a tensor as its name, shape and neighbours tell them, or why there are none."""
    name, shape, rank = index.layer_name(header.name), header.shape, len(header.shape)
    for pattern, what in _NOT_WEIGHTS:
        if pattern.search(_leaf(header.name)):
            return f"{what}, not a weight"
    bias = index.beside(header.name, "bias") if _is_weight(header.name) else None
    if bias is not None and bias.shape == shape:
        return "elementwise scale (its bias has the same shape), not a matrix"
    if header.dtype.is_complex and rank > 2:
        # (in, out, *modes): as a kernel's positions, with the roles of in and out exchanged.
        modes = math.prod(shape[2:])
        return [Part(name, "spectral", (modes, shape[0], shape[1]), _TrailingPositions())]
    if _is_afno_weight(header, index):
        return [Part(name, "spectral", (shape[1], shape[2], shape[3]), _RealAndImaginary())]
    if rank == 3 and _leaf(header.name) in ("b1", "b2"):
        weight = index.beside(header.name, _leaf(header.name).replace("b", "w"))
        if weight is not None and _is_afno_weight(weight, index):
            return "a bias (of an AFNO block), not a weight"
    if rank == 2:
        return _matrix_by_name(header, index, has_bias=bias is not None)
    if rank == 3 and _is_stack_of_experts(name):
        return [stacked_part(name, shape, kind="experts")]
    if rank == 3 and shape[0] == 1 and _is_embedding(name):
        return [embedding_part(name, shape)]
    if rank <= 5:
        transposed = index.stored_in_by_out(header)
        return [convolution_part(name, shape, transposed=transposed)]
    return f"{rank}-D tensor: no rule makes matrices of it"


def _matrix_by_name(
    header: TensorHeader, index: HeaderIndex, *, has_bias: bool
) -> list[Part] | str:
    name, shape, leaf = index.layer_name(header.name), header.shape, _leaf(header.name)
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
        _leaf(name) in _GPT2_LEAVES
        and (
            _is_transposed_c_attn(header)
            or (shape[0] == shape[1] and index.has_transposed_gpt2_layers)
        )
    )
    return linear_parts(name, shape, transposed=transposed)


def _recurrent_parts(header: TensorHeader, index: HeaderIndex) -> list[Part]:
    """Weights of a recurrent layer cut by gate, in torch's order of gates."""
    match = _RECURRENT.fullmatch(_leaf(header.name))
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


def _is_afno_weight(header: TensorHeader, index: HeaderIndex) -> bool:
    """Block-diagonal complex weight of an adaptive Fourier neural operator.

    ``w1`` is ``(2, blocks, in, out)``, real parts first; its bias ``b1`` is ``(2, blocks, out)``.
    """
    leaf, shape = _leaf(header.name), header.shape
    if leaf not in ("w1", "w2") or len(shape) != 4 or shape[0] != 2:
        return False
    bias = index.beside(header.name, leaf.replace("w", "b"))
    return bias is not None and bias.shape == (2, shape[1], shape[3])


def _is_stack_of_experts(name: str) -> bool:
    """Whether the name speaks of experts together, not of one expert by its number."""
    parts = name.lower().split(".")
    return any(
        "expert" in part and not (following.isdigit() or part[-1].isdigit())
        for part, following in zip(parts, [*parts[1:], ""], strict=True)
    )


def _is_embedding(name: str) -> bool:
    leaf = _leaf(name).lower()
    return name == "shared" or (
        leaf != "embed_out"  # GPT-NeoX's output layer
        and (
            "embed" in leaf
            or "emb" in leaf.split("_")
            or leaf in ("wte", "wpe", "relative_attention_bias")
        )
    )
