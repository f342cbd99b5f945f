"""An analysis with a store: what is there is not computed again, whatever ended the run before."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from farms_fast import Analysis, FixedAspectSampling, FullMatrix, analyze
from farms_fast.engine.stages import BatchStages, LoadedBatch, SolvedBatch
from farms_fast.results import run_recorder
from farms_fast.results.store import ResultsStore

SAMPLING = FixedAspectSampling(rows=8, per_dim=3)
Weights = dict[str, torch.Tensor]


def weights_of(layers: int = 6) -> Weights:
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 30), (8, 8), (16, 12)]
    return {
        f"layer{i}.weight": torch.randn(shapes[i % 3], generator=generator) for i in range(layers)
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers whose eigenvalues are computed, in order."""
    names: list[str] = []
    solve = BatchStages.solve

    def counting(self: BatchStages, loaded: LoadedBatch) -> SolvedBatch:
        names.extend(state.layer.spec.name for state in loaded.unsolved)
        return solve(self, loaded)

    monkeypatch.setattr(BatchStages, "solve", counting)
    return names


def assert_equal(found: Analysis, expected: Analysis) -> None:
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    assert found.skipped == expected.skipped
    for layer, other in zip(found, expected, strict=True):
        for name, value in layer.scalars().items():
            assert value == other.scalars()[name] or value != value, (layer.name, name)
        np.testing.assert_array_equal(layer.window_evals, other.window_evals)
        np.testing.assert_array_equal(layer.window_alphas, other.window_alphas)


def test_a_store_holds_what_was_found(tmp_path: Path, device: torch.device) -> None:
    weights = {**weights_of(), "norm.weight": torch.ones(3)}
    path = tmp_path / "run.sqlite"
    expected = analyze(weights, SAMPLING, device=device)
    found = analyze(weights, SAMPLING, device=device, store=path)
    assert_equal(found, expected)
    assert_equal(Analysis.from_store(path), expected)
    with ResultsStore(path) as store:
        (run,) = store.runs()
    assert (run.layers, run.total) == (6, 6)
    assert run.finished is not None
    assert run.settings == found.settings


