"""Which files belong together: indexes of shards, and shards that their names number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from farms_fast.core.json_files import parse_json
from farms_fast.core.regular_files import read_limited

_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_json_object(path: Path, what: str = "a JSON object") -> dict[str, Any]:
    """The entries of a JSON file, which is a regular one of bounded size."""
    entries = parse_json(path, read_limited(path))
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected {what}")
    return entries


def read_index(path: Path) -> dict[Path, list[str]]:
    """Shards of an index and the tensors of each, all beside the index."""
    what = 'JSON with a "weight_map" of tensor names to file names'
    weight_map = read_json_object(path, what).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: expected {what}")
    shards: dict[Path, list[str]] = {}
    for name, shard in weight_map.items():
        # A plain name, so that a downloaded index cannot point elsewhere. The name itself may be a
        # symbolic link: caches of downloads store files so. Backslash and colon are for Windows.
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\:\0]", shard):
            raise ValueError(
                f"{path}: expected the plain name of a file in the same folder for {name!r}, "
                f"got {shard!r}"
            )
        shards.setdefault(path.parent / shard, []).append(name)
    for shard_path in shards:
        if not shard_path.is_file():
            raise FileNotFoundError(f"{path}: names the file {shard_path.name!r}, which is missing")
    if not shards:
        raise ValueError(f"{path}: expected at least one tensor in weight_map, got none")
    return shards


def numbered_shards(path: Path) -> list[Path]:
    """All parts of a GGUF model that is cut into files, by the path of any; else the path alone."""
    match = _NUMBERED.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    if path not in parts:
        return [path]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(
                f"{path}: is one of {count} parts, of which {part.name!r} is missing"
            )
    return parts
