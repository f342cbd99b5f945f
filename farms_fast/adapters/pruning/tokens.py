"""Checks of token ids: their type and shape, and whether the model knows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["check_positions", "check_tokens", "token_ids"]


def check_tokens(model: nn.Module, tokens: object) -> Tensor:
    """Calibration tokens as int64 (samples, seqlen) on the CPU.

    Raises:
        TypeError: They are no tensor of integers.
        ValueError: Not two-dimensional, empty, too long for the model's positions, or an id that
            the model's vocabulary does not have.
    """
    if isinstance(tokens, Tensor) and (
        tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2
    ):
        raise ValueError(
            "calibration: expected a tensor (samples, seqlen) of at least one sample of two "
            f"tokens, got shape {tuple(tokens.shape)}"
        )
    found = token_ids(model, tokens, "calibration")
    check_positions(model, found.shape[1], "calibration")
    return found


def token_ids(model: nn.Module, tokens: object, argument: str) -> Tensor:
    """Tokens as int64 on the CPU, all of them in the model's vocabulary.

    Raises:
        TypeError: They are no tensor of integers.
        ValueError: An id that the vocabulary does not have.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{argument}: expected token ids as an int64 tensor, got {got}")
    found = tokens.detach().to("cpu", torch.int64)
    embed = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embed, "num_embeddings", None)
    low, high = int(found.min()), int(found.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ValueError(
            f"{argument}: expected token ids from 0 to {(vocabulary or high + 1) - 1}, "
            f"got {low} to {high}"
        )
    return found


def check_positions(model: nn.Module, seqlen: int, argument: str) -> None:
    """Raises ValueError where the model has fewer positions than a sequence has tokens."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and seqlen > positions > 0:
        raise ValueError(
            f"{argument}: expected at most the {positions} positions of the model, "
            f"got a seqlen of {seqlen}"
        )
