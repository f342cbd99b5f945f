"""The tensors of a module, each as the module uses it."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable

import torch
from torch import nn
from torch.nn.utils import parametrize

from farms_fast.weights.formats.quantised import QUANTISED_BUFFERS

__all__ = [
    "ON_META",
    "dequantised",
    "module_tensor",
    "no_data",
    "own_tensors",
    "sparse_layout",
    "tensor_identity",
]

ON_META = (
    "is on the meta device: load the weights first (model.load_state_dict(state_dict, "
    "assign=True), or from_pretrained without offloading)"
)
# What weight_norm, spectral_norm and pruning put in the place of a parameter, as forward hooks.
_HOOKED = re.compile(r"(.+)_(?:orig|g|v)")


def module_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The tensor behind one of a layer's `tensors` names, detached and not copied.

    Args:
        module: the module that the layers were made from.
        name: as in `LayerSpec.tensors`.

    Raises:
        ValueError: the module has no such tensor, or the tensor has no data.

    Example:
        >>> from torch import nn
        >>> module_tensor(nn.Sequential(nn.Linear(8, 4)), "0.weight").shape
        torch.Size([4, 8])
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        tensor = _effective(module.get_submodule(prefix), leaf)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"name: expected a tensor of {type(module).__name__}, got {name!r}")
    if tensor.is_meta:
        raise no_data(name)
    return tensor.detach()


def no_data(name: str) -> ValueError:
    """The error of a tensor without data."""
    return ValueError(f"{name}: {ON_META}")


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor of a class that holds a quantised weight, such as torchao's.

    Such a tensor shows the shape and dtype of its values. Any other tensor is returned as it is.
    """
    if type(tensor).dequantize is torch.Tensor.dequantize:
        return tensor
    values: torch.Tensor = tensor.dequantize()
    return values


def tensor_identity(tensor: torch.Tensor) -> Hashable | None:
    """A key that is equal for two tensors of the same memory, shape, strides and dtype."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    storage = tensor.untyped_storage()
    try:
        # All meta tensors have address 0, so there the storage object itself has to tell.
        address = storage._cdata if tensor.is_meta else storage.data_ptr()
    except RuntimeError:  # subclasses that wrap other tensors have no address of their own
        return None
    return (
        str(tensor.device),
        address,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def sparse_layout(tensor: torch.Tensor) -> str:
    """Why a tensor that is not dense cannot be analysed; empty for a dense one."""
    if tensor.layout is torch.strided:
        return ""
    return f"layout {str(tensor.layout).removeprefix('torch.')}: make it dense first"


def _effective(owner: nn.Module, leaf: str) -> torch.Tensor:
    """A module's tensor as its forward pass uses it, without changing the module."""
    if parametrize.is_parametrized(owner, leaf):
        # Spectral norm in training mode writes its buffers at each evaluation: take a copy's.
        with torch.no_grad():
            tensor = copy.deepcopy(owner.parametrizations[leaf]).eval()()  # type: ignore[index, union-attr]
    elif leaf in owner._parameters:
        # As it is stored: tensorly-torch's complex factors answer by attribute as another tensor.
        tensor = owner._parameters[leaf]
    else:
        tensor = getattr(owner, leaf)
    return dequantised(tensor) if isinstance(tensor, torch.Tensor) else tensor  # type: ignore[no-any-return]


def own_tensors(owner: nn.Module, prefix: str) -> list[tuple[str, torch.Tensor, str]]:
    """A module's own parameters: leaf name, tensor, and why it is not analysed (or nothing)."""
    rows: list[tuple[str, torch.Tensor, str]] = []
    if "parametrizations" in prefix.split("."):
        reason = "original of a parametrised weight, which is analysed as the module uses it"
        return [(leaf, p, reason) for leaf, p in owner.named_parameters(recurse=False)]
    seen: set[str] = set()
    for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
        match = _HOOKED.fullmatch(leaf)
        used = owner.__dict__.get(match[1]) if match else None
        if match is None or not isinstance(used, torch.Tensor):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            rows.append((leaf, parameter, "not initialised: run the module once" if lazy else ""))
            continue
        if match[1] not in seen:
            seen.add(match[1])
            rows.append((match[1], used, ""))
        rows.append((leaf, parameter, f"part of {match[1]}, analysed as the module uses it"))
    rows.extend(
        (leaf, buffer, "")
        for leaf, buffer in owner.named_buffers(recurse=False)
        # Of any dtype but one byte wide, a buffer of this name is no weight.
        if leaf in QUANTISED_BUFFERS and (leaf != "weight" or buffer.element_size() == 1)
    )
    if parametrize.is_parametrized(owner):
        names = owner.parametrizations.keys()  # type: ignore[operator, union-attr]
        rows.extend((leaf, _effective(owner, leaf), "") for leaf in names)
    return rows
