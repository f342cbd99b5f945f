"""What all sources share, and weights in memory: modules and mappings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from farms_fast.core.arrays import from_numpy
from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.module_tensors import (
    data_of,
    module_tensor,
    shape_of,
    sparse_layout,
    tensor_identity,
)
from farms_fast.weights.sources.containers import TreeView, find_weights
from farms_fast.weights.stacks import (
    Globs,
    Layers,
    Skipped,
    TensorHeader,
    WeightTransform,
)


class Source(Protocol):
    """What the rest of the package asks of whatever holds weights."""

    @property
    def description(self) -> str:
        """A path or a class name, for titles."""

    def layers(
        self, include: Globs = None, exclude: Globs = None, *, layout: str = "auto"
    ) -> Layers:
        """Layers to analyse, and what is not analysed with the reason; reads no weight."""

    def load(self, name: str) -> Tensor:
        """One tensor, named as in `LayerSpec.tensors`, where it lives; not to be written."""


class HeaderSource(ABC):
    """A source that knows its tensors by `headers`; `skipped` is what else it holds."""

    def __init__(self, description: str, config: ModelConfig | None = None) -> None:
        self.description = description
        self.headers: list[TensorHeader] = []
        self.skipped: list[Skipped] = []
        self._config = config
        self._stored: dict[str, Any] = {}

    def layers(
        self,
        include: Globs = None,
        exclude: Globs = None,
        *,
        change: WeightTransform | None = None,
        layout: str = "auto",
    ) -> Layers:
        """As `layers_from_headers`; what is no tensor to load is listed as skipped too."""
        layers, skipped = layers_from_headers(
            self.headers, include, exclude, config=self._config, change=change, layout=layout
        )
        return layers, skipped + self.skipped

    def load(self, name: str) -> Tensor:
        """The tensor, detached; ValueError when its file has changed meanwhile."""
        if name not in self._stored:
            raise ValueError(f"name: expected a tensor of {self.description}, got {name!r}")
        return self._load(name, self._stored[name])

    @abstractmethod
    def _load(self, name: str, stored: Any) -> Tensor:
        """The tensor, from what the source has noted of it."""


class ModuleSource:
    """The parameters of a module; each `load` reads them anew."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.description = type(module).__name__

    def layers(
        self,
        include: Globs = None,
        exclude: Globs = None,
        *,
        change: WeightTransform | None = None,
        layout: str = "auto",
    ) -> Layers:
        """As `layers_from_module`."""
        return layers_from_module(self.module, include, exclude, change=change, layout=layout)

    def load(self, name: str) -> Tensor:
        """As `module_tensor`."""
        return module_tensor(self.module, name)


class MappingSource(HeaderSource):
    """Tensors or arrays by name, also wrapped in a checkpoint's mapping or nested as Flax's are.

    `key` is the dotted path of the mapping to take where there are several.
    """

    def __init__(
        self, tensors: Mapping[str, Any], description: str = "state dict", key: str | None = None
    ) -> None:
        super().__init__(description)
        weights = find_weights(tensors, _VIEW, description, key)
        self.skipped += weights.skipped
        for name, value in weights.tensors.items():
            if isinstance(value, Tensor) and (reason := sparse_layout(value)):
                self.skipped.append(Skipped(name, shape_of(value), reason))
                continue
            if not isinstance(value, (Tensor, np.ndarray)):
                try:
                    value = torch.utils.dlpack.from_dlpack(value)
                except (BufferError, RuntimeError, TypeError) as error:
                    self.skipped.append(Skipped(name, tuple(value.shape), f"not read: {error}"))
                    continue
            header = _header(name, value)
            if isinstance(header, Skipped):
                self.skipped.append(header)
                continue
            self._stored[name] = value
            self.headers.append(header)

    def _load(self, name: str, stored: Tensor | np.ndarray[Any, Any]) -> Tensor:
        return data_of(name, stored) if isinstance(stored, Tensor) else from_numpy(stored)


def _children(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, nn.Module):
        return dict(value.state_dict())
    if isinstance(value, (list, tuple)):
        return {str(position): entry for position, entry in enumerate(value)}
    return value if isinstance(value, Mapping) else None


def _shape(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, (Tensor, np.ndarray)) and not hasattr(value, "__dlpack__"):
        return None
    return shape_of(value) if isinstance(value, Tensor) else tuple(value.shape)


_VIEW = TreeView(_children, _shape, is_module=lambda value: isinstance(value, nn.Module))


def _header(name: str, value: Tensor | np.ndarray[Any, Any]) -> TensorHeader | Skipped:
    if isinstance(value, Tensor):
        return TensorHeader(name, tuple(value.shape), value.dtype, tensor_identity(value))
    if isinstance(value, np.ma.MaskedArray):
        return Skipped(name, value.shape, "an array with a mask: fill it first")
    try:
        dtype = torch.from_numpy(np.empty(0, value.dtype.newbyteorder("="))).dtype
    except TypeError:
        return Skipped(name, value.shape, f"dtype {value.dtype} is none that torch can hold")
    memory = (value.ctypes.data, value.shape, value.strides, dtype) if value.size else None
    return TensorHeader(name, value.shape, dtype, memory)
