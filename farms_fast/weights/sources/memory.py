"""Weights in memory: modules and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farms_fast.core.arrays import from_numpy
from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.module_tensors import (
    ON_META,
    dequantised,
    module_tensor,
    sparse_layout,
    tensor_identity,
)
from farms_fast.weights.sources.base import HeaderSource
from farms_fast.weights.stacks import LayerSpec, Patterns, Skipped, TensorHeader, WeightTransform

# Names under which training scripts put the weights, beside an optimiser's state and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class ModuleSource:
    """The parameters of a module; each `load` reads them anew."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.description = type(module).__name__

    def layers(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        change: WeightTransform | None = None,
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_module`."""
        return layers_from_module(self.module, include, exclude, change=change)

    def load(self, name: str) -> Tensor:
        """As `module_tensor`."""
        return module_tensor(self.module, name)


class MappingSource(HeaderSource):
    """Tensors or NumPy arrays by name, such as a state dict or an unpickled checkpoint.

    Args:
        tensors: names to tensors; a state dict wrapped under `state_dict`, `model_state_dict`,
            `model` or `module` is unwrapped.
        description: for titles and messages.
        config: of the model.

    Raises:
        TypeError: a key is not a string, or an array's dtype has no counterpart in torch.
        ValueError: there is no tensor in it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "state dict",
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__(description, config)
        for name, value in self._unwrapped(tensors).items():
            if not isinstance(name, str):
                raise TypeError(f"{description}: expected names as keys, got {name!r}")
            if not isinstance(value, (Tensor, np.ndarray)):
                reason = f"not a tensor: {type(value).__name__}"
                self.skipped.append(Skipped(name, (), reason))
            elif isinstance(value, Tensor) and sparse_layout(value):
                self.skipped.append(Skipped(name, tuple(value.shape), sparse_layout(value)))
            else:
                self._stored[name] = value
                self.headers.append(_header(name, value))
        if not self._stored:
            keys = ", ".join(repr(key) for key in list(tensors)[:5])
            raise ValueError(
                f"{description}: expected tensors by name, got a mapping without any tensor"
                f" (keys: {keys or 'none'})"
            )

    def _load(self, name: str, stored: Tensor | np.ndarray[Any, Any]) -> Tensor:
        """The tensor; an array as a tensor of the same memory where torch allows it."""
        if not isinstance(stored, Tensor):
            return from_numpy(stored)
        if stored.is_meta:
            raise ValueError(f"{name}: {ON_META}")
        return dequantised(stored.detach())

    def _unwrapped(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """The innermost state dict; its neighbours on the way are noted as skipped."""
        while not any(isinstance(v, (Tensor, np.ndarray)) for v in tensors.values()):
            wrapper = next((w for w in _WRAPPERS if isinstance(tensors.get(w), Mapping)), None)
            if wrapper is None:
                break
            self.skipped.extend(
                Skipped(str(key), (), f"beside {wrapper!r}, which holds the weights")
                for key in tensors
                if key != wrapper
            )
            tensors = tensors[wrapper]
        return tensors


def _header(name: str, value: Tensor | np.ndarray[Any, Any]) -> TensorHeader:
    if isinstance(value, Tensor):
        return TensorHeader(name, tuple(value.shape), value.dtype, tensor_identity(value))
    try:
        dtype = torch.from_numpy(np.empty(0, value.dtype.newbyteorder("="))).dtype
    except TypeError:
        raise TypeError(
            f"{name}: expected an array of numbers that torch can hold, got dtype {value.dtype}"
        ) from None
    memory = (value.ctypes.data, value.shape, value.strides, dtype) if value.size else None
    return TensorHeader(name, value.shape, dtype, memory)
