"""Negative log likelihoods of tokens under a model, as many windows at a time as there is room for.

A model that attends in both directions has logits too, but sees the token that it is to predict.
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
from farms_fast.adapters.pruning.module_state import evaluating
from farms_fast.adapters.pruning.placement import block_device, input_device
from farms_fast.adapters.pruning.shortage import is_out_of_memory, no_room, release
from farms_fast.core.arguments import check_int, check_module

__all__ = ["TokenLosses", "check_order", "with_another_end"]

_HALF = (torch.float16, torch.bfloat16)
# How many tokens before the exchanged ones are looked at: with local attention only those see them.
_NEAREST = 16


class TokenLosses:
    """Negative log likelihoods of the last tokens of windows.

    Args:
        model: called with token ids (n, length); returns logits (n, length, vocabulary), or an
            output with `logits`, or a tuple with them first.
        batch_size: windows at a time to begin with; None is about 4096 tokens. Where the device's
            memory ends, half of them.
        device: where the model's repeated blocks run, one at a time; None is where the model is.
        memory: bytes on that device, unless the model is there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None,
        device: str | torch.device | None,
        memory: int | None,
    ) -> None:
        check_module("model", model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(_NOT_CAUSAL.format(type(model).__name__, "it has an encoder"))
        self._model = model
        self._size = batch_size if batch_size is None else check_int("batch_size", batch_size, 1)
        self._memory = None if memory is None else check_int("memory", memory, least=1)
        self._place = input_device(model)
        self._device = self._place if device is None else block_device(device, self._place)

    def __call__(self, windows: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Runs the model in evaluation mode.

        Args:
            windows: int64 (n, length).
            targets: int64 (n, scored), what comes after the last tokens but one.

        Yields:
            For every batch, float64 (windows, scored) on the CPU.

        Raises:
            TypeError: the model returns no logits.
            ValueError: there is no memory for one window at a time.
        """

        def losses(output: Any, first: int) -> Tensor:
            logits = _logits(output, windows.shape[1], targets)
            wanted = targets[first : first + len(logits)].to(logits.device)
            # Window by window: copies of all logits in float32 would take more than the model.
            parts = [_losses(*window) for window in zip(logits, wanted, strict=True)]
            return torch.stack(parts).cpu()

        run = self._whole if self._device == self._place else self._by_blocks
        return run(windows, losses)

    def _whole(self, windows: Tensor, make: Callable[[Any, int], Tensor]) -> Iterator[Tensor]:
        size = min(self._size or usual_batch(windows.shape[1]), len(windows))
        done = 0
        while done < len(windows):
            batch = windows[done : done + size]
            failure = None
            try:
                # Not around the yield: outside of the call the model is as it was.
                with torch.no_grad(), evaluating(self._model):
                    made = make(self._model(batch.to(self._place)), done)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            if failure is None:
                done += len(batch)
                yield made
                continue
            # Beyond the handler, where the failed call's tensors are no longer held by its frames.
            release()
            if size == 1:
                raise no_room(self._place, f"one window of {windows.shape[1]} tokens", failure)
            size //= 2

    def _by_blocks(self, windows: Tensor, make: Callable[[Any, int], Tensor]) -> Iterator[Tensor]:
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
            # All at once: until the end the model is not as it was.
            found = list(runner.outputs(make))
        yield from found


def _logits(output: Any, length: int, targets: Tensor) -> Tensor:
    """(n, scored, vocabulary), those that predict the targets."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Sequence) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "model: expected logits (n, seqlen, vocabulary) or an output that has them, "
            f"got {type(output).__name__}"
        )
    largest = int(targets.max())
    if found.dim() != 3 or found.shape[1] != length or found.shape[2] <= largest:
        raise TypeError(
            f"model: expected logits (n, {length}, vocabulary) with a vocabulary of more than "
            f"{largest}, got shape {tuple(found.shape)}"
        )
    return found[:, -targets.shape[1] - 1 : -1]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihoods of a window's tokens, float64 (scored,)."""
    if logits.dtype in _HALF:
        logits = logits.float()
    return functional.cross_entropy(logits, targets, reduction="none").double()


# ------------------------------------------------------------------------------- order of tokens

_NOT_CAUSAL = (
    "model: expected a causal language model, got {}: {}, so that it has no perplexity (a model of "
    "an encoder's architecture may need is_decoder=True in its config)"
)


def with_another_end(window: Tensor) -> Tensor:
    """A window (length,), and the same with other tokens in its second half: (2, length).

    Where there are no other tokens that are known to be in the vocabulary, they are alike.

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
    """Raises ValueError where likelihoods in a window depend on the tokens that come after.

    Args:
        model: whose they are.
        losses: (2, length - 1) of what `with_another_end` gives, with the window's own targets.
    """
    half = (losses.shape[1] + 2) // 2
    changes = (losses[0] - losses[1]).abs()[max(0, half - _NEAREST) : half]
    # Of a causal model they are the same to the bit, but where the size of a product, and with it
    # its kernel, depends on the other tokens, as with mixtures of experts. In few digits that
    # changes all tokens a little, and those a lot that are then given to other experts.
    coarse = any(parameter.dtype in _HALF for parameter in model.parameters()) or (
        torch.backends.cuda.matmul.fp32_precision == "tf32"
    )
    if changes.median() > 0.1 if coarse else changes.max() > 1e-4:
        raise ValueError(
            _NOT_CAUSAL.format(
                type(model).__name__, "its likelihood of a token depends on the tokens after it"
            )
        )
