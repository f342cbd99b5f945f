"""Consecutive or similar things, as many together as one limit allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T")


def split_by_budget(items: Iterable[T], size: Callable[[T], int], budget: int) -> list[list[T]]:
    """Parts of consecutive items, none empty, whose sizes sum to the budget at most.

    An item beyond the budget is a part of its own.
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
    """Items of equal keys together, each group in parts as of `split_by_budget`."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [part for group in groups.values() for part in split_by_budget(group, size, budget)]
