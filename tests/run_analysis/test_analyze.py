"""From model to table: against a slow pipeline in NumPy, and what goes wrong on the way."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import farms_fast
from farms_fast import Analysis, FixedAspectSampling, FullMatrix, LayerRecord, analyze
from farms_fast.core.progress import reporter
from farms_fast.engine.plan import plan
from farms_fast.results.settings import AnalysisSettings
from farms_fast.testing import reference
from farms_fast.weights.sources import MappingSource, ModuleSource, open_source
from tests.support.bounds import error_bound
from tests.support.purity import left_as_it_was

SAMPLING = FixedAspectSampling(rows=10, per_dim=3)


class Model(nn.Module):
    """One layer of every kind that people put into vision models and transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 12)
        self.fc = nn.Linear(24, 40)
        self.conv = nn.Conv2d(11, 14, (2, 3), bias=False)
        self.grouped = nn.Conv2d(20, 22, 3, groups=2)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.head = nn.Linear(12, 12, dtype=torch.float64)


@pytest.fixture
def model() -> Model:
    generator_state = torch.get_rng_state()
    made = Model()
    torch.set_rng_state(generator_state)
    return made


def stacks_of(model: Model) -> dict[str, np.ndarray]:
    """Layers as stacks (S, R, C), written out by hand."""
    weights = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    conv, grouped = weights["conv.weight"], weights["grouped.weight"]
    in_projection = weights["attention.in_proj_weight"]
    return {
        "fc": weights["fc.weight"][None],
        "conv": np.stack([conv[:, :, i, j] for i in range(2) for j in range(3)]),
        "grouped": np.stack(
            [
                grouped[11 * group : 11 * (group + 1), :, i, j]
                for group in range(2)
                for i in range(3)
                for j in range(3)
            ]
        ),
        "attention.in_proj.q": in_projection[None, :12],
        "attention.in_proj.k": in_projection[None, 12:24],
        "attention.in_proj.v": in_projection[None, 24:],
        "attention.out_proj": weights["attention.out_proj.weight"][None],
        "head": weights["head.weight"][None],
    }


def windows_over(stack: np.ndarray, sampling: FixedAspectSampling | FullMatrix) -> list[np.ndarray]:
    _, R, C = stack.shape
    if isinstance(sampling, FullMatrix):
        return list(stack)
    grid = reference.published_windows if sampling.compat else reference.fixed_aspect_windows
    table = grid(R, C, sampling.rows, sampling.q, sampling.per_dim)
    return [matrix[r : r + m, c : c + n] for matrix in stack for r, c, m, n in table]


def slow_fit(values: np.ndarray, rule: str, compat: bool, **options: Any) -> dict[str, Any]:
    return reference.fit_power_law(values.ravel(), rule, published=compat, **options)


def assert_same_spectra(found: LayerRecord, expected: LayerRecord) -> None:
    assert found.window_evals.shape == expected.window_evals.shape
    bounds = np.array([error_bound(evals) for evals in expected.window_evals])
    off = np.abs(found.window_evals - expected.window_evals).max(axis=1)
    assert (off <= bounds).all(), f"window {np.argmax(off / bounds)}"
    np.testing.assert_allclose(found.evals, expected.evals, rtol=0, atol=bounds.max())
    for name in ("alpha", "D", "xmin", "alpha_se", "split_half", "stable_rank"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-7, nan_ok=True)


# ----------------------------------------------------------------------- against the slow pipeline


