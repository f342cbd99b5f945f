"""Which device a model's blocks run on, and where its own parts are."""

from __future__ import annotations

import torch
from torch import nn

from farms_fast.adapters.pruning.shortage import is_out_of_memory, release
from farms_fast.core.arguments import resolve_device
from farms_fast.engine.machine import machine_of

__all__ = [
    "block_device",
    "device_of",
    "input_device",
    "input_embeddings",
    "move_module",
    "place_model",
]


def block_device(device: str | torch.device | None, home: torch.device) -> torch.device:
    """The device that an argument names, with its number, so that it equals that of a tensor.

    Raises:
        ValueError: as `farms_fast.core.arguments.resolve_device`.
    """
    found = resolve_device(device, home)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter is; the CPU without any."""
    for parameter in module.parameters():
        return parameter.device
    return torch.device("cpu")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that takes token ids, where the model tells as those of transformers do."""
    found = getattr(model, "get_input_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids."""
    embeddings = input_embeddings(model)
    return device_of(model if embeddings is None else embeddings)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Moves all of a module to a device, or none of it where that has no room."""
    before = device_of(module)
    if before == device:
        return
    try:
        module.to(device)
    except BaseException:
        module.to(before)
        raise


def place_model(model: nn.Module, device: torch.device, memory: int | None = None) -> int:
    """Moves a model to a device if it takes at most half of what may be taken there.

    Where the device has no room for it, it stays where it is.

    Args:
        model: whole on one device.
        device: where to.
        memory: bytes that may be taken; None is half of what the device has.

    Returns:
        Bytes that may be taken beside the model. On the CPU, where it is anyway, it does not count.

    Example:
        >>> place_model(nn.Linear(8, 8), torch.device("cpu"), 1000)
        1000
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
    release()
    return budget
