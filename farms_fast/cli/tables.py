"""Texts of tables and lists.

Names come from files that anyone may have written: nothing of them reaches the terminal before
`printable`.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from farms_fast.core.text import printable

if TYPE_CHECKING:
    from farms_fast.weights.layers import Skipped

__all__ = [
    "all_skipped",
    "cells",
    "columns",
    "counted",
    "fit_table",
    "pad",
    "shorten",
    "skipped_lines",
]

_GAP = "  "
_NAME_FLOOR = 28
_LEAST_NAME = 8


def cells(text: str) -> int:
    """Columns on a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def pad(text: str, width: int, *, right: bool) -> str:
    """Fills up with spaces to a width on a terminal."""
    fill = " " * (width - cells(text))
    return fill + text if right else text + fill


def columns(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of texts, aligned to the right."""
    widths = [max(map(cells, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield _GAP.join(pad(text, w, right=True) for text, w in zip(row, widths, strict=True))


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number of things.

    Example:
        >>> counted(1, "layer"), counted(2, "batch", "es")
        ('1 layer', '2 batches')
    """
    return f"{count} {noun}{ending if count != 1 else ''}"


def all_skipped(tensors: int) -> str:
    """Why there is nothing to analyse in a checkpoint of so many tensors."""
    return (
        "its only tensor was skipped"
        if tensors == 1
        else f"all of its {tensors} tensors were skipped"
    )


def fit_table(
    names: Sequence[str],
    columns: Sequence[tuple[str, int, Sequence[str]]],
    width: int,
    *,
    left: Collection[str] = (),
) -> str:
    """Lays out names and columns as a plain table of at most that many columns of a terminal.

    Columns are left out, the least important first, until the names have room; then names are
    shortened in their middle. What stands in a column is never cut.

    Args:
        names: the first column, printable.
        columns: for each its heading, its importance, and its texts, one a name.
        width: columns of the terminal.
        left: headings of the columns that are aligned to the left.

    Returns:
        Lines without trailing spaces, the heading first.

    Example:
        >>> print(fit_table(["fc1"], [("alpha", 2, ["2.5"]), ("D", 1, ["0.1"])], 30))
        name      alpha    D
        fc1         2.5  0.1
    """
    longest = max(map(cells, names), default=0)
    kept = list(columns)

    def width_of(column: tuple[str, int, Sequence[str]]) -> int:
        return max(map(cells, (column[0], *column[2])))

    def room_for_names() -> int:
        return width - sum(len(_GAP) + width_of(column) for column in kept)

    floor = max(_LEAST_NAME, min(longest, _NAME_FLOOR))
    while room_for_names() < floor and len(kept) > 1:
        if len(kept) <= 3 and room_for_names() >= _LEAST_NAME:
            break  # a name that is shortened more says more than a missing column
        kept.remove(min(kept, key=lambda column: column[1]))
    name_width = max(_LEAST_NAME, min(longest, room_for_names()))

    lines = []
    for row in range(-1, len(names)):
        line = pad("name" if row < 0 else shorten(names[row], name_width), name_width, right=False)
        for column in kept:
            text = column[0] if row < 0 else column[2][row]
            line += _GAP + pad(text, width_of(column), right=column[0] not in left)
        lines.append(line.rstrip())
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """Text of at most that many columns, cut in its middle.

    Three quarters of what stays come from the end, where the names of a model's layers differ.
    """
    if cells(text) <= width:
        return text
    left, right = list(text), list[str]()
    while left and cells("".join(left)) > (width - 1) // 4:
        left.pop()
    for c in reversed(text):
        if cells("".join(right)) + cells(c) > width - 1 - cells("".join(left)):
            break
        right.insert(0, c)
    return "".join(left) + "…" + "".join(right)


def skipped_lines(tensors: Sequence[Skipped], names: bool) -> Iterator[str]:
    """The skipped tensors by reason, the commonest first."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        by_reason[tensor.reason].append(f"{printable(tensor.name)}  {shape}")
    if by_reason:
        yield "skipped:" if names else "skipped (--show-skipped lists the names):"
    for reason, listed in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"  {len(listed)}  {printable(reason)}"
        if names:
            yield from (f"       {tensor}" for tensor in listed)
