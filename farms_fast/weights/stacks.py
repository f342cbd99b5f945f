"""What is known of tensors, weights and layers before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

Globs = str | Sequence[str] | None
# How a kernel's dimensions go: told by the tensor itself, (out, in, *positions), or
# (*positions, in, out).
LAYOUTS = ("auto", "torch", "channels_last")
# Keras and TensorFlow append the number of a variable's output to its name.
_OUTPUT = ":0"
# A recipe of `farms_fast.weights.recipes`, or a caller's own function.
ToTensor = Callable[..., Tensor]


def check_layout(layout: object) -> None:
    """Raises ValueError unless it is one of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")


def leaf_name(name: str) -> str:
    """What stands after the last dot or slash, without the `:0` of a TensorFlow variable.

    Example:
        >>> leaf_name("encoder.fc.weight"), leaf_name("conv2d/kernel:0")
        ('weight', 'kernel')
    """
    stem = name.removesuffix(_OUTPUT)
    return stem[_leaf_start(stem) :]


def _leaf_start(name: str) -> int:
    return max(name.rfind("."), name.rfind("/")) + 1


@dataclass(frozen=True)
class LayerSpec:
    """One layer: which tensors it reads and how they become a stack of matrices.

    Attributes:
        name: module name, or tensor name without a trailing `.weight`; a part of a fused tensor
            has its role appended (`attn.in_proj.q`, `lstm.weight_ih_l0.f`).
        kind: `linear`, `attention`, `conv1d`..`conv3d`, `conv_transpose1d`..`conv_transpose3d`,
            `lstm`, `gru`, `rnn`, `experts`, `bilinear`, `spectral`, `stacked` (any other stack of
            matrices) or `embedding`.
        tensors: what `to_stack` takes; several where a weight is computed, as from its scales.
        shape: `(S, R, C)`: S equal matrices of R rows and C columns.
        dtype: of the stored tensor, or of the computed weight. A `spectral` layer that stores
            real and imaginary parts apart has a real dtype and gives a complex stack.
        to_stack: loaded tensors to the `(S, R, C)` stack.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    to_stack: ToTensor


@dataclass(frozen=True)
class Skipped:
    """A tensor, or a part of one, that is not analysed, and why; `name` is its layer name.

    `shape` is the tensor's, or the stack's when a whole layer was left out.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


Layers = tuple[list[LayerSpec], list[Skipped]]


@dataclass(frozen=True)
class TensorHeader:
    """What is known of a weight before it is loaded.

    Attributes:
        name: in the checkpoint or module.
        shape: the tensor's, or the computed weight's.
        dtype: as stored, or as `combine` returns it.
        identity: equal for two names of one and the same memory, None when that is not known.
        tensors: names of the stored tensors that it is computed from; empty for a stored one.
        combine: those tensors, loaded, to the weight; None for a stored one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: Hashable | None = None
    tensors: tuple[str, ...] = ()
    combine: ToTensor | None = None

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors to load."""
        return self.tensors or (self.name,)

    @cached_property
    def leaf(self) -> str:
        """The name within the module."""
        return leaf_name(self.name)

    @cached_property
    def _before_leaf(self) -> str:
        return self.name[: self.name.rindex(self.leaf)] if self.leaf else self.name

    @property
    def module(self) -> str:
        """The name of the module that has it."""
        return self._before_leaf[:-1]

    def neighbour(self, leaf: str) -> str:
        """The name of the tensor `leaf` of the same module."""
        before = self._before_leaf
        return before + leaf + self.name[len(before) + len(self.leaf) :]


class WeightCandidate(NamedTuple):
    """A weight that may become layers, and why it does not; an empty reason leaves it to rules."""

    header: TensorHeader
    reason: str = ""

    @classmethod
    def computed(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        parts: Sequence[TensorHeader],
        combine: ToTensor,
    ) -> WeightCandidate:
        """The weight that `combine` makes of stored parts."""
        known = all(part.identity is not None for part in parts)
        identity = (*(part.identity for part in parts), combine) if known else None
        tensors = tuple(name for part in parts for name in part.stored)
        return cls(TensorHeader(name, shape, dtype, identity, tensors, combine))


# What an adapter, or a caller, makes of the weights of a model.
WeightTransform = Callable[[Sequence[WeightCandidate]], list[WeightCandidate]]


@dataclass(frozen=True)
class Part:
    """A layer that a rule makes of a tensor; `left_out` says why only `include` brings it in."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    to_stack: ToTensor
    left_out: str = ""
