"""What all sources share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from farms_fast.weights.layers import LayerSpec, Skipped, TensorHeader, layers_from_headers
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.stacks import Found

__all__ = ["BaseSource", "Change", "HeaderSource", "Patterns", "Source", "no_such_tensor"]

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
        """As in `Source`, of the weights as `change` leaves them."""


class HeaderSource:
    """A source that knows its tensors by name, shape and dtype, and its layers from those.

    Args:
        description: for titles and messages.
        config: of the model.

    Attributes:
        description: for titles and messages.
        headers: the tensors that it can load.
        skipped: what else it holds, with the reason.
    """

    def __init__(self, description: str, config: ModelConfig | None) -> None:
        self.description = description
        self.headers: list[TensorHeader] = []
        self.skipped: list[Skipped] = []
        self._config = config

    def layers(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        change: Change | None = None,
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_headers`; what is no tensor to load is listed as skipped too."""
        layers, skipped = layers_from_headers(
            self.headers, include, exclude, config=self._config, change=change
        )
        return layers, skipped + self.skipped


def no_such_tensor(description: str, name: str) -> ValueError:
    """The error of a `load` that is asked for what is not there."""
    return ValueError(f"name: expected a tensor of {description}, got {name!r}")
