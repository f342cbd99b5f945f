"""Files that commands write: none of those that are read, whatever they are called by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from farms_fast.cli import main as cli

WEIGHTS = {"q.weight": torch.randn(40, 40), "up.weight": torch.randn(40, 48)}
SMALL = ("--rows", "32", "--per-dim", "3", "--bootstrap", "0", "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"TERM": "dumb"})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pickle; a folder whose weights are a link; an adapter whose config names the pickle."""
    monkeypatch.chdir(tmp_path)
    torch.save(WEIGHTS, "ck.pt")
    for folder in ("blobs", "ck", "adapter"):
        Path(folder).mkdir()
    save_file(WEIGHTS, "blobs/0a1b")
    Path("ck/model.safetensors").symlink_to("../blobs/0a1b")
    Path("ck/config.json").write_text('{"model_type": "llama"}')
    Path("ck/tokenizer.json").write_text("{}")
    prefix = "base_model.model.q.lora_"
    save_file(
        {f"{prefix}A.weight": torch.randn(2, 40), f"{prefix}B.weight": torch.randn(40, 2)},
        "adapter/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "ck.pt"}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    Path("link.csv").symlink_to("ck.pt")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "command", ["analyze --csv", "analyze --json", "analyze --store", "plan --json"]
)
@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("ck.pt", "ck.pt"),
        ("ck.pt", "./blobs/../ck.pt"),
        ("ck.pt", "link.csv"),
        ("ck", "ck/model.safetensors"),
        ("ck", "blobs/0a1b"),
        ("ck", "ck/config.json"),
        ("ck", "ck/tokenizer.json"),
        ("ck", "ck/model.safetensors.index.json"),  # is not there, and would be read from then on
        ("ck/model.safetensors", "ck/config.json"),
        ("adapter", "adapter/adapter_model.safetensors"),
        ("adapter", "adapter/adapter_config.json"),
        ("adapter", "ck.pt"),
        ("adapter --base ck", "ck/model.safetensors"),
    ],
)
def test_no_file_of_a_checkpoint_is_written(
    here: Path, command: str, model: str, file: str
) -> None:
    before = contents(here)
    name, option = command.split()
    result = run(name, *model.split(), option, file, *SMALL[:6])
    assert result.exit_code == 2
    assert f"{option.removeprefix('--')}: {str(Path(file))!r} would overwrite a file of the" in (
        result.stderr
    )
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert contents(here) == before


def test_other_files_beside_a_checkpoint_are(here: Path) -> None:
    for _ in range(2):
        result = run("analyze", "ck", *SMALL, "--json", "ck/a.json", "--store", "ck/run.sqlite")
        assert result.exit_code == 0, result.output
    assert run("plan", "ck.pt", "--json", "plan.json").exit_code == 0
    # The base that is given is read, that of the config is not.
    result = run("analyze", "adapter", "--base", "ck", *SMALL, "--csv", "ck.csv")
    assert result.exit_code == 0, result.output
    assert run("export", "ck/run.sqlite", "--csv", "ck/a.csv").exit_code == 0


@pytest.mark.parametrize("command", ["export", "report", "compare"])
def test_no_store_is_written_by_what_reads_it(here: Path, command: str) -> None:
    assert run("analyze", "ck.pt", *SMALL, "--store", "run.sqlite").exit_code == 0
    shutil.copy("run.sqlite", "other.sqlite")
    Path("alias").symlink_to("run.sqlite")
    before = contents(here)
    given = ["run.sqlite", "other.sqlite"][: 1 + (command == "compare")]
    options = {"export": ["--csv", "--npz"], "report": ["-o"], "compare": ["--csv", "-o"]}
    for option in options[command]:
        for file in (*given, "alias"):
            result = run(command, *given, option, file)
            assert (result.exit_code, result.stdout) == (2, "")
            assert " is the file of " in result.stderr
    assert contents(here) == before


def test_a_dash_is_no_file(here: Path) -> None:
    assert run("analyze", "ck.pt", *SMALL, "--store", "run.sqlite").exit_code == 0
    for arguments in (("export", "run.sqlite"), ("analyze", "ck.pt")):
        result = run(*arguments, "--csv", "-")
        assert result.exit_code == 2
        assert result.stderr == (
            "error: csv: expected a file, got '-' (/dev/stdout writes to a pipe)\n"
        )
    assert not Path("-").exists()


def test_a_report_has_the_name_of_its_source(here: Path) -> None:
    assert run("analyze", "ck.pt", *SMALL, "--store", "blobs/run.sqlite").exit_code == 0
    assert run("report", "blobs/run.sqlite").exit_code == 0
    assert "<!doctype html>" in Path("blobs/run.html").read_text(encoding="utf-8")
    shutil.copy("blobs/run.sqlite", "run.html")
    result = run("report", "run.html")
    assert result.exit_code == 2
    assert "output: 'run.html' is the file of source too" in result.stderr


def test_what_cannot_be_written_is_named_as_it_was_asked_for(here: Path) -> None:
    for option, file in (("--csv", "/dev/full"), ("--json", "/proc/x.json")):
        result = run("analyze", "ck.pt", *SMALL, option, file)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: [Errno ")
        assert result.stderr.endswith(f": '{file}'\n")


def test_messages_call_arguments_as_the_command_does(here: Path) -> None:
    for command in ("analyze", "plan"):
        assert run(command, "none.pt").stderr.startswith("error: path: expected a file or folder")
        unknown = run(command, "ck", "--include", "mlp").stderr
        assert unknown == (
            "error: include: expected patterns that match a whole name, 'mlp' matches none of the "
            "2 names (names: 'q', 'up')\n"
        )
        bytes_alone = run(command, "ck", "--memory", "40", *SMALL).stderr
        assert bytes_alone.endswith("got 40 (40 is bytes; 40GiB for gibibytes)\n")
        solver = run(command, "ck", "--solver", "abacus", "--device", "cpu").stderr
        assert solver.startswith("error: solver: expected one of auto, lapack, two_stage on cpu")
    assert run("plan", "ck", "--solver", "lapack", "--device", "cpu").exit_code == 0


def test_comparing_what_has_no_layer_in_common(here: Path) -> None:
    save_file({f"model.{name}": value for name, value in WEIGHTS.items()}, "b.safetensors")
    for model, store in (("ck", "a.sqlite"), ("b.safetensors", "b.sqlite")):
        assert run("analyze", model, *SMALL, "--store", store).exit_code == 0
    for quiet in ([], ["--quiet"]):
        result = run("compare", "a.sqlite", "b.sqlite", "-o", "c.html", *quiet)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "error: no layer has the same name in A ('q', ...) and B ('model.q', ...): analyse "
            "both from a checkpoint or both from the same class\n"
        )
    assert not Path("c.html").exists()
