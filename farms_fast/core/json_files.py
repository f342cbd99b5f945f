"""JSON from files of anyone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(path: Path, text: bytes) -> Any:
    """The content of a JSON file, None where it has none; ValueError for a name given twice."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            repeated.append(next(name for name in names if names.count(name) > 1))
        return entries

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        content = None
    if repeated:
        raise ValueError(f"{path}: expected each name once, got {repeated[0]!r} more than once")
    return content
