"""What a pruned model is worth: perplexity over a text, and accuracies without examples."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning.likelihood import TokenLosses, check_order, with_another_end
from farms_fast.adapters.pruning.module_state import evaluating
from farms_fast.adapters.pruning.placement import input_embeddings
from farms_fast.adapters.pruning.tokens import check_positions, longest_sequence, token_ids
from farms_fast.core.arguments import check_int
from farms_fast.core.optional import optional_import

__all__ = ["SEVEN_TASKS", "check_causal", "perplexity", "zero_shot"]

# Tokens that it takes to see whether a model is causal.
_TRIED = 16
#: The zero-shot tasks that the literature on pruning reports, by their names in lm_eval: BoolQ,
#: RTE, HellaSwag, WinoGrande, ARC easy and challenge, OpenBookQA.
SEVEN_TASKS = (
    "boolq",
    "rte",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)


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

    Windows of `seqlen` tokens start every `stride` tokens; the last one ends with the text and
    is shorter. A window scores those of its tokens that no window before it has scored; the
    rest are context. Without a stride windows lie side by side, as in the literature, and the first
    token of each, which has no context, is not scored. With a smaller stride every token but the
    text's first is scored once, with at least `seqlen - stride` tokens before it.

    The model has to be causal: a token's likelihood may depend on the tokens before it alone. That
    is tried out on the first window, whose second half is replaced to see whether the likelihoods
    in its first half change.

    Args:
        model: called with token ids (n, seqlen); returns logits (n, seqlen, vocabulary), or an
            output with `logits`, or a tuple with them first. It runs in evaluation mode.
        tokens: int64 (n,) or (1, n), a text.
        seqlen: tokens of a window.
        stride: tokens from a window's start to that of the next, at most seqlen; None is seqlen.
        batch_size: windows at a time to begin with; None is about 4096 tokens. Where the device's
            memory ends, half of them, and so on down to one.
        device: where the model's repeated blocks run, one at a time, what is around them running
            where it is; None runs the model where it is, as does the device that it is on.
        memory: with a device where the model is not: as
            `farms_fast.adapters.pruning.sequential.prune_model` takes it. A model that is on its
            device takes what `batch_size` windows take.

    Returns:
        The perplexity; infinity where it is beyond the range of a float. Log likelihoods are summed
        in float64, each computed in float32 or the model's wider dtype.

    Raises:
        TypeError: an argument of another kind.
        ValueError: fewer than two tokens, a seqlen below 2 or beyond the model's positions, a
            stride out of range, an unknown token, logits that are NaN, a model that is not causal,
            or no memory for one window at a time.

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
            found: Iterator[Tensor] = iter([first[:1]])
        else:
            found = losses(windows, targets)
        done = 0
        for batch in found:
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
    model: nn.Module,
    *,
    device: str | torch.device | None = None,
    memory: int | None = None,
) -> None:
    """Raises unless a model's likelihood of a token depends on the tokens before it alone.

    Args:
        model: as `perplexity` takes it. Of a model that does not tell its vocabulary, as those of
            transformers do, nothing is known here.
        device: as `perplexity` takes it.
        memory: as `perplexity` takes it.

    Raises:
        TypeError: the model returns no logits.
        ValueError: it is not causal.

    Example:
        >>> check_causal(torch.nn.Sequential(torch.nn.Embedding(10, 10)))
    """
    losses = TokenLosses(model, batch_size=None, device=device, memory=memory)
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    length = min(_TRIED, longest_sequence(model) or _TRIED)
    if not isinstance(vocabulary, int) or length < 2:
        return
    # From the middle of the vocabulary: its ends often have a meaning of their own.
    ids = (torch.arange(length) + vocabulary // 2) % vocabulary
    pair = losses(with_another_end(ids), ids[1:].expand(2, -1))
    check_order(model, torch.cat(list(pair)))


def _windows(text: Tensor, length: int, step: int) -> Iterator[tuple[int, Tensor, int]]:
    """Windows of equal length: the first one's start, (n, length), and tokens that each scores."""
    count = len(text)
    starts = [0]
    while starts[-1] + length < count:
        starts.append(starts[-1] + step)
    # The first token of a window has nothing before it.
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

    Data sets come from a hub, unless they have been fetched before.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of lm_eval's tasks.
        batch_size: as lm_eval takes it.
        limit: examples of each task; None is all of them.

    Returns:
        Accuracy ("acc" of lm_eval, not length-normalised, as papers on pruning report it) by task.

    Raises:
        ImportError: lm_eval is not installed.
        TypeError: the model is none, or returns no logits.
        ValueError: no task, one that has no accuracy, or a model that is not causal.
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
        # It seeds every generator for itself.
        with torch.random.fork_rng(), evaluating(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(tasks), num_fewshot=0, limit=limit
            )
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
    results = {task: found["results"].get(task, {}) for task in tasks}
    without = [task for task, result in results.items() if "acc,none" not in result]
    if without:
        raise ValueError(f"tasks: expected tasks with an accuracy, got {', '.join(without)}")
    return {task: float(result["acc,none"]) for task, result in results.items()}
