"""The file of finished cells: JSON lines, each with the digest of the settings it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.effect.real_llm_plan import Cell, digest_of


@dataclass
class Run:
    """What was measured with the same settings: what cells share, and cells by key."""

    facts: dict[str, Any] | None = None
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, entry: dict[str, Any]) -> None:
        if "facts" in entry:
            self.facts = entry["facts"]
        else:
            self.cells[Cell(**entry["cell"]).key] = entry


def read_runs(path: Path) -> dict[str, Run]:
    """Runs by the digest of their settings; half a line at the end is left out."""
    runs: dict[str, Run] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        entry = json.loads(line)
        runs.setdefault(entry["settings"], Run()).take(entry)
    return runs


class Results(Run):
    """The cells of these settings in a file; new ones are appended at once."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.path, self.digest = path, digest_of(settings)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A run that was killed may have left half a line, which no line may continue.
        if not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        known = read_runs(path).get(self.digest, Run())
        self.facts, self.cells = known.facts, known.cells

    def add(self, entry: dict[str, Any]) -> None:
        entry = {"settings": self.digest, **entry}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.take(entry)