@pytest.mark.parametrize("xmin", ["median", "ks", "peak"])
@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        FixedAspectSampling(rows=7, q=1.5, per_dim=2),
        FixedAspectSampling(rows=8, per_dim=3, compat="farms"),
        FullMatrix(),
    ],
    ids=str,
)
def test_equals_the_slow_pipeline(
    device: torch.device, model: Model, sampling: FixedAspectSampling | FullMatrix, xmin: str
) -> None:
    analysis = analyze(model, sampling, xmin, bootstrap=5, device=device)
    stacks = stacks_of(model)
    assert [layer.name for layer in analysis] == list(stacks)
    compat = getattr(sampling, "compat", None) == "farms"
    for layer, stack in zip(analysis, stacks.values(), strict=True):
        assert layer.shape == stack.shape
        windows = windows_over(stack, sampling)
        assert (layer.windows, layer.window_rows, layer.window_cols) == (
            len(windows),
            *windows[0].shape,
        )
        evals = np.stack([reference.eigenvalues(window) for window in windows])
        bounds = np.array([error_bound(window) for window in evals])
        assert (np.abs(layer.window_evals - evals) <= bounds[:, None]).all(), layer.name
        np.testing.assert_array_equal(layer.evals, np.sort(layer.window_evals, axis=None))

        fit = slow_fit(evals, xmin, compat)
        assert (layer.status, layer.message) == ("ok", "")
        assert fit["status"] == "ok"
        for name in ("alpha", "D", "xmin"):
            assert getattr(layer, name) == pytest.approx(fit[name], rel=1e-9), (layer.name, name)
        assert (layer.num_pl_spikes, layer.dropped) == (fit["n_tail"], fit["dropped"])
        assert layer.num_evals == evals.size
        assert layer.norm == pytest.approx(sum((window**2).sum() for window in windows), rel=1e-12)
        assert layer.spectral_norm == pytest.approx(evals.max(), rel=1e-12)

        if len(windows) == 1:
            assert layer.window_alphas.size == 0
            assert math.isnan(layer.alpha_se)
            assert math.isnan(layer.split_half)
            continue
        alone = [slow_fit(window, xmin, compat)["alpha"] for window in evals]
        np.testing.assert_allclose(layer.window_alphas, alone, rtol=1e-7)
        even, odd = (slow_fit(evals[half::2], xmin, compat)["alpha"] for half in (0, 1))
        assert (layer.alpha_even, layer.alpha_odd) == pytest.approx((even, odd), rel=1e-7)
        assert layer.split_half == pytest.approx(abs(even - odd), rel=1e-5, nan_ok=True)
        assert layer.alpha_low <= layer.alpha_high
        assert layer.alpha_se > 0


@pytest.mark.parametrize("xmin", ["median", "ks", "peak"])
@pytest.mark.parametrize("kind", ["repeated rows", "product", "dead units"])
def test_the_alpha_of_a_weight_of_low_rank_has_no_rounding_in_it(
    device: torch.device, kind: str, xmin: str
) -> None:
    rng = np.random.default_rng(0)
    weight, rank = {
        "repeated rows": (np.tile(rng.standard_normal((20, 90)).astype("f4"), (3, 1)), 20),
        "product": (rng.standard_normal((60, 20)) @ rng.standard_normal((20, 90)), 20),
        "dead units": (rng.standard_t(3, (60, 90)) * (np.arange(60)[:, None] % 3 == 0), 20),
    }[kind]
    weights = {
        "W": weight,
        "3 W": 3 * weight,
        "rows": weight[rng.permutation(60)],
        "columns": weight[:, rng.permutation(90)],
        "transposed": weight.T,
    }
    layers = analyze(weights, FullMatrix(), xmin, device=device, progress=False).layers
    for layer in layers:
        assert (layer.status, layer.dropped, layer.matrix_rank) == ("ok", 40, rank)
        assert np.count_nonzero(layer.evals) == rank
        assert layer.num_pl_spikes <= rank
        # 3 W is rounded to float32 itself.
        assert layer.alpha == pytest.approx(layers[0].alpha, rel=1e-6)
    # Each window has a largest eigenvalue of its own.
    sampling = FixedAspectSampling(rows=30, per_dim=3)
    graded = weight * np.repeat(10.0 ** -np.arange(0, 12, 4), 30)
    layers = analyze(
        {"W": graded, "3 W": 3 * graded}, sampling, xmin, device=device, progress=False
    ).layers
    for layer in layers:
        shares = layer.window_evals / layer.window_evals[:, -1:]
        assert not ((shares > 0) & (shares <= 8 * 30 * 2.0**-52)).any()
        assert layer.matrix_rank == np.count_nonzero(shares) == layer.num_evals - layer.dropped
    assert layers[0].alpha == pytest.approx(layers[1].alpha, rel=1e-9)
    assert layers[0].alpha_se == pytest.approx(layers[1].alpha_se, rel=1e-6)
    np.testing.assert_allclose(layers[0].window_alphas, layers[1].window_alphas, rtol=1e-9)


