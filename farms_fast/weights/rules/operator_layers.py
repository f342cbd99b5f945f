"""Weights of neural operators: spectral convolutions, dense or factorised, and AFNO blocks.

A spectral convolution multiplies the channels of each Fourier mode by a complex matrix of its own:
its weight `(in, out, *modes)` is a stack of one matrix per mode. It may be stored as complex
numbers, as real ones with a last dimension of real and imaginary part, or as the factors of a
Tucker, CP or tensor-train decomposition, in the way of tensorly-torch, on which `neuraloperator`
builds. `assembled` puts one header of the complex weight in the place of all of these.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from farms_fast.weights.formats.complex_weights import ComplexPairs, Reconstructed, Unfolded
from farms_fast.weights.rules.afno_layers import afno_layout, is_afno_bias, says_afno
from farms_fast.weights.stacks import (
    AsStored,
    Found,
    Part,
    RealAndImaginary,
    TensorHeader,
    TrailingPositions,
)

if TYPE_CHECKING:
    from farms_fast.weights.rules.header_index import HeaderIndex

__all__ = [
    "assembled",
    "factor_matrices",
    "module_notes",
    "spectral_parts",
]

_FACTOR = re.compile(r"(.+)\.factors\.factor_(\d+)")
_FILTER = "complex_weight"  # of GFNet, (height, width, channels, 2)
# How plain models call a complex weight that they store as pairs of real numbers.
_PAIRS = re.compile(r"(^|\.)weights\d+$|spectral|fourier", re.IGNORECASE)
_PAIRS_OWNER = re.compile(r"spectral|fourier|(?<!a)fno", re.IGNORECASE)
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_SEPARABLE = "one number for each channel and mode (a separable spectral convolution), no matrix"
_GLOBAL_FILTER = "one number for each channel and mode (a global filter), no matrix"


def assembled(found: Sequence[Found], notes: Mapping[str, str] | None = None) -> list[Found]:
    """Puts the complex weight in the place of the real pairs or the factors it is stored as.

    Real tensors whose last dimension is 2 are taken for pairs where something says so: a complex
    factorisation of tensorly-torch, the class of the module, or a name such as `weights1` or one
    with "spectral" or "fourier" in it. All others are left to the rules for real weights.

    Args:
        found: the weights of a model, in order.
        notes: what the modules tell, from `module_notes`; None where there are no modules.

    Returns:
        The weights in order; one that is put together takes the place of the first of its parts.

    Example:
        >>> import torch
        >>> headers = [TensorHeader("c.weight.weights", (3,), torch.complex64),
        ...            TensorHeader("c.weight.factors.factor_0", (8, 3), torch.complex64),
        ...            TensorHeader("c.weight.factors.factor_1", (6, 3), torch.complex64),
        ...            TensorHeader("c.weight.factors.factor_2", (5, 3), torch.complex64)]
        >>> (weight,) = assembled([Found(header) for header in headers])
        >>> weight.header.name, weight.header.shape, weight.header.combine.kind
        ('c.weight', (8, 6, 5), 'cp')
    """
    by_name = {item.header.name: item.header for item in found if not item.reason}
    groups = _groups(by_name)
    results: list[Found] = []
    done: set[str] = set()
    for item in found:
        name = item.header.name
        group = None if item.reason else groups.get(name)
        if group is None:
            results.append(item if item.reason else _single(item.header, by_name, notes))
            continue
        whole = group[0]
        if whole not in done:
            done.add(whole)
            results.extend(_whole(whole, group[1], (notes or {}).get(whole, "")))
    return results


def _groups(by_name: Mapping[str, TensorHeader]) -> dict[str, tuple[str, list[TensorHeader]]]:
    """Name and parts of the factorised weight that each tensor belongs to, by the tensor's name."""
    factors: dict[str, dict[int, TensorHeader]] = {}
    for name, header in by_name.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[int(match[2])] = header
    groups: dict[str, tuple[str, list[TensorHeader]]] = {}
    for whole, numbered in factors.items():
        parts = [numbered[number] for number in sorted(numbered)]
        first = by_name.get(f"{whole}.core", by_name.get(f"{whole}.weights"))
        parts = parts if first is None else [first, *parts]
        groups.update((part.name, (whole, parts)) for part in parts)
    return groups


