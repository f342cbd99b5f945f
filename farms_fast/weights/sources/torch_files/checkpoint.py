"""What a pickled checkpoint holds, and how to look at the modules in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from farms_fast.weights.formats.quantised import QUANTISED_BUFFERS
from farms_fast.weights.sources.containers import TreeView
from farms_fast.weights.sources.stored_tensors import FileBytes, StoredTensor
from farms_fast.weights.sources.torch_files.machine import Global, StandIn
from farms_fast.weights.sources.torch_files.tensors import (
    NumpyArray,
    TorchTensor,
    as_stored,
)

# Where a TorchScript archive's constants are put among its modules.
CONSTANTS = "CONSTANTS"


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        tree: of mappings, lists, stand-ins and tensors.
        swapped: whether its numbers have their bytes in the other order.
        buffers: names of the buffers of TorchScript's classes.
    """

    tree: Any
    swapped: bool = False
    buffers: Mapping[str, frozenset[str]] | None = None

    def view(self) -> TreeView:
        """How to look at the tree."""
        return TreeView(self._children, self._shape, _type_name, self._is_module)

    def stored(self, value: Any) -> StoredTensor | None:
        """The tensor that a value of the tree is, None for any other."""
        return as_stored(value, self.swapped)

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        stored = self.stored(value)
        return None if stored is None else stored.shape

    def _is_module(self, value: Any) -> bool:
        return isinstance(value, StandIn) and (_is_module(value) or is_scripted(value))

    def _children(self, value: Any) -> Mapping[Any, Any] | None:
        if isinstance(value, dict):
            return value
        if isinstance(value, (list, tuple)):
            if any(isinstance(entry, _HOLDERS) for entry in value):
                return {str(position): entry for position, entry in enumerate(value)}
            return None
        if not isinstance(value, StandIn):
            return None
        if _is_module(value):
            return self._module_entries(value.state)
        if is_scripted(value):
            return self._scripted_entries(value)
        return value.entries

    def _module_entries(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """Parameters, buffers and modules; any of the three may be anything in a hostile file."""
        entries: dict[Any, Any] = {}
        for name, tensor in _items(state["_parameters"]):
            if tensor is not None:
                entries[name] = tensor
        for name, tensor in _items(state.get("_buffers")):
            stored = self.stored(tensor)
            if stored is not None:
                entries[name] = _of_module(name, stored, entries)
        entries.update((name, m) for name, m in _items(state["_modules"]) if m is not None)
        return entries

    def _scripted_entries(self, value: StandIn) -> dict[Any, Any]:
        buffers = (self.buffers or {}).get(value.name, frozenset())
        entries: dict[Any, Any] = {}
        for name, entry in value.state.items():
            if isinstance(entry, _OF_SCRIPTED) or name == CONSTANTS:
                stored = self.stored(entry) if name in buffers else None
                entries[name] = entry if stored is None else _of_module(name, stored, value.state)
        return entries


_OF_SCRIPTED = (StandIn, TorchTensor)
_HOLDERS = (*_OF_SCRIPTED, dict, list, tuple, StoredTensor, NumpyArray)


# What pruning and spectral normalisation keep beside a parameter `weight_orig`.
_BESIDE_ORIGINAL = re.compile(r"(.+)_(?:mask|u|v)")


def _of_module(name: Any, buffer: StoredTensor, beside: Mapping[Any, Any]) -> StoredTensor:
    """A module's buffer, with a reason against it unless it is a part of a weight."""
    if buffer.reason or _is_of_weight(name, buffer, beside):
        return buffer
    return replace(buffer, reason="a buffer of its module, no weight")


def _is_of_weight(name: Any, buffer: StoredTensor, parameters: Mapping[Any, Any]) -> bool:
    """Whether a module's buffer is a part of a weight: quantised, or what the weight is made of."""
    if name in QUANTISED_BUFFERS:
        return name != "weight" or buffer.dtype.itemsize == 1
    if name == "mask" and "weight" in parameters:
        return True
    original = _BESIDE_ORIGINAL.fullmatch(name) if isinstance(name, str) else None
    return original is not None and f"{original[1]}_orig" in parameters


def _items(entries: Any) -> list[tuple[Any, Any]]:
    return list(entries.items()) if isinstance(entries, dict) else []


def _is_module(value: StandIn) -> bool:
    """Whether it is a torch.nn.Module, by what its class keeps in its state."""
    return (
        isinstance(value.state, dict) and "_parameters" in value.state and "_modules" in value.state
    )


def is_scripted(value: StandIn) -> bool:
    """Whether it is a module of TorchScript."""
    return value.name.startswith("__torch__.") and isinstance(value.state, dict)


def _type_name(value: Any) -> str:
    if isinstance(value, (StandIn, Global)):
        return value.name.rpartition(".")[2]
    if isinstance(value, (TorchTensor, NumpyArray)):
        return "Tensor" if isinstance(value, TorchTensor) else "ndarray"
    return "bytes" if isinstance(value, FileBytes) else type(value).__name__
