"""A PEFT adapter together with the base that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from farms_fast.weights.formats.lora import Adapter
from farms_fast.weights.sources.base import HeaderSource
from farms_fast.weights.sources.memory import ModuleSource
from farms_fast.weights.stacks import LayerSpec, Patterns, Skipped

_PREFIX = "adapter:"


class AdapterSource:
    """The weights of a base model as an adapter changes them.

    Args:
        base: where the base's weights are.
        adapter: where the adapter's tensors are.
        config: the entries of its `adapter_config.json`.

    Raises:
        ValueError: it is not of LoRA, or needs more than its tensors and its base.
    """

    def __init__(
        self, base: HeaderSource | ModuleSource, adapter: HeaderSource, config: Mapping[str, Any]
    ) -> None:
        self.description = f"{base.description} with {adapter.description}"
        self.base = base
        self._adapter = adapter
        self._apply = Adapter(config, adapter.headers, adapter.description, _PREFIX)

    def layers(
        self, include: Patterns = None, exclude: Patterns = None
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """The base's layers, in effect; ValueError when the adapter has none of its weights."""
        layers, skipped = self.base.layers(include, exclude, change=self._apply)
        return layers, skipped + self._adapter.skipped

    def load(self, name: str) -> Tensor:
        """One tensor of the base, or of the adapter where the name begins with `adapter:`."""
        if name.startswith(_PREFIX):
            return self._adapter.load(name.removeprefix(_PREFIX))
        return self.base.load(name)
