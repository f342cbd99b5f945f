"""Texts of tables and lists.

Names come from files that anyone may have written: nothing of them reaches the terminal before
:func:`farms_fast.results.printable`.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from farms_fast.results import printable

if TYPE_CHECKING:
    from farms_fast.layers import Skipped

__all__ = ["cells", "columns", "pad", "skipped_lines"]

_GAP = "  "


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
