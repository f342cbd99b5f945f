"""The page of what layer-wise decisions did, from saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.effect import cv_training, report

IMAGES: dict[str, Any] = {
    "data": "digits",
    "torch": "2.13",
    "device": "a GPU",
    "workers": 2,
    "times": {},
    "results": [
        {
            "settings": {
                "model": "resnet18", "epochs": 3, "batch": 8, "lr": 0.1, "lr_range": [0.1, 1.9],
                "arm": arm, "seed": 1,
            },
            "accuracy": accuracy,
        }
        for arm, accuracy in (("baseline", 90.0), ("farms", 91.5))
    ],
}  # fmt: skip
SHARE = {
    "model": "fno", "parameters": 1e6, "layers": 4, "matrices": 64, "sampling": "full",
    "analysis_seconds": 0.02, "step_seconds": 0.01, "epoch_seconds": 10.0, "share": 0.002,
}  # fmt: skip
OPERATORS: dict[str, Any] = {
    "options": {"model": "fno", "grid": 64, "rows": 16, "scale": [1.0, 2.0], "epoch": 1000},
    "machine": {"cpu": "a CPU", "gpu": {"name": "a GPU"}},
    "share": [SHARE],
    "left_out": 1,
    "pretrained": [{"nrmse": 0.01, "rollout": 0.02}],
    "runs": [
        {"seed": 0, "fraction": 5.0, "arm": arm, "nrmse": error, "rollout": 2 * error}
        for arm, error in (("baseline", 0.02), ("farms", 0.01))
    ],
}
TIMES: dict[str, Any] = {
    "torch": "2.13",
    "device": "a GPU",
    "times": {
        "vgg16, waited for": {
            "steps": 40, "without_ms": [99.0, 100.0, 101.0], "with_ms": [102.0, 103.0, 104.0],
            "step_ms": 2.5, "analysis_ms": 3.0, "cifar_epoch_ms": 977.5, "cifar_share_percent": 0.3,
        }
    },
}  # fmt: skip


def save(folder: Path, name: str, result: dict[str, Any]) -> None:
    file = folder / "out.json"
    file.write_text(json.dumps(result))
    report.main(["--folder", str(folder), "save", name, str(file), "--date", "2026-01-02"])


def test_every_script_has_its_section(tmp_path: Path) -> None:
    table = cv_training.table_of(IMAGES["results"], ["baseline", "farms"])
    save(tmp_path, "cv_training", IMAGES | {"table": table})
    save(tmp_path, "cv_times", TIMES)
    save(tmp_path, "sciml", OPERATORS)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.index("## Image classification") < text.index("## Fine-tuning of neural operators")
    assert text.count("Measured on 2026-01-02, a GPU.") == 3
    assert "- vgg16, waited for: 40 steps take 100.0 ms [99.0, 101.0], with an analysis" in text
    assert "| 91.50 | 1: 91.50 | +1.50 |" in text
    assert "-50.00 %" in text
    assert "1 runs were left out" in text
    assert "analysis 20.0 ms" in text
    assert "0.200 %" in text


def test_a_file_replaces_the_one_of_its_script(tmp_path: Path) -> None:
    save(tmp_path, "sciml", OPERATORS)
    save(tmp_path, "sciml", OPERATORS | {"share": [SHARE | {"share": 0.003}]})
    text = (tmp_path / "RESULTS.md").read_text()
    assert "0.300 %" in text
    assert "0.200 %" not in text


def test_an_unknown_script_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        save(tmp_path, "chess", OPERATORS)
