"""Recipes of complex weights that are stored as real numbers or as factors of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.weights.recipes import Recipe


def _not_half(weight: Tensor) -> Tensor:
    """16-bit numbers as float32: torch has no complex type for them."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


@dataclass(frozen=True)
class RealAndImaginary(Recipe, name="real-and-imaginary/1"):
    """`(2, S, R, C)` with real parts first to S complex matrices (always a copy)."""

    def __call__(self, weight: Tensor) -> Tensor:
        """`(S, R, C)`, complex."""
        return torch.complex(*_not_half(weight))


@dataclass(frozen=True)
class ComplexPairs(Recipe, name="complex-pairs/1"):
    """`(..., 2)` of real and imaginary parts to a complex tensor; `joint` as `FactorisedTensor`."""

    joint: bool = False

    def __call__(self, weight: Tensor) -> Tensor:
        """The complex tensor, of one dimension less."""
        tensor = torch.view_as_complex(_not_half(weight).contiguous())
        return tensor.movedim(0, 2) if self.joint else tensor


@dataclass(frozen=True)
class FactorisedTensor(Recipe, name="factorised-tensor/1"):
    """The factors of a decomposed tensor to the tensor itself, in the precision of the factors.

    With `i, j, ...` the tensor's dimensions and `a, b, ...` the ranks,
    Tucker is `sum core[a, b, ...] · f0[i, a] · f1[j, b] ···`, CP is
    `sum_a weights[a] · f0[i, a] · f1[j, a] ···` (Kolda and Bader, SIAM Review 51, 2009), and a
    tensor train (TT) is `sum f0[0, i, a] · f1[a, j, b] ···` (Oseledets, SIAM J. Sci. Comput. 33,
    2011).

    Attributes:
        kind: `tucker` (first the core), `cp` (first the weights) or `tt`.
        shapes: of the parts, as complex tensors where they are stored as pairs.
        pairs: whether each part is stored as pairs of real and imaginary parts.
        joint: whether the first dimension counts layers, each with a weight of its own; it then
            becomes a mode: `(layers, in, out, *modes)` to `(in, out, layers, *modes)`.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    pairs: bool = False
    joint: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        if self.kind == "tt":
            sizes = tuple(core[1] for core in self.shapes)
        else:
            sizes = tuple(factor[0] for factor in self.shapes[1:])
        return (*sizes[1:3], sizes[0], *sizes[3:]) if self.joint else sizes

    def factor_matrix(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Recipe | None]:
        """Shape of the matrix that a part of this shape is, and its recipe if it needs one."""
        if self.kind != "tt":
            return shape, ComplexPairs() if self.pairs else None
        left, size, right = shape
        matrix = (left * size, right) if right > 1 else (left, size)
        return matrix, TensorTrainCore(self.pairs)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The tensor, of as many dimensions as there are factors."""
        if self.pairs:
            tensors = tuple(ComplexPairs()(tensor) for tensor in tensors)
        if self.kind == "tt":
            result = tensors[0].squeeze(0)
            for core in tensors[1:]:
                result = torch.tensordot(result, core, dims=1)
            result = result.squeeze(-1)
        elif self.kind == "cp":
            # The rank stays last until the end, where a product with the last factor sums over it.
            result = tensors[1] * tensors[0]
            for factor in tensors[2:-1]:
                result = result.unsqueeze(-2) * factor
            result = result @ tensors[-1].mT
        else:
            result = tensors[0]
            for factor in tensors[1:]:
                # Each contracts the first dimension and appends its own: n times, and all is done.
                result = torch.tensordot(result, factor, dims=([0], [1]))
        return result.movedim(0, 2) if self.joint else result


@dataclass(frozen=True)
class TensorTrainCore(Recipe, name="tensor-train-core/1"):
    """A core `(left, size, right)` to `(left · size, right)`, the last to `(left, size)`."""

    pairs: bool = False

    def __call__(self, core: Tensor) -> Tensor:
        """The matrix."""
        core = ComplexPairs()(core) if self.pairs else core
        return core.squeeze(2) if core.shape[2] == 1 else core.flatten(0, 1)
