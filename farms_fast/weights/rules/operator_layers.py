"""Weights of neural operators: spectral convolutions, dense or factorised, and AFNO blocks.

A spectral convolution multiplies the channels of each Fourier mode by a complex matrix of its own:
its weight `(in, out, *modes)` is a stack of one matrix per mode. It may be stored as complex
numbers, as real ones with a last dimension of real and imaginary part, or as the factors of a
Tucker, CP or tensor-train decomposition, in the way of tensorly-torch, on which `neuraloperator`
builds. `merge_complex_parts` puts one header of the complex weight in the place of all of these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from farms_fast.weights.formats.complex_weights import (
    ComplexPairs,
    FactorisedTensor,
    RealAndImaginary,
)
from farms_fast.weights.recipes import AsStored, TrailingPositions
from farms_fast.weights.rules.afno_layers import afno_layout, is_afno_bias, says_afno
from farms_fast.weights.rules.header_index import Weight
from farms_fast.weights.stacks import Part, TensorHeader, WeightCandidate

_FACTOR = re.compile(r"(.+)\.factors\.factor_(\d+)")
_FILTER = "complex_weight"  # of GFNet, (height, width, channels, 2)
# How plain models call a complex weight that they store as pairs of real numbers.
_PAIRS = re.compile(r"(^|\.)weights\d+$|spectral|fourier", re.IGNORECASE)
_PAIRS_OWNER = re.compile(r"spectral|fourier|(?<!a)fno", re.IGNORECASE)
_SEPARABLE = "one number for each channel and mode (a separable spectral convolution), no matrix"
_GLOBAL_FILTER = "one number for each channel and mode (a global filter), no matrix"


def merge_complex_parts(
    weights: Sequence[WeightCandidate], notes: Mapping[str, str] | None = None
) -> list[WeightCandidate]:
    """Puts the complex weight in the place of the real pairs or the factors it is stored as.

    Real tensors whose last dimension is 2 are taken for pairs where something says so: a complex
    factorisation of tensorly-torch, the class of the module, or a name such as `weights1` or one
    with "spectral" or "fourier" in it. All others are left to the rules for real weights.

    Args:
        weights: of a model, in order.
        notes: what the modules tell, from `module_notes`; None where there are no modules.

    Returns:
        The weights in order; a merged one takes the position of the first of its parts.
    """
    by_name = {weight.header.name: weight.header for weight in weights if not weight.reason}
    groups = _groups(by_name)
    results: list[WeightCandidate] = []
    merged: set[str] = set()
    for weight in weights:
        group = None if weight.reason else groups.get(weight.header.name)
        if group is None:
            results.append(weight if weight.reason else _single(weight.header, by_name, notes))
        elif group[0] not in merged:
            merged.add(group[0])
            results.extend(_merged(*group, (notes or {}).get(group[0], "")))
    return results


def _groups(by_name: Mapping[str, TensorHeader]) -> dict[str, tuple[str, list[TensorHeader]]]:
    """Name and parts of the factorised weight that each tensor belongs to, by the tensor's name."""
    factors: dict[str, dict[int, TensorHeader]] = {}
    for name, header in by_name.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[int(match[2])] = header
    groups: dict[str, tuple[str, list[TensorHeader]]] = {}
    for merged, numbered in factors.items():
        parts = [numbered[number] for number in sorted(numbered)]
        first = by_name.get(f"{merged}.core", by_name.get(f"{merged}.weights"))
        parts = parts if first is None else [first, *parts]
        groups.update((part.name, (merged, parts)) for part in parts)
    return groups


def _kind_of(parts: Sequence[TensorHeader]) -> FactorisedTensor | None:
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
                return FactorisedTensor("tucker", shapes, pairs)
        elif flat and parts[0].name.endswith(".weights"):
            if len(first) == 1 and all(factor[1] == first[0] for factor in factors):
                return FactorisedTensor("cp", shapes, pairs)
        elif all(len(core) == 3 for core in shapes):
            ranks = [core[2] for core in shapes[:-1]] == [core[0] for core in factors]
            if ranks and first[0] == 1 and shapes[-1][2] == 1:
                return FactorisedTensor("tt", shapes, pairs)
    return None


def _merged(name: str, parts: Sequence[TensorHeader], note: str) -> list[WeightCandidate]:
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
        return [WeightCandidate(part, reason) for part in parts]
    combine = replace(combine, joint=note.startswith("joint"))
    dtype = _complex_of(parts[0].dtype) if combine.pairs else parts[0].dtype
    return [WeightCandidate(TensorHeader.computed(name, combine.shape, dtype, parts, combine))]


