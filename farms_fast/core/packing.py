"""Consecutive or similar things, as many together as one limit allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def split_by_budget(items: Iterable[T], size: Callable[[T], int], budget: int) -> list[list[T]]:
    """Parts of consecutive items, each as long as the budget allows.

    Args:
        items: what to split.
        size: of an item, 0 or more.
        budget: what the sizes of one part sum to at most; an item beyond it is a part of its own.

    Returns:
        The parts in the order of the items, none of them empty.

    Example:
        >>> split_by_budget([3, 4, 9, 2, 5, 1], lambda item: item, budget=8)
        [[3, 4], [9], [2, 5, 1]]
    """
    parts: list[list[T]] = []
    used = 0
    for item in items:
        own = size(item)
        used += own
        if not parts or used > budget:
            parts.append([])
            used = own
        parts[-1].append(item)
    return parts


def group_by_budget(
    items: Iterable[T], key: Callable[[T], Hashable], size: Callable[[T], int], budget: int
) -> list[list[T]]:
    """Items of equal keys together, each group in parts as of `split_by_budget`.

    Example:
        >>> group_by_budget([1, 2, 3, 5, 8], lambda item: item % 2, lambda item: item, budget=8)
        [[1, 3], [5], [2], [8]]
    """
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [part for group in groups.values() for part in split_by_budget(group, size, budget)]
