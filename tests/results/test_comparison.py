"""Comparisons: what is matched, how certain a difference is, tables, and ``farms-fast compare``."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

import farms_fast
from farms_fast import Analysis, FixedAspectSampling, compare
from farms_fast.cli.compare import format_comparison
from farms_fast.cli.main import app
from farms_fast.results.comparison import COMPARISON_COLUMNS
from farms_fast.results.record import LayerRecord
from farms_fast.results.settings import AnalysisSettings, OtherSampling
from farms_fast.results.store import ResultsStore
from farms_fast.spectra.bootstrap import resampled_counts
from farms_fast.testing import reference
from farms_fast.views.html.payload import comparison_payload
from tests.support.analyses import HOSTILE, an_analysis

WINDOWS = FixedAspectSampling(rows=24, per_dim=3)


def a_layer(name: str, alpha: float, error: float = 0.1, **values: object) -> LayerRecord:
    settings = {
        "alpha_se": error,
        "alpha_low": alpha - 2 * error,
        "alpha_high": alpha + 2 * error,
        **values,
    }
    return LayerRecord(name, "linear", (1, 8, 4), "ok", alpha=alpha, **settings)


def of(*layers: LayerRecord, settings: AnalysisSettings | None = None) -> Analysis:
    return Analysis(layers, [], settings)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"h.{block}.{role}.weight": torch.randn(64, 48, generator=generator)
        / torch.rand(64, 1, generator=generator)
        for block in range(2)
        for role in ("q", "up")
    }


@pytest.fixture(scope="module")
def before(weights: dict[str, torch.Tensor]) -> Analysis:
    return farms_fast.analyze(weights, WINDOWS, bootstrap=20)


@pytest.fixture(scope="module")
def after(weights: dict[str, torch.Tensor]) -> Analysis:
    """A little noise in all layers but the last, which is halved: its alpha stays."""
    generator = torch.Generator().manual_seed(1)
    changed = {
        name: weight + 0.05 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }
    changed["h.1.up.weight"] = weights["h.1.up.weight"] / 2
    return farms_fast.analyze(changed, WINDOWS, bootstrap=20)


# ------------------------------------------------------------------------------------------ matched


def test_layers_are_matched_by_name_in_the_order_of_the_model() -> None:
    a = of(*(a_layer(name, 2.0) for name in ("fc", "h.0", "h.1", "h.2", "head")))
    b = of(*(a_layer(name, 2.5) for name in ("emb", "h.0", "h.0.lora", "h.2", "head", "tail")))
    found = compare(a, b)
    expected = ["emb", "fc", "h.0", "h.0.lora", "h.1", "h.2", "head", "tail"]
    assert [layer.name for layer in found] == expected
    assert [layer.present for layer in found] == ["b", "a", "both", "b", "a", "both", "both", "b"]
    assert [layer.name for layer in found.only_a] == ["fc", "h.1"]
    assert [layer.name for layer in found.only_b] == ["emb", "h.0.lora", "tail"]
    assert found["fc"].note == "only in A"
    assert math.isnan(found["fc"].difference)
    assert found.mean_difference == 0.5
    with pytest.raises(KeyError, match=r"did you mean 'h\.2'"):
        found["h.3"]


def test_the_difference_against_its_error() -> None:
    found = compare(of(a_layer("fc", 2.0, 0.3)), of(a_layer("fc", 3.0, 0.4)))["fc"]
    assert found.difference == 1.0
    assert found.difference_se == pytest.approx(0.5)
    assert found.z == pytest.approx(2.0)
    assert not found.paired
    assert found.intervals_overlap is True
    assert compare(of(a_layer("fc", 2.0)), of(a_layer("fc", 3.0)))["fc"].intervals_overlap is False


def test_layers_without_an_alpha_or_an_error() -> None:
    failed = LayerRecord("fc", "linear", (1, 8, 4), "nonfinite", "1 weight is NaN")
    found = compare(of(a_layer("fc", 2.0)), of(failed))["fc"]
    assert math.isnan(found.z)
    assert found.note == "B: nonfinite, 1 weight is NaN"
    single = a_layer("fc", 2.0, math.nan)
    found = compare(of(single), of(a_layer("fc", 2.5)))
    assert math.isnan(found["fc"].z)
    assert found["fc"].difference == 0.5
    assert found["fc"].intervals_overlap is None
    assert found.different == []
    other = LayerRecord("fc", "linear", (1, 8, 8), "ok", alpha=2.0)
    assert compare(of(single), of(other))["fc"].note == "shapes differ: 1x8x4 and 1x8x8"


def test_what_is_beyond_its_error() -> None:
    a = of(*(a_layer(f"h.{i}", 2.0) for i in range(4)))
    b = of(*(a_layer(f"h.{i}", 2.0 + shift) for i, shift in enumerate((0.27, 0.28, -0.28, 0))))
    # 1.96 * sqrt(2) * 0.1 is 0.2772.
    assert [layer.name for layer in compare(a, b).different] == ["h.1", "h.2"]


def test_notes_say_what_the_numbers_do_not(before: Analysis) -> None:
    assert compare(before, before).notes == []
    other = of(*before, settings=replace(before.settings, xmin="ks", farms_fast="0.0"))
    found = compare(before, other)
    assert found.settings_that_differ == {
        "xmin": ("median", "ks"),
        "farms_fast": (before.settings.farms_fast, "0.0"),
    }
    assert "different settings (xmin)" in found.notes[0]
    assert "4 of 4 differences take the errors of A and B as independent" in found.notes[1]
    assert compare(of(a_layer("a", 2.0)), of(a_layer("b", 2.0))).notes == [
        "no layer has the same name in A ('a') and B ('b'): analyse both from a checkpoint or both "
        "from the same class"
    ]
    failed = LayerRecord("a", "linear", (1, 8, 4), "nonfinite", "1 weight is NaN")
    assert compare(of(a_layer("a", 2.0)), of(failed)).notes == [
        "no layer has an alpha in both analyses"
    ]


def test_arguments() -> None:
    with pytest.raises(TypeError, match="b: expected an Analysis, got dict"):
        compare(of(), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a: expected layers of different names, got 'fc' twice"):
        compare(of(a_layer("fc", 2.0), a_layer("fc", 2.0)), of())
    with pytest.raises(ValueError, match="device"):
        compare(of(), of(), device="tpu")
    assert len(compare(of(), of())) == 0


# ------------------------------------------------------------------------------------------- paired


@pytest.mark.parametrize("name", ["h.0.q", "h.1.up"])
def test_paired_errors_are_those_of_one_bootstrap(
    before: Analysis, after: Analysis, name: str
) -> None:
    a, b = before[name], after[name]
    counts = resampled_counts(1, WINDOWS.grid(*a.shape[1:]), 20)
    differences = []
    for count in counts:
        alphas = [
            float(reference.fit_power_law(np.repeat(record.window_evals, count, axis=0).ravel())[
                "alpha"
            ])
            for record in (a, b)
        ]  # fmt: skip
        differences.append(alphas[1] - alphas[0])
    found = compare(before, after)[name]
    assert found.paired
    expected = np.std(differences, ddof=1)
    assert found.difference_se == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_pairing_sees_what_independent_errors_hide(before: Analysis, after: Analysis) -> None:
    paired, independent = compare(before, after), compare(before, after, paired=False)
    for layer in paired:
        alone = independent[layer.name]
        assert alone.difference == layer.difference
        assert alone.difference_se == pytest.approx(
            math.hypot(before[layer.name].alpha_se, after[layer.name].alpha_se)
        )
        assert layer.difference_se < alone.difference_se / 2
    # Halving the weights changes no alpha but by rounding, which is no difference.
    assert abs(paired["h.1.up"].difference) < 1e-12
    assert abs(paired["h.1.up"].z) < 1e-6


def test_the_same_analysis_does_not_differ(before: Analysis) -> None:
    for layer in compare(before, before):
        assert (layer.difference, layer.difference_se, layer.z) == (0, 0, 0)


@pytest.mark.gpu
def test_pairing_on_the_gpu_as_on_the_cpu(before: Analysis, after: Analysis) -> None:
    expected = compare(before, after)
    for layer in compare(before, after, device="cuda"):
        error = expected[layer.name].difference_se
        assert layer.difference_se == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_pairing_needs_the_same_windows_and_the_spectra(
    before: Analysis, after: Analysis, tmp_path: Path
) -> None:
    before.to_json(tmp_path / "a.json")
    assert not any(
        layer.paired for layer in compare(Analysis.from_json(tmp_path / "a.json"), after)
    )
    before.to_json(tmp_path / "b.json", spectra=True)
    whole = compare(Analysis.from_json(tmp_path / "b.json"), after)
    assert [layer.z for layer in whole] == [layer.z for layer in compare(before, after)]
    for changed in (
        {"sampling": FixedAspectSampling(rows=24, per_dim=4)},
        {"sampling": OtherSampling("mine")},
        {"bootstrap": 0},
    ):
        both = [of(*side, settings=replace(side.settings, **changed)) for side in (before, after)]
        assert not any(layer.paired for layer in compare(*both)), changed


# ------------------------------------------------------------------------------------------- tables


def test_shapes_and_samplings_of_a_file_may_be_any() -> None:
    """A grid of so many starts would not fit into any memory."""
    settings = AnalysisSettings("m", sampling=FixedAspectSampling(rows=1, per_dim=2**40))
    for shape, window in (((1, 2**40, 2**40), 1), ((1, 2**62, 2**62), 2**20), ((1, 9, 9), 10)):
        sides = {"windows": 4, "window_rows": window, "window_cols": window}
        layer = replace(a_layer("a", 2.5, **sides), shape=shape, window_evals=np.ones((4, 1)))
        made = of(layer, settings=settings)
        assert not compare(made, made)["a"].paired


@pytest.mark.parametrize("sampling", [
    FixedAspectSampling(rows=8, per_dim=4, compat="farms"),
    FixedAspectSampling(rows=8, per_dim=2),
    FixedAspectSampling(rows=30, per_dim=15),
    FixedAspectSampling(rows=20, q=2.0, per_dim=15),
])  # fmt: skip
def test_every_grid_of_a_real_analysis_is_paired(sampling: FixedAspectSampling) -> None:
    made = farms_fast.analyze({"a": torch.randn(200, 40)}, sampling, device="cpu", bootstrap=5)
    assert [layer.paired for layer in compare(made, made)] == [True]


def test_tables(before: Analysis, after: Analysis, tmp_path: Path) -> None:
    found = compare(before, of(*list(after)[1:], settings=after.settings))
    frame = found.to_pandas()
    assert tuple(frame.columns) == COMPARISON_COLUMNS
    assert frame["alpha_b"][1] == after.layers[1].alpha
    assert math.isnan(frame["alpha_b"][0])
    assert frame["status_b"].tolist() == ["", "ok", "ok", "ok"]
    found.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["difference"]) for row in rows[1:]] == frame["difference"][1:].tolist()
    assert pd.read_csv(tmp_path / "a.csv").shape == frame.shape
    found.to_json(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["format"] == "farms_fast.comparison"
    assert document["layers"][0]["difference"] is None
    assert document["layers"][1]["z"] == found.layers[1].z
    assert document["settings_a"]["xmin"] == "median"


def test_notebooks_show_names_as_text() -> None:
    html = compare(an_analysis(), an_analysis(seed=1))._repr_html_()
    assert "<img" not in html
    assert "&lt;img src=x" in html


def test_the_payload_of_two_sides() -> None:
    found = compare(an_analysis(), an_analysis(2, seed=1))
    sides = found.a.as_side(), found.b.as_side()
    page, curves = comparison_payload(found.layers, sides, found.notes, [], None)
    assert page["title"] == "some model"
    assert page["mode"] == "compare"
    assert len(page["layers"]) == len(curves) == 19
    missing = [layer for layer in page["layers"] if layer["note"] == "only in A"]
    assert [layer["sides"][1] for layer in missing] == [None] * 4
    index = page["layers"].index(missing[0])
    assert "density" in curves[index][0]
    assert curves[index][1] is None
    json.dumps([page, curves], allow_nan=False)


# ---------------------------------------------------------------------------------------------- CLI


def run(*arguments: str | Path, columns: int = 100) -> Result:
    env = {"COLUMNS": str(columns)}
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env=env)


@pytest.fixture
def stores(before: Analysis, after: Analysis, tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    for path, analysis in zip(paths, (before, after), strict=True):
        with ResultsStore(path) as store:
            made = store.run(analysis.settings)
            made.put_many((i, layer, "d") for i, layer in enumerate(analysis))
            made.complete([layer.name for layer in analysis])
    return paths


def test_compare_prints_a_table_and_writes_files(
    stores: tuple[Path, Path], before: Analysis, after: Analysis, tmp_path: Path
) -> None:
    forms = [tmp_path / name for name in ("c.html", "c.csv", "c.json")]
    result = run(*stores, "-o", forms[0], "--csv", forms[1], "--json", forms[2])
    assert result.exit_code == 0
    assert result.stderr == ""
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["name", "alpha", "A", "alpha", "B", "difference", "±", "z"]
    found = compare(before, after)
    for layer, row in zip(found, rows, strict=False):
        name, _, alpha_b, difference, error, _ = row.split()
        assert name == layer.name
        assert float(alpha_b) == pytest.approx(after[name].alpha, abs=5e-4)
        assert float(difference) == pytest.approx(layer.difference, abs=5e-4)
        assert float(error) == pytest.approx(layer.difference_se, abs=5e-4)
    assert rows[5].startswith("compared 4, only in A 0, only in B 0; beyond 1.96 standard errors ")
    assert "<!doctype html>" in forms[0].read_text(encoding="utf-8")
    assert len(forms[1].read_text().splitlines()) == 5
    assert json.loads(forms[2].read_text())["layers"][0]["paired"] is True
    result = run(*stores, "--quiet", "--csv", forms[1], "--unpaired")
    assert result.output == ""
    assert pd.read_csv(forms[1])["paired"].tolist() == [False] * 4


def test_two_runs_of_one_store(stores: tuple[Path, Path], after: Analysis) -> None:
    with ResultsStore(stores[0]) as store:
        made = store.run(after.settings, force=True)
        made.put_many((i, layer, "d") for i, layer in enumerate(after))
        made.complete([layer.name for layer in after])
    one = run(stores[0], stores[0], "--run-a", "1").stdout
    assert one == run(*stores, "--run-a", "1").stdout
    assert one != run(stores[0], stores[0]).stdout


def test_the_order_of_the_table() -> None:
    a = of(*(a_layer(f"h.{i}", 2.0, error) for i, error in enumerate((0.1, 0.01, math.nan))))
    b = of(*(a_layer(f"h.{i}", 2.0 + i, 0.01) for i in range(3)))
    found = compare(a, b)

    def names(sort: str) -> list[str]:
        return [row.split()[0] for row in format_comparison(found, 90, sort).splitlines()[1:4]]

    assert names("model") == ["h.0", "h.1", "h.2"]
    assert names("difference") == ["h.2", "h.1", "h.0"]
    assert names("z") == ["h.1", "h.0", "h.2"]


def test_hostile_names_do_not_reach_the_terminal() -> None:
    a = of(a_layer("a\x1b[31m\n\u202e", 2.0))
    text = format_comparison(compare(a, of()), 60)
    assert "\x1b" not in text
    assert "a\\x1b[31m" in text
    assert "only in A" in text
    assert HOSTILE[:20] in format_comparison(compare(of(a_layer(HOSTILE, 2.0)), of()), 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.sqlite", "none"), "no such file: 'none'"),
        (("a.sqlite", "b.sqlite", "--sort", "name"), "sort: expected model, difference or z"),
        (("a.sqlite", "b.sqlite", "--csv", "a.sqlite"), "csv: 'a.sqlite' is the file of a too"),
        (("a.sqlite", "b.sqlite", "-o", "b.sqlite"), "output: 'b.sqlite' is the file of b too"),
        (("a.sqlite", "b.sqlite", "--run-b", "7"), "run-b: expected one of 1, got 7"),
        (("a.sqlite", "b.sqlite", "--device", "tpu"), "device: "),
    ],
)
def test_compare_refuses_in_one_line(
    stores: tuple[Path, Path],
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(stores[0].parent)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.sqlite", "b.sqlite"]
