"""The package as a whole: what it offers by name, and what an unbuilt clone of it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import farms_fast

ROOT = Path(farms_fast.__file__).parents[1]


def test_dir_offers_the_public_names_only() -> None:
    assert dir(farms_fast) == sorted(farms_fast.__all__)


@pytest.mark.slow
def test_an_unbuilt_clone_says_in_one_line_how_to_build_it(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "farms_fast", tmp_path / "farms_fast", ignore=ignore)
    # The folder one is in comes first, before the built package of the tests.
    result = subprocess.run(
        [sys.executable, "-c", "import farms_fast"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: farms_fast: ")
    assert "make build" in error
    assert str(tmp_path) in error
    # Nothing else went wrong before or after it.
    assert result.stderr.count("Error: ") == 1