def _kind_of(parts: Sequence[TensorHeader]) -> Reconstructed | None:
    """The decomposition that parts of these shapes make, None if they do not fit together."""
    for pairs in (False, True):
        if pairs and any(part.dtype.is_complex or part.shape[-1:] != (2,) for part in parts):
            continue
        shapes = tuple(part.shape[:-1] if pairs else part.shape for part in parts)
        first, factors = shapes[0], shapes[1:]
        if not factors:
            continue
        flat = all(len(factor) == 2 for factor in factors)
        if flat and parts[0].name.endswith(".core"):
            if first == tuple(factor[1] for factor in factors):
                return Reconstructed("tucker", shapes, pairs)
        elif flat and parts[0].name.endswith(".weights"):
            if len(first) == 1 and all(factor[1] == first[0] for factor in factors):
                return Reconstructed("cp", shapes, pairs)
        elif all(len(core) == 3 for core in shapes):
            ranks = [core[2] for core in shapes[:-1]] == [core[0] for core in factors]
            if ranks and first[0] == 1 and shapes[-1][2] == 1:
                return Reconstructed("tt", shapes, pairs)
    return None


def _whole(name: str, parts: Sequence[TensorHeader], note: str) -> list[Found]:
    """The header of a factorised weight, or its parts with the reason why it has none."""
    combine = _kind_of(parts)
    reason = ""
    if note == "separable":
        reason = _SEPARABLE
    elif note == "tensorised":
        reason = f"part of {name}, a tensorised matrix, which is not read"
    elif combine is None:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        reason = f"part of {name}, whose factors do not fit together: {shapes}"
    if reason or combine is None:
        return [Found(part, reason) for part in parts]
    if note.startswith("joint"):
        combine = Reconstructed(combine.kind, combine.shapes, combine.pairs, joint=True)
    known = all(part.identity is not None for part in parts)
    identity: Hashable = (*(part.identity for part in parts), combine) if known else None
    stored = tuple(part.stored[0] for part in parts)
    dtype = _complex_of(parts[0].dtype) if combine.pairs else parts[0].dtype
    return [Found(TensorHeader(name, combine.shape, dtype, identity, stored, combine))]


def _single(
    header: TensorHeader, by_name: Mapping[str, TensorHeader], notes: Mapping[str, str] | None
) -> Found:
    """A weight in one piece: under the name of the whole, and complex if it is stored as pairs."""
    name, shape, dtype = header.name, header.shape, header.dtype
    whole = name.removesuffix(".tensor")
    dense = whole != name and whole not in by_name and len(shape) > 2
    whole = whole if dense else name
    pairs = not dtype.is_complex and shape[-1:] == (2,) and len(shape) > 3
    if notes is None:
        bias = by_name.get(f"{name.rpartition('.')[0]}.bias")
        convolution = bias is not None and bias.shape == shape[:1]
        note = "pairs" if dense or (_PAIRS.search(name) and not convolution) else ""
        if name.rpartition(".")[2] == _FILTER and "conv" not in name.lower():
            note = "global filter"
    else:
        note = notes.get(whole, "")
    if note == "separable":
        return Found(header, _SEPARABLE)
    if note == "global filter" and pairs and len(shape) == 4:
        return Found(header, _GLOBAL_FILTER)
    layout = afno_layout(header, by_name, says_so=note == "afno" or says_afno(name))
    if layout:
        note = "joint pairs" if layout == "trailing" else ""
    if header.combine is not None or not (dense or (pairs and "pairs" in note)):
        return Found(header)
    if not (pairs and "pairs" in note):
        return Found(TensorHeader(whole, shape, dtype, header.identity, header.stored))
    combine = ComplexPairs(joint=note.startswith("joint"))
    shape = (*shape[1:3], shape[0], *shape[3:-1]) if combine.joint else shape[:-1]
    identity = None if header.identity is None else (header.identity, combine)
    made = TensorHeader(whole, shape, _complex_of(dtype), identity, header.stored, combine)
    return Found(made)


