"""Where in a model its layers are, read off their names: depth, and what they have in common.

A transformer's `encoder.layer.3.attention.self.query` is in block 3 and has a sibling of the same
role in every other block. That is all that a plot over depth needs, and names tell it for
checkpoints too, which have no modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

OTHER = "other"
"""The group of all layers whose role is too rare for a group of its own."""

_INTEGER = re.compile(r"(?:^|(?<=[.\[/]))\d+(?=$|[.\]/])")


@dataclass(frozen=True)
class LayerPosition:
    """Where a layer is.

    Attributes:
        depth: position of its block among the model's blocks; a layer in no block counts as one.
        block: what the block is called: its number, with its prefix where the model has several
            sequences of blocks; or the layer's own name.
        group: its role: the name within the block, further numbers as `*`; the kind ("linear",
            "conv2d") where a block is the layer itself or the layer is in none.
    """

    depth: int
    block: str
    group: str


def layer_positions(
    names: Sequence[str], kinds: Sequence[str], most: int = 12
) -> list[LayerPosition]:
    """The position of every layer, from names and kinds in the model's order.

    The first number in a name is its block's, and what stands before it names the sequence of
    blocks. Blocks of one sequence are in the order of their numbers; otherwise the order of the
    layers decides. Of more roles than `most` the rarest become `OTHER`.
    """
    blocks = [_block(name) for name in names]
    roles = [
        role if number >= 0 and role else kind
        for (_, number, role), kind in zip(blocks, kinds, strict=True)
    ]
    counts = Counter(roles)
    # Counter lists equally common ones in the order in which they came.
    kept = [role for role, _ in counts.most_common(most if len(counts) <= most else most - 1)]
    sequences: dict[str, list[int]] = {}
    units: dict[tuple[str, int], int] = {}
    for prefix, number, _ in blocks:
        if (prefix, number) not in units:
            units[prefix, number] = len(units)
            sequences.setdefault(prefix, []).append(number)
    # The slots of a sequence stay where they are, and its blocks take them in their order.
    depths = {}
    for prefix, numbers in sequences.items():
        slots = sorted(units[prefix, number] for number in numbers)
        for slot, number in zip(slots, sorted(numbers), strict=True):
            depths[prefix, number] = slot
    several = sum(numbers != [-1] for numbers in sequences.values()) > 1
    positions = []
    for (prefix, number, _), role in zip(blocks, roles, strict=True):
        block = prefix if number < 0 else f"{prefix}{number}" if several else str(number)
        group = role if role in kept else OTHER
        positions.append(LayerPosition(depths[prefix, number], block, group))
    return positions


def _block(name: str) -> tuple[str, int, str]:
    """What stands before the first number, the number (-1 for none), and what stands after it."""
    match = _INTEGER.search(name)
    # int() refuses texts of thousands of digits, and a block's number has few.
    if match is None or len(match[0]) > 9:
        return name, -1, ""
    role = _INTEGER.sub("*", name[match.end() :].lstrip(".]/"))
    return name[: match.start()], int(match[0]), role
