"""Negative log likelihoods of tokens under a model, in batches that fit into the memory.

A model that attends in both directions returns logits too, but sees the token that it predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.memory_use import usual_batch
from farms_fast.adapters.pruning.modules import block_device, evaluating, input_device
from farms_fast.adapters.pruning.oom import out_of_memory_error, retry_with_less
from farms_fast.core.arguments import check_int, check_module

__all__ = ["TokenLosses", "check_order", "with_another_end"]

_HALF = (torch.float16, torch.bfloat16)
# Tokens before the replaced ones to compare: with local attention only those see the replaced ones.
_NEAREST = 16
_NOT_CAUSAL = (
    "model: expected a causal language model, got {}: {}, so that it has no perplexity (a model of "
    "an encoder's architecture may need is_decoder=True in its config)"
)


class TokenLosses:
    """Negative log likelihoods of the last tokens of windows; arguments as of `perplexity`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        memory: int | None = None,
    ) -> None:
        check_module("model", model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(_NOT_CAUSAL.format(type(model).__name__, "it has an encoder"))
        self._model = model
        self._size = batch_size if batch_size is None else check_int("batch_size", batch_size, 1)
        self._memory = None if memory is None else check_int("memory", memory, least=1)
        self._model_device = input_device(model)
        self._device = (
            self._model_device if device is None else block_device(device, self._model_device)
        )

    def __call__(self, windows: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yields float64 (windows, scored) on the CPU for every batch, in evaluation mode.

        Args:
            windows: int64 (n, length).
            targets: int64 (n, scored): for each of the last tokens but one, the next token.

        Raises:
            TypeError: the model returns no logits.
            ValueError: one window does not fit into the memory.
        """

        def losses(output: Any, first: int) -> Tensor:
            logits = _logits(output, windows.shape[1], targets)
            wanted = targets[first : first + len(logits)].to(logits.device)
            # Window by window: a float32 copy of all logits can exceed the model.
            parts = [_losses(*window) for window in zip(logits, wanted, strict=True)]
            return torch.stack(parts).cpu()

        run = self._by_batch if self._device == self._model_device else self._by_block
        return run(windows, losses)

    def _by_batch(self, windows: Tensor, make: Callable[[Any, int], Tensor]) -> Iterator[Tensor]:
        """Runs the whole model on its own device."""
        count, length = windows.shape
        size = min(self._size or usual_batch(length), count)
        done = 0

        def attempt() -> Tensor:
            batch = windows[done : done + size].to(self._model_device)
            with torch.no_grad(), evaluating(self._model):
                return make(self._model(batch), done)

        def halve(failure: str) -> None:
            nonlocal size
            if size == 1:
                what = f"one window of {length} tokens"
                raise out_of_memory_error(self._model_device, what, failure)
            size //= 2

        while done < count:
            losses = retry_with_less(attempt, halve)
            done += len(losses)
            yield losses

    def _by_block(self, windows: Tensor, make: Callable[[Any, int], Tensor]) -> Iterator[Tensor]:
        """Runs one block after the other on the device."""
        blocks = find_blocks(self._model)
        runner = BlockRunner(
            self._model,
            blocks,
            windows,
            device=self._device,
            memory=self._memory,
            batch_size=self._size,
        )
        with runner:
            for _ in blocks.blocks:
                with runner.on_device():
                    runner.run(keep=True)
            # A list: the caller must not see the model as it is inside of the runner.
            losses = list(runner.outputs(make))
        yield from losses


def _logits(output: Any, length: int, targets: Tensor) -> Tensor:
    """(n, scored, vocabulary), those that predict the targets."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Sequence) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model: expected logits (n, seqlen, vocabulary) or an output that has them, "
            f"got {type(output).__name__}"
        )
    largest = int(targets.max())
    if logits.dim() != 3 or logits.shape[1] != length or logits.shape[2] <= largest:
        raise TypeError(
            f"model: expected logits (n, {length}, vocabulary) with a vocabulary of more than "
            f"{largest}, got shape {tuple(logits.shape)}"
        )
    return logits[:, -targets.shape[1] - 1 : -1]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dtype in _HALF:
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="none").double()


def with_another_end(window: Tensor) -> Tensor:
    """A window (length,), and a copy with other tokens in its second half: (2, length).

    The copy is equal where the window shows no other token of the vocabulary.

    Example:
        >>> with_another_end(torch.tensor([5, 6, 5, 7])).tolist()
        [[5, 6, 5, 7], [5, 6, 6, 5]]
    """
    half = (len(window) + 1) // 2
    first, end = window[0], window[half:]
    unlike = window[window != first]
    # Zero is in every vocabulary.
    other = unlike[0] if len(unlike) else torch.zeros_like(first)
    replaced = torch.where(end == first, other, first)
    return torch.stack([window, torch.cat([window[:half], replaced])])


def check_order(model: nn.Module, losses: Tensor) -> None:
    """Raises ValueError if the likelihoods of a window depend on later tokens.

    Args:
        model: the model of these losses.
        losses: (2, length - 1), of `with_another_end` of a window with that window's targets.
    """
    half = (losses.shape[1] + 2) // 2
    changes = (losses[0] - losses[1]).abs()[max(0, half - _NEAREST) : half]
    # A causal model changes nothing, unless other tokens change the size of a product and so its
    # kernel, as in mixtures of experts. In low precision that changes all tokens a little, and
    # those a lot that move to another expert.
    coarse = any(parameter.dtype in _HALF for parameter in model.parameters()) or (
        torch.backends.cuda.matmul.fp32_precision == "tf32"
    )
    if changes.median() > 0.1 if coarse else changes.max() > 1e-4:
        raise ValueError(
            _NOT_CAUSAL.format(
                type(model).__name__, "its likelihood of a token depends on the tokens after it"
            )
        )
