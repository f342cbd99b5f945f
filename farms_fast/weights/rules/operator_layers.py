"""Weights of neural operators: spectral convolutions, dense or factorised, and AFNO blocks.

A spectral convolution multiplies the channels of each Fourier mode by a complex matrix of its own:
its weight `(in, out, *modes)` is a stack of one matrix per mode. It may be stored as complex
numbers, as real ones with a last dimension of real and imaginary part, or as the factors of a
Tucker, CP or tensor-train decomposition, as tensorly-torch and so `neuraloperator` name them.
An AFNO block (adaptive Fourier neural operator; Guibas et al., ICLR 2022) multiplies blocks of
channels by complex matrices, the same for all modes: `w1` and `w2`, a small network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from farms_fast.weights.formats.complex import ComplexPairs, FactorisedTensor, RealAndImaginary
from farms_fast.weights.recipes import AsStored, TrailingPositions
from farms_fast.weights.rules.header_index import Weight
from farms_fast.weights.stacks import Part, TensorHeader, WeightCandidate

_FACTORS = ".factors.factor_"
_FACTOR = re.compile(r"(.+)\.factors\.factor_(\d+)")
_FILTER = "complex_weight"  # of GFNet, (height, width, channels, 2)
# How plain models call a complex weight that they store as pairs of real numbers.
_PAIRS = re.compile(r"(^|\.)weights\d+$|spectral|fourier", re.IGNORECASE)
_PAIRS_OWNER = re.compile(r"spectral|fourier|(?<!a)fno", re.IGNORECASE)
_SEPARABLE = "one number for each channel and mode (a separable spectral convolution), no matrix"
_GLOBAL_FILTER = "one number for each channel and mode (a global filter), no matrix"
_AFNO = re.compile(r"afno|adaptive_?fourier", re.IGNORECASE)
_OTHER = {"w1": "w2", "w2": "w1"}
_REAL_LAYOUTS = ("leading", "trailing")
Shape = tuple[int, ...]


def merge_complex_parts(
    weights: Sequence[WeightCandidate], notes: Mapping[str, str] | None = None
) -> list[WeightCandidate]:
    """Puts the complex weight in the place of the real pairs or the factors it is stored as.

    `notes` are from `module_notes`, None where there are no modules. Real tensors whose last
    dimension is 2 are pairs only where a note or the name says so.
    """
    by_name = {weight.header.name: weight.header for weight in weights if not weight.reason}
    groups = _groups(by_name)
    results: list[WeightCandidate] = []
    merged: set[str] = set()
    for weight in weights:
        group = None if weight.reason else groups.get(weight.header.name)
        if weight.reason or (group is None and notes is None and len(weight.header.shape) < 3):
            results.append(weight)
        elif group is None:
            results.append(_single(weight.header, by_name, notes))
        elif group[0] not in merged:
            merged.add(group[0])
            results.extend(_merged(*group, (notes or {}).get(group[0], "")))
    return results


def _groups(by_name: Mapping[str, TensorHeader]) -> dict[str, tuple[str, list[TensorHeader]]]:
    """Name and parts of the factorised weight that each tensor belongs to."""
    factors: dict[str, dict[int, TensorHeader]] = {}
    for name, header in by_name.items():
        if _FACTORS in name and (match := _FACTOR.fullmatch(name)):
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
    if note == "separable":
        reason = _SEPARABLE
    elif note == "tensorised":
        reason = f"part of {name}, a tensorised matrix, which is not read"
    elif combine is None:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        reason = f"part of {name}, whose factors do not fit together: {shapes}"
    else:
        combine = replace(combine, joint=note.startswith("joint"))
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        dtype = _complex_of(dtype) if combine.pairs else dtype
        return [WeightCandidate.computed(name, combine.shape, dtype, parts, combine)]
    return [WeightCandidate(part, reason) for part in parts]


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
        bias = by_name.get(header.neighbour("bias"))
        convolution = bias is not None and bias.shape == shape[:1]
        if header.leaf == _FILTER and "conv" not in header.name.lower():
            note = "global filter"
        elif dense or (_PAIRS.search(header.name) and not convolution):
            note = "pairs"
    if note == "separable":
        return WeightCandidate(header, _SEPARABLE)
    if note == "global filter" and pairs and len(shape) == 4:
        return WeightCandidate(header, _GLOBAL_FILTER)
    says_so = note == "afno" or bool(_AFNO.search(header.name))
    if layout := _afno_layout(header, by_name, says_so):
        note = "joint pairs" if layout == "trailing" else ""
    pairs = pairs and "pairs" in note
    if header.combine is not None or not (dense or pairs):
        return WeightCandidate(header)
    if not pairs:
        return WeightCandidate(replace(header, name=name, tensors=header.stored))
    combine = ComplexPairs(joint=note.startswith("joint"))
    shape = (*shape[1:3], shape[0], *shape[3:-1]) if combine.joint else shape[:-1]
    return WeightCandidate.computed(name, shape, _complex_of(dtype), [header], combine)


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
        if isinstance(owner, torch.jit.ScriptModule):
            continue
        if hasattr(owner, "tensorized_shape"):
            notes[path] = "tensorised"
        elif type(owner).__name__.startswith("Complex") and hasattr(owner, "to_tensor"):
            notes.setdefault(path, "pairs")
        elif not isinstance(owner, _ConvNd):
            kind = type(owner).__name__
            for leaf, _ in owner.named_parameters(recurse=False):
                if _AFNO.search(kind) and leaf in ("w1", "w2", "b1", "b2"):
                    notes[dot + leaf] = "afno"
                elif leaf == _FILTER and "conv" not in kind.lower():
                    notes[dot + leaf] = "global filter"
                elif _PAIRS_OWNER.search(kind) or _PAIRS.search(dot + leaf):
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
    """A `WeightTransform` that puts the factors of each factorised weight in its place.

    The matrices are (dimension, rank) of Tucker and CP; of a tensor train the unfolding
    (left rank · dimension, right rank), the last one (left rank, dimension). The core of a Tucker
    weight is a stack like a spectral convolution's.
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
    says_so = weight.index.notes.get(header.name) == "afno" or bool(_AFNO.search(header.name))
    if _is_afno_bias(header, by_name, says_so):
        return "a bias (of an AFNO block), not a weight"
    if layout := _afno_layout(header, by_name, says_so):
        to_stack = AsStored() if layout == "complex" else RealAndImaginary()
        return [Part(weight.name, "spectral", (shape[-3], shape[-2], shape[-1]), to_stack)]
    if header.dtype.is_complex and weight.rank > 2:
        # (in, out, *modes): as a kernel's positions, with the roles of in and out exchanged.
        stack = (math.prod(shape[2:]), shape[0], shape[1])
        return [Part(weight.name, "spectral", stack, TrailingPositions())]
    return None


