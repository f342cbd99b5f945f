"""What a layer is made of, and the callables that turn loaded tensors into its stack.

The callables are frozen dataclasses, not closures: a plan can be sent to another process, and their
text (`repr`) says how a stack is made, which `farms_fast.weights.digest` relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = [
    "AsStored",
    "Combined",
    "Found",
    "HeadRows",
    "LayerSpec",
    "Part",
    "RealAndImaginary",
    "Rows",
    "Skipped",
    "TensorHeader",
    "TrailingPositions",
    "used_region",
]


@dataclass(frozen=True)
class LayerSpec:
    """One layer: which tensors it reads and how they become a stack of matrices.

    Attributes:
        name: module name, or tensor name without a trailing `.weight`; a part of a fused tensor
            has its role appended (`attn.in_proj.q`, `lstm.weight_ih_l0.f`).
        kind: `linear`, `attention`, `conv1d`..`conv3d`, `conv_transpose1d`..
            `conv_transpose3d`, `lstm`, `gru`, `rnn`, `experts`, `bilinear`,
            `spectral`, `stacked` (any other stack of matrices) or `embedding`.
        tensors: names of the source tensors, in the order in which `to_stack` takes them: one,
            or several where a weight is computed (a quantised one with its scales, one with its
            LoRA update).
        shape: `(S, R, C)`: S equal matrices of R rows and C columns.
        dtype: of the stack: that of the stored tensor, or that in which a weight is computed. A
            `spectral` layer of a real dtype (an AFNO block weight, which stores real and
            imaginary parts apart) gives a complex stack all the same.
        to_stack: loaded tensors to the `(S, R, C)` stack: a view wherever strides allow one, and
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
        name: its layer name.
        shape: of the tensor; of the stack when a whole layer was left out.
        reason: one line for the reader of a report.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a weight before it is loaded.

    Attributes:
        name: its name in the checkpoint or module.
        shape: its dimensions.
        dtype: as stored, or as `combine` returns it.
        identity: equal for two names of one and the same memory, None when that is not known.
        tensors: names of the stored tensors that it is computed from; empty for a stored one.
        combine: those tensors, loaded, to the weight, as a new tensor; None for a stored one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: Hashable | None = None
    tensors: tuple[str, ...] = ()
    combine: Callable[..., torch.Tensor] | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors to load."""
        return self.tensors or (self.name,)


class Found(NamedTuple):
    """A weight, and why no layer is made of it; an empty reason leaves it to the rules."""

    header: TensorHeader
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """A layer as a rule proposes it.

    Attributes:
        name: layer name.
        kind: as in `LayerSpec`.
        shape: `(S, R, C)`.
        to_stack: as in `LayerSpec`, of one tensor.
        left_out: why the layer is analysed only when an include pattern asks for it; empty for a
            layer that is analysed by default.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    to_stack: Callable[..., torch.Tensor]
    left_out: str = ""


@dataclass(frozen=True)
class Rows:
    """`count` rows from `start`, each `step` apart, of one matrix or of each of a stack.

    The matrices are transposed first if asked.
    """

    start: int
    count: int
    step: int = 1
    transposed: bool = False

    def used(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows alone, of as many dimensions as the weight has."""
        matrix = weight.mT if self.transposed else weight
        return matrix[..., self.start : self.start + self.count * self.step : self.step, :]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """`(S, count, C)`."""
        rows = self.used(weight)
        return rows if rows.dim() == 3 else rows.unsqueeze(0)


@dataclass(frozen=True)
class HeadRows:
    """Rows of q, k or v where the heads of one group stand together.

    `(groups * (queries + 2) * head_dim, C)`: in each group its query heads, one key head and one
    value head. A view when there is one group.
    """

    role: str
    groups: int
    queries: int

    def used(self, weight: torch.Tensor) -> torch.Tensor:
        """The role's heads, `(groups, heads, head_dim, C)`."""
        heads = weight.reshape(self.groups, self.queries + 2, -1, weight.shape[-1])
        first = {"q": 0, "k": self.queries, "v": self.queries + 1}[self.role]
        return heads.narrow(1, first, self.queries if self.role == "q" else 1)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """`(1, rows of the role, C)`."""
        return self.used(weight).flatten(0, 2).unsqueeze(0)


@dataclass(frozen=True)
class TrailingPositions:
    """`(a, b, *positions)` to one matrix per group and position.

    Group-major. Matrices are (a/groups) x b, or b x (a/groups) when `transposed`.
    """

    groups: int = 1
    transposed: bool = False

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """`(groups * positions, R, C)`."""
        kernels = weight.flatten(2)
        grouped = kernels.reshape(self.groups, -1, *kernels.shape[1:])  # (g, a/g, b, positions)
        order = (0, 3, 2, 1) if self.transposed else (0, 3, 1, 2)
        # With several groups and several positions the two have no common stride: that case copies.
        return grouped.permute(order).flatten(0, 1)


@dataclass(frozen=True)
class AsStored:
    """`(S, R, C)`, or `(R, C)` as a stack of one."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, of three dimensions."""
        return weight if weight.dim() == 3 else weight.unsqueeze(0)


@dataclass(frozen=True)
class RealAndImaginary:
    """`(2, S, R, C)` with real parts first to S complex matrices (always a copy)."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """`(S, R, C)`, complex."""
        if weight.dtype in (torch.float16, torch.bfloat16):  # torch has no complex type for these
            weight = weight.float()
        return torch.complex(weight[0], weight[1])


@dataclass(frozen=True)
class Combined:
    """A weight computed from several tensors, then its stack."""

    combine: Callable[..., torch.Tensor]
    to_stack: Callable[..., torch.Tensor]

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The stack of the combined weight."""
        return self.to_stack(self.combine(*tensors))


def used_region(
    to_stack: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """The views of the tensors that a stack is made from: all of them, or the rows that it takes.

    Example:
        >>> import torch
        >>> used_region(Rows(2, 2), (torch.zeros(6, 3),))[0].shape
        torch.Size([2, 3])
    """
    used = getattr(to_stack, "used", None)
    return tensors if used is None else (used(*tensors),)
