"""Plain-text tables and lists.

Names come from files that anyone may have written: callers pass them through `printable`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from farms_fast.core.text import printable
from farms_fast.weights.stacks import Skipped

_GAP = 2
_NAME_FLOOR = 28
_SHORTEST_NAME = 8


def text_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    first_width: int = 0,
) -> list[str]:
    """Lays printable texts out in columns, aligned to the right, and cuts none.

    Returns lines without trailing spaces, the headings first. `left` has the headings of columns
    that are aligned to the left, `first_width` the least width of the first column.

    Example:
        >>> text_table(["name", "n"], [["fc", "12"]], left=["name"])
        ['name   n', 'fc    12']
    """
    # rich's own table takes milliseconds for a row, and models have tens of thousands.
    from rich.cells import cell_len

    table = [headings, *rows]
    widths = [[cell_len(cell) for cell in line] for line in table]
    columns = [max(column) for column in zip(*widths, strict=True)]
    columns[0] = max(columns[0], first_width)
    lines = []
    for cells, own in zip(table, widths, strict=True):
        line = []
        for heading, cell, width, column in zip(headings, cells, own, columns, strict=True):
            space = " " * (column - width)
            line.append(cell + space if heading in left else space + cell)
        lines.append((" " * _GAP).join(line).rstrip())
    return lines


def fit_table(
    names: Sequence[str],
    columns: Sequence[tuple[str, int, Sequence[str]]],
    width: int,
    *,
    left: Collection[str] = (),
) -> str:
    """Lays out names and columns as a plain table of at most that many columns of a terminal.

    A column has a heading, an importance, and a printable text for each name. Columns are left out,
    the least important first, until the names have room; then names are shortened in their middle.
    Other texts are never cut. `left` has the headings of columns that are aligned to the left.

    Example:
        >>> print(fit_table(["fc1"], [("alpha", 2, ["2.5"]), ("D", 1, ["0.1"])], 30))
        name      alpha    D
        fc1         2.5  0.1
    """
    from rich.cells import cell_len

    longest = max(map(cell_len, names), default=0)
    kept = list(columns)
    widths = {heading: max(map(cell_len, (heading, *texts))) for heading, _, texts in columns}

    def width_for_names() -> int:
        return width - sum(_GAP + widths[heading] for heading, _, _ in kept)

    floor = max(_SHORTEST_NAME, min(longest, _NAME_FLOOR))
    while width_for_names() < floor and len(kept) > 1:
        if len(kept) <= 3 and width_for_names() >= _SHORTEST_NAME:
            break  # a name that is shortened more says more than a missing column
        kept.remove(min(kept, key=lambda column: column[1]))
    name_width = max(_SHORTEST_NAME, min(longest, width_for_names()))
    shortened = [shorten(name, name_width) for name in names]
    rows = list(zip(shortened, *(texts for _, _, texts in kept), strict=True))
    headings = ["name", *(heading for heading, _, _ in kept)]
    return "\n".join(text_table(headings, rows, left=["name", *left], first_width=name_width))


def shorten(text: str, width: int) -> str:
    """Text of at most that many columns of a terminal, cut in its middle.

    Three quarters of the rest come from the end, where the names of a model's layers differ.
    """
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    # More than enough of both ends, also where characters take no column.
    text = text if len(text) <= 16 * width else text[: 8 * width] + text[-8 * width :]
    left = text[:width]
    while cell_len(left) > (width - 1) // 4:
        left = left[:-1]
    # Reversed, for `set_cell_size` cuts the end; a wide character that it halves becomes a space.
    right = set_cell_size(text[::-1], width - 1 - cell_len(left))[::-1].lstrip()
    return f"{left}…{right}"


def counted(count: int, noun: str, ending: str = "s") -> str:
    """A number of things: 1 layer, 2 batches."""
    return f"{count} {noun}{ending if count != 1 else ''}"


def all_skipped(tensors: int) -> str:
    """The reason why a checkpoint of so many tensors has no layer."""
    if tensors == 1:
        return "its only tensor was skipped"
    return f"all of its {tensors} tensors were skipped"


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
