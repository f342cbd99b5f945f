"""Layers by name, and their stacks, checked against what was promised of them."""

from __future__ import annotations

import torch
from torch import nn

from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.module_tensors import module_tensor
from farms_fast.weights.stacks import LayerSpec, Skipped, TensorHeader


def header(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorHeader:
    return TensorHeader(name, shape, dtype)


def by_header(*headers: TensorHeader, **patterns: object) -> dict[str, LayerSpec]:
    layers, _ = layers_from_headers(headers, **patterns)
    return {layer.name: layer for layer in layers}


def by_module(module: nn.Module, **patterns: object) -> dict[str, LayerSpec]:
    layers, _ = layers_from_module(module, **patterns)
    return {layer.name: layer for layer in layers}


def reasons(found: tuple[list[LayerSpec], list[Skipped]]) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in found[1]}


def stack_of(module: nn.Module, layer: LayerSpec) -> torch.Tensor:
    """The layer's stack, checked against what the plan promised and for aliasing."""
    tensors = [module_tensor(module, name) for name in layer.tensors]
    before = [tensor.clone() for tensor in tensors]
    stack = layer.to_stack(*tensors)
    assert stack.shape == layer.shape
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    return stack


def shares_memory(stack: torch.Tensor, tensor: torch.Tensor) -> bool:
    return stack.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