def test_published_fits_take_every_positive_eigenvalue() -> None:
    weight = np.tile(np.random.default_rng(0).standard_normal((20, 60)), (3, 1))
    sampling = FixedAspectSampling(rows=60, per_dim=1, compat="farms")
    layer = analyze({"W": weight}, sampling, progress=False).layers[0]
    shares = layer.evals / layer.evals[-1]
    assert ((shares > 0) & (shares < 1e-13)).any()
    assert layer.dropped == np.count_nonzero(shares == 0) < 40
    assert layer.matrix_rank == 20


@pytest.mark.parametrize("xmin", ["median", "ks", "peak"])
def test_equal_but_for_the_precision_of_the_weights(device: torch.device, xmin: str) -> None:
    torch.manual_seed(0)
    made = torch.nn.init.orthogonal_(torch.empty(80, 80, dtype=torch.float64))
    halves = (torch.float16, torch.bfloat16)
    weights = {str(dtype): made.to(dtype) for dtype in (torch.float64, torch.float32, *halves)}
    weights["in float32"] = torch.nn.init.orthogonal_(torch.empty(80, 80))
    weights["spread in bfloat16 only"] = made.to(torch.bfloat16).float()
    found = analyze(weights, FullMatrix(), xmin, device=device, progress=False)
    assert [layer.status for layer in found] == ["degenerate_tail"] * 5 + ["ok"]
    assert found.layers[0].message.startswith("the eigenvalues of the tail are equal but for round")


def test_settings_of_the_fit_arrive(model: Model) -> None:
    stack = stacks_of(model)["fc"]
    evals = np.stack([reference.eigenvalues(w) for w in windows_over(stack, SAMPLING)])
    for xmin, options in (("median", {"xmin_pos": 4}), ("peak", {"bins": 17})):
        found = analyze(model, SAMPLING, xmin, include="fc", **options).layers[0]
        expected = slow_fit(evals, xmin, False, **options)["alpha"]
        assert found.alpha == pytest.approx(expected, rel=1e-9)
        assert found.alpha != pytest.approx(slow_fit(evals, xmin, False)["alpha"], rel=1e-3)


def test_aliases_of_the_rules(model: Model) -> None:
    for alias, rule in (("xmin_mid", "median"), ("goodness-of-fit", "ks"), ("xmin_peak", "peak")):
        found, expected = (analyze(model, SAMPLING, x, include="fc") for x in (alias, rule))
        assert found.layers[0].alpha == expected.layers[0].alpha
        assert found.settings == expected.settings


def test_no_bootstrap(model: Model) -> None:
    plain = analyze(model, SAMPLING, bootstrap=0)
    for layer in plain:
        assert math.isnan(layer.alpha_se)
        assert math.isnan(layer.alpha_low)
        assert layer.split_half >= 0
    many = analyze(model, SAMPLING)["fc"]
    assert many.alpha == plain["fc"].alpha
    assert many.alpha_se > 0


def test_float32_is_what_it_says(model: Model) -> None:
    exact, rough = (
        analyze(model, SAMPLING)["fc"],
        analyze(model, SAMPLING, dtype=torch.float32)["fc"],
    )
    assert rough.evals.dtype == np.float64
    off = np.abs(rough.evals - exact.evals).max()
    assert 1e-12 < off / exact.spectral_norm < 10 * 2**-23


