"""The command line: what it prints, where, at which width, and its exit codes."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import farms_fast
from farms_fast.cli import main as cli
from farms_fast.cli.tables import shorten
from farms_fast.core.progress import reporter
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix
from farms_fast.weights.stacks import Skipped
from tests.support.records import SETTINGS

HOSTILE = "a\x1b[31mred\x1b[0m\n[bold]b[/bold]\u202e\x07"


def run(*arguments: str | Path, columns: int | None = None) -> Result:
    env = {"COLUMNS": None if columns is None else str(columns), "TERM": "dumb"}
    return CliRunner().invoke(cli.app, ["analyze", *map(str, arguments)], env=env)


def a_record(name: str, **values: Any) -> LayerRecord:
    values = {
        "windows": 9,
        "alpha": 2.345678,
        "alpha_se": 0.0125,
        "split_half": 0.02,
        "D": 0.0625,
        "xmin": 0.00123456,
        "stable_rank": 43.21,
        "log_spectral_norm": 1.5,
        **values,
    }
    return LayerRecord(name, "linear", (1, 384, 1536), values.pop("status", "ok"), **values)


def an_analysis(*names: str) -> Analysis:
    return Analysis(
        [a_record(name) for name in names or ("encoder.fc",)],
        [
            Skipped(name="encoder.fc.bias", shape=(384,), reason="a vector"),
            Skipped(name="embed.weight", shape=(10, 4), reason="an embedding"),
            Skipped(name="norm.bias", shape=(4,), reason="a vector"),
        ],
        SETTINGS,
    )


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the analysis by a given result; keeps the arguments that it was called with."""
    import farms_fast.run_analysis

    seen: dict[str, Any] = {"result": an_analysis()}

    def analyze(model: object, sampling: object, xmin: str, **options: object) -> Analysis:
        seen.update(options, model=model, sampling=sampling, xmin=xmin)
        if isinstance(seen["result"], BaseException):
            raise seen["result"]
        result = seen["result"]
        assert isinstance(result, Analysis)
        return result

    monkeypatch.setattr(farms_fast.run_analysis, "analyze", analyze)
    return seen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(
        {
            "encoder.fc.weight": torch.randn(48, 64, generator=generator),
            "encoder.fc.bias": torch.zeros(48),
            "head.weight": torch.randn(40, 40, generator=generator),
        },
        path,
    )
    return path


SMALL = ("--rows", "32", "--per-dim", "3", "--bootstrap", "10")


# ------------------------------------------------------------------------------- real checkpoints


def test_analyses_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, *SMALL, "--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["name", "shape", "windows"]
    assert lines[1].split()[:3] == ["encoder.fc", "48x64", "9"]
    assert lines[2].split()[:3] == ["head", "40x40", "9"]
    assert re.search(r"2 layers ok, 0 failed, 1 tensors? skipped, mean alpha \d", result.stdout)

    analysis = Analysis.from_json(tmp_path / "a.json")
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["encoder.fc", "head"]
    assert [float(row["alpha"]) for row in rows] == [layer.alpha for layer in analysis]
    assert f"{analysis['head'].alpha:.3f}" in lines[2]
    assert analysis["head"].alpha_se > 0


def test_layers_that_fail_give_exit_code_1(tmp_path: Path) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    bad = weight.clone()
    bad[3, 4] = math.nan
    save_file({"good.weight": weight, "bad.weight": bad}, tmp_path / "m.safetensors")
    result = run(tmp_path / "m.safetensors", *SMALL)
    assert result.exit_code == 1, result.output
    assert re.search(r"^bad .* nonfinite$", result.stdout, re.MULTILINE)
    assert re.search(r"^failed: bad: nonfinite: \S", result.stdout, re.MULTILINE)
    assert "1 layer ok, 1 failed, 0 tensors skipped" in result.stdout


