"""Weights that are in memory already: modules and mappings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from farms_fast.core.arrays import from_numpy
from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.module_tensors import (
    dequantised,
    module_tensor,
    no_data,
    sparse_layout,
    tensor_identity,
)
from farms_fast.weights.sources.base import HeaderSource
from farms_fast.weights.stacks import LayerSpec, Patterns, Skipped, TensorHeader, WeightTransform

__all__ = ["MappingSource", "ModuleSource"]

# Names under which training scripts put the weights, beside an optimiser's state and the like.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class ModuleSource:
    """The parameters of a module, as they are at the time of each `load`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def description(self) -> str:
        """The module's class name."""
        return type(self.module).__name__

    def layers(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        *,
        change: WeightTransform | None = None,
    ) -> tuple[list[LayerSpec], list[Skipped]]:
        """As `layers_from_module`."""
        return layers_from_module(self.module, include, exclude, change=change)

    def load(self, name: str) -> torch.Tensor:
        """The parameter, detached; raises ValueError for a name that the module does not have."""
        return module_tensor(self.module, name)


class MappingSource(HeaderSource):
    """Tensors or NumPy arrays by name, such as a state dict or an unpickled checkpoint.

    Args:
        tensors: names to tensors; a state dict wrapped under `state_dict`, `model_state_dict`,
            `model` or `module` is unwrapped.
        description: for titles and messages.
        skipped: what is known beforehand not to be analysed.
        config: of the model.

    Raises:
        TypeError: a key is not a string, or an array's dtype has no counterpart in torch.
        ValueError: there is no tensor in it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        description: str = "state dict",
        skipped: Sequence[Skipped] = (),
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__(description, config)
        self.skipped += skipped
        for name, value in self._unwrapped(tensors).items():
            if not isinstance(name, str):
                raise TypeError(f"{description}: expected names as keys, got {name!r}")
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                reason = f"not a tensor: {type(value).__name__}"
                self.skipped.append(Skipped(name, (), reason))
            elif isinstance(value, torch.Tensor) and sparse_layout(value):
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

    def _load(self, name: str, stored: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
        """The tensor; an array as a tensor of the same memory where torch allows it."""
        if not isinstance(stored, torch.Tensor):
            return from_numpy(stored)
        if stored.is_meta:
            raise no_data(name)
        return dequantised(stored.detach())

    def _unwrapped(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """The innermost state dict; its neighbours on the way are noted as skipped."""
        while not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in tensors.values()):
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


def _header(name: str, value: torch.Tensor | np.ndarray[Any, Any]) -> TensorHeader:
    if isinstance(value, torch.Tensor):
        return TensorHeader(name, tuple(value.shape), value.dtype, tensor_identity(value))
    try:
        dtype = torch.from_numpy(np.empty(0, value.dtype.newbyteorder("="))).dtype
    except TypeError:
        raise TypeError(
            f"{name}: expected an array of numbers that torch can hold, got dtype {value.dtype}"
        ) from None
    memory = (value.ctypes.data, value.shape, value.strides, dtype) if value.size else None
    return TensorHeader(name, value.shape, dtype, memory)
