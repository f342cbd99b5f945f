"""What all sources share."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from farms_fast.weights.layers import layers_from_headers
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.stacks import LayerSpec, Patterns, Skipped, TensorHeader, WeightTransform


class Source(Protocol):
    """What the rest of the package asks of whatever holds weights."""

    @property
    def description(self) -> str:
        """A path or a class name, for titles."""

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """Layers to analyse, and what is not analysed with the reason; reads no weight."""

    def load(self, name: str) -> Tensor:
        """One tensor, named as in `LayerSpec.tensors`, where it lives; not to be written."""


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
        self._stored: dict[str, Any] = {}

    def layers(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        change: WeightTransform | None = None,
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_headers`; what is no tensor to load is listed as skipped too."""
        layers, skipped = layers_from_headers(
            self.headers, include, exclude, config=self._config, change=change
        )
        return layers, skipped + self.skipped

    def load(self, name: str) -> Tensor:
        """The tensor, detached; from files, it is on the CPU.

        Raises:
            ValueError: there is no tensor of this name, or its file has changed meanwhile.
        """
        if name not in self._stored:
            raise ValueError(f"name: expected a tensor of {self.description}, got {name!r}")
        return self._load(name, self._stored[name])

    def _load(self, name: str, stored: Any) -> Tensor:
        """The tensor of a name, from what the source has stored for it."""
        raise NotImplementedError