def test_full_takes_one_window(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--full", "--json", tmp_path / "a.json", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    layer = Analysis.from_json(tmp_path / "a.json")["encoder.fc"]
    assert (layer.windows, layer.window_rows, layer.window_cols) == (1, 48, 64)


def test_include_and_exclude(checkpoint: Path, tmp_path: Path) -> None:
    for option in (("--include", "enc*"), ("--exclude", "head")):
        result = run(checkpoint, *SMALL, *option, "--json", tmp_path / "a.json")
        assert result.exit_code == 0, result.output
        assert [x.name for x in Analysis.from_json(tmp_path / "a.json")] == ["encoder.fc"]


# -------------------------------------------------------------------------------------- bad input


def assert_one_error_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--xmin", "middle"], ["middle", "median"]),
        (["--xmin-pos", "0"], ["xmin_pos"]),
        (["--bins", "0"], ["bins", "0"]),
        (["--bootstrap", "-1"], ["bootstrap", "-1"]),
        (["--device", "tpu9"], ["device", "cuda", "'tpu9'"]),
        (["--device", "meta"], ["device", "'meta'"]),
        (["--device", "cuda:99"], ["device", "cuda:99"]),
        (["--dtype", "float16"], ["dtype", "float64, float32", "'float16'"]),
        (["--solver", "abacus"], ["solver", "abacus"]),
        (["--q", "0"], ["q", "0"]),
        (["--q", "-1"], ["q", "-1"]),
        (["--q", "nan"], ["q", "nan"]),
        (["--rows", "0"], ["rows", "0"]),
        (["--rows", "-5"], ["rows", "-5"]),
        (["--per-dim", "0"], ["per_dim", "0"]),
        (["--memory", "lots"], ["memory", "40GiB", "'lots'"]),
        (["--memory", "9" * 400], ["memory", "40GiB", "99..."]),
        (["--bins", "100000000", "--xmin", "peak"], ["bins", "at most 1048576", "100000000"]),
        (["--bootstrap", "99999999999999999999"], ["bootstrap", "at most 100000"]),
        (["--full", "--rows", "9", "--q", "2"], ["full", "--rows, --q"]),
        (["--include", "nothing*"], ["include", "nothing*"]),
        (["--exclude", "nothing*"], ["exclude", "nothing*"]),
        (["--layout", "last"], ["layout", "auto, torch, channels_last", "'last'"]),
    ],
    ids=" ".join,
)
def test_bad_option(checkpoint: Path, options: list[str], parts: list[str]) -> None:
    assert_one_error_line(run(checkpoint, *options), *parts)


def test_missing_path(tmp_path: Path) -> None:
    assert_one_error_line(run(tmp_path / "none.safetensors"), "none.safetensors")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    assert_one_error_line(run(tmp_path), str(tmp_path))


def test_truncated_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint.read_bytes()
    for length in (0, 4, 40, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        assert_one_error_line(run(tmp_path / "cut.safetensors"), "cut.safetensors")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("1 2 3")
    assert_one_error_line(run(tmp_path / "weights.txt"), "weights.txt")


def test_nothing_to_analyse(tmp_path: Path) -> None:
    save_file({"bias": torch.zeros(4)}, tmp_path / "m.safetensors")
    result = run(tmp_path / "m.safetensors")
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)


@pytest.mark.parametrize("option", ["--csv", "--json", "--store"])
def test_unwritable_output_is_found_before_the_work(
    analysed: dict[str, Any], option: str, tmp_path: Path
) -> None:
    name = option.removeprefix("--")
    assert_one_error_line(run("m", option, tmp_path), f"{name}: ", "is a directory")
    assert_one_error_line(run("m", option, tmp_path / "no" / "x"), f"{name}: ", "does not exist")
    other = "--json" if option != "--json" else "--csv"
    error = run("m", option, "/proc/x")
    assert_one_error_line(error, f" {name}: cannot be written (", "): '/proc/x'")
    twice = run("m", option, tmp_path / "x", other, tmp_path / "x")
    assert_one_error_line(twice, "is the file of ", " too")
    assert "model" not in analysed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["m", "--rows", "many"], ["m", "--what"]])
