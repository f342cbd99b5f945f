"""Records, the Analysis that holds them, and its files."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import os
import pickle
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farms_fast.core.text import printable
from farms_fast.results.analysis import Analysis
from farms_fast.results.comparison import compare
from farms_fast.results.record import LayerRecord, Uncertainty
from farms_fast.results.settings import AnalysisSettings
from farms_fast.spectra.metrics import spectrum_metrics
from farms_fast.spectra.power_law import PowerLawFit
from farms_fast.spectra.windows import FixedAspectSampling
from farms_fast.weights.stacks import Skipped
from tests.support.records import SETTINGS

WINDOWS = np.array([[0.5, 1.0, 3.0], [0.1, 2.0, 7.0]])
ARRAYS = ("window_alphas", "window_evals")

# A whole file of this version of the format.
VERSION_2 = """{"format": "farms_fast.analysis", "version": 2, "settings": {"source": "m",
"base": null, "include": ["fc"], "exclude": [], "sampling": {"kind": "fixed_aspect", "rows": 4,
"q": 1.0, "per_dim": 3, "compat": null}, "xmin": "median", "xmin_pos": 2.0, "bins": 100,
"bootstrap": 100, "dtype": "float64", "device": "cpu", "solver": "auto", "farms_fast": "0.1",
"torch": "2.13", "numpy": "2.4"},
"layers": [{"name": "fc", "kind": "linear", "shape": [1, 2, 2], "status": "ok", "message": "",
"windows": 2, "window_rows": 2, "window_cols": 2, "alpha": 2.5, "D": 0.1, "sigma": 0.5, "xmin": 1.0,
"xmax": 3.0, "num_pl_spikes": 3, "norm": 6.5, "log_norm": 0.8, "spectral_norm": 3.0,
"log_spectral_norm": 0.5, "alpha_weighted": 1.2, "log_alpha_norm": 1.3, "stable_rank": 2.2,
"matrix_rank": 4, "entropy": 0.9, "mp_softrank": null, "Q": 1.0, "M": 2, "N": 2, "num_evals": 4,
"dropped": 0, "window_alpha_mean": 2.0, "window_alpha_std": null, "alpha_se": 0.1, "alpha_low": 2.0,
"alpha_high": 3.0, "alpha_even": 2.0, "alpha_odd": null, "split_half": null,
"window_alphas": [2.0, null], "evals": [0.5, 1.0, 2.0, 3.0],
"window_evals": [[0.5, 3.0], [1.0, 2.0]]}], "skipped": []}"""


def a_fit(status: str = "ok", alpha: float = 2.5) -> PowerLawFit:
    return PowerLawFit(
        alpha=alpha,
        D=0.1,
        xmin=1.0,
        n_tail=4,
        n=6,
        dropped=2,
        status=status,
        xmin_rule="median",
    )


def a_spread() -> Uncertainty:
    return Uncertainty(
        window_alphas=np.array([2.0, 3.0]),
        alpha_se=0.25,
        alpha_low=2.1,
        alpha_high=2.9,
        alpha_even=2.0,
        alpha_odd=3.5,
    )


def a_record(name: str = "encoder.0.fc", windows: np.ndarray = WINDOWS) -> LayerRecord:
    return LayerRecord.from_spectra(name, "linear", (1, 6, 4), windows, a_fit(), 4, 3, a_spread())


def an_analysis() -> Analysis:
    return Analysis(
        [
            a_record(),
            a_record("encoder.1.fc", np.array([[0.1, 1 / 3, 1e-310]])),
            LayerRecord("broken", "conv2d", (9, 4, 4), "nonfinite", "2 NaN"),
        ],
        [Skipped(name="encoder.0.bias", shape=(6,), reason="a vector")],
        SETTINGS,
    )


def same(left: LayerRecord, right: LayerRecord, arrays: tuple[str, ...] = ARRAYS) -> bool:
    for field in dataclasses.fields(LayerRecord):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ARRAYS:
            if field.name in arrays:
                np.testing.assert_array_equal(a, b, err_msg=field.name, strict=True)
        elif isinstance(a, float) and math.isnan(a):
            assert math.isnan(b), field.name
        else:
            assert a == b, field.name
            assert type(a) is type(b), field.name
    return True


# ------------------------------------------------------------------------------------------ records


def test_record_from_spectra() -> None:
    record = a_record()
    assert (record.name, record.kind, record.shape) == ("encoder.0.fc", "linear", (1, 6, 4))
    assert (record.status, record.message, record.dropped) == ("ok", "", 2)
    assert (record.windows, record.window_rows, record.window_cols) == (2, 4, 3)
    np.testing.assert_array_equal(record.evals, [0.1, 0.5, 1.0, 2.0, 3.0, 7.0], strict=True)
    np.testing.assert_array_equal(record.window_evals, WINDOWS)
    for name, value in spectrum_metrics(record.window_evals, a_fit(), 4, 3).items():
        assert getattr(record, name) == value, name


def test_record_carries_every_metric() -> None:
    names = set(spectrum_metrics(a_record().evals, a_fit(), 4, 3))
    assert names <= {field.name for field in dataclasses.fields(LayerRecord)}
    assert names <= set(a_record().scalars())


def test_record_uncertainty() -> None:
    record = a_record()
    assert record.window_alpha_mean == 2.5
    assert record.window_alpha_std == pytest.approx(math.sqrt(0.5))
    assert (record.alpha_se, record.alpha_low, record.alpha_high) == (0.25, 2.1, 2.9)
    assert (record.alpha_even, record.alpha_odd, record.split_half) == (2.0, 3.5, 1.5)
    np.testing.assert_array_equal(record.window_alphas, [2.0, 3.0])


def test_window_alphas_without_a_fit_are_left_out_of_the_mean() -> None:
    spread = Uncertainty(window_alphas=np.array([2.0, math.nan, 3.0]))
    windows = np.ones((3, 2))
    record = LayerRecord.from_spectra("a", "linear", (1, 2, 2), windows, a_fit(), 2, 2, spread)
    assert record.window_alpha_mean == 2.5
    assert len(record.window_alphas) == 3


@pytest.mark.parametrize("spread", [None, a_spread()])
def test_one_window_has_no_uncertainty(spread: Uncertainty | None) -> None:
    record = LayerRecord.from_spectra("a", "linear", (1, 3, 3), WINDOWS[:1], a_fit(), 3, 3, spread)
    assert math.isnan(record.window_alpha_mean)
    assert math.isnan(record.window_alpha_std)
    assert math.isnan(record.split_half)
    for name in ("alpha_se", "alpha_low", "alpha_high", "alpha_even", "alpha_odd"):
        assert math.isnan(getattr(record, name)), name
    assert record.alpha == 2.5


@pytest.mark.parametrize("status", ["too_few", "degenerate_tail", "no_candidate", "nonfinite"])
def test_failed_fit_gives_status_and_message(status: str) -> None:
    fit = a_fit(status, math.nan)
    record = LayerRecord.from_spectra("a", "linear", (1, 4, 3), WINDOWS, fit, 4, 3)
    assert record.status == status
    assert "6 eigenvalues, 2 dropped" in record.message
    assert math.isnan(record.alpha)
    assert record.norm == pytest.approx(13.6)


def test_record_without_spectrum() -> None:
    record = LayerRecord("a", "linear", (1, 2, 3), "error", "no memory")
    assert (record.status, record.message, record.windows) == ("error", "no memory", 0)
    assert math.isnan(record.alpha)
    assert math.isnan(record.norm)
    assert record.evals.shape == (0,)
    assert record.window_evals.shape == (0, 0)


def test_records_do_not_share_arrays() -> None:
    first = LayerRecord("a", "linear", (1, 2, 3), "ok")
    assert first.evals is not LayerRecord("b", "linear", (1, 2, 3), "ok").evals


def test_matrix_rank_goes_by_each_window() -> None:
    # 1e-13 is no more than rounding beside 1e3, and all there is of the second window.
    windows = np.array([[0.0, 1e-13, 1e3], [0.0, 1e-13, 2e-13]])
    record = LayerRecord.from_spectra("a", "linear", (1, 4, 3), windows, a_fit(), 4, 3)
    assert record.matrix_rank == 3


class TestDeferredSpectra:
    def deferred(self) -> tuple[LayerRecord, list[int]]:
        record, loads = a_record(), list[int]()

        def load() -> np.ndarray:
            loads.append(len(loads))
            return WINDOWS.copy()

        record.defer_window_evals(load)
        return record, loads

    def test_loaded_once_when_asked_for(self) -> None:
        record, loads = self.deferred()
        assert record.alpha == 2.5
        assert "window_evals" not in repr(record)
        assert loads == []
        np.testing.assert_array_equal(record.window_evals, WINDOWS)
        assert record.window_evals is record.window_evals
        assert same(record, a_record())
        assert loads == [0]

    def test_reading_and_pooling_keep_nothing(self) -> None:
        record, loads = self.deferred()
        np.testing.assert_array_equal(record.read_window_evals(), WINDOWS)
        np.testing.assert_array_equal(record.evals, np.sort(WINDOWS.ravel()))
        assert loads == [0, 1]
        assert "window_evals" not in vars(record)

    def test_assignment_wins(self) -> None:
        record, loads = self.deferred()
        record.window_evals = WINDOWS[:1]
        assert record.window_evals.shape == (1, 3)
        assert loads == []

    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.copy,
            copy.deepcopy,
            dataclasses.replace,
            # The loader, a local function, could not be pickled.
            lambda record: pickle.loads(pickle.dumps(record)),
        ],
    )
    def test_duplicates_have_the_values(self, duplicate) -> None:
        record, loads = self.deferred()
        other = duplicate(record)
        loaded = list(loads)
        assert same(other, a_record())
        assert loads == loaded == [0]

    def test_loader_that_fails_is_asked_again(self) -> None:
        record, answers = a_record(), [OSError("gone"), WINDOWS]

        def load() -> np.ndarray:
            answer = answers.pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        record.defer_window_evals(load)
        with pytest.raises(OSError, match="gone"):
            _ = record.window_evals
        np.testing.assert_array_equal(record.window_evals, WINDOWS)

    def test_other_attributes_are_still_missing(self) -> None:
        with pytest.raises(AttributeError, match="'LayerRecord' object has no attribute 'alhpa'"):
            _ = self.deferred()[0].alhpa  # type: ignore[attr-defined]


def test_bad_spectra() -> None:
    with pytest.raises(ValueError, match=r"window_evals: expected shape \(windows, k\), got \(3,"):
        LayerRecord.from_spectra("a", "linear", (1, 4, 3), WINDOWS[0], a_fit(), 4, 3)


# ----------------------------------------------------------------------------------------- Analysis


def test_container() -> None:
    analysis = an_analysis()
    assert len(analysis) == 3
    assert [layer.name for layer in analysis] == ["encoder.0.fc", "encoder.1.fc", "broken"]
    assert analysis["broken"] is analysis.layers[2]
    assert [layer.name for layer in analysis.failed] == ["broken"]
    assert analysis.mean_alpha == 2.5
    assert math.isnan(Analysis([]).mean_alpha)


def test_layers_are_had_by_name_however_many() -> None:
    """Were the list searched each time, this would take minutes."""
    analysis = Analysis([LayerRecord(f"l.{i}", "linear", (1, 2, 2), "ok") for i in range(30_000)])
    assert all(analysis[f"l.{i}"] is analysis.layers[i] for i in range(30_000))
    analysis.layers.reverse()
    assert analysis["l.0"] is analysis.layers[-1]
    analysis.layers[3].name = "renamed"
    assert analysis["renamed"] is analysis.layers[3]
    del analysis.layers[10:]
    with pytest.raises(KeyError, match=r"no layer named 'l\.0'"):
        analysis["l.0"]
    assert pickle.loads(pickle.dumps(analysis))["renamed"].name == "renamed"


def test_the_first_of_several_layers_of_one_name() -> None:
    analysis = Analysis([LayerRecord("a", "linear", (1, n, n), "ok") for n in (1, 2)])
    assert analysis["a"].shape == (1, 1, 1)


def test_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(KeyError, match=r"no layer named 'encoder\.2\.fc'.*'encoder\.[01]\.fc'"):
        an_analysis()["encoder.2.fc"]
    with pytest.raises(KeyError, match=r"no layer named 'zzz' \(3 layers\)"):
        an_analysis()["zzz"]
    said = r"no layer named 0: .*'encoder\.0\.fc'.*\.layers\[0\]"
    with pytest.raises(KeyError, match=said):
        an_analysis()[0]  # type: ignore[index]
    with pytest.raises(KeyError, match=r"no layer named \[\]: names are text"):
        an_analysis()[[]]  # type: ignore[index]
    # However long names are.
    analysis = Analysis([LayerRecord("a" * 10**6, "linear", (1, 2, 2), "ok")] * 3)
    with pytest.raises(KeyError, match="no layer named 'aa"):
        analysis["a" * 999_999 + "b"]


def test_repr_and_str() -> None:
    analysis = an_analysis()
    assert repr(analysis) == "Analysis(3 layers, 1 failed, 1 tensor skipped, mean alpha 2.5)"
    lines = str(analysis).splitlines()
    assert lines[0] == repr(analysis)
    assert lines[1] == "  encoder.0.fc  1x6x4  alpha 2.500 +- 0.250, D 0.100"
    assert lines[3] == "  broken  9x4x4  nonfinite: 2 NaN"
    assert len(lines) == 4


def test_str_escapes_names() -> None:
    text = str(Analysis([a_record("a\x1b[31m\nb")]))
    assert "a\\x1b[31m\\nb" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model.layers.0", "model.layers.0"),
        ("größe 層", "größe 層"),
        ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\u202egnp", "\\u202egnp"),
        ("\x9b2J", "\\x9b2J"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


# -------------------------------------------------------------------------------------------- files


def test_json_round_trip_with_spectra(tmp_path: Path) -> None:
    analysis = an_analysis()
    analysis.to_json(tmp_path / "a.json", spectra=True)
    back = Analysis.from_json(tmp_path / "a.json")
    assert all(same(a, b) for a, b in zip(analysis.layers, back.layers, strict=True))
    assert back.skipped == analysis.skipped
    assert back.settings == analysis.settings


def test_json_without_spectra(tmp_path: Path) -> None:
    analysis = an_analysis()
    analysis.to_json(tmp_path / "a.json")
    back = Analysis.from_json(str(tmp_path / "a.json"))
    for a, b in zip(analysis.layers, back.layers, strict=True):
        assert same(a, b, arrays=("window_alphas",))
        assert b.evals.shape == (0,)
        assert b.window_evals.shape == (0, 0)


def test_json_is_strict_json(tmp_path: Path) -> None:
    record = a_record()
    record.window_evals = np.array([[1.0, math.nan], [math.inf, 2.0]])
    record.norm = math.inf
    record.matrix_rank = math.nan
    Analysis([record]).to_json(tmp_path / "a.json", spectra=True)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    plain = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert plain["layers"][0]["matrix_rank"] is None
    assert plain["layers"][0]["window_evals"][0] == [1.0, None]
    back = Analysis.from_json(tmp_path / "a.json")["encoder.0.fc"]
    assert same(record, back)


def test_an_analysis_made_by_hand_has_no_settings(tmp_path: Path) -> None:
    Analysis([]).to_json(tmp_path / "a.json")
    assert Analysis.from_json(tmp_path / "a.json").settings is None


@given(st.text(), st.floats(), st.floats())
def test_json_keeps_any_name_and_number(name: str, alpha: float, xmin: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        record = LayerRecord(name, "linear", (1, 2, 3), "ok", alpha=alpha, xmin=xmin)
        Analysis([record]).to_json(path)
        assert same(record, Analysis.from_json(path).layers[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a JSON file"),
        ("{", "is not a JSON file"),
        ("[]", "was not written by Analysis.to_json"),
        ('{"layers": []}', "was not written by Analysis.to_json"),
        ('{"format": "farms_fast.analysis", "version": 99}', "has format version 99"),
        ('{"format": "farms_fast.analysis", "version": 2}', "has a damaged record"),
        (
            '{"format": "farms_fast.analysis", "version": 2, "settings": null, "skipped": [],'
            ' "layers": [{"name": "a"}]}',
            "has a damaged record",
        ),
        (
            '{"format": "farms_fast.analysis", "version": 2, "settings": 3, "skipped": [],'
            ' "layers": []}',
            "has a damaged record",
        ),
    ],
)
def test_from_json_refuses_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Analysis.from_json(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"windows": 2', '"windows": 1e400', "windows: expected an integer of 0 to .*, got inf"),
        ('"windows": 2', '"windows": 1.5', "windows: expected an integer of 0 to .*, got 1.5"),
        ('"windows": 2', '"windows": -1', "windows: expected an integer of 0 to .*, got -1"),
        ('"windows": 2', f'"windows": {2**63}', "windows: expected an integer of 0 to 2.63 - 1"),
        ('"alpha": 2.5', '"alpha": ' + "9" * 400, r"alpha: expected a number of float64, got 9+"),
        ('"alpha": 2.5', '"alpha": ' + "9" * 5000, "not a JSON file"),
        ('"alpha": 2.5', '"alpha": "2.5"', "alpha: expected a number, got '2.5'"),
        ('"alpha": 2.5', '"alpha": true', "alpha: expected a number, got True"),
        ('"status": "ok"', '"status": ["ok"]', "status: expected text, got "),
        ('"shape": [1, 2, 2]', '"shape": 4', "shape: expected a list of integers, got 4"),
        ('"shape": [1, 2, 2]', '"shape": [2, 2]', "damaged record"),
        ('"window_alphas": [2.0, null]', '"window_alphas": "12"', "window_alphas: expected a list"),
        ('"window_alphas": [2.0, null]', '"window_alphas": [[1]]', "expected 1 dimensions, got 2"),
        ('[[0.5, 3.0], [1.0, 2.0]]', '[[0.5, 3.0], [1.0]]', "window_evals: expected numbers"),
        ('[[0.5, 3.0], [1.0, 2.0]]', '[1' + "0" * 400 + "]", "window_evals: expected numbers"),
        ('"settings": {', '"settings": {"x": ' + "[" * 100_000, "not a JSON file .nested too deep"),
        ('"per_dim": 3', '"per_dim": [3]', "settings: sampling: per_dim: expected a positive int"),
        ('"q": 1.0', '"q": 1' + "0" * 400, "settings: sampling: "),
        ('"bootstrap": 100', '"bootstrap": 1000000000', "bootstrap: expected an integer of 0 to"),
    ],
)  # fmt: skip
def test_values_that_no_analysis_has(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "a.json"
    assert old in VERSION_2
    path.write_text(VERSION_2.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        Analysis.from_json(path)
    assert str(path) in str(caught.value)
    # However long what came was.
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_reason_is_text(tmp_path: Path) -> None:
    Analysis([], [Skipped("b", (3,), "vector")]).to_json(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"vector"', '["vector"]'))
    with pytest.raises(ValueError, match="skipped reason: expected text, got "):
        Analysis.from_json(tmp_path / "a.json")


def test_an_older_file_is_refused(tmp_path: Path) -> None:
    older = VERSION_2.replace('"version": 2', '"version": 1')
    (tmp_path / "a.json").write_text(older)
    with pytest.raises(ValueError, match="format version 1, this release reads version 2: write"):
        Analysis.from_json(tmp_path / "a.json")


def test_version_2_of_the_format_stays_readable(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(VERSION_2)
    analysis = Analysis.from_json(tmp_path / "a.json")
    assert analysis.settings == AnalysisSettings(
        "m",
        include=("fc",),
        sampling=FixedAspectSampling(rows=4, per_dim=3),
        farms_fast="0.1",
        torch="2.13",
        numpy="2.4",
    )
    record = analysis["fc"]
    np.testing.assert_array_equal(record.window_evals, [[0.5, 3.0], [1.0, 2.0]], strict=True)
    np.testing.assert_array_equal(record.evals, [0.5, 1.0, 2.0, 3.0], strict=True)
    np.testing.assert_array_equal(record.window_alphas, [2.0, math.nan], strict=True)
    assert (record.alpha, record.matrix_rank, record.shape) == (2.5, 4, (1, 2, 2))
    # Pooled eigenvalues that are not those of the windows come from no analysis.
    (tmp_path / "a.json").write_text(VERSION_2.replace("[0.5, 1.0, 2.0, 3.0]", "[0.5, 1.0, 2.0]"))
    with pytest.raises(ValueError, match="evals of 'fc' are not its window_evals in order"):
        Analysis.from_json(tmp_path / "a.json")


def test_from_json_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Analysis.from_json(tmp_path / "none.json")


def test_csv_round_trips_numbers(tmp_path: Path) -> None:
    analysis = an_analysis()
    analysis.layers[0].name = 'a,"b"\nc'
    analysis.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3
    for row, layer in zip(rows, analysis.layers, strict=True):
        assert set(row) == set(layer.scalars())
        for name, value in layer.scalars().items():
            if isinstance(value, float):
                np.testing.assert_array_equal(float(row[name]), value, err_msg=name)
            else:
                assert type(value)(row[name]) == value, name
    assert (rows[2]["stack"], rows[2]["rows"], rows[2]["cols"]) == ("9", "4", "4")
    assert rows[2]["alpha"] == "nan"


def test_no_text_of_a_csv_is_a_formula(tmp_path: Path) -> None:
    names = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "'a",
        "''",
        "fc",
        "",
        "a=b",
    ]
    records = [LayerRecord(name, "linear", (1, 2, 2), "error", name, alpha=-0.5) for name in names]
    Analysis(records).to_csv(tmp_path / "a.csv")
    compare(Analysis(records), Analysis(records)).to_csv(tmp_path / "b.csv")
    for file, columns in (("a.csv", ("name", "message")), ("b.csv", ("name",))):
        with (tmp_path / file).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        for column in columns:
            cells = [row[column] for row in rows]
            assert not any(cell.startswith(tuple("=+-@\t\r\n\uff1d")) for cell in cells)
            # One in front taken away, every name is what it was.
            assert [cell[cell[:1] == "'" :] for cell in cells] == names
    assert float(rows[0]["alpha_a"]) == -0.5


def test_csv_of_nothing_has_the_heading(tmp_path: Path) -> None:
    Analysis([]).to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("name,kind,stack,rows,cols,status,")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_pandas_and_csv_agree(tmp_path: Path) -> None:
    import pandas as pd

    analysis = an_analysis()
    frame = analysis.to_pandas()
    assert list(frame["name"]) == ["encoder.0.fc", "encoder.1.fc", "broken"]
    assert frame["num_evals"].dtype == np.int64
    assert frame.loc[0, "alpha"] == 2.5
    assert math.isnan(frame.loc[2, "alpha"])
    assert list(Analysis([]).to_pandas().columns) == list(frame.columns)
    analysis.to_csv(tmp_path / "a.csv")
    read = pd.read_csv(tmp_path / "a.csv", keep_default_na=True)
    read["message"] = read["message"].fillna("")
    # The parser of pandas 2 may be off by one unit in the last place; the file itself is not.
    pd.testing.assert_frame_equal(read, frame, check_dtype=False, rtol=4e-16, atol=0)


@pytest.mark.slow
def test_without_pandas(tmp_path: Path) -> None:
    # None in sys.modules makes the import fail as if the package were not there.
    script = (
        "import sys; sys.modules['pandas'] = None\n"
        "from farms_fast.results.record import LayerRecord\n"
        "from farms_fast.results.analysis import Analysis\n"
        "a = Analysis([LayerRecord('a', 'linear', (1, 2, 3), 'ok')])\n"
        "a.to_csv(sys.argv[1]); a.to_json(sys.argv[2]); Analysis.from_json(sys.argv[2])\n"
        "try: a.to_pandas()\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.csv", tmp_path / "a.json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'farms-fast[pandas]', or use to_csv" in done.stdout


@pytest.mark.slow
def test_pandas_is_not_imported_unasked() -> None:
    script = "import sys, farms_fast.cli.main; print('pandas' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("write", [Analysis.to_csv, Analysis.to_json])
class TestWriting:
    def test_replaces_and_leaves_nothing_behind(self, write, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.write_text("old" * 100_000)
        write(an_analysis(), path)
        assert "encoder.0.fc" in path.read_text()
        assert "old" not in path.read_text()
        assert os.listdir(tmp_path) == ["out"]

    def test_failure_keeps_the_old_file(self, write, tmp_path: Path, monkeypatch) -> None:
        path = tmp_path / "out"
        path.write_text("old")

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write(an_analysis(), path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["out"]

    def test_mode_follows_the_umask(self, write, tmp_path: Path) -> None:
        old = os.umask(0o027)
        try:
            write(an_analysis(), tmp_path / "out")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640

    def test_link_stays_a_link(self, write, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        (tmp_path / "link").symlink_to("file")
        write(an_analysis(), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert "encoder.0.fc" in (tmp_path / "file").read_text()

    def test_pipe_is_written_to_not_replaced(self, write, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        # Open for reading first, or the writer would wait for a reader.
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            write(an_analysis(), pipe)
            assert b"encoder.0.fc" in os.read(reader, 1 << 16)
        finally:
            os.close(reader)
        assert pipe.is_fifo()

    def test_directory_and_missing_directory(self, write, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError):
            write(an_analysis(), tmp_path)
        with pytest.raises(FileNotFoundError):
            write(an_analysis(), tmp_path / "none" / "out")

    def test_name_that_utf8_cannot_write(self, write, tmp_path: Path) -> None:
        write(Analysis([a_record("a\ud800")]), tmp_path / "out")
        assert "\\ud800" in (tmp_path / "out").read_text(encoding="utf-8")
