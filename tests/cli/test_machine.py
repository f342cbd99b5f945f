"""`farms-fast tune` and what `farms-fast info` says of GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import farms_fast
from farms_fast.cli import machine, main
from farms_fast.core import self_test, solver_choice
from farms_fast.core.solver_table import Row, SolverTable, use_rows
from farms_fast.engine import tune as engine_tune
from tests.support.gpus import A100, INDEX, pretend

ROWS = (Row(False, 300, 10, "cusolver"), Row(True, 80, 10, "two_stage"))


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FARMS_FAST_CACHE_DIR", str(tmp_path))
    yield
    use_rows(INDEX, ())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 that passes the self-test, and that takes no time to measure."""
    pretend(A100, monkeypatch)
    monkeypatch.setattr(self_test, "failures", lambda index: [])
    monkeypatch.setattr(machine, "has_cuda", lambda: True)
    monkeypatch.setattr(machine, "resolve_device", lambda name, default: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def tune(index: int, quick: bool, told: engine_tune.Told) -> SolverTable:
        told(f"measured on {index}, quick {quick}")
        return SolverTable(A100, ROWS)

    monkeypatch.setattr(engine_tune, "tune", tune)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_info_says_how_it_was_built() -> None:
    code, out, _ = run("info")
    assert code == 0
    for key, value in farms_fast.build_info().items():
        assert f"{key}: {value}" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a CUDA device and a build with CUDA (see farms-fast info)"),
        (("--quick", "--device", "cpu"), "expected a CUDA device and a build with CUDA (see "),
        (("--device", "cuda"), "device: got 'cuda', but "),
        (("--device", "tpu"), "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_tune_without_a_gpu_says_so_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, out, error = run("tune", *arguments)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("quick", [False, True])
def test_tune_writes_a_table(quick: bool, gpu: None, tmp_path: Path) -> None:
    code, out, _ = run("tune", *["--quick"] * quick)
    assert code == 0
    path = tmp_path / "nvidia-a100-sxm4-80gb-80.solvers.json"
    assert out.splitlines() == [
        f"measured on 0, quick {quick}",
        f"2 rows for NVIDIA A100-SXM4-80GB in {path}, used from now on",
    ]
    found = SolverTable.read(A100)
    assert found is not None
    assert found.rows == ROWS


def test_a_table_that_cannot_be_written_is_one_line(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FARMS_FAST_CACHE_DIR", str(tmp_path / "file"))
    code, _, error = run("tune")
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / "file") in error


def test_info_says_what_decides_on_a_gpu(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pretended GPU has the rows of those that are told of by their compute capability.
    monkeypatch.setattr(solver_choice, "use_rows", lambda index, rows: use_rows(INDEX, rows))

    def said() -> list[str]:
        pretend(A100, monkeypatch)
        code, out, _ = run("info")
        assert code == 0
        return [line for line in out.splitlines() if line.startswith("gpu 0")]

    name, choice, tested = said()
    assert name == (
        "gpu 0: NVIDIA A100-SXM4-80GB, compute_capability 80, processors 108, "
        "driver 13000 (580.1), cuda 12080, cusolver 11703"
    )
    assert choice == (
        "gpu 0 solver choice: a model of compute capability 8.0 (`farms-fast tune` measures)"
    )
    assert tested.startswith("gpu 0 self-test: passed on 2")
    SolverTable(A100, ROWS).write()
    assert said()[1].startswith("gpu 0 solver choice: measured here on 2")
    SolverTable(dataclasses.replace(A100, driver="12080"), ROWS).write()
    assert "is ignored: it was measured with driver 12080, not 13000 (580.1)" in said()[1]


@pytest.mark.gpu
def test_a_tuned_gpu_uses_its_table(tmp_path: Path) -> None:
    code, out, error = run("tune", "--quick")
    assert (code, error) == (0, "")
    path = out.splitlines()[-1].partition(" in ")[2].partition(", used")[0]
    assert Path(path).parent == tmp_path
    solver_choice._decisions.clear()
    solver_choice._settled.clear()
    try:
        code, out, _ = run("info")
        assert code == 0
        assert "gpu 0 solver choice: measured here on 2" in out
    finally:
        solver_choice._decisions.clear()
        solver_choice._settled.clear()
        use_rows(0, ())