def test_bad_usage(analysed: dict[str, Any], arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "model" not in analysed
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("q: expected > 0,\n  got 0"), "error: q: expected > 0, got 0\n"),
        (TypeError("model: bad"), "error: path: bad\n"),
        (TypeError("models: bad"), "error: models: bad\n"),
        (KeyError("no layer named 'x'"), "error: no layer named 'x'\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: [Errno 2] No such file: 'x'\n"),
        (ValueError("name \x1b[2J"), "error: name \\x1b[2J\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_errors_are_one_line(analysed: dict[str, Any], error: Exception, line: str) -> None:
    analysed["result"] = error
    result = run("m")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", line)


def test_a_bug_is_not_hidden(analysed: dict[str, Any]) -> None:
    analysed["result"] = RuntimeError("a bug")
    assert isinstance(run("m").exception, RuntimeError)


def test_interruption(analysed: dict[str, Any]) -> None:
    analysed["result"] = KeyboardInterrupt()
    result = run("m")
    saved = "nothing is saved; with --store FILE the finished layers would be"
    assert (result.exit_code, result.stderr) == (130, f"error: interrupted: {saved}\n")
    analysed["result"] = KeyboardInterrupt("3 of 7 layers are in 'a\x1b'")
    result = run("m", "--store", "run.sqlite")
    assert (result.exit_code, result.stderr) == (
        130,
        "error: interrupted: 3 of 7 layers are in 'a\\x1b'\n",
    )


# ---------------------------------------------------------------------------------------- options


def test_options_reach_the_analysis(analysed: dict[str, Any]) -> None:
    options = (
        "--rows 64 --q 0.5 --per-dim 4 --xmin peak --xmin-pos 3 --bins 50 --bootstrap 7 "
        "--device cpu --dtype float32 --solver lapack --memory 2KiB --include a* --include b "
        "--exclude c --layout channels_last --base d --key e --store e.sqlite "
        "--force --download"
    )
    result = run("m.pt", *options.split())
    assert result.exit_code == 0, result.output
    del analysed["result"]
    assert analysed == {
        "model": Path("m.pt"),
        "sampling": FixedAspectSampling(rows=64, q=0.5, per_dim=4),
        "xmin": "peak",
        "xmin_pos": 3.0,
        "bins": 50,
        "bootstrap": 7,
        "device": "cpu",
        "dtype": torch.float32,
        "solver": "lapack",
        "memory": 2048,
        "include": ["a*", "b"],
        "exclude": ["c"],
        "layout": "channels_last",
        "base": Path("d"),
        "key": "e",
        "download": True,
        "store": Path("e.sqlite"),
        "force": True,
        "process_group": None,
        "progress": True,
    }


def test_defaults(analysed: dict[str, Any]) -> None:
    run("m")
    assert analysed["sampling"] == FixedAspectSampling()
    assert analysed["xmin"] == "median"
    assert analysed["dtype"] is torch.float64
    assert analysed["layout"] == "auto"
    for name in ("device", "solver", "memory", "include", "exclude", "base", "store"):
        assert analysed[name] is None, name
    run("m", "--full")
    assert analysed["sampling"] == FullMatrix()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 * 2**30),
        ("40 gib", 40 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("2kB", 2000),
        ("1TiB", 2**40),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert cli.parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "0", "0.1B", "1GG", "1e9", "nan", "1 2", "٣", "9" * 400, "8388608TiB"],
)
def test_bad_memory(text: str) -> None:
    with pytest.raises(ValueError, match="memory: expected a size such as 40GiB"):
        cli.parse_memory(text)


# ------------------------------------------------------------------------------------ the output


def test_hostile_names_do_nothing(analysed: dict[str, Any]) -> None:
    analysed["result"] = Analysis(
        [a_record(HOSTILE), a_record(HOSTILE, status="error", message=HOSTILE)],
        [Skipped(name=HOSTILE, shape=(1,), reason=f"tied to {HOSTILE}")],
    )
    result = run("m", "--show-skipped", columns=300)
    shown = r"a\x1b[31mred\x1b[0m\n[bold]b[/bold]\u202e\x07"
    assert result.stdout.count(shown) == 6
    assert not set("\x1b\u202e\x07") & set(result.output)


def test_hostile_names_from_a_file(tmp_path: Path) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    save_file({HOSTILE + ".weight": weight}, tmp_path / "m.safetensors")
    result = run(tmp_path / "m.safetensors", *SMALL, columns=200)
    assert result.exit_code == 0
    assert r"a\x1b[31mred\x1b[0m\n[bold]b[/bold]\u202e\x07" in result.stdout
    assert not set("\x1b\u202e\x07") & set(result.output)


def test_default_width_shows_every_column(analysed: dict[str, Any]) -> None:
    table = run("m").stdout.splitlines()
    heading, row = (re.split(r" {2,}", line) for line in table[:2])
    assert dict(zip(heading, row, strict=True)) == {
        "name": "encoder.fc",
        "shape": "384x1536",
        "windows": "9",
        "alpha": "2.346",
        "±": "0.013",
        "split": "0.020",
        "D": "0.062",
        "xmin": "0.001235",
        "stable rank": "43.21",
        "log λmax": "1.500",
        "status": "ok",
    }
    assert max(map(len, table)) <= 100


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 140])
def test_table_fits_and_cuts_no_number(analysed: dict[str, Any], width: int) -> None:
    names = [f"model.language_model.layers.{i}.mlp.gate_proj" for i in range(3)]
    analysed["result"] = Analysis([a_record(name) for name in names])
    table = run("m", columns=width).stdout.splitlines()[:4]
    assert max(map(len, table)) <= width
    heading = table[0].split()
    assert heading[0] == "name"
    assert heading.count("alpha") == 1
    whole = {"384x1536", "9", "2.346", "0.013", "0.020", "0.062", "0.001235", "43.21", "1.500"}
    for i, line in enumerate(table[1:]):
        name, *values = line.split()
        assert set(values) <= whole | {"ok"}
        assert "2.346" in values
        assert name == names[i] or "…" in name
        # The ends of names tell layers apart.
        assert name.endswith("j")