def _complex_of(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def module_notes(module: nn.Module) -> dict[str, str]:
    """What only modules know of the weights of spectral convolutions, by the weight's name.

    `separable`: one number for each channel and mode; `joint`: one tensor for several layers;
    `tensorised`: a matrix whose dimensions are factorised; `pairs`: real and imaginary parts;
    `afno`: of an AFNO block; `global filter`: multiplied elementwise.

    Example:
        >>> import torch
        >>> class SpectralConv(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.zeros(3, 4, 5, 2))
        >>> module_notes(SpectralConv())
        {'kernel': 'pairs'}
    """
    notes: dict[str, str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if hasattr(owner, "tensorized_shape"):
            notes[path] = "tensorised"
        elif type(owner).__name__.startswith("Complex") and hasattr(owner, "to_tensor"):
            notes.setdefault(path, "pairs")
        elif not isinstance(owner, _CONVOLUTIONS):
            kind = type(owner).__name__
            says_so = _PAIRS_OWNER.search(kind)
            for leaf, _ in owner.named_parameters(recurse=False):
                if says_afno(kind) and leaf in ("w1", "w2", "b1", "b2"):
                    notes[dot + leaf] = "afno"
                elif leaf == _FILTER and "conv" not in kind.lower():
                    notes[dot + leaf] = "global filter"
                elif says_so or _PAIRS.search(dot + leaf):
                    notes[dot + leaf] = "pairs"
        for name, order in _spectral_weights(owner, dot):
            if getattr(owner, "separable", False) is True:
                notes[name] = "separable"
            elif getattr(owner, "joint_factorization", False) is True and order == 1:
                notes[name] = "joint pairs"
    return notes


def _spectral_weights(owner: nn.Module, dot: str) -> list[tuple[str, int]]:
    """Weights of a spectral convolution, and their dimensions beyond `(in, out, *modes)`."""
    order = getattr(owner, "order", None)
    weight = owner._modules.get("weight", owner._parameters.get("weight"))
    if weight is None or not isinstance(order, int):
        return []
    several = weight.named_children() if isinstance(weight, nn.ModuleList) else [("", weight)]
    return [
        (
            f"{dot}weight.{number}" if number else f"{dot}weight",
            len(getattr(each, "shape", ())) - 2 - order,
        )
        for number, each in several
    ]


def factor_matrices(found: Sequence[Found]) -> list[Found]:
    """Gives a layer to each factor of a factorised weight, in the place of the weight as a whole.

    The matrices are the factors as they are: (dimension, rank) of Tucker and CP; of a tensor train
    the unfolding (left rank · dimension, right rank), the last one (left rank, dimension). The core
    of a Tucker weight is a stack like a spectral convolution's. A CP weight's vector of scales has
    no spectrum.

    For `change=` of `farms_fast.weights.layers.layers_from_module` and of sources.

    Example:
        >>> import torch
        >>> names = ["c.weight.core", *(f"c.weight.factors.factor_{n}" for n in range(3))]
        >>> shapes = [(2, 2, 3), (8, 2), (6, 2), (5, 3)]
        >>> whole = assembled([Found(TensorHeader(name, shape, torch.complex64))
        ...                    for name, shape in zip(names, shapes)])
        >>> [item.header.shape for item in factor_matrices(whole)]
        [(2, 2, 3), (8, 2), (6, 2), (5, 3)]
    """
    results: list[Found] = []
    for item in found:
        combine = item.header.combine
        if item.reason or not isinstance(combine, Reconstructed):
            results.append(item)
            continue
        identities = item.header.identity
        for number, (name, shape) in enumerate(
            zip(item.header.tensors, combine.shapes, strict=True)
        ):
            identity = identities[number] if isinstance(identities, tuple) else None
            results.append(Found(_factor(name, shape, identity, item.header.dtype, combine)))
    return results


def _factor(
    name: str,
    shape: tuple[int, ...],
    identity: Hashable | None,
    dtype: torch.dtype,
    whole: Reconstructed,
) -> TensorHeader:
    if whole.kind == "tt":
        left, size, right = shape
        matrix = (left * size, right) if right > 1 else (left, size)
        return TensorHeader(name, matrix, dtype, identity, (name,), Unfolded(whole.pairs))
    combine = ComplexPairs() if whole.pairs else None
    return TensorHeader(name, shape, dtype, identity, (name,), combine)


def spectral_parts(header: TensorHeader, name: str, index: HeaderIndex) -> list[Part] | str:
    """The layers of a complex weight or of an AFNO block's, why there are none, or no answer.

    The empty list leaves the tensor to other rules.
    """
    shape, rank = header.shape, len(header.shape)
    says_so = index.notes.get(header.name) == "afno" or says_afno(header.name)
    if is_afno_bias(header, index.by_name, says_so):
        return "a bias (of an AFNO block), not a weight"
    layout = afno_layout(header, index.by_name, says_so)
    if layout:
        to_stack = AsStored() if layout == "complex" else RealAndImaginary()
        return [Part(name, "spectral", (shape[-3], shape[-2], shape[-1]), to_stack)]
    if header.dtype.is_complex and rank > 2:
        # (in, out, *modes): as a kernel's positions, with the roles of in and out exchanged.
        modes = torch.Size(shape[2:]).numel()
        return [Part(name, "spectral", (modes, shape[0], shape[1]), TrailingPositions())]
    return []
