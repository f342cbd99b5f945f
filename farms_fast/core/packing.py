"""Things in their order, as many together as one limit allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def pack(items: Iterable[T], size: Callable[[T], int], most: int) -> list[list[T]]:
    """Parts of consecutive items, each as long as its sizes sum to no more than the limit.

    Args:
        items: what to share out.
        size: of an item, 0 or more.
        most: what the sizes of one part sum to at most; an item beyond it is a part of its own.

    Returns:
        The parts in the order of the items, none of them empty.

    Example:
        >>> pack([3, 4, 9, 2, 5, 1], lambda item: item, most=8)
        [[3, 4], [9], [2, 5, 1]]
    """
    parts: list[list[T]] = []
    held = 0
    for item in items:
        taken = size(item)
        held += taken
        if not parts or held > most:
            parts.append([])
            held = taken
        parts[-1].append(item)
    return parts
