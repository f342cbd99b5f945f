"""The fine-tuning script, at the size of a toy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.effect import fine_tuning, sciml
from benchmarks.effect.analysis_share import share_of_time
from benchmarks.effect.navier_stokes import simulate
from benchmarks.effect.operators import TINY, DenoisingOperator, FourierOperator, parameter_count
from farms_fast.adapters.sciml import write_pdebench

TOY = ["--profile", "toy"]


def test_the_table_has_every_arm_fraction_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = sciml.main([*TOY, "--out", str(tmp_path / "out.json")])
    found = {(run["seed"], run["fraction"], run["arm"]) for run in result["runs"]}
    assert found == {
        (seed, fraction, arm)
        for seed in (0, 1)
        for fraction, arm in [(0.0, "none")]
        + [(f, a) for f in (50.0, 100.0) for a in ("baseline", "full", "farms")]
    }
    assert len(result["pretrained"]) == 2
    assert result["left_out"] == 0
    errors = [run[measure] for run in result["runs"] for measure in ("nrmse", "rollout")]
    assert all(math.isfinite(error) and error > 0 for error in errors)
    # Every arm trains from the same start, and each in its own way.
    assert len(set(errors)) == len(errors)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["runs"] == result["runs"]
    assert saved["options"]["tau"] == 10.0
    printed = capsys.readouterr().out
    for measure in ("nrmse", "rollout"):
        lines = sciml.table(result, measure)
        assert lines[-1].startswith("|  100 % |")
        assert lines[-1].count("±") == 3
        assert all(line in printed for line in lines)


def test_the_table_shows_means_spreads_and_changes() -> None:
    runs = [
        {"seed": seed, "fraction": 5.0, "arm": arm, "nrmse": error}
        for arm, errors in (("baseline", (0.02, 0.04)), ("farms", (0.02, 0.03)))
        for seed, error in enumerate(errors)
    ]
    lines = sciml.table({"runs": runs, "pretrained": [{"nrmse": 0.01}]}, "nrmse")
    assert lines[1].endswith("1.0000 ± nan")
    assert lines[2].endswith(" -")
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "5 %", "3.0000 ± 1.4142", "2.5000 ± 0.7071 (-16.67 %)",
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_errors() -> None:
    once, twice = (
        sciml.main([*TOY, "--seeds", "1", "--fractions", "50", "--arms", "farms"])["runs"]
        for _ in range(2)
    )
    assert once == twice


def test_training_learns() -> None:
    args = sciml.options([*TOY, "--pretrain-steps", "60"])
    (task, _) = fine_tuning.make_tasks(args)
    torch.manual_seed(0)
    model = fine_tuning.make_model(args, 0, task)
    frames, target = task.train[:, :2], task.train[:, 2]
    before = fine_tuning.relative_error(model(frames), target).mean()
    fine_tuning.train(model, task.train, args, steps=60, lr=5e-3, seed=0)
    assert fine_tuning.relative_error(model(frames), target).mean() < 0.7 * before


def test_the_error_is_that_of_predictions_from_predictions() -> None:
    class Last(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames[:, -1]

    flow = torch.randn(2, 6, 4, 6, 6)
    mean, std = torch.tensor([1.0, 2, 0, 0])[:, None, None], torch.full((4, 1, 1), 0.5)
    task = fine_tuning.Task(flow, flow, mean, std)
    physical = flow * 0.5 + mean

    def expected(pairs: list[tuple[int, int]]) -> float:
        """What repeats the last true frame is off by the frames since then."""
        errors = [
            (physical[:, n] - physical[:, last]).square().mean((-2, -1)).sqrt()
            / physical[:, n].square().mean((-2, -1)).sqrt()
            for n, last in pairs
        ]
        return float(torch.stack(errors).mean())

    for length, pairs in (
        (1, [(2, 1), (3, 2), (4, 3), (5, 4)]),
        (2, [(2, 1), (3, 1), (4, 3), (5, 3)]),
        (4, [(2, 1), (3, 1), (4, 1), (5, 1)]),
    ):
        found = fine_tuning.prediction_error(Last(), task, 2, length)
        assert found == pytest.approx(expected(pairs), rel=1e-6)


def test_files_of_pdebench_take_the_place_of_simulated_flows(tmp_path: Path) -> None:
    for name, eta, seed in (("a", 0.02, 0), ("b", 0.01, 1)):
        flow = simulate(
            8, 16, eta=eta, zeta=eta, mach=0.3, frames=6, duration=0.25, seed=10_000 * (seed + 1)
        )
        write_pdebench(tmp_path / f"{name}.hdf5", flow)
    short = [*TOY, "--seeds", "1", "--fractions", "100", "--arms", "baseline"]
    files = ["--pretrain-data", str(tmp_path / "a.hdf5"), "--data", str(tmp_path / "b.hdf5")]
    assert sciml.main([*short, *files])["runs"] == sciml.main(short)["runs"]
    halved = sciml.main([*short, *files, "--space-step", "2", "--modes", "4", "3"])
    assert halved["runs"] != sciml.main(short)["runs"]


def test_a_budget_leaves_the_last_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = sciml.main([*TOY, "--budget", "0"])
    assert result["runs"] == []
    assert result["left_out"] == 14
    assert "14 not begun within the budget" in capsys.readouterr().out


def test_processes_give_what_one_process_gives() -> None:
    short = [*TOY, "--seeds", "1", "--fractions", "100", "--arms", "full"]
    threads = torch.get_num_threads()
    # As many as each of the processes has: sums over more threads have other last bits.
    torch.set_num_threads(1)
    try:
        alone = sciml.main(short)["runs"]
    finally:
        torch.set_num_threads(threads)
    assert sciml.main([*short, "--workers", "1"])["runs"] == alone


def test_the_other_model_with_rates_per_block() -> None:
    size = ["--model", "dpot", "--width", "16", "--per", "block", "--seeds", "1"]
    result = sciml.main([*TOY, *size, "--fractions", "100"])
    assert len({run["nrmse"] for run in result["runs"]}) == 4


def test_the_share_of_the_time_is_that_of_an_epoch() -> None:
    args = sciml.options([*TOY, "--share-batch", "4", "--share-steps", "1", "--epoch", "10"])
    model = FourierOperator(4, 10, 8, (6, 4), 1)
    full, farms = share_of_time(args, "small", model, grid=16)
    assert full["epoch_seconds"] == pytest.approx(3 * full["step_seconds"])
    assert full["share"] == pytest.approx(full["analysis_seconds"] / full["epoch_seconds"])
    assert (full["sampling"], farms["sampling"]) == ("full", "farms")
    assert (full["layers"], full["matrices"]) == (5, 24 + 4)


def test_the_tiny_model_has_the_published_number_of_parameters() -> None:
    assert 6.9e6 < parameter_count(DenoisingOperator(4, 10, TINY)) < 7.1e6


def test_too_coarse_a_grid_for_the_modes_is_an_error() -> None:
    model = FourierOperator(4, 2, 8, (12, 4), 1)
    with pytest.raises(ValueError, match=r"x: expected a grid of 12 x 4 modes, got \(8, 8\)"):
        model(torch.zeros(1, 2, 4, 8, 8))
