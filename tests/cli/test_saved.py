"""``farms-fast export`` and ``farms-fast runs``."""

from __future__ import annotations

import csv
import os
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from farms_fast.cli.main import app
from farms_fast.results.analysis import Analysis
from farms_fast.results.store import ResultsStore
from tests.support.records import SETTINGS, assert_same, made_up

HOSTILE = "a\x1b[31mred\x1b[0m\n\u202e"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Run 1 is finished; run 2 has one layer of three and other numbers."""
    path = tmp_path / "run.sqlite"
    with ResultsStore(path) as opened:
        first = opened.run(SETTINGS)
        first.put_many((index, made_up(index), "d") for index in range(2))
        first.complete(["layer.0", "layer.1"])
        opened.run(replace(SETTINGS, source=HOSTILE), total=3).put(0, made_up(0, weights=1), "d")
    return path


def test_export_writes_every_form(store: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    forms = ("csv", "json", "parquet", "safetensors", "npz")
    options = [text for form in forms for text in (f"--{form}", str(tmp_path / form))]
    result = run("export", store, "--run", "1", *options)
    assert (result.exit_code, result.output) == (0, "")
    with (tmp_path / "csv").open(newline="") as stream:
        assert [float(row["alpha"]) for row in csv.DictReader(stream)] == [
            made_up(index).alpha for index in range(2)
        ]
    analysis = Analysis.from_json(tmp_path / "json")
    assert analysis.settings == SETTINGS
    # As `analyze --json` writes it.
    assert analysis["layer.1"].alpha == made_up(1).alpha
    assert analysis["layer.1"].window_evals.size == 0
    assert pyarrow.parquet.read_table(tmp_path / "parquet").num_rows == 2
    with np.load(tmp_path / "npz") as spectra:
        np.testing.assert_array_equal(spectra["layer.1"], made_up(1).window_evals)
    spectra = load_file(tmp_path / "safetensors")
    np.testing.assert_array_equal(spectra["layer.1"], made_up(1).window_evals)


def test_export_takes_the_newest_and_says_that_it_is_not_finished(store: Path) -> None:
    result = run("export", store, "--json", store.parent / "a.json")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == "note: run 2 is not finished: 1/3 layers\n"
    (layer,) = Analysis.from_json(store.parent / "a.json")
    assert layer.alpha == made_up(0, weights=1).alpha


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected at least one of --csv, --json, --parquet, --safetensors, --npz"),
        (("--csv", "none/a.csv"), "csv: the directory of 'none/a.csv' does not exist"),
        (("--npz", "."), "npz: '.' is a directory, expected a file"),
        (("--json", "run.sqlite"), "json: 'run.sqlite' is the file of store too"),
        (("--csv", "a", "--npz", "./a"), "npz: 'a' is the file of csv too"),
        (("--run", "7", "--csv", "a.csv"), "run: expected one of 1, 2, got 7"),
    ],
)
def test_export_refuses_in_one_line(
    store: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    result = run("export", store, *arguments)
    assert result.exit_code == 2
    assert result.stderr == f"error: {message}\n"
    assert_same(Analysis.from_store(store, 1)["layer.0"], made_up(0))
    assert [path.name for path in store.parent.iterdir()] == ["run.sqlite"]


def test_export_without_pyarrow(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    result = run("export", store, "--parquet", store.parent / "a.parquet")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: to_parquet: pyarrow is needed")


@pytest.mark.parametrize("command", [("runs",), ("export", "--csv", "a.csv")])
def test_what_is_no_store(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = command
    missing, other = tmp_path / "none.sqlite", tmp_path / "other.txt"
    other.write_text("text of some length that is no database" * 50)
    for path, message in ((missing, "no such results store"), (other, "is not a results store")):
        result = run(name, path, *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert path.name in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not missing.exists()


def test_runs_lists_them(store: Path) -> None:
    result = run("runs", store)
    assert result.exit_code == 0
    heading, first, second = result.stdout.splitlines()
    assert heading.split() == ["run", "started", "finished", "layers", "source"]
    with ResultsStore(store) as opened:
        infos = opened.runs()
    assert first.split() == [
        "1",
        infos[0].started,
        infos[0].finished,
        "2/2",
        "model.safetensors",
    ]
    assert second.split()[:4] == ["2", infos[1].started, "-", "1/3"]
    # All columns but the last begin where the heading does.
    for title, text in (("layers", "1/3"), ("source", "a\\x1b[31mred")):
        assert second.index(text) == heading.index(title)
    assert "\x1b" not in result.stdout


def test_runs_of_a_store_without_any(tmp_path: Path) -> None:
    with ResultsStore(tmp_path / "run.sqlite"):
        pass
    result = run("runs", tmp_path / "run.sqlite")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1


def test_nothing_of_a_store_acts_on_the_terminal(store: Path) -> None:
    with sqlite3.connect(store) as connection:
        connection.execute("UPDATE runs SET started = ?", (HOSTILE,))
    listed = run("runs", store)
    assert listed.exit_code == 0
    assert "\x1b" not in listed.output
    assert "a\\x1b[31mred" in listed.stdout
    for column in ("total", "finished"):
        with sqlite3.connect(store) as connection:
            connection.execute(f"UPDATE runs SET {column} = x'1b5d'")
        for arguments in (("runs", store), ("export", store, "--csv", store.parent / "a.csv")):
            result = run(*arguments)
            assert result.exit_code == 2
            assert "is damaged" in result.stderr
            assert "\x1b" not in result.output


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_saved_analysis_from_anyone_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text("[" * 100_000)
    os.mkfifo("pipe")
    for path, message in (
        ("a.json", "is not a JSON file (nested too deeply)"),
        ("pipe", "pipe: expected a regular file, got a FIFO"),
        ("/dev/zero", "/dev/zero: expected a regular file, got a character device"),
    ):
        result = run(command, *[path] * (1 + (command == "compare")), "-o", "page.html")
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