def test_what_is_there_is_not_computed_again(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(), tmp_path / "run.sqlite"
    first = analyze(weights, SAMPLING, store=path)
    assert len(computed) == 6
    computed.clear()
    assert_equal(analyze(weights, SAMPLING, store=path), first)
    assert computed == []
    weights["layer3.weight"] = weights["layer3.weight"] + 1
    changed = analyze(weights, SAMPLING, store=path)
    assert computed == ["layer3"]
    assert changed["layer3"].alpha != first["layer3"].alpha
    computed.clear()


def test_another_layout_of_kernels_is_another_run(tmp_path: Path) -> None:
    weights, path = {"c.kernel": torch.randn(4, 4, 4, 4)}, tmp_path / "run.sqlite"
    for layout in ("torch", "channels_last") * 2:
        (layer,) = analyze(weights, FullMatrix(), store=path, layout=layout)
        (expected,) = analyze(weights, FullMatrix(), layout=layout)
        assert np.array_equal(layer.window_evals, expected.window_evals)
    with ResultsStore(path) as store:
        assert [run.settings.layout for run in store.runs()] == ["torch", "channels_last"]


def test_a_selection_of_layers_is_another_run(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(), tmp_path / "run.sqlite"
    whole = analyze(weights, SAMPLING, store=path)
    for _ in range(2):
        some = analyze(weights, SAMPLING, store=path, include="layer[0-3]", exclude="layer1")
        assert [layer.name for layer in some] == ["layer0", "layer2", "layer3"]
    assert computed[6:] == ["layer0", "layer2", "layer3"]
    # The run of all layers is what it was.
    assert_equal(Analysis.from_store(path, 1), whole)


def test_another_key_is_another_run(tmp_path: Path) -> None:
    networks = {"generator": weights_of(), "critic": weights_of()}
    path = tmp_path / "run.sqlite"
    for number, key in enumerate(("generator", "critic", "critic"), start=1):
        analysis = analyze(networks, SAMPLING, store=path, key=key)
        assert analysis.settings is not None
        assert analysis.settings.key == key
        run = min(number, 2)
        assert_equal(Analysis.from_store(path, run), analysis)


def test_other_settings_are_another_run(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(), tmp_path / "run.sqlite"
    for options in (
        {},
        {"xmin": "ks"},
        {"xmin_pos": 3},
        {"bootstrap": 7},
        {"dtype": torch.float32},
        {"solver": "lapack"},
        {"sampling": FullMatrix()},
    ):
        computed.clear()
        analyze(weights, **{"sampling": SAMPLING, "device": "cpu", **options}, store=path)
        assert len(computed) == 6, options
    with ResultsStore(path) as store:
        assert [run.layers for run in store.runs()] == [6] * 7


def test_settings_that_the_rule_does_not_read_are_the_same_run(
    tmp_path: Path, computed: list[str]
) -> None:
    weights, path = weights_of(3), tmp_path / "run.sqlite"
    unread = {"median": {"bins": 7}, "ks": {"bins": 7, "xmin_pos": 3}, "peak": {"xmin_pos": 3}}
    for xmin, options in unread.items():
        first = analyze(weights, SAMPLING, xmin, store=path)
        assert len(computed) == 3
        computed.clear()
        assert_equal(analyze(weights, SAMPLING, xmin, store=path, **options), first)
        assert computed == []
    # What it reads is another run.
    analyze(weights, SAMPLING, "peak", bins=7, store=path)
    assert len(computed) == 3


def test_force_computes_anew(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(), tmp_path / "run.sqlite"
    first = analyze(weights, SAMPLING, store=path)
    computed.clear()
    assert_equal(analyze(weights, SAMPLING, store=path, force=True), first)
    assert len(computed) == 6
    with pytest.raises(ValueError, match=r"^force: .* needs store="):
        analyze(weights, SAMPLING, force=True)


def stop_after(layers: int, error: type[BaseException]) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, name: str) -> None:
        if done == layers:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, computed: list[str], error: type[BaseException]
) -> None:
    # Three orders, so three batches.
    weights, path = weights_of(), tmp_path / "run.sqlite"
    expected = analyze(weights, FullMatrix())
    with pytest.raises(error) as caught:
        analyze(weights, FullMatrix(), store=path, progress=stop_after(1, error))
    with ResultsStore(path) as store:
        (run,) = store.runs()
        stored = [layer.name for layer in store.read()[0]]
    assert run.finished is None
    # The first batch has two layers; neither is lost, whatever the caller's function does.
    assert len(stored) == 2
    if error is KeyboardInterrupt:
        assert str(caught.value).startswith(f"2 of 6 layers are in {str(path)!r}, and the same")
    computed.clear()
    assert_equal(analyze(weights, FullMatrix(), store=path), expected)
    assert sorted(computed + stored) == [layer.name for layer in expected]


def test_layers_are_saved_as_they_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction for each layer where they come slowly, and for many where they come fast."""
    weights = {f"layer{i}.weight": torch.randn(8, 8) for i in range(6)}
    for seconds, expected in ((1.0, [1, 2, 3, 4, 5, 6]), (0.0, [6] * 6), (0.1, [3] * 3 + [6] * 3)):
        now = itertools.count()
        monkeypatch.setattr(run_recorder, "_clock", lambda s=seconds, now=now: next(now) * s)
        path, saved = tmp_path / f"{seconds}.sqlite", []

        def progress(
            done: int, total: int, name: str, path: Path = path, saved: list[int] = saved
        ) -> None:
            with ResultsStore(path, create=False) as store:
                saved.append(store.runs()[0].layers)

        analyze(weights, FullMatrix(), store=path, progress=progress, bootstrap=0)
        assert saved == expected


def test_a_layer_that_failed_is_tried_again(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(3), tmp_path / "run.sqlite"
    weights["layer1.weight"] = torch.empty(8, 8, device="meta")
    assert [layer.status for layer in analyze(weights, SAMPLING, store=path)] == [
        "ok",
        "error",
        "ok",
    ]
    weights["layer1.weight"] = torch.eye(8)
    computed.clear()
    assert analyze(weights, SAMPLING, store=path)["layer1"].status != "error"
    assert computed == ["layer1"]


def test_layers_with_nan_are_known_too(tmp_path: Path, computed: list[str]) -> None:
    weights, path = weights_of(3), tmp_path / "run.sqlite"
    weights["layer1.weight"][0, 0] = torch.nan
    for _ in range(2):
        statuses = [layer.status for layer in analyze(weights, SAMPLING, store=path)]
        assert statuses == ["ok", "nonfinite", "ok"]
    assert len(computed) == 3


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    for missing in (tmp_path / "nowhere" / "run.sqlite", tmp_path / "no" / "where" / "run.sqlite"):
        said = rf"^store: .*'{missing}'"
        with pytest.raises(FileNotFoundError, match=said):
            analyze(weights_of(), SAMPLING, store=missing)
    other = tmp_path / "other"
    other.write_text("no store")
    with pytest.raises(ValueError, match="not a results store"):
        analyze(weights_of(), SAMPLING, store=other)
    assert other.read_text() == "no store"


# ------------------------------------------------------------------------------- other processes


def process(*arguments: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """tests/support/resume_processes.py, by itself or by torchrun."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command = [sys.executable, *(launcher if ranks else []), "tests/support/resume_processes.py"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    result = process("kill", tmp_path / "run.sqlite", 20)
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout)
    assert told["kills"] == 20
    # Kills that come before the first layer and after the last one prove little.
    assert told["kills in the middle"] >= 5
    assert told["computed twice"] == []
    assert told["equal to an unbroken run"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["share", "share_apart"])
def test_ranks_share_the_layers(tmp_path: Path, how: str) -> None:
    result = process(how, tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert sorted(told[0]["computed"] + told[1]["computed"]) == told[0]["all"]
    assert all(rank["computed"] for rank in told)
    assert told[0]["equal to one process"]
    assert told[0]["equal to one process, stored"]
    # Ranks that do not lead have what they computed.
    assert sorted(told[1]["returned"]) == sorted(told[1]["computed"])
    assert sorted(told[1]["returned, stored"]) == sorted(told[1]["returned"])
    assert [path.name for path in tmp_path.glob("run.sqlite*")] == ["run.sqlite"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["die", "die_apart"])
def test_a_rank_that_dies_ends_the_run_and_loses_nothing(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run.sqlite"
    result = process(how, tmp_path, ranks=2)
    assert result.returncode != 0
    assert "exitcode  : 3" in result.stderr
    # A file of one's own is what is left of a rank on another machine.
    assert bool(list(tmp_path.glob("run.sqlite.rank*"))) == (how == "die_apart")
    # With another number of ranks: one, here and now.
    result = process("resume", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout)
    assert told["known"]
    assert sorted(told["known"] + told["computed"]) == told["all"]
    assert told["equal to an unbroken run"]
    assert [file.name for file in tmp_path.glob("run.sqlite*")] == [path.name]
