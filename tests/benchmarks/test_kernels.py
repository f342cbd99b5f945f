"""The programs of benchmarks/kernels as far as they go without a GPU."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.kernels import cases, micro, sanitize, solver_times


def test_cases_cover_every_config_once() -> None:
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    source = (Path(__file__).parents[2] / "csrc/cuda/eigvalsh/one_stage.cu").read_text()
    configs = [int(line.split()[1][5:]) for line in source.splitlines() if "Order" in line[:12]]
    assert configs == [16, 32, 48, 64, 80, 104, 128, 160]
    for order, below, upto in zip(cases.BLOCK_ORDERS, [0, *configs], configs, strict=False):
        assert below < order <= upto
    clusters = (Path(__file__).parents[2] / "csrc/cuda/eigvalsh/one_stage_cluster.cu").read_text()
    for name in cases.CLUSTERS:
        assert f"struct Order{name.replace(' in ', 'In')} " in clusters
    assert clusters.count("struct Order") == len(cases.CLUSTERS)
    for rule in cases.RULES:
        assert f"fit {rule}" in names


def test_cases_call_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    cases.use_ops()
    monkeypatch.setattr(cases, "normal", functools.partial(cases.normal, device="cpu"))
    made = [case for case in cases.cases() if case.name.startswith(("gram 70", "fit"))]
    assert len(made) == len(cases.WEIGHT_DTYPES) + 1 + len(cases.RULES)
    for case in made:
        first, *rest = case.run()
        assert first.shape == ((len(cases.SPECTRA),) if rest else (3, 70, 70))
    (evals,) = cases.windows_case("11", "auto", 11, 3, torch.complex64).run()
    assert evals.shape == (3, 11)
    (evals,) = cases.gram_case("11", "auto", 11, 3, torch.float32).run()
    assert evals.shape == (3, 11)


def test_overlapping_windows_stay_inside() -> None:
    table = cases.overlapping_windows(100, 40, 4).numpy()
    assert table.shape == (16, 6)
    assert table[:, 2:4].min() == 0
    assert (table[:, 2] + table[:, 4]).max() == 100


def test_sanitize_lists_and_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--list", "two_stage"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed
    assert all("two_stage" in name for name in listed)
    assert sanitize.main(["--list", "--long", "two_stage"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(listed) + len(cases.LONG_ORDERS)
    command = sanitize.sanitizer_command("racecheck", ["fit"])
    assert command[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert command[-3:] == ["benchmarks.kernels.sanitize", "--run", "fit"]


def test_sanitize_reads_what_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    said = [
        "========= COMPUTE-SANITIZER\n",
        "case first\n",
        "done 0.5\n",
        "case second\n",
        "========= Invalid __global__ read of size 8 bytes\n",
        "=========     at kernel+0x10\n",
        "done 1.5\n",
        "========= ERROR SUMMARY: 1 error\n",
    ]
    assert sanitize.print_reports(said) == 1
    first, second, *details = capsys.readouterr().out.splitlines()
    assert first.split() == ["first", "0.5", "s", "ok"]
    assert second.split() == ["second", "1.5", "s", "1", "reported"]
    assert any("__global__ read" in line for line in details)
    assert sanitize.print_reports(said[:2]) == 1
    assert "did not end" in capsys.readouterr().out


def test_solver_times_lists_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert solver_times.main(["--list", "512:9", "32(4096)", "--op", "eigvalsh"]) == 0
    assert capsys.readouterr().out.splitlines() == ["eigvalsh 512 (9)", "eigvalsh 32 (4096)"]
    assert solver_times.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(solver_times.DEFAULT_PAIRS)
    for wrong in ("512", "0:3", "a:b"):
        with pytest.raises(argparse.ArgumentTypeError, match="ORDER:BATCH"):
            solver_times.pair(wrong)


def test_solver_times_compares_with_another_build(tmp_path: Path) -> None:
    result = {"op": "eigvalsh", "order": 512, "batch": 9, "dtype": "float64", "solver": "auto"}
    saved = tmp_path / "other.json"
    saved.write_text(json.dumps({"results": [{**result, "us": 100.0}]}))
    others = solver_times.saved_times(saved)
    row = solver_times.line_of({**result, "us": 102.0, "quartiles": [101.0, 103.0]}, others)
    assert row.endswith("1.020 of 100")


def test_bits_differ_by_a_last_bit_a_shape_or_a_name() -> None:
    values = np.array([1.0, np.nan])
    others = {"same": values, "moved": np.array([1.0]), "gone": values}
    results = {"same": values.copy(), "moved": np.nextafter([1.0], 2.0), "new": values}
    assert sorted(solver_times.differing(results, others)) == ["gone", "moved", "new"]


def test_micro_benchmarks_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert micro.main(["--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == sorted(micro.programs())
    assert {"dmma_rate", "exchange_latency"} <= set(listed)
    command = micro.compile_command("dmma_rate", Path("build/dmma_rate"), "90")
    assert command[0] == "nvcc"
    assert command[-1].endswith("dmma_rate.cu")
    with pytest.raises(SystemExit):
        micro.main(["no_such_program"])
