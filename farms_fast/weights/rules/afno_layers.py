"""Weights of adaptive Fourier neural operators (AFNO; Guibas et al., ICLR 2022).

An AFNO block multiplies blocks of channels by complex matrices, the same for all modes: two
weights `w1` and `w2`, a small network. Code differs in how it stores complex numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from farms_fast.weights.formats.complex_weights import ComplexPairs
from farms_fast.weights.stacks import TensorHeader

_AFNO = re.compile(r"afno|adaptive_?fourier", re.IGNORECASE)
_OTHER = {"w1": "w2", "w2": "w1"}
_REAL_LAYOUTS = ("leading", "trailing")
Shape = tuple[int, ...]


def says_afno(name: str) -> bool:
    """Whether the name of a class or of a tensor speaks of an AFNO."""
    return _AFNO.search(name) is not None


def afno_layout(header: TensorHeader, by_name: Mapping[str, TensorHeader], says_so: bool) -> str:
    """How `w1` or `w2` of an AFNO block is stored; empty for any other tensor.

    `"leading"` is `(2, blocks, in, out)`, real parts first; `"trailing"` is
    `(blocks, in, out, 2)`; `"complex"` is `(blocks, in, out)` of complex numbers. The bias
    beside a weight tells. Where there is none of a telling shape, `says_so` counts: the class of
    the module, or the tensor's name, speaks of an AFNO.
    """
    parent, dot, leaf = header.name.rpartition(".")
    shape = tuple(header.shape)
    if leaf not in _OTHER or header.combine is not None:
        return ""
    bias_header = by_name.get(f"{parent}{dot}{leaf.replace('w', 'b')}")
    bias = None if bias_header is None else tuple(bias_header.shape)
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
        other = by_name.get(f"{parent}{dot}{_OTHER[leaf]}")
        pair = [shape, shape if other is None else tuple(other.shape)]
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


def is_afno_bias(header: TensorHeader, by_name: Mapping[str, TensorHeader], says_so: bool) -> bool:
    """Whether it is `b1` or `b2` beside a weight of an AFNO block, of whatever shape."""
    parent, dot, leaf = header.name.rpartition(".")
    if leaf not in ("b1", "b2"):
        return False
    weight = by_name.get(f"{parent}{dot}{leaf.replace('b', 'w')}")
    if weight is None:
        return False
    # What is stored as pairs has been made complex by now.
    made = isinstance(weight.combine, ComplexPairs) and weight.combine.joint
    return made or bool(afno_layout(weight, by_name, says_so))
