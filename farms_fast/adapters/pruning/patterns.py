"""Ratios as N:M: how many of every M weights stay, in whole numbers that keep the total."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["kept_of_groups"]


def kept_of_groups(ratios: Sequence[float], counts: Sequence[int], size: int) -> list[int]:
    """How many of `size` weights each layer (or block) keeps.

    Every number is the wanted one rounded down, and at least 1 unless the ratio is 1. What then
    lacks for the total is added to those with the largest remainders, or what those with less than
    1 got too much is taken from those with the smallest, one each time, until another would not
    bring the total nearer.

    Args:
        ratios: within [0, 1].
        counts: numbers of weights.
        size: weights of a group.

    Raises:
        ValueError: with 1 of `size` kept everywhere fewer weights go than the ratios say.

    Example:
        >>> kept_of_groups([0.9, 0.5, 0.7], [8, 8, 8], 4)
        [1, 2, 1]
    """
    wanted = [(1 - ratio) * size for ratio in ratios]
    least = [0 if ratio == 1 else 1 for ratio in ratios]
    # A ratio such as 0.7 is not exact: 2.9999999999999996 is meant as 3.
    down = [math.floor(value + 1e-9) for value in wanted]
    kept = [max(pair) for pair in zip(down, least, strict=True)]

    def missing() -> float:
        return math.fsum(
            (value - n) * count for value, n, count in zip(wanted, kept, counts, strict=True)
        )

    lacking = missing()
    while lacking < 0:
        able = [u for u, n in enumerate(kept) if n > least[u] and -2 * lacking > counts[u]]
        if not able:
            break
        kept[min(able, key=lambda unit: (wanted[unit] - kept[unit], unit))] -= 1
        lacking = missing()
    for unit in sorted(range(len(kept)), key=lambda unit: (down[unit] - wanted[unit], unit)):
        may = down[unit] >= least[unit] > 0 and kept[unit] < size
        if may and lacking * 2 >= counts[unit]:
            kept[unit] += 1
            lacking -= counts[unit]
    steps = [count for count, few in zip(counts, least, strict=True) if few]
    if kept == least and steps and -2 * lacking > min(steps) * (1 + 1e-9):
        reached = 1 - sum(n * c for n, c in zip(kept, counts, strict=True)) / size / sum(counts)
        total = math.fsum(r * c for r, c in zip(ratios, counts, strict=True)) / sum(counts)
        raise ValueError(
            f"m: with 1 of {size} kept at least, no more than {reached:.4f} of the weights can go, "
            f"and the ratios make it {total:.4f}: expected a larger m"
        )
    return kept
