"""A real checkpoint, all-MiniLM-L6-v2, against singular values of NumPy and the reference fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from farms_fast import Analysis, FixedAspectSampling, LayerRecord, analyze
from farms_fast.testing import reference
from tests.support.bounds import error_bound

pytestmark = pytest.mark.slow

SQUARE = ("attention.output.dense", *(f"attention.self.{x}" for x in ("key", "query", "value")))
SHAPES = {
    **{name: (1, 384, 384) for name in SQUARE},
    "intermediate.dense": (1, 1536, 384),
    "output.dense": (1, 384, 1536),
}
NAMES = [f"encoder.layer.{block}.{name}" for block in range(6) for name in SHAPES]


@pytest.fixture(scope="module")
def default(checkpoint: Path) -> Analysis:
    return analyze(checkpoint)


@pytest.fixture(scope="module")
def small_windows(checkpoint: Path) -> Analysis:
    return analyze(checkpoint, FixedAspectSampling(rows=192, per_dim=2))


def weight_of(checkpoint: Path, name: str) -> np.ndarray:
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights:
        return weights.get_tensor(f"{name}.weight").astype(np.float64)


def assert_equals_reference(record: LayerRecord, weight: np.ndarray, windows: np.ndarray) -> None:
    evals = [reference.eigenvalues(weight[r : r + m, c : c + n]) for r, c, m, n in windows]
    assert record.windows == len(windows)
    for found, expected in zip(record.window_evals, evals, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=error_bound(expected))
    fit = reference.fit_power_law(np.concatenate(evals))
    assert (record.status, fit["status"]) == ("ok", "ok")
    assert (record.num_pl_spikes, record.dropped) == (fit["n_tail"], 0)
    for name in ("alpha", "D", "xmin"):
        assert getattr(record, name) == pytest.approx(fit[name], rel=1e-9), name


def test_every_block_is_found(default: Analysis) -> None:
    records = {layer.name: layer for layer in default if layer.name.startswith("encoder.")}
    assert sorted(records) == sorted(NAMES)
    for name, record in records.items():
        assert record.shape == SHAPES[name.split(".", 3)[3]]
        assert record.kind == "linear"
        assert record.status == "ok"
        assert np.isfinite(record.alpha)
    assert default.failed == []


def test_every_tensor_is_accounted_for(checkpoint: Path, default: Analysis) -> None:
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as weights:
        tensors = {name.removesuffix(".weight") for name in weights.keys()}  # noqa: SIM118
    skipped = {tensor.name: tensor.reason for tensor in default.skipped}
    assert tensors == {layer.name for layer in default} | set(skipped)
    assert all(skipped.values())
    assert "embeddings.word_embeddings" in skipped


@pytest.mark.parametrize("name", NAMES)
def test_default_sampling(checkpoint: Path, default: Analysis, name: str) -> None:
    weight = weight_of(checkpoint, name)
    windows = reference.fixed_aspect_windows(*weight.shape, 2000, 1.0, 15)
    assert len(windows) == (1 if name.endswith(SQUARE) else 15)
    assert_equals_reference(default[name], weight, windows)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.query",
        "encoder.layer.3.intermediate.dense",
        "encoder.layer.5.output.dense",
    ],
)
def test_small_windows(checkpoint: Path, small_windows: Analysis, name: str) -> None:
    weight = weight_of(checkpoint, name)
    windows = reference.fixed_aspect_windows(*weight.shape, 192, 1.0, 2)
    assert len(windows) == (4 if name.endswith(SQUARE) else 16)
    assert_equals_reference(small_windows[name], weight, windows)
    assert 0 < small_windows[name].alpha_se < 0.2
    assert small_windows[name].split_half < 0.2


def test_all_windows_are_of_one_shape(small_windows: Analysis) -> None:
    for layer in small_windows:
        assert (layer.window_rows, layer.window_cols, layer.Q) == (192, 192, 1)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu(checkpoint: Path) -> None:
    found, expected = (
        analyze(checkpoint, include="encoder.layer.0.*", device=device)
        for device in ("cuda", "cpu")
    )
    assert len(found) == 6
    for layer in found:
        assert layer.alpha == pytest.approx(expected[layer.name].alpha, rel=1e-9)
