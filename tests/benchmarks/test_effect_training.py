"""The script that trains with and without rates per layer, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models
from benchmarks.effect import cv_training
from benchmarks.effect.cv_training import Run, Settings, images_of, main, table_of, train
from benchmarks.effect.images import PADDING, SIDE, Images, digits
from benchmarks.effect.networks import network
from farms_fast.adapters.training.cifar100 import load_cifar100
from tests.adapters.training.test_tempbalance import write_archive

TINY = {"width": 4, "epochs": 2, "train": 24, "batch": 12, "seed": 43}


@pytest.mark.parametrize("name", ["resnet18", "vgg19"])
def test_networks_have_the_layers_of_the_models_that_are_timed(name: str) -> None:
    def shapes(model: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in model.parameters() if p.dim() > 1]

    assert shapes(network(name, 64, 100)) == shapes(getattr(models, name)(100))


@pytest.mark.parametrize(("name", "layers"), [("resnet34", 37), ("vgg16", 14)])
def test_the_other_networks_run(name: str, layers: int) -> None:
    model = network(name, 4, 10)
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == layers
    assert model(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 10)


def test_digits_are_the_same_for_everyone_and_normalised() -> None:
    found, again = digits(200), digits(200)
    assert torch.equal(found.train, again.train)
    assert found.train.shape == (200, 3, SIDE, SIDE)
    assert len(found.test) == len(found.test_labels) == 1597
    assert found.train.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.train.std().item() == pytest.approx(1, abs=1e-3)
    assert set(found.test_labels.tolist()) == set(range(10))
    with pytest.raises(ValueError, match="--train: expected fewer than 1797 images, got 1797"):
        digits(1797)


def test_batches_are_crops_of_every_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    train_images = torch.randn((10, 3, SIDE, SIDE), generator=generator)
    labels = torch.arange(10)
    data = Images(train_images, labels, train_images, labels, 10, True, "noise")
    seen, mirrored, shifts = [], 0, set()
    padded = nn.functional.pad(train_images, (PADDING,) * 4)
    for images, found in data.batches(5, generator):
        assert images.shape == (5, 3, SIDE, SIDE)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images, found.tolist(), strict=True):
            seen.append(label)
            matches = [
                (flip, y, x)
                for flip in (False, True)
                for y in range(2 * PADDING + 1)
                for x in range(2 * PADDING + 1)
                if torch.equal(
                    image.flip(2) if flip else image,
                    padded[label, :, y : y + SIDE, x : x + SIDE],
                )
            ]
            assert len(matches) == 1
            mirrored += matches[0][0]
            shifts.add(matches[0][1:])
    assert sorted(seen) == list(range(10))
    assert 0 < mirrored < 10
    assert len(shifts) > 5


def test_cifar_is_read_from_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path)
    monkeypatch.setattr(
        "benchmarks.effect.images.load_cifar100", lambda path: load_cifar100(path, verify=False)
    )
    found = images_of(Settings(data=str(tmp_path), train=4))
    assert (found.classes, found.flips, len(found.train), len(found.test)) == (100, True, 4, 2)


def test_arms_begin_alike_and_differ_in_their_rates() -> None:
    runs = {
        arm: Run(Settings(arm=arm, **TINY), images_of(Settings(**TINY)))
        for arm in ("baseline", "full", "farms")
    }
    weights = [run.model.state_dict() for run in runs.values()]
    for name, value in weights[0].items():
        assert all(torch.equal(value, other[name]) for other in weights[1:]), name
    rates = {arm: [g["lr"] for g in run.optimizer.param_groups] for arm, run in runs.items()}
    assert rates["baseline"] == [0.1]
    for arm in ("full", "farms"):
        assert min(rates[arm]) == pytest.approx(0.01)
        assert max(rates[arm]) == pytest.approx(0.19)
    assert rates["full"] != rates["farms"]
    for run in runs.values():
        run.train_epoch()
        run.schedule.step()
        run.rebalance()
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert runs["baseline"].rebalance() is None


def test_a_run_is_the_same_again() -> None:
    settings = Settings(arm="farms", **TINY)
    first, second = train(settings), train(settings)
    assert first["accuracy"] == second["accuracy"]
    assert first["mean_alpha"] == second["mean_alpha"] > 1
    assert first["failed"] == []


def test_the_script_prints_a_table_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "effect.json"
    arguments = "--width 4 --epochs 1 --train 24 --batch 12 --device cpu --seeds 2"
    two = ["--repeats", "1", "--timed-steps", "2"]
    two += ["--arms", "baseline", "farms", "--workers", "2", "--json", str(path)]
    assert main([*arguments.split(), *two]) == 0
    printed = capsys.readouterr().out
    for line in (
        "resnet18 on digits (24 to train, 1773 to test), 1 epochs",
        "| one learning rate |",
        "| TempBalance, FARMS windows |",
        "TempBalance, FARMS windows: 2 steps take",
        "Of an epoch of 50000 images",
    ):
        assert line in printed
    kept = json.loads(path.read_text())
    assert [(r["settings"]["arm"], r["settings"]["seed"]) for r in kept["results"]] == [
        ("baseline", 2),
        ("farms", 2),
    ]
    assert kept["times"]["farms"]["steps"] == 2
    alone = train(Settings(arm="farms", seed=2, width=4, epochs=1, train=24, batch=12))
    assert kept["results"][-1]["accuracy"] == pytest.approx(alone["accuracy"], abs=0.3)


def test_times_say_what_an_analysis_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves by 10 for a round of steps, and by 3 for an analysis."""
    clock = [0.0]
    monkeypatch.setattr(cv_training.time, "perf_counter", lambda: clock[0])

    def pass_by(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(Run, "train", lambda self, steps: pass_by(0.005 * steps))
    monkeypatch.setattr(Run, "rebalance", lambda self: pass_by(0.003))
    found = cv_training.time_of_analyses(Settings(**{**TINY, "batch": 20}), 2, repeats=4)
    assert found["step_ms"] == pytest.approx(5)
    assert found["analysis_ms"] == pytest.approx(3)
    assert found["with_ms"] == pytest.approx([13] * 3)
    assert found["cifar_epoch_ms"] == pytest.approx(12_500)
    assert found["cifar_share_percent"] == pytest.approx(0.024)


def test_the_table_has_means_spreads_and_paired_gains() -> None:
    accuracies = {
        ("baseline", 1): 90.0,
        ("baseline", 2): 92.0,
        ("farms", 1): 91.0,
        ("farms", 2): 95,
    }
    results = [
        {"settings": {"arm": arm, "seed": seed}, "accuracy": float(value)}
        for (arm, seed), value in accuracies.items()
    ]
    lines = table_of(results, ["baseline", "farms"])
    assert lines[2] == "| one learning rate | 91.00 ± 1.41 | 1: 90.00, 2: 92.00 |  |"
    assert lines[3] == (
        "| TempBalance, FARMS windows | 93.00 ± 2.83 | 1: 91.00, 2: 95.00 | +2.00 ± 1.41 |"
    )