def _single(
    header: TensorHeader, by_name: Mapping[str, TensorHeader], notes: Mapping[str, str] | None
) -> WeightCandidate:
    """A weight in one piece, complex if it is stored as pairs; `.tensor` goes from its name."""
    shape, dtype = header.shape, header.dtype
    name = header.name.removesuffix(".tensor")
    dense = name != header.name and name not in by_name and len(shape) > 2
    name = name if dense else header.name
    pairs = not dtype.is_complex and shape[-1:] == (2,) and len(shape) > 3
    note = (notes or {}).get(name, "")
    if notes is None:
        bias = by_name.get(f"{header.name.rpartition('.')[0]}.bias")
        convolution = bias is not None and bias.shape == shape[:1]
        if header.name.rpartition(".")[2] == _FILTER and "conv" not in header.name.lower():
            note = "global filter"
        elif dense or (_PAIRS.search(header.name) and not convolution):
            note = "pairs"
    if note == "separable":
        return WeightCandidate(header, _SEPARABLE)
    if note == "global filter" and pairs and len(shape) == 4:
        return WeightCandidate(header, _GLOBAL_FILTER)
    says_so = note == "afno" or says_afno(header.name)
    layout = afno_layout(header, by_name, says_so)
    if layout:
        note = "joint pairs" if layout == "trailing" else ""
    pairs = pairs and "pairs" in note
    if header.combine is not None or not (dense or pairs):
        return WeightCandidate(header)
    if not pairs:
        return WeightCandidate(replace(header, name=name, tensors=header.stored))
    combine = ComplexPairs(joint=note.startswith("joint"))
    shape = (*shape[1:3], shape[0], *shape[3:-1]) if combine.joint else shape[:-1]
    made = TensorHeader.computed(name, shape, _complex_of(dtype), [header], combine)
    return WeightCandidate(made)


def _complex_of(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def module_notes(module: nn.Module) -> dict[str, str]:
    """What only modules know of the weights of spectral convolutions, by the weight's name.

    `separable`: one number for each channel and mode; `joint`: one tensor for several layers;
    `tensorised`: a matrix whose dimensions are factorised; `pairs`: real and imaginary parts;
    `afno`: of an AFNO block; `global filter`: multiplied elementwise.
    """
    notes: dict[str, str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if hasattr(owner, "tensorized_shape"):
            notes[path] = "tensorised"
        elif type(owner).__name__.startswith("Complex") and hasattr(owner, "to_tensor"):
            notes.setdefault(path, "pairs")
        elif not isinstance(owner, _ConvNd):
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


def _spectral_weights(owner: nn.Module, dot: str) -> Iterator[tuple[str, int]]:
    """Weights of a spectral convolution, and their dimensions beyond `(in, out, *modes)`."""
    order = getattr(owner, "order", None)
    weight = owner._modules.get("weight", owner._parameters.get("weight"))
    if weight is None or not isinstance(order, int):
        return
    several = weight.named_children() if isinstance(weight, nn.ModuleList) else [("", weight)]
    for number, each in several:
        name = f"{dot}weight.{number}" if number else f"{dot}weight"
        yield name, len(getattr(each, "shape", ())) - 2 - order


def factor_matrices(weights: Sequence[WeightCandidate]) -> list[WeightCandidate]:
    """Gives a layer to each factor of a factorised weight, in the place of the weight itself.

    The matrices are the factors as they are: (dimension, rank) of Tucker and CP; of a tensor train
    the unfolding (left rank · dimension, right rank), the last one (left rank, dimension). The core
    of a Tucker weight is a stack like a spectral convolution's. A CP weight's vector of scales has
    no spectrum.

    For `change=` of `farms_fast.weights.layers.layers_from_module` and of sources.

    Example:
        >>> names = ["c.weight.core", *(f"c.weight.factors.factor_{n}" for n in range(3))]
        >>> shapes = [(2, 2, 3), (8, 2), (6, 2), (5, 3)]
        >>> headers = [TensorHeader(*each, torch.complex64) for each in zip(names, shapes)]
        >>> merged = merge_complex_parts([WeightCandidate(header) for header in headers])
        >>> [weight.header.shape for weight in factor_matrices(merged)]
        [(2, 2, 3), (8, 2), (6, 2), (5, 3)]
    """
    results: list[WeightCandidate] = []
    for weight in weights:
        header, combine = weight.header, weight.header.combine
        if weight.reason or not isinstance(combine, FactorisedTensor):
            results.append(weight)
            continue
        for number, (name, stored) in enumerate(zip(header.tensors, combine.shapes, strict=True)):
            known = header.identity
            identity = known[number] if isinstance(known, tuple) else None
            shape, recipe = combine.factor_matrix(stored)
            factor = TensorHeader(name, shape, header.dtype, identity, (name,), recipe)
            results.append(WeightCandidate(factor))
    return results


def spectral_layers(weight: Weight) -> list[Part] | str | None:
    """The layers of a complex weight or of an AFNO block's, or why there are none."""
    header, shape, by_name = weight.header, weight.shape, weight.index.by_name
    says_so = weight.index.notes.get(header.name) == "afno" or says_afno(header.name)
    if is_afno_bias(header, by_name, says_so):
        return "a bias (of an AFNO block), not a weight"
    layout = afno_layout(header, by_name, says_so)
    if layout:
        to_stack = AsStored() if layout == "complex" else RealAndImaginary()
        return [Part(weight.name, "spectral", (shape[-3], shape[-2], shape[-1]), to_stack)]
    if header.dtype.is_complex and weight.rank > 2:
        # (in, out, *modes): as a kernel's positions, with the roles of in and out exchanged.
        stack = (math.prod(shape[2:]), shape[0], shape[1])
        return [Part(weight.name, "spectral", stack, TrailingPositions())]
    return None
