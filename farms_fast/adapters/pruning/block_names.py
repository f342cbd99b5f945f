"""Which layers belong to which block, as their names tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["group_by_block"]


def group_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups layers by the repeated blocks that they lie in.

    A block is numbered: `model.layers.3` in `model.layers.3.mlp.up_proj`. Numbers of one list
    are repeated blocks when at least two of them hold layers of one name (`mlp.up_proj`). Of
    nested lists the outermost counts, so that a block's experts are in the block.

    Args:
        names: of layers, in the model's order.

    Returns:
        Names of blocks to names of layers, both in the given order. Layers outside of blocks are
        in none.

    Raises:
        TypeError: they are no names.
        ValueError: there are no repeated blocks.

    Example:
        >>> group_by_block(["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up", "lm_head"])
        {'layers.0': ['layers.0.q', 'layers.0.up'], 'layers.1': ['layers.1.q', 'layers.1.up']}
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected names of layers, got {type(names).__name__}")
    every = list(names)
    for name in every:
        if not isinstance(name, str):
            raise TypeError(f"names: expected names of layers, got {name!r} for one")
    # Of each list and each name inside of its blocks: the numbers of the blocks that have it.
    numbers: dict[tuple[str, str], set[str]] = {}
    for name in every:
        for parent, number, inner in _numbered(name):
            numbers.setdefault((parent, inner), set()).add(number)
    repeated = {parent for (parent, _), found in numbers.items() if len(found) > 1}
    blocks: dict[str, list[str]] = {}
    for name in every:
        for parent, number, _ in _numbered(name):
            if parent in repeated:
                blocks.setdefault(f"{parent}.{number}" if parent else number, []).append(name)
                break
    if not blocks:
        shown = ", ".join(map(repr, every[:3])) + (", ..." if len(every) > 3 else "")
        raise ValueError(
            "layers: expected repeated blocks (names such as 'layers.0.q' and 'layers.1.q'), found "
            f"none in {len(every)} names ({shown or 'no layers'})"
        )
    return blocks


def _numbered(name: str) -> Iterator[tuple[str, str, str]]:
    """The list, the number and the rest for every number in a name that has a rest."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdecimal():
            yield ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
