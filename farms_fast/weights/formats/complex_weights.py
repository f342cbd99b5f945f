"""Complex weights from what they are stored as: pairs of real numbers, and factors of a tensor.

Frozen dataclasses for the reason that `farms_fast.weights.stacks` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ComplexPairs", "Reconstructed", "Unfolded"]


@dataclass(frozen=True)
class ComplexPairs:
    """`(..., 2)` of real and imaginary parts to a complex tensor: a view where that is possible.

    16-bit parts become float32 first, for which torch has no complex type.

    Attributes:
        joint: as in `Reconstructed`.

    Example:
        >>> import torch
        >>> ComplexPairs()(torch.tensor([[3.0, 4.0]]))
        tensor([3.+4.j])
    """

    joint: bool = False

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The complex tensor, of one dimension less."""
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        whole = torch.view_as_complex(weight.contiguous())
        return whole.movedim(0, 2) if self.joint else whole


@dataclass(frozen=True)
class Reconstructed:
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

    Example:
        >>> import torch
        >>> whole = Reconstructed("cp", ((1,), (3, 1), (4, 1)))
        >>> whole(torch.tensor([2.0]), torch.ones(3, 1), torch.ones(4, 1)).shape, whole.shape
        (torch.Size([3, 4]), (3, 4))
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    pairs: bool = False
    joint: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        first, factors = self.shapes[0], self.shapes[1:]
        if self.kind == "tt":
            sizes = (first[1], *(core[1] for core in factors))
        else:
            sizes = tuple(factor[0] for factor in factors)
        return (*sizes[1:3], sizes[0], *sizes[3:]) if self.joint else sizes

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The tensor, of as many dimensions as there are factors."""
        if self.pairs:
            tensors = tuple(ComplexPairs()(tensor) for tensor in tensors)
        if self.kind == "tt":
            whole = tensors[0].squeeze(0)
            for core in tensors[1:]:
                whole = torch.tensordot(whole, core, dims=1)
            whole = whole.squeeze(-1)
        elif self.kind == "cp":
            # The rank stays last until the end, where a product with the last factor sums over it.
            whole = tensors[1] * tensors[0]
            for factor in tensors[2:-1]:
                whole = whole.unsqueeze(-2) * factor
            whole = whole @ tensors[-1].mT
        else:
            whole = tensors[0]
            for factor in tensors[1:]:
                # Each contracts the first dimension and appends its own: n times, and all is done.
                whole = torch.tensordot(whole, factor, dims=([0], [1]))
        return whole.movedim(0, 2) if self.joint else whole


@dataclass(frozen=True)
class Unfolded:
    """A core of a tensor train `(left, size, right)` to `(left · size, right)`.

    The last core, whose right rank is 1, becomes `(left, size)`.

    Example:
        >>> import torch
        >>> Unfolded()(torch.zeros(2, 5, 3)).shape, Unfolded()(torch.zeros(3, 5, 1)).shape
        (torch.Size([10, 3]), torch.Size([3, 5]))
    """

    pairs: bool = False

    def __call__(self, core: torch.Tensor) -> torch.Tensor:
        """The matrix."""
        core = ComplexPairs()(core) if self.pairs else core
        return core.squeeze(2) if core.shape[2] == 1 else core.flatten(0, 1)
