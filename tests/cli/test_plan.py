"""`farms-fast plan`: what it prints and writes, and that it reads no weight."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from farms_fast.cli import main as cli
from farms_fast.cli.plan import _machine
from farms_fast.weights.sources import SafetensorsSource
from tests.support.sparse_checkpoints import LLAMA_7B, LLAMA_70B, Llama, write_hollow

HOSTILE = "a\x1b[31mred\n[bold]b[/bold]"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], env={"TERM": "dumb"})


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hollow")
    return {
        "7b": write_hollow(folder / "7b", LLAMA_7B.shapes()),
        "70b": write_hollow(folder / "70b", LLAMA_70B.shapes(), "BF16"),
    }


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_file(
        {
            "encoder.fc.weight": torch.randn(48, 64),
            "encoder.out.weight": torch.randn(64, 48),
            "wide.weight": torch.randn(96, 96),
            "half.weight": torch.randn(48, 48, dtype=torch.float16),
            "encoder.fc.bias": torch.zeros(48),
            HOSTILE: torch.zeros(3),
        },
        tmp_path / "model.safetensors",
    )
    return tmp_path


def planned(*arguments: str | Path, file: Path) -> dict[str, Any]:
    result = run(*arguments, "--json", file)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# ------------------------------------------------------------------------------ large checkpoints


def test_hollow_checkpoints_are_as_large_as_real_ones(hollow: dict[str, Path]) -> None:
    for name, size in (("7b", 13.5e9), ("70b", 138e9)):
        files = list(hollow[name].glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) == pytest.approx(size, rel=0.01)
        # And take no room.
        assert sum(file.stat().st_blocks for file in files) * 512 < 2**21


def test_llama_7b(hollow: dict[str, Path]) -> None:
    result = run(hollow["7b"], "--device", "cuda", "--exclude", "lm_head")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert " ".join(lines[0].split()) == (
        "order dtype layers batches windows weights GB TFLOP time mem. GB"
    )
    order, dtype, layers, batches, windows, weights, flops, *_ = lines[1].split()
    assert (order, dtype, layers, windows) == ("2000", "float16", "224", "50400")
    # 2^19 eigenvalues a batch are one layer of 450,000.
    assert (batches, weights) == ("224", "13")
    assert 940 < float(flops) < 1000
    assert lines[2] == ""
    assert lines[3].startswith("224 layers in 224 batches, 50400 windows, 13 GB of weights, ")
    found = re.fullmatch(
        r"about (\S+) s on one NVIDIA H200, (\S+) GB of the (\S+) GB allowed", lines[4]
    )
    assert found
    seconds, memory, allowed = map(float, found.groups())
    # No less than its operations take at an H200's 56.2 TFLOP/s.
    assert 984 / 56.2 < seconds < 60
    assert memory < 40
    assert allowed > memory
    page = Path(__file__).parents[2] / "docs/checkpoints.md"
    # The memory allowed is half of the device's, so that a machine with another GPU prints more.
    if not torch.cuda.is_available():
        assert "\n".join(line.rstrip() for line in lines[:5]) in page.read_text(encoding="utf-8")
    assert "65  vector, not a matrix" in result.output
    assert "1  embedding, left out by default" in result.output


@pytest.mark.parametrize("name", ["7b", "70b"])
def test_no_weight_is_read(
    hollow: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: SafetensorsSource, name: str) -> torch.Tensor:
        raise AssertionError("a plan reads no weight")

    monkeypatch.setattr(SafetensorsSource, "load", load)
    assert run(hollow[name], "--device", "cuda").exit_code == 0


@pytest.mark.slow
def test_a_plan_of_138_gb_takes_the_memory_of_its_headers(hollow: dict[str, Path]) -> None:
    def peak(*arguments: str | Path) -> int:
        """Most bytes of a process of its own."""
        code = (
            "import resource, sys\n"
            "from farms_fast.cli.main import app\n"
            "app(sys.argv[1:], standalone_mode=False)\n"
            "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", code, "plan", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
        assert found, done.stdout
        return int(found[1]) * 1024

    large = peak(hollow["70b"], "--device", "cuda")
    assert large < peak(hollow["7b"], "--device", "cuda") + 50e6


def test_memory_bounds_the_plan(hollow: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    seconds = []
    for memory in (4 * 10**9, 20 * 10**9, 60 * 10**9):
        found = planned(hollow["70b"], "--device", "cuda", "--memory", str(memory), file=file)
        assert found["settings"]["memory"] == memory
        assert 0.3 * memory < found["cost"]["memory"] <= memory
        assert all(batch["cost"]["memory"] <= memory for batch in found["batches"])
        assert sum(len(batch["layers"]) for batch in found["batches"]) == 561
        seconds.append(found["cost"]["seconds"])
    assert seconds == sorted(seconds, reverse=True)


# ---------------------------------------------------------------------------------- what it shows


def test_table(small: Path) -> None:
    result = run(small, "--rows", "32", "--per-dim", "2", "--device", "cpu")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["32", "float16", "1", "1", "4"],
        ["32", "float32", "3", "1", "17"],
    ]
    assert lines[4].startswith("4 layers in 2 batches, 21 windows, ")
    assert re.match(r"about \S+ ms on \d+ cores? like those of an AMD EPYC, ", lines[5])
    assert lines[6:] == [
        "skipped (--show-skipped lists the names):",
        "  2  vector, not a matrix",
    ]
    # Columns end where their headings do.
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[1].index("float16") == lines[2].index("float32")


def test_names_of_skipped_tensors_are_made_printable(small: Path) -> None:
    result = run(small, "--show-skipped", "--device", "cpu")
    assert "       encoder.fc.bias  48" in result.output
    assert "\x1b" not in result.output
    assert "red\n" not in result.output


def test_json(small: Path, tmp_path: Path) -> None:
    options = ("--rows", "32", "--per-dim", "2", "--device", "cuda", "--memory", "1GB")
    found = planned(small, *options, "--xmin", "ks", file=tmp_path / "plan.json")
    assert found["settings"] == {
        "source": str(small),
        "key": None,
        "layout": "auto",
        "sampling": "FixedAspectSampling(rows=32, q=1.0, per_dim=2, compat=None)",
        "xmin": "ks",
        "bootstrap": 100,
        "dtype": "float64",
        "machine": vars(_machine("cuda")),
        "memory": 10**9,
    }
    layers = [layer for batch in found["batches"] for layer in batch["layers"]]
    assert sorted(layer["name"] for layer in layers) == [
        "encoder.fc",
        "encoder.out",
        "half",
        "wide",
    ]
    fc = next(layer for layer in layers if layer["name"] == "encoder.fc")
    assert {key: value for key, value in fc.items() if key != "cost"} == {
        "name": "encoder.fc",
        "kind": "linear",
        "shape": [1, 48, 64],
        "dtype": "float32",
        "windows": 4,
        "window_rows": 32,
        "window_cols": 32,
    }
    for name in ("flops", "bytes", "seconds"):
        assert sum(layer["cost"][name] for layer in layers) == pytest.approx(found["cost"][name])
    assert sorted(tensor["name"] for tensor in found["skipped"]) == [HOSTILE, "encoder.fc.bias"]


def test_options_change_the_plan(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    base = planned(small, "--device", "cuda", file=file)
    full = planned(small, "--device", "cuda", "--full", file=file)
    assert {batch["order"] for batch in full["batches"]} == {48, 96}
    assert full["settings"]["sampling"] == "FullMatrix()"
    only = planned(small, "--device", "cuda", "--include", "encoder.*", file=file)
    assert only["cost"]["flops"] < base["cost"]["flops"]
    rows = ("--rows", "16", "--per-dim", "4", "--device", "cuda")
    some, none = (planned(small, *rows, "--bootstrap", n, file=file) for n in ("100", "0"))
    assert none["cost"]["flops"] < some["cost"]["flops"]
    narrow = planned(small, *rows, "--dtype", "float32", file=file)
    assert narrow["settings"]["dtype"] == "float32"


def test_what_is_printed_is_what_is_planned(tmp_path: Path) -> None:
    tiny = Llama(layers=2, hidden=64, intermediate=96, kv=32, vocabulary=100)
    folder = write_hollow(tmp_path / "tiny", tiny.shapes(), "F32", shard_bytes=30_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    result = run(folder, "--device", "cpu", "--rows", "32", "--per-dim", "3")
    assert result.exit_code == 0
    assert "15 layers in 1 batch, " in result.output
    analysed = CliRunner().invoke(
        cli.app, ["analyze", str(folder), "--rows", "32", "--per-dim", "3", "--device", "cpu"]
    )
    assert "15 failed" in analysed.output  # zeros have no tail, but every layer was there


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], ["device", "'tpu'"]),
        (["--device", "meta"], ["device", "expected cpu, cuda or cuda:N"]),
        (["--dtype", "float16"], ["dtype", "'float16'"]),
        (["--memory", "lots"], ["memory", "40GiB", "'lots'"]),
        (["--memory", "2KiB"], ["memory: expected at least the", "layer", "got 2048"]),
        (["--xmin", "least"], ["xmin", "'least'"]),
        (["--bootstrap", "-1"], ["bootstrap", "-1"]),
        (["--full", "--rows", "3"], ["full", "--rows"]),
        (["--include", "nothing*"], ["include", "nothing*"]),
        (["--json", "no/such/folder/plan.json"], ["json", "does not exist"]),
    ],
)
def test_bad_options(small: Path, options: list[str], words: list[str]) -> None:
    result = run(small, *options)
    assert result.exit_code == 2
    message = result.stderr
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_bad_paths(tmp_path: Path) -> None:
    missing = run(tmp_path / "none")
    assert missing.exit_code == 2
    assert "does not exist" in missing.stderr
    save_file({"bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    empty = run(tmp_path)
    assert empty.exit_code == 2
    assert "has no layer to analyse, its only tensor was skipped" in empty.stderr


def test_key_chooses_between_two_state_dicts(tmp_path: Path) -> None:
    path = tmp_path / "gan.pt"
    networks = {
        "generator": {"0.weight": torch.ones(8, 6)},
        "critic": {"1.weight": torch.ones(9, 7)},
    }
    torch.save(networks, path)
    several = run(path)
    assert several.exit_code == 2
    assert several.output.count("\n") == 1
    assert "'generator', 'critic'" in several.output
    assert "--key generator" in several.output
    found = planned(path, "--key", "critic", "--full", file=tmp_path / "plan.json")
    assert found["settings"]["key"] == "critic"
    assert [layer["name"] for layer in found["batches"][0]["layers"]] == ["1"]


def test_layout_of_kernels(tmp_path: Path) -> None:
    save_file({"conv.kernel": torch.ones(3, 3, 3, 3)}, tmp_path / "model.safetensors")
    assert "its only tensor was skipped" in run(tmp_path).stderr
    written = tmp_path.parent / "plan.json"
    result = run(tmp_path, "--layout", "channels_last", "--json", written)
    assert result.exit_code == 0, result.output
    assert json.loads(written.read_text())["settings"]["layout"] == "channels_last"