def test_complex_layers() -> None:
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((6, 5, 3)) + 1j * rng.standard_normal((6, 5, 3))
    (layer,) = analyze({"spectral.weight": torch.from_numpy(modes)}, FullMatrix())
    evals = np.stack([reference.eigenvalues(modes[:, :, mode]) for mode in range(3)])
    np.testing.assert_allclose(layer.window_evals, evals, rtol=1e-10)


def test_complex_layers_stored_as_two_reals() -> None:
    # An AFNO block weight beside a real layer of the same order and dtype.
    generator = torch.Generator().manual_seed(4)
    weights = {
        "fc.weight": torch.randn(6, 6, generator=generator),
        "filter.w1": torch.randn(2, 3, 6, 6, generator=generator),
        "filter.b1": torch.randn(2, 3, 6, generator=generator),
    }
    analysis = analyze(weights, FullMatrix())
    assert [(layer.name, layer.windows) for layer in analysis] == [("fc", 1), ("filter.w1", 3)]
    real, imaginary = weights["filter.w1"].double().numpy()
    evals = np.stack([reference.eigenvalues(block) for block in real + 1j * imaginary])
    np.testing.assert_allclose(analysis["filter.w1"].window_evals, evals, rtol=1e-9)


# ------------------------------------------------------------------------------ batches and kinds


def test_any_batching_gives_the_same(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 40), (30, 64), (40, 33), (18, 18), (64, 40), (18, 99)]
    weights = {
        f"{i}.weight": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)
    }
    specs, _ = open_source(weights).layers()
    sampling = FixedAspectSampling(rows=20, per_dim=4)
    expected = analyze(weights, sampling, device=device)
    batches = {len(plan(specs, sampling).batches)}
    for memory in (2**30, 600_000, 300_000, 150_000):
        batches.add(len(plan(specs, sampling, memory).batches))
        # A solver's workspace for one matrix may be more than all of these weights together.
        enough = memory if device.type == "cpu" else memory + 2**22
        found = analyze(weights, sampling, memory=enough, device=device)
        assert [layer.name for layer in found] == [layer.name for layer in expected]
        for layer, other in zip(found, expected, strict=True):
            assert_same_spectra(layer, other)
    assert min(batches) == 2
    assert max(batches) == 6
    assert len(batches) >= 3


def test_a_layer_does_not_depend_on_the_others(model: Model) -> None:
    together = analyze(model, SAMPLING)
    for layer in together:
        (alone,) = analyze(model, SAMPLING, include=layer.name)
        assert_same_spectra(alone, layer)


def test_same_bits_every_time(device: torch.device, model: Model) -> None:
    first, second = (analyze(model, SAMPLING, "peak", device=device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.window_evals, b.window_evals)
        np.testing.assert_equal(a.scalars(), b.scalars())


def test_module_state_dict_arrays_and_files_agree(model: Model, tmp_path: Path) -> None:
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    # A header does not tell groups, so the grouped convolution is another layer there.
    options: dict[str, Any] = {"exclude": "grouped"}
    expected = analyze(model, SAMPLING, **options)
    kinds: list[Any] = [
        state,
        {name: tensor.numpy() for name, tensor in state.items()},
        {"epoch": 3, "state_dict": state},
        tmp_path / "model.safetensors",
        str(tmp_path),
        tmp_path / "model.pt",
    ]
    for kind in kinds:
        found = analyze(kind, SAMPLING, **options)
        assert {layer.name for layer in found} == {layer.name for layer in expected}
        for layer in expected:
            assert found[layer.name].shape == layer.shape
            assert_same_spectra(found[layer.name], layer)


def test_include_and_exclude(model: Model) -> None:
    everything = [layer.name for layer in analyze(model, SAMPLING)]
    assert "embedding" not in everything
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"include": "attention.*", "exclude": "*.k"}, [n for n in everything if n[:3] == "att"]),
        ({"include": ["head", "fc"]}, ["fc", "head"]),
        ({"exclude": ["att*", "*conv"]}, ["fc", "grouped", "head"]),
        ({"include": "embedding"}, ["embedding"]),
    ]
    cases[0][1].remove("attention.in_proj.k")
    for options, names in cases:
        analysis = analyze(model, SAMPLING, **options)
        assert [layer.name for layer in analysis] == names
    reasons = {s.name: s.reason for s in analyze(model, SAMPLING, exclude="fc").skipped}
    assert reasons["fc"] == "excluded by 'fc'"
    assert "vector" in reasons["norm"]
    assert "embedding" in reasons


