"""Which device a model's blocks run on, and where its own parts are."""

from __future__ import annotations

import torch
from torch import nn

from farms_fast.arguments import resolve_device

__all__ = ["block_device", "device_of", "input_device", "input_embeddings"]


def block_device(device: str | torch.device | None, home: torch.device) -> torch.device:
    """The device that an argument names, with its number, so that it equals that of a tensor.

    Raises:
        ValueError: As `farms_fast.arguments.resolve_device`.
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
