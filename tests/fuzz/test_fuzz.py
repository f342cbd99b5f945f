"""Damaged files: a short series of `python -m tests.fuzz`, and that what is wrong is seen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import workers
from tests.fuzz.mutations import changed, changed_json
from tests.fuzz.seeds import SEEDS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_series_is_answered_well() -> None:
    """In a process of its own, for it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--count", "52", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^52 cases, 0 badly answered", done.stdout, re.MULTILINE)
    # Every kind has its turn.
    assert all(f"{kind.name}: exit codes" in done.stdout for kind in SEEDS)


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ((0, "table\n", ""), ""),
        ((1, "table\n", "note: 1\n"), ""),
        ((2, "", "error: a\n"), ""),
        ((2, "", "Usage: x\n"), "exit code 2 without one line"),
        ((2, "", "error: a\nerror: b\n"), "exit code 2 without one line"),
        ((2, "", "error: a\nmore\n"), "exit code 2 without one line"),
        ((-1, "", "Traceback\nKeyError: 'a'\n"), "traceback: Traceback | KeyError: 'a'"),
        ((3, "", ""), "exit code 3"),
        ((0, "a\x1b[2J\n", ""), "raw '\\x1b' on the terminal"),
        ((2, "", "error: set weights_only=False\n"), "advises to run code"),
        ((0, "failed: a: MemoryError\n", ""), "takes more memory than there is"),
    ],
)
def test_what_is_wrong_is_seen(answer: tuple[int, str, str], wrong: str) -> None:
    judged = workers.judged(*answer)
    assert judged.startswith(wrong)
    assert bool(judged) == bool(wrong)


def test_cases_are_made_by_seed_and_number_alone(tmp_path: Path) -> None:
    kind = SEEDS[0]
    (tmp_path / "sound").mkdir()
    path = kind.make(tmp_path / "sound")
    (tmp_path / "sound" / "path").write_text(path.name)
    written = []
    for folder, number in (("a", 0), ("b", 0), ("c", len(SEEDS))):
        workers.Case.of(number, seed=3).write(tmp_path / "sound", tmp_path / folder)
        written.append((tmp_path / folder / path.name).read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]
    assert path.read_bytes() not in written


def test_mutations_change_something() -> None:
    content = b'{"a": [1, 2], "b": {"c": "text"}}' * 3
    assert sum(changed(Random(i), content) != content for i in range(200)) > 180
    text = b'{"a": [1, 2], "b": {"c": "text"}}'
    assert sum(changed_json(Random(i), text) != text for i in range(200)) > 150