def test_wider_terminals_show_more(analysed: dict[str, Any]) -> None:
    analysed["result"] = Analysis([a_record("a" * 30)])
    counts = [len(run("m", columns=w).stdout.splitlines()[1].split()) for w in range(20, 140, 10)]
    assert counts == sorted(counts)
    assert counts[0] < 5
    assert counts[-1] == 11


def test_narrowest_terminal_keeps_name_and_alpha(analysed: dict[str, Any]) -> None:
    table = run("m", columns=5).stdout.splitlines()
    assert table[0].split() == ["name", "alpha"]
    assert table[1].split()[1] == "2.346"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (19, "encoder.layer.0.mlp"),
        (18, "enco…r.layer.0.mlp"),
        (9, "en….0.mlp"),
    ],
)
def test_names_are_shortened_in_the_middle(width: int, shown: str) -> None:
    assert shorten("encoder.layer.0.mlp", width) == shown


@pytest.mark.parametrize("name", ["a" * 10**6, "層" * 10**6, "e\u0301" * 10**6])
def test_a_name_of_any_length(name: str) -> None:
    table = cli.format_table([a_record(name), a_record("fc")], 80).splitlines()
    assert all(cell_len(line) <= 80 for line in table)
    assert "…" in table[1]


def test_a_table_of_many_layers() -> None:
    """In proportion to the layers: as many took minutes when each row was laid out by rich."""
    start = time.perf_counter()
    table = cli.format_table([a_record(f"layers.{i}.fc") for i in range(18_000)], 140)
    assert len(table.splitlines()) == 18_001
    assert time.perf_counter() - start < 10


def test_wide_characters_line_up() -> None:
    table = cli.format_table([a_record("層" * 4), a_record("abcdefgh")], 100).splitlines()
    assert table[1].index("384x1536") == 4 + table[1].count("層") - 4 + 2
    assert table[2].index("384x1536") == 10


def test_missing_values_are_dashes() -> None:
    record = LayerRecord("a", "conv2d", (9, 8, 4), "error")
    assert cli.format_table([record], 100).splitlines()[1].split() == [
        "a",
        "9x8x4",
        "0",
        *["-"] * 7,
        "error",
    ]


def test_table_is_stable(analysed: dict[str, Any]) -> None:
    first, second = run("m").stdout, run("m").stdout
    strip = re.compile(r"\d+\.\d s$", re.MULTILINE)
    assert strip.sub("", first) == strip.sub("", second)


def test_skipped_tensors_by_reason(analysed: dict[str, Any]) -> None:
    brief = run("m").stdout
    assert brief.endswith(
        "skipped (--show-skipped lists the names):\n  2  a vector\n  1  an embedding\n"
    )
    assert "norm.bias" not in brief
    names = run("m", "--show-skipped").stdout
    assert names.endswith(
        "skipped:\n  2  a vector\n       encoder.fc.bias  384\n       norm.bias  4\n"
        "  1  an embedding\n       embed.weight  10x4\n"
    )


def test_quiet_prints_nothing_but_writes(analysed: dict[str, Any], tmp_path: Path) -> None:
    result = run("m", "--quiet", "--json", tmp_path / "a.json")
    assert (result.exit_code, result.output) == (0, "")
    assert analysed["progress"] is False
    assert json.loads((tmp_path / "a.json").read_text())["settings"] == SETTINGS.to_plain()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_that_cannot_have_every_character(checkpoint: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "farms_fast", "analyze", str(checkpoint), *SMALL],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"},
        check=True,
    )
    assert b"encoder.fc" in done.stdout
    assert done.stderr == b""


@pytest.mark.slow
def test_reader_that_leaves_is_no_error(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "farms_fast", "analyze", str(checkpoint), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait() == 141


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""
        self.encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with reporter(True, layers=2, windows=30) as report:
        report("[bold]b\x1b]0;x\x07[/bold]", 10, True)
        report("[bold]b\x1b]0;x\x07[/bold]", 20, True)
    assert "2/2" in terminal.text
    assert r"[bold]b\x1b]0;x\x07[/bold]" in terminal.text
    assert "\x07" not in terminal.text


# --------------------------------------------------------------------------------- other commands


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"farms-fast {farms_fast.__version__}\n")


@pytest.mark.slow
def test_module_and_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "farms_fast", "analyze", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    options = (
        "--rows --q --per-dim --xmin --xmin-pos --bins --bootstrap --full --device --dtype "
        "--solver --memory --include --exclude --layout --csv --json --quiet --show-skipped"
    )
    for option in options.split():
        assert f"  {option} " in done.stdout or f" {option}\n" in done.stdout, option


def test_numbers_of_the_record_are_not_changed_by_printing() -> None:
    record = a_record("a")
    before = record.scalars()
    cli.format_table([record], 60)
    np.testing.assert_equal(record.scalars(), before)
