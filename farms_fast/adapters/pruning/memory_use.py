"""What a calibration takes on a device, and how many samples at a time fit into a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.adapters.pruning.blocks import Block
from farms_fast.adapters.pruning.placement import device_of
from farms_fast.core.arguments import check_int

__all__ = ["MemoryUse", "plan_memory", "usual_batch"]

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a calibration takes, beside what the model takes where it is.

    Attributes:
        kept: the hidden states between two blocks: samples · seqlen · hidden size · bytes of a
            value (and whatever else a block returns).
        block: the largest block's weights, if they are not on the device already.
        statistics: of one block's layers, as the method says.
        batch: what one batch takes inside a block: batch · seqlen · (2 · hidden size + the inputs
            and outputs of its layers) · bytes of a value, and a float32 copy of the widest input.
            Attention is taken to keep no matrix of scores.
        on_device: whether `kept` is on the device; else it is in the host's memory.
    """

    kept: int
    block: int
    statistics: int
    batch: int
    on_device: bool

    @property
    def device(self) -> int:
        """Bytes on the device at most."""
        return self.block + self.statistics + self.batch + (self.kept if self.on_device else 0)


def usual_batch(seqlen: int) -> int:
    """Samples at a time where nobody says: about 4096 tokens."""
    return max(1, _BATCH_TOKENS // seqlen)


def plan_memory(
    blocks: Sequence[Block],
    hidden: Tensor,
    tokens: Tensor,
    device: torch.device,
    budget: int,
    batch_size: int | None,
    statistics: Callable[[Block], int],
) -> tuple[int, MemoryUse]:
    """The samples at a time that a budget has room for, and what they take.

    Args:
        blocks: that are run one after the other.
        hidden: the hidden states of one sample, (1, seqlen, hidden size) or as the model has them.
        tokens: (samples, seqlen), all of them.
        device: where the blocks run.
        budget: bytes.
        batch_size: samples at a time, or None for about 4096 tokens, fewer where they do not fit.
        statistics: bytes of what is collected of a block.

    Raises:
        ValueError: the budget is not enough for as many, or for one at a time.
    """
    samples, seqlen = tokens.shape
    wanted = usual_batch(seqlen) if batch_size is None else batch_size
    size = min(samples, check_int("batch_size", wanted, least=1))
    while True:
        use = _use(blocks, hidden, samples, size, device, budget, statistics)
        if use.device <= budget:
            return size, use
        if size == 1 or batch_size is not None:
            raise ValueError(
                f"memory: expected at least {use.device} bytes on {device} for {size} samples of "
                f"{seqlen} tokens at a time (block {use.block}, statistics {use.statistics}, "
                f"batch {use.batch}, kept hidden states "
                f"{use.kept if use.on_device else 'in host memory'}), got {budget}"
            )
        size //= 2


def _use(
    blocks: Sequence[Block],
    hidden: Tensor,
    samples: int,
    size: int,
    device: torch.device,
    budget: int,
    statistics: Callable[[Block], int],
) -> MemoryUse:
    value = hidden.element_size()
    kept = samples * hidden.numel() * value
    block = collected = batch = 0
    for item in blocks:
        if device_of(item.module) != device:
            weights = sum(p.numel() * p.element_size() for p in item.module.parameters())
            block = max(block, weights)
        collected = max(collected, statistics(item))
        width = 2 * hidden.shape[-1] + sum(sum(layer.shape) for layer in item.layers)
        widest = max((layer.shape[1] for layer in item.layers), default=0)
        token = width * value + 4 * widest
        batch = max(batch, size * (hidden.numel() // hidden.shape[-1]) * token)
    use = MemoryUse(kept, block, collected, batch, on_device=True)
    if use.device > budget and device.type != "cpu":
        use = MemoryUse(kept, block, collected, batch, on_device=False)
    return use
