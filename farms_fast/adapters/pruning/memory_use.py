"""The memory that calibration takes on a device, and the batch that fits into a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farms_fast.adapters.pruning.blocks import Block
from farms_fast.adapters.pruning.modules import device_of
from farms_fast.core.arguments import check_int

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that calibration takes besides the model itself.

    The `hidden_states` between two blocks take samples · seqlen · hidden size · bytes of a value,
    and are in the host's memory unless `on_device`. `block` is the largest block's weights, if they
    are not on the device already; `statistics` are those of one block's layers. A `batch` inside a
    block takes batch · seqlen · (2 · hidden size + the inputs and outputs of its layers) · bytes of
    a value, and a float32 copy of the widest input, for attention that keeps no matrix of scores.
    """

    hidden_states: int
    block: int
    statistics: int
    batch: int
    on_device: bool

    @property
    def device(self) -> int:
        """The most bytes on the device."""
        kept = self.hidden_states if self.on_device else 0
        return self.block + self.statistics + self.batch + kept


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

    Without a `batch_size`, about 4096 tokens are halved until they fit. `hidden` are the hidden
    states of one sample, and `statistics` gives the bytes of a block's statistics.
    """
    samples, seqlen = tokens.shape
    value = hidden.element_size()
    block = collected = per_sample = 0
    for item in blocks:
        if device_of(item.module) != device:
            weights = sum(p.numel() * p.element_size() for p in item.module.parameters())
            block = max(block, weights)
        collected = max(collected, statistics(item))
        width = 2 * hidden.shape[-1] + sum(sum(layer.shape) for layer in item.layers)
        widest = max((layer.shape[1] for layer in item.layers), default=0)
        token = width * value + 4 * widest
        per_sample = max(per_sample, hidden.numel() // hidden.shape[-1] * token)
    wanted = usual_batch(seqlen) if batch_size is None else batch_size
    size = min(samples, check_int("batch_size", wanted, least=1))
    while True:
        use = MemoryUse(samples * hidden.numel() * value, block, collected, size * per_sample, True)
        if use.device > budget and device.type != "cpu":
            use = replace(use, on_device=False)
        if use.device <= budget:
            return size, use
        if size == 1 or batch_size is not None:
            raise ValueError(
                f"memory: expected at least {use.device} bytes on {device} for {size} samples of "
                f"{seqlen} tokens at a time (block {use.block}, statistics {use.statistics}, "
                f"batch {use.batch}, kept hidden states "
                f"{use.hidden_states if use.on_device else 'in host memory'}), got {budget}"
            )
        size //= 2
