"""Checks of token ids: their type and shape, and whether the model knows them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning.placement import input_embeddings

__all__ = ["check_positions", "check_tokens", "longest_sequence", "token_ids"]


def check_tokens(model: nn.Module, tokens: object) -> Tensor:
    """Calibration tokens as int64 (samples, seqlen) on the CPU.

    Raises:
        TypeError: they are no tensor of integers.
        ValueError: not two-dimensional, empty, too long for the model's positions, or an id that
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
        TypeError: they are no tensor of integers.
        ValueError: an id that the vocabulary does not have.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{argument}: expected token ids as an int64 tensor, got {got}")
    found = tokens.detach().to("cpu", torch.int64)
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    low, high = int(found.min()), int(found.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ValueError(
            f"{argument}: expected token ids from 0 to {(vocabulary or high + 1) - 1}, "
            f"got {low} to {high}"
        )
    return found


def longest_sequence(model: nn.Module) -> int | None:
    """The positions that a model has; None where its config does not tell."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_positions(model: nn.Module, seqlen: int, argument: str) -> None:
    """Raises ValueError where the model has fewer positions than a sequence has tokens."""
    positions = longest_sequence(model)
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"{argument}: expected at most the {positions} positions of the model, "
            f"got a seqlen of {seqlen}"
        )