def _afno_layout(header: TensorHeader, by_name: Mapping[str, TensorHeader], says_so: bool) -> str:
    """How `w1` or `w2` of an AFNO block is stored; empty for any other tensor.

    `"leading"` is `(2, blocks, in, out)`, real parts first; `"trailing"` is `(blocks, in, out, 2)`;
    `"complex"` is `(blocks, in, out)`. The shape of the bias tells. Where it does not, `says_so`
    counts: the class of the module, or the tensor's name, speaks of an AFNO.
    """
    shape, leaf = header.shape, header.leaf
    if leaf not in _OTHER or header.combine is not None:
        return ""
    bias_header = by_name.get(header.neighbour(leaf.replace("w", "b")))
    bias = None if bias_header is None else bias_header.shape
    if header.dtype.is_complex:
        fits = len(shape) == 3 and (says_so or bias == (shape[0], shape[2]))
        return "complex" if fits else ""
    if len(shape) != 4:
        return ""
    fitting = [layout for layout in _REAL_LAYOUTS if _bias_fits(layout, shape, bias)]
    if not fitting and says_so:
        fitting = [layout for layout in _REAL_LAYOUTS if _parts_first(layout, shape)[0] == 2]
    if len(fitting) > 1:
        # Of two readings that is the one in which the two weights make a network.
        other = by_name.get(header.neighbour(_OTHER[leaf]))
        pair = [shape, shape if other is None else other.shape]
        first, second = pair if leaf == "w1" else pair[::-1]
        fitting = [layout for layout in fitting if _chained(layout, first, second)] or fitting
    return fitting[0] if fitting else ""


def _parts_first(layout: str, shape: Shape) -> Shape:
    """(parts, blocks, in, out) whatever the layout."""
    return shape if layout == "leading" else (shape[-1], *shape[:-1])


def _bias_fits(layout: str, shape: Shape, bias: Shape | None) -> bool:
    parts, blocks, inputs, outputs = _parts_first(layout, shape)
    if layout == "leading":
        return parts == 2 and bias == (2, blocks, outputs)
    flat = [(1, blocks * size, 1, 1) for size in (inputs, outputs)]  # real, one for each channel
    return parts == 2 and bias in ((blocks, outputs, 2), (blocks, outputs, 1, 1, 2), *flat)


def _chained(layout: str, first: Shape, second: Shape) -> bool:
    """Whether the outputs of the first weight are the inputs of the second."""
    if len(second) != len(first):
        return False
    first, second = _parts_first(layout, first), _parts_first(layout, second)
    return first[:2] == second[:2] and first[3] == second[2]


def _is_afno_bias(header: TensorHeader, by_name: Mapping[str, TensorHeader], says_so: bool) -> bool:
    """Whether it is `b1` or `b2` beside a weight of an AFNO block, of whatever shape."""
    if header.leaf not in ("b1", "b2"):
        return False
    weight = by_name.get(header.neighbour(header.leaf.replace("b", "w")))
    if weight is None:
        return False
    # What is stored as pairs has been made complex by now.
    made = isinstance(weight.combine, ComplexPairs) and weight.combine.joint
    return made or bool(_afno_layout(weight, by_name, says_so))