def test_tensors_on_which_no_window_fits_are_listed() -> None:
    weights = {
        "thin.weight": torch.randn(9, 4),
        "wide.weight": torch.randn(4, 30),
        "b": torch.ones(3),
    }
    analysis = analyze(weights, FixedAspectSampling(q=5.0))
    assert [layer.name for layer in analysis] == ["wide"]
    assert {s.name: s.reason for s in analysis.skipped}["thin"] == (
        f"no window of {FixedAspectSampling(q=5.0)} fits 9 x 4"
    )
    assert {s.name for s in analysis.skipped} == {"thin", "b"}


# ------------------------------------------------------------------------------ layers that fail


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (15, 17), (29, 29)])
def test_a_layer_that_is_not_finite(
    device: torch.device, value: float, place: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = {f"{i}.weight": torch.randn(30, 30, generator=generator) for i in range(3)}
    whole = analyze(weights, SAMPLING, device=device)
    weights["1.weight"][place] = value
    analysis = analyze(weights, SAMPLING, device=device)
    assert [layer.status for layer in analysis] == ["ok", "nonfinite", "ok"]
    bad = analysis["1"]
    assert bad.shape == (1, 30, 30)
    assert math.isnan(bad.alpha)
    assert bad.evals.size == 0
    windows = windows_over(weights["1.weight"].double().numpy()[None], SAMPLING)
    affected = sum(not np.isfinite(window).all() for window in windows)
    assert bad.message == f"NaN, infinity or overflow in {affected} of 9 windows"
    assert analysis.failed == [bad]
    for name in ("0", "2"):
        assert_same_spectra(analysis[name], whole[name])


def test_a_layer_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = {f"{i}.weight": torch.randn(20, 20, generator=generator) for i in range(4)}
    whole = analyze(weights, SAMPLING)
    load = MappingSource.load

    def broken(self: MappingSource, name: str) -> torch.Tensor:
        if name == "2.weight":
            raise OSError("the disk is gone")
        return load(self, name)

    monkeypatch.setattr(MappingSource, "load", broken)
    weights["0.weight"] = torch.empty(20, 20, device="meta")
    calls: list[tuple[int, int, str]] = []
    analysis = analyze(weights, SAMPLING, progress=lambda *call: calls.append(call))
    assert [layer.name for layer in analysis] == ["0", "1", "2", "3"]
    assert [layer.status for layer in analysis] == ["error", "ok", "error", "ok"]
    assert analysis["2"].message == "OSError: the disk is gone"
    assert analysis["0"].message.startswith(
        "ValueError: 0.weight: is on the meta device: load the weights first (model.load_state_dict"
    )
    assert [call[:2] for call in calls] == [(done, 4) for done in range(1, 5)]
    for name in ("1", "3"):
        assert_same_spectra(analysis[name], whole[name])


def test_no_layer_can_be_read() -> None:
    analysis = analyze(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 8)).to("meta"), SAMPLING)
    assert [layer.status for layer in analysis] == ["error", "error"]
    assert math.isnan(analysis.mean_alpha)


