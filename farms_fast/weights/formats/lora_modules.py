"""LoRA layers in modules as PEFT wraps them, recognised by their structure.

Such a layer has the wrapped module as `base_layer` and its factors by adapter in `lora_A` and
`lora_B`; a module that is trained as a whole has its copies in `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from farms_fast.weights.formats.lora import Update, is_transposed, with_updates
from farms_fast.weights.stacks import Found, TensorHeader

__all__ = ["Wrapper", "module_wrappers", "visible_name"]


@dataclass(frozen=True)
class Wrapper:
    """A module that stands for another one.

    Attributes:
        path: its name.
        module: it.
        children: the names of its submodules on the way to the module in use, such as
            `("base_layer",)` or `("modules_to_save", "default")`.
        adapters: active LoRA adapters, empty when they are merged already or switched off.
    """

    path: str
    module: nn.Module
    children: tuple[str, ...]
    adapters: tuple[str, ...] = ()

    def updated(self, base: TensorHeader) -> Found:
        """The wrapped module's weight with the updates of the active adapters."""
        owner: Any = self.module
        if hasattr(owner, "parameter_name"):
            changed = self.adapters and base.name.rpartition(".")[2] == owner.parameter_name
            reason = "parameter with a LoRA update, which is read of layers only"
            return Found(base, reason if changed else "")
        if not base.name.endswith("weight"):
            return Found(base)
        updates: list[Update] = []
        names: list[str] = []
        problem = ""
        for adapter in self.adapters:
            embedding = adapter in getattr(owner, "lora_embedding_A", {})
            parts = (
                [f"lora_embedding_{what}.{adapter}" for what in "AB"]
                if embedding
                else [f"lora_{what}.{adapter}.weight" for what in "AB"]
            )
            dora = bool(getattr(owner, "use_dora", {}).get(adapter))
            a, b = (_parameter(owner, part) for part in parts)
            transposed = is_transposed(
                base.shape, a.shape, b.shape, getattr(owner, "fan_in_fan_out", False) is True
            )
            if transposed is None:
                problem = f"A {tuple(a.shape)} and B {tuple(b.shape)} do not make a {base.shape}"
            elif dora and embedding:
                problem = "DoRA of an embedding"
            elif not dora and adapter in getattr(owner, "lora_variant", {}):
                problem = f"{type(owner.lora_variant[adapter]).__name__} is not understood"
            else:
                parts += [f"lora_magnitude_vector.{adapter}.weight"] if dora else []
                updates.append(Update(float(owner.scaling[adapter]), transposed, dora))
                names += [f"{self.path}.{part}" if self.path else part for part in parts]
        if problem:
            return Found(base, f"weight whose LoRA update cannot be applied: {problem}")
        return Found(with_updates(base, updates, names) if updates else base)


def _parameter(owner: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(owner.get_submodule(path), leaf)
    return found


def module_wrappers(module: nn.Module) -> dict[str, Wrapper]:
    """The LoRA layers and retrained modules in a module as PEFT makes them, by name."""
    found: dict[str, Wrapper] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        children = owner._modules
        if "base_layer" in children and "lora_A" in children and hasattr(owner, "scaling"):
            tables = [getattr(owner, table, {}) for table in ("lora_A", "lora_embedding_A")]
            merged = bool(getattr(owner, "merged", False))
            active = () if merged else _active(owner)
            own = tuple(name for name in active if any(name in table for table in tables))
            found[path] = Wrapper(path, owner, ("base_layer",), own)
        elif "original_module" in children and "modules_to_save" in children:
            copies: Any = owner.modules_to_save
            used = next((name for name in _active(owner) if name in copies), None)
            way = ("original_module",) if used is None else ("modules_to_save", used)
            found[path] = Wrapper(path, owner, way)
    return found


def _active(owner: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a wrapper's forward pass uses."""
    if getattr(owner, "disable_adapters", False) is True:
        return ()
    active = getattr(owner, "active_adapters", None) or getattr(owner, "active_adapter", None) or ()
    return (active,) if isinstance(active, str) else tuple(active)


def visible_name(name: str, wrappers: Mapping[str, Wrapper]) -> tuple[str, str]:
    """The name of a tensor as if nothing were wrapped, or why it is not the one in use.

    Args:
        name: in the wrapped module.
        wrappers: from `module_wrappers`.

    Returns:
        The name and an empty reason, or the name unchanged and the reason.
    """
    if not wrappers:
        return name, ""
    pieces, kept, place = name.split("."), [], 0
    while place < len(pieces):
        wrapper = wrappers.get(".".join(pieces[:place]))
        if wrapper is None:
            kept.append(pieces[place])
            place += 1
            continue
        if tuple(pieces[place : place + len(wrapper.children)]) != wrapper.children:
            whole = ".".join(kept)
            if wrapper.children == ("base_layer",):
                return name, f"part of the LoRA update of {whole}"
            return name, f"not in use: {'.'.join([*kept, *wrapper.children])} is"
        place += len(wrapper.children)  # the module that it leads to may be a wrapper again
    return ".".join(kept), ""
