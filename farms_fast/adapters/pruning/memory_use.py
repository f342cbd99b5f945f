"""The memory that calibration takes on a device, and the batch that fits into a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.adapters.pruning.blocks import Block
from farms_fast.adapters.pruning.modules import device_of
from farms_fast.core.arguments import check_int

__all__ = ["MemoryUse", "plan_memory", "usual_batch"]

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that calibration takes besides the model itself.

    Attributes:
        kept: the hidden states between two blocks: samples · seqlen · hidden size · bytes of a
            value (and whatever else a block returns).
        block: the largest block's weights, if they are not on the device already.
        statistics: the statistics of one block's layers.
        batch: one batch inside a block: batch · seqlen · (2 · hidden size + the inputs and outputs
            of its layers) · bytes of a value, and a float32 copy of the widest input, for attention
            that keeps no matrix of scores.
        on_device: whether `kept` is on the device; else it is in the host's memory.
    """

    kept: int
    block: int
    statistics: int
    batch: int
    on_device: bool

    @property
    def device(self) -> int:
        """The most bytes on the device."""
        return self.block + self.statistics + self.batch + (self.kept if self.on_device else 0)


def usual_batch(seqlen: int) -> int:
    """The default batch size in samples: about 4096 tokens."""
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
    """The batch size that fits into a budget of bytes, and the memory that it takes.

    Args:
        blocks: the blocks that run one after the other.
        hidden: the hidden states of one sample, (1, seqlen, hidden size) or another layout.
        tokens: all tokens, (samples, seqlen).
        device: the device of the running block.
        budget: bytes.
        batch_size: a fixed batch size; None halves about 4096 tokens until they fit.
        statistics: bytes of a block's statistics.

    Raises:
        ValueError: the budget is too small for this batch size, or for one sample.
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
