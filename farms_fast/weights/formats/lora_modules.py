"""LoRA layers in modules as PEFT wraps them, recognised by their structure.

A LoRA layer has the wrapped module as `base_layer` and its factors by adapter in `lora_A` and
`lora_B`. A module that is retrained as such has its copies in `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from farms_fast.weights.formats.lora import (
    UPDATED_PARAMETER,
    LoraUpdate,
    is_transposed,
    not_applied,
    not_real,
    with_updates,
)
from farms_fast.weights.stacks import TensorHeader, WeightCandidate


@dataclass(frozen=True)
class Wrapper:
    """A module of PEFT around another one.

    `children` lead to the module in use, as `("base_layer",)` or `("modules_to_save", "default")`.
    """

    path: str
    module: nn.Module
    children: tuple[str, ...]
    adapters: tuple[str, ...] = ()

    def updated(self, base: TensorHeader) -> WeightCandidate:
        """The wrapped module's weight with the updates of the active adapters."""
        owner: Any = self.module
        if hasattr(owner, "parameter_name"):
            changed = self.adapters and base.leaf == owner.parameter_name
            return WeightCandidate(base, UPDATED_PARAMETER if changed else "")
        if not base.name.endswith("weight"):
            return WeightCandidate(base)
        updates: list[LoraUpdate] = []
        names: list[str] = []
        problem = ""
        for adapter in self.adapters:
            embedding = adapter in getattr(owner, "lora_embedding_A", {})
            start, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
            parts = [f"{start}{factor}.{adapter}{end}" for factor in "AB"]
            dora = bool(getattr(owner, "use_dora", {}).get(adapter))
            a, b = (_parameter(owner, part) for part in parts)
            fan_in_fan_out = getattr(owner, "fan_in_fan_out", False) is True
            transposed = is_transposed(base.shape, a.shape, b.shape, fan_in_fan_out)
            if isinstance(transposed, str):
                problem = transposed
            elif not_reals := not_real([base.dtype, a.dtype, b.dtype]):
                problem = not_reals
            elif dora and embedding:
                problem = "DoRA of an embedding"
            elif not dora and adapter in getattr(owner, "lora_variant", {}):
                problem = f"{type(owner.lora_variant[adapter]).__name__} is not understood"
            else:
                parts += [f"lora_magnitude_vector.{adapter}.weight"] if dora else []
                updates.append(LoraUpdate(float(owner.scaling[adapter]), transposed, dora))
                names += [f"{self.path}.{part}" if self.path else part for part in parts]
        if problem:
            return not_applied(base, problem)
        return with_updates(base, updates, names) if updates else WeightCandidate(base)


def _parameter(owner: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    parameter: Tensor = getattr(owner.get_submodule(path), leaf)
    return parameter


def module_wrappers(module: nn.Module) -> dict[str, Wrapper]:
    """The LoRA layers and retrained modules in a module, by name."""
    wrappers: dict[str, Wrapper] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        children = owner._modules
        if "base_layer" in children and "lora_A" in children and hasattr(owner, "scaling"):
            tables = [getattr(owner, table, {}) for table in ("lora_A", "lora_embedding_A")]
            active = () if getattr(owner, "merged", False) else _active(owner)
            own = tuple(name for name in active if any(name in table for table in tables))
            wrappers[path] = Wrapper(path, owner, ("base_layer",), own)
        elif "original_module" in children and "modules_to_save" in children:
            copies: Any = owner.modules_to_save
            used = next((name for name in _active(owner) if name in copies), None)
            way = ("original_module",) if used is None else ("modules_to_save", used)
            wrappers[path] = Wrapper(path, owner, way)
    return wrappers


def _active(owner: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a wrapper's forward pass uses."""
    if getattr(owner, "disable_adapters", False) is True:
        return ()
    active = getattr(owner, "active_adapters", None) or getattr(owner, "active_adapter", None) or ()
    return (active,) if isinstance(active, str) else tuple(active)


def visible_name(name: str, wrappers: Mapping[str, Wrapper]) -> tuple[str, str]:
    """The name as if nothing were wrapped, or the name as it is and why it is not in use."""
    if not wrappers:
        return name, ""
    pieces, visible, at = name.split("."), [], 0
    while at < len(pieces):
        wrapper = wrappers.get(".".join(pieces[:at]))
        if wrapper is None:
            visible.append(pieces[at])
            at += 1
            continue
        if tuple(pieces[at : at + len(wrapper.children)]) != wrapper.children:
            if wrapper.children == ("base_layer",):
                return name, f"part of the LoRA update of {'.'.join(visible)}"
            return name, f"not in use: {'.'.join([*visible, *wrapper.children])} is"
        at += len(wrapper.children)  # the module that it leads to may be a wrapper again
    return ".".join(visible), ""
