"""Evaluates a language model: perplexity of a text, and zero-shot accuracies.

A model that attends in both directions returns logits too, but sees the token that it predicts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.memory_use import usual_batch
from farms_fast.adapters.pruning.modules import (
    block_device,
    evaluating,
    input_device,
    input_embeddings,
)
from farms_fast.adapters.pruning.oom import out_of_memory_error, retry_with_less
from farms_fast.adapters.pruning.tokens import check_positions, longest_sequence, token_ids
from farms_fast.core.arguments import check_int, check_module
from farms_fast.core.optional import optional_import

_HALF = (torch.float16, torch.bfloat16)
# Tokens of the window that tests whether a model is causal.
_CAUSAL_TEST_TOKENS = 16
# Tokens before the replaced ones to compare: with local attention only those see the replaced ones.
_NEAREST = 16
_NOT_CAUSAL = (
    "model: expected a causal language model, got {}: {}, so that it has no perplexity (a model of "
    "an encoder's architecture may need is_decoder=True in its config)"
)
#: The zero-shot tasks that the literature on pruning reports, by their names in lm_eval.
SEVEN_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    seqlen: int,
    stride: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    memory: int | None = None,
) -> float:
    """Exponential of the mean negative log likelihood of a text's tokens, over windows of the text.

    Windows of `seqlen` tokens start every `stride` tokens; the last one ends with the text and is
    shorter. Each scores the tokens that no earlier window has scored; the rest are context. Without
    a stride windows do not overlap, as in the literature, and the first token of each, which has no
    context, is not scored. With a smaller stride every token but the text's first is scored once,
    with at least `seqlen - stride` tokens before it.

    The model has to be causal: a token's likelihood may depend on earlier tokens only. To test
    this, the second half of the first window is replaced; the likelihoods in its first half must
    not change.

    Args:
        model: called with token ids (n, seqlen); returns logits (n, seqlen, vocabulary), or an
            output with `logits`, or a tuple that starts with them. It runs in evaluation mode.
        tokens: int64 (n,) or (1, n), a text.
        seqlen: tokens of a window.
        stride: tokens from one window's start to the next, at most seqlen; None is seqlen.
        batch_size: windows at a time to begin with; None is about 4096 tokens. It is halved, down
            to one, when the device runs out of memory.
        device: device of the model's repeated blocks, which run there one at a time; the rest runs
            where it is. None, or the model's own device, runs the model as a whole.
        memory: as `prune_model` takes it, for a device other than the model's.

    Returns:
        The perplexity; infinity beyond the range of a float. Log likelihoods are computed in
        float32, or the model's wider dtype, and summed in float64.

    Raises:
        TypeError: an argument of another type.
        ValueError: fewer than two tokens, a seqlen below 2 or beyond the model's positions, a
            stride out of range, an unknown token, logits that are NaN, a model that is not causal,
            or no memory for one window.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 10))
        >>> _ = torch.nn.init.zeros_(model[0].weight)
        >>> round(perplexity(model, torch.arange(10), seqlen=4), 6)
        10.0
    """
    length = check_int("seqlen", seqlen, least=2)
    step = length if stride is None else check_int("stride", stride, least=1)
    if step > length:
        raise ValueError(f"stride: expected at most the seqlen of {length}, got {step}")
    if isinstance(tokens, Tensor) and (tokens.dim() > 2 or tokens.shape[:-1] not in ((), (1,))):
        raise ValueError(f"tokens: expected shape (n,) or (1, n), got {tuple(tokens.shape)}")
    if isinstance(tokens, Tensor) and tokens.numel() < 2:
        raise ValueError(f"tokens: expected at least two, got {tokens.numel()}")
    text = token_ids(model, tokens, "tokens").flatten()
    check_positions(model, min(length, len(text)), "tokens")
    losses = TokenLosses(model, batch_size=batch_size, device=device, memory=memory)
    total, count = 0.0, 0
    for start, windows, scored in _windows(text, length, step):
        targets = windows[:, -scored:]
        if start == 0:
            first = torch.cat(list(losses(with_another_end(windows[0]), targets.expand(2, -1))))
            check_order(model, first)
            batches: Iterator[Tensor] = iter([first[:1]])
        else:
            batches = losses(windows, targets)
        done = 0
        for batch in batches:
            loss = float(batch.sum())
            if math.isnan(loss):
                raise ValueError(
                    "model: its logits are NaN in the windows that start with token "
                    f"{start + done * step}"
                )
            done += len(batch)
            total += loss
            count += batch.numel()
    mean = total / count
    return math.exp(mean) if mean < 709 else math.inf


def check_causal(
    model: nn.Module, *, device: str | torch.device | None = None, memory: int | None = None
) -> None:
    """Raises ValueError unless a model is causal, TypeError if it returns no logits.

    Arguments are as of `perplexity`. A model without `get_input_embeddings` is not tested.
    """
    losses = TokenLosses(model, device=device, memory=memory)
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    length = min(_CAUSAL_TEST_TOKENS, longest_sequence(model) or _CAUSAL_TEST_TOKENS)
    if not isinstance(vocabulary, int) or length < 2:
        return
    # From the middle of the vocabulary: tokens at its ends are often special.
    ids = (torch.arange(length) + vocabulary // 2) % vocabulary
    pair = losses(with_another_end(ids), ids[1:].expand(2, -1))
    check_order(model, torch.cat(list(pair)))


def _windows(text: Tensor, length: int, step: int) -> Iterator[tuple[int, Tensor, int]]:
    """Groups of equal windows: start of the first, windows (n, length), tokens each one scores."""
    count = len(text)
    starts = [0]
    while starts[-1] + length < count:
        starts.append(starts[-1] + step)
    # The first token of a window has no context.
    first = text[None, :length]
    yield 0, first, first.shape[1] - 1
    full = [start for start in starts[1:] if start + length <= count]
    if full:
        yield full[0], text.unfold(0, length, 1)[full], min(step, length - 1)
    last = starts[-1]
    left = min(count - (last - step + length), count - last - 1)
    if last + length > count and last and left:
        yield last, text[None, last:], left


def zero_shot(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = SEVEN_TASKS,
    *,
    batch_size: int | str = "auto",
    limit: int | None = None,
) -> dict[str, float]:
    """Accuracies on tasks of the lm-evaluation-harness, without examples in the prompt.

    The harness downloads data sets that are not cached.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of lm_eval's tasks.
        batch_size: as lm_eval takes it.
        limit: examples of each task; None is all of them.

    Returns:
        Accuracy by task ("acc" of lm_eval, not length-normalised, as papers on pruning report it).

    Raises:
        ImportError: lm_eval is not installed.
        TypeError: model is no module, or returns no logits.
        ValueError: no task, a task without an accuracy, or a model that is not causal.
    """
    named = isinstance(tasks, Sequence) and all(isinstance(task, str) for task in tasks)
    if isinstance(tasks, str) or not named or not tasks:
        raise ValueError(f"tasks: expected a sequence of names of tasks, got {tasks!r}")
    if limit is not None:
        check_int("limit", limit, least=1)
    with optional_import("lm_eval", extra="lm-eval", needed_for="zero_shot"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    check_causal(model)
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        # The harness seeds every generator.
        with torch.random.fork_rng(), evaluating(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            evaluated = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(tasks), num_fewshot=0, limit=limit
            )
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    results = {task: evaluated["results"].get(task, {}) for task in tasks}
    without = [task for task, result in results.items() if "acc,none" not in result]
    if without:
        raise ValueError(f"tasks: expected tasks with an accuracy, got {', '.join(without)}")
    return {task: float(result["acc,none"]) for task, result in results.items()}


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
        home = self._model_device = input_device(model)
        self._device = home if device is None else block_device(device, home)

    def __call__(self, windows: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yields float64 (windows, scored) on the CPU for every batch, in evaluation mode.

        Windows are int64 (n, length). Targets are int64 (n, scored): for each of the last tokens
        but one, the next token.
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
        limits = (self._device, self._memory, self._size)
        runner = BlockRunner(self._model, blocks, windows, *limits)
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

    The losses (2, length - 1) are those of `with_another_end` with the window's own targets.
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
