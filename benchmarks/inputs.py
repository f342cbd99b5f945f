"""Random inputs, in so many sets that none stays in the last-level cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Of a CPU; a GPU tells its own.
CPU_CACHE_BYTES = 64 * 2**20
# Between two uses of a set, this many times the cache is read in between.
_MARGIN = 2


def cache_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets_past_cache(set_bytes: int, device: torch.device, quick: bool = False) -> int:
    """How many sets to rotate; 1 where one set alone is past the cache."""
    return 1 if quick else 1 + math.ceil(_MARGIN * cache_bytes(device) / set_bytes)


def gaussian_windows(
    batch: int, order: int, device: torch.device, quick: bool = False
) -> list[Tensor]:
    """Sets of (batch, order, order) float64 with independent normal entries of variance 1/order."""
    single = batch * order * order * 8
    sets = sets_past_cache(single, device, quick)
    # A set past the cache needs no second one, unless there is room for it.
    sets = 1 if single > _MARGIN * cache_bytes(device) else sets
    return [_normal((batch, order, order), seed, device) / math.sqrt(order) for seed in range(sets)]


def weights(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device, quick: bool = False
) -> list[Tensor]:
    """Sets of (rows, columns) with normal entries of variance 1/columns."""
    sets = sets_past_cache(rows * columns * dtype.itemsize, device, quick)
    scale = math.sqrt(columns)
    return [(_normal((rows, columns), seed, device) / scale).to(dtype) for seed in range(sets)]


def _normal(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, device=device, generator=generator)


def spectrum(size: int, seed: int, device: torch.device) -> Tensor:
    """An ascending spectrum like a trained layer's: a bulk, and a tenth of it in a heavy tail.

    The bulk is Marchenko and Pastur's for square windows (the squares of a quarter-circle law); the
    tail multiplies it by Pareto variates of exponent 1.5.
    """
    generator = np.random.default_rng(seed)
    singular = 2 * (2 * generator.beta(1.5, 1.5, size) - 1)
    heavy = np.where(generator.random(size) < 0.1, 1 + generator.pareto(1.5, size), 1.0)
    # No exact zeros: the peers do not drop them.
    return torch.from_numpy(np.sort(np.maximum(singular**2, 1e-12) * heavy)).to(device)


def packed_spectra(
    size: int, count: int, most: int, device: torch.device, quick: bool
) -> list[Tensor]:
    """At most so many sets of `count` spectra, one after the other, together past the cache.

    The first spectrum is the same whatever the count.
    """
    sets = min(most, sets_past_cache(count * size * 8, device, quick))
    made = [spectrum(size, seed, device) for seed in range(sets * count)]
    return [torch.cat(made[begin : begin + count]) for begin in range(0, len(made), count)]
