"""A model's modules: their devices, moves between devices, and temporary changes of mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from farms_fast.adapters.pruning.oom import is_out_of_memory, release_memory
from farms_fast.core.arguments import resolve_device
from farms_fast.engine.machine import machine_of


def block_device(device: str | torch.device | None, default: torch.device) -> torch.device:
    """The device that an argument names, with its index, so that it equals a tensor's device."""
    resolved = resolve_device(device, default)
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter; the CPU if there is none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that takes token ids; None where a model has no `get_input_embeddings`."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings if isinstance(embeddings, nn.Module) else None


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model takes its token ids."""
    return device_of(input_embeddings(model) or model)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Moves a module to a device, or leaves all of it where it was if that fails."""
    before = device_of(module)
    if before == device:
        return
    try:
        module.to(device)
    except BaseException:
        module.to(before)
        raise


def place_model(model: nn.Module, device: torch.device, memory: int | None = None) -> int:
    """Moves a model to a device if it takes at most half of the memory budget (bytes) there.

    The budget is half of the device's memory by default. The model stays where it is if the device
    runs out of memory. Returns the bytes of the budget that the model leaves; on the CPU, where it
    is loaded anyway, the model does not count.
    """
    budget = machine_of(device).memory // 2 if memory is None else memory
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type == "cpu" or 2 * weights > budget:
        return budget
    try:
        move_module(model, device)
        return budget - weights
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return budget


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and every module back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replaces a module's forward pass for a while, be it the instance's own or its class's."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