def test_interruption_is_no_layers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: MappingSource, name: str) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(MappingSource, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze({"a.weight": torch.randn(9, 9)}, SAMPLING)


def test_fits_that_fail_are_reported() -> None:
    weights = {"zero.weight": torch.zeros(20, 20), "eye.weight": torch.eye(20), "ok.weight": None}
    weights["ok.weight"] = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    analysis = analyze(weights, FixedAspectSampling(rows=20))
    assert [layer.status for layer in analysis] == ["too_few", "degenerate_tail", "ok"]
    assert [layer.name for layer in analysis.failed] == ["zero", "eye"]
    assert analysis["zero"].dropped == 20
    assert analysis["eye"].stable_rank == 20
    assert all(layer.message for layer in analysis.failed)


# --------------------------------------------------------------------------------------- progress


def test_progress_is_called_once_a_layer(model: Model) -> None:
    calls: list[tuple[int, int, str]] = []
    analysis = analyze(model, SAMPLING, progress=lambda *call: calls.append(call))
    total = len(analysis)
    assert [call[:2] for call in calls] == [(done, total) for done in range(1, total + 1)]
    assert sorted(call[2] for call in calls) == sorted(layer.name for layer in analysis)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_reporter(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, progress: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with reporter(progress, layers=3, windows=1600) as report:
        report("layer.0", 400, False)
        report("layer.1", 1000, True)
        report("layer.\x1b[31m2[bold]", 200, True)
    return stream.getvalue()


def test_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    assert run_reporter(monkeypatch, io.StringIO(), True) == ""
    assert run_reporter(monkeypatch, Terminal(), False) == ""
    shown = run_reporter(monkeypatch, Terminal(), True)
    assert "3/3 layers" in shown
    # The windows of the layer that was there already are not among those to compute.
    assert "1,200/1,200 windows" in shown
    assert re.search(r"\d/s", shown)
    assert r"layer.\x1b[31m2[bold]" in shown


def test_progress_is_told_layer_by_layer(model: Model) -> None:
    told: list[tuple[int, int, str]] = []
    analysis = analyze(model, SAMPLING, progress=lambda *given: told.append(given))
    assert [done for done, _, _ in told] == list(range(1, len(analysis) + 1))
    assert {total for _, total, _ in told} == {len(analysis)}
    assert sorted(name for _, _, name in told) == sorted(layer.name for layer in analysis)


def test_an_error_in_the_callers_progress_is_the_callers(model: Model) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match=r"^enough$"):
        analyze(model, SAMPLING, progress=stop)


# ---------------------------------------------------------------------------- settings and caller


def test_settings_are_recorded(model: Model, tmp_path: Path) -> None:
    assert analyze(model, SAMPLING, include="fc", device="cpu").settings == AnalysisSettings(
        source="Model",
        base=None,
        include=("fc",),
        exclude=(),
        sampling=SAMPLING,
        xmin="median",
        xmin_pos=2.0,
        bins=100,
        bootstrap=100,
        dtype="float64",
        device="cpu",
        solver="auto",
        farms_fast=farms_fast.__version__,
        torch=torch.__version__,
        numpy=np.__version__,
    )
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    analysis = analyze(
        tmp_path / "m.safetensors",
        FullMatrix(),
        "fix-finger",
        xmin_pos=3,
        bins=50,
        bootstrap=0,
        device="cpu",
        dtype=torch.float32,
        solver="lapack",
        include="fc",
    )
    found = analysis.settings
    assert found is not None
    assert found.source == str(tmp_path / "m.safetensors")
    assert (found.sampling, found.xmin, found.xmin_pos) == (FullMatrix(), "peak", 2.0)
    assert (found.bins, found.bootstrap, found.dtype) == (50, 0, "float32")
    assert found.solver == "lapack"
    analysis.to_json(tmp_path / "a.json")
    assert Analysis.from_json(tmp_path / "a.json").settings == found


@pytest.mark.parametrize(
    ("xmin", "settings"), [("median", (3.0, 100)), ("ks", (2.0, 100)), ("peak", (2.0, 50))]
)
def test_what_the_rule_does_not_read_is_recorded_as_its_default(
    model: Model, xmin: str, settings: tuple[float, int]
) -> None:
    found = analyze(model, SAMPLING, xmin, xmin_pos=3, bins=50, bootstrap=0).settings
    assert (found.xmin_pos, found.bins) == settings


def test_memory_and_dtype_as_text(model: Model) -> None:
    expected = analyze(model, SAMPLING, dtype=torch.float32, device="cpu", memory=2**20)
    for dtype in ("float32", "torch.float32", np.float32, np.dtype("float32")):
        found = analyze(model, SAMPLING, dtype=dtype, device="cpu", memory="1MiB")
        assert found.settings == expected.settings
        assert_same_spectra(found["fc"], expected["fc"])
    with pytest.raises(ValueError, match=r"^memory: expected at least the \d+ bytes .*got 2000 \("):
        analyze(model, SAMPLING, memory="2kB")


def test_a_base_in_memory_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    made = MappingSource.__init__

    def counting(self: MappingSource, *given: Any, **options: Any) -> None:
        opened.append(1)
        made(self, *given, **options)

    prefix = "base_model.model.q.lora_"
    save_file(
        {f"{prefix}A.weight": torch.randn(2, 20), f"{prefix}B.weight": torch.randn(20, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(MappingSource, "__init__", counting)
    analysis = analyze(tmp_path, SAMPLING, base={"q.weight": torch.randn(20, 20)})
    assert analysis.settings.base == "state dict of 1 entries"
    assert opened == [1]


def test_default_sampling_is_farms(model: Model) -> None:
    analysis = analyze(model, include="fc")
    assert analysis.settings.sampling == FixedAspectSampling()
    assert (analysis["fc"].window_rows, analysis["fc"].window_cols) == (24, 24)
    assert analysis["fc"].windows == 15


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(device: torch.device, model: Model, training: bool) -> None:
    model.to(device).train(training)
    model.fc.weight.requires_grad_(False)
    (model.head.weight.sum() + model.conv.weight.square().sum()).backward()
    tensors = [*model.parameters(), *model.buffers()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 2
    identities = [id(tensor) for tensor in tensors]
    keys = [set(module.__dict__) for module in model.modules()]
    with left_as_it_was(*tensors, *gradients):
        analyze(model, SAMPLING, device=device)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert all(module.training is training for module in model.modules())


def test_the_state_dict_is_left_as_it_was(model: Model) -> None:
    state: dict[str, Any] = dict(model.state_dict())
    read_only = np.random.default_rng(0).standard_normal((20, 20))
    read_only.flags.writeable = False
    state["array"] = read_only
    before = dict(state)
    with left_as_it_was(*state.values()):
        analyze(state, SAMPLING)
    assert list(state.items()) == list(before.items())


def test_the_result_is_its_own(model: Model) -> None:
    analysis = analyze(model, FullMatrix(), include="head")
    kept = analysis["head"].evals.copy()
    with torch.no_grad():
        model.head.weight.zero_()
    np.testing.assert_array_equal(analysis["head"].evals, kept)


# -------------------------------------------------------------------------------------- bad input

BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"xmin": "middle"}, ValueError, r"xmin: expected one of 'median', .*; got 'middle'"),
    ({"xmin": None}, ValueError, r"xmin: expected one of .*; got None"),
    ({"xmin_pos": 1}, ValueError, r"xmin_pos: expected a finite number above 1, got 1"),
    ({"xmin_pos": math.nan}, ValueError, r"xmin_pos: expected a finite number above 1, got nan"),
    ({"xmin_pos": "half"}, TypeError, r"xmin_pos: expected a number above 1, got str"),
    ({"bins": 0}, ValueError, r"bins: expected an integer of at least 1, got 0"),
    ({"bins": 10.5}, TypeError, r"bins: expected an integer, got float"),
    ({"bootstrap": -1}, ValueError, r"bootstrap: expected an integer of at least 0, got -1"),
    ({"bootstrap": 10.0}, TypeError, r"bootstrap: expected an integer, got float"),
    ({"bootstrap": True}, ValueError, r"bootstrap: expected an integer of at least 0, got True"),
    ({"memory": 0}, ValueError, r"memory: expected an integer of at least 1, got 0"),
    ({"memory": 2**63}, ValueError, r"memory: expected an integer of at most \d+, got \d+"),
    ({"memory": 4.5e9}, TypeError, r"memory: expected an integer, got float"),
    ({"memory": "40 bags"}, ValueError, r"memory: expected a size such as 40GiB, .* '40 bags'"),
    ({"bootstrap": 10**5 + 1}, ValueError, r"bootstrap: expected an integer of at most 100000, .*"),
    ({"bins": 2**20 + 1}, ValueError, r"bins: expected an integer of at most 1048576, got 1048577"),
    (
        {"dtype": torch.float16},
        ValueError,
        r"dtype: expected torch.float64 or .*, got torch.float16",
    ),
    ({"dtype": "float16"}, ValueError, r"dtype: expected torch.float64 or .*, got 'float16'"),
    ({"dtype": np.int64}, ValueError, r"dtype: expected torch.float64 or .*, got <class .*"),
    ({"dtype": "what"}, ValueError, r"dtype: expected torch.float64 or .*, got 'what'"),
    ({"dtype": None}, ValueError, r"dtype: expected torch.float64 or .*, got None"),
    ({"device": "tpu"}, ValueError, r"device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ({"device": "meta"}, ValueError, r"device: expected cpu, cuda or cuda:N, got 'meta'"),
    ({"device": "cuda:99"}, ValueError, r"device: got 'cuda:99', but .*"),
    (
        {"solver": "abacus", "device": "cpu"},
        ValueError,
        r"solver: expected one of auto, lapack, two_stage on cpu, got 'abacus'",
    ),
    (
        {"sampling": 2000},
        TypeError,
        r"sampling: expected FixedAspectSampling\(...\) or .*, got int",
    ),
    ({"include": "nothing*"}, ValueError, r"include: expected patterns that match .*'nothing\*'.*"),
    ({"exclude": "nothing*"}, ValueError, r"exclude: expected patterns that match .*'nothing\*'.*"),
    ({"include": 3}, TypeError, r"include: expected None, a glob or a sequence of globs, got 3"),
    ({"include": []}, ValueError, r"include: expected None or at least one glob, got .*"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_ARGUMENTS, ids=lambda x: str(x)[:30]
)
def test_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def never(self: ModuleSource, name: str) -> torch.Tensor:
        raise AssertionError("arguments are checked before any weight is read")

    monkeypatch.setattr(ModuleSource, "load", never)
    options: dict[str, Any] = {"sampling": SAMPLING, "bootstrap": 5} | arguments
    with pytest.raises(error, match=f"^{message}$"):
        analyze(nn.Linear(9, 9), **options)


@pytest.mark.parametrize("model", [None, 3, [torch.ones(3, 3)], torch.ones(3, 3), object], ids=str)
def test_not_a_model(model: Any) -> None:
    message = f"got {re.escape(type(model).__name__)}"
    with pytest.raises(TypeError, match=rf"^model: expected a torch.nn.Module, .* {message}$"):
        analyze(model)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^model: expected a file or folder of weights"):
        analyze(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="mapping without any tensor"):
        analyze({})
    with pytest.raises(ValueError, match="a folder without weights"):
        analyze(tmp_path)


def test_a_model_without_layers() -> None:
    analysis = analyze(nn.LayerNorm(8), SAMPLING)
    assert len(analysis) == 0
    assert {skipped.name for skipped in analysis.skipped} == {"weight", "bias"}


def test_positions_of_the_arguments(model: Model) -> None:
    call: Callable[..., Analysis] = analyze
    with pytest.raises(TypeError):
        call(model, SAMPLING, "median", 3)
    assert call(model, SAMPLING, "ks", include="fc").settings.xmin == "ks"
