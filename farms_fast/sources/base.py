"""What all sources share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from farms_fast.layers import LayerSpec, Skipped
from farms_fast.stacks import Found

__all__ = ["BaseSource", "Change", "Patterns", "Source", "no_such_tensor"]

Patterns = str | Sequence[str] | None
Change = Callable[[Sequence[Found]], list[Found]]


class Source(Protocol):
    """What the rest of the package asks of a place that holds weights."""

    @property
    def description(self) -> str:
        """A path or a class name, for titles."""

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """Layers to analyse, and what is not analysed with the reason; reads no weight."""

    def load(self, name: str) -> torch.Tensor:
        """One tensor, named as in `LayerSpec.tensors`, where it lives; not to be written."""


class BaseSource(Source, Protocol):
    """A source that can serve as the base of an adapter."""

    def layers(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        change: Change | None = None,
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As in `Source`, of the weights as ``change`` leaves them."""


def no_such_tensor(description: str, name: str) -> ValueError:
    """The error of a `load` that is asked for what is not there."""
    return ValueError(f"name: expected a tensor of {description}, got {name!r}")
