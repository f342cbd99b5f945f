"""The import linter's contract: it holds, and an import of a higher floor breaks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
UPWARD = {
    "at the top of the module": "from farms_fast.results import record\n",
    "in a function": "def f():\n    from farms_fast.results import record\n    return record\n",
    "for type checkers only": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from farms_fast.results import record\n"
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package's Python files and the settings of its tools."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "farms_fast", tmp_path / "farms_fast", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_import_goes_down(copy: Path) -> None:
    result = lint_imports(copy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("upward", UPWARD.values(), ids=UPWARD)
def test_an_upward_import_is_found(copy: Path, upward: str) -> None:
    (copy / "farms_fast/core/planted.py").write_text(upward)
    result = lint_imports(copy)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "farms_fast.core.planted -> farms_fast.results.record" in result.stdout
