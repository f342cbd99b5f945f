"""Consecutive things, as many together as a limit allows."""

from __future__ import annotations

from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st

from farms_fast.core.packing import group_by_budget, split_by_budget


@given(st.lists(st.integers(0, 12)), st.integers(0, 20))
def test_parts_are_full_but_never_over_full(sizes: list[int], most: int) -> None:
    items = list(enumerate(sizes))
    parts = split_by_budget(items, lambda item: item[1], most)
    assert list(chain.from_iterable(parts)) == items
    held = [sum(size for _, size in part) for part in parts]
    assert all(part for part in parts)
    assert all(total <= most or len(part) == 1 for part, total in zip(parts, held, strict=True))
    # What begins a part would not have fitted into the one before.
    assert all(
        total + after[0][1] > most for total, (_, after) in zip(held, pairwise(parts), strict=False)
    )


def test_an_item_beyond_the_limit_is_alone() -> None:
    assert split_by_budget([9, 1, 9, 9, 1, 1], int, 8) == [[9], [1], [9], [9], [1, 1]]


@given(st.lists(st.integers(0, 12)), st.integers(0, 20))
def test_groups_hold_equal_keys_in_order(sizes: list[int], most: int) -> None:
    parts = group_by_budget(sizes, lambda size: size % 3, int, most)
    for key in range(3):
        own = [part for part in parts if part[0] % 3 == key]
        alike = [size for size in sizes if size % 3 == key]
        assert own == split_by_budget(alike, int, most)
    assert sum(map(len, parts)) == len(sizes)
