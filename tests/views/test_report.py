"""Reports: the curves of a spectrum, the data of a page, its file, and ``farms-fast report``."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from typer.testing import CliRunner, Result

from farms_fast import FixedAspectSampling, FullMatrix, analyze
from farms_fast.cli.main import app
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from farms_fast.results.store import ResultsStore
from farms_fast.spectra.marchenko_pastur import (
    marchenko_pastur_density,
    marchenko_pastur_support,
    marchenko_pastur_survival,
)
from farms_fast.spectra.power_law import fit_power_law
from farms_fast.testing import reference
from farms_fast.views.curves import SURVIVAL_TOLERANCE, spectrum_curves, thin
from farms_fast.views.html.payload import RECORD_FIELDS, curves_of, packed, report_payload
from farms_fast.views.positions import OTHER, layer_positions
from tests.support.analyses import HOSTILE, a_layer, an_analysis

# The file of the npm package echarts 6.1.0 that is shipped, unchanged.
ECHARTS_SHA256 = "b66b25aeb4df84e33199dc21694014d336d222cbd9deb0e5a7c14bd6aa0d0fd0"


def record_of(values: np.ndarray, rows: int = 30, cols: int = 60) -> LayerRecord:
    fit = fit_power_law(values)
    return LayerRecord.from_spectra(
        "fc", "linear", (1, rows, cols), values.reshape(1, -1), fit, rows, cols
    )


SPECTRA = {
    "heavy": np.sort(np.random.default_rng(0).pareto(1.5, 30_000)),
    "few": np.sort(np.random.default_rng(1).pareto(1.5, 30)),
    "wide": 10.0 ** np.linspace(-150, 150, 5000),
    "ties": np.sort(np.random.default_rng(2).integers(1, 40, 4000).astype(float)),
    "zeros": np.concatenate([np.zeros(700), np.sort(np.random.default_rng(3).pareto(2.0, 1300))]),
    "graded": np.sort(np.exp(np.random.default_rng(4).normal(0, 12, 9000))),
}


# ------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("name", SPECTRA)
def test_the_complementary_cdf_stays_within_its_bound(name: str) -> None:
    values = SPECTRA[name]
    curves = spectrum_curves(record_of(values))
    positive = np.unique(values[values > 0])
    share = np.array([np.count_nonzero(values >= value) for value in positive]) / values.size
    drawn = np.interp(np.log10(positive), curves.survival_x, curves.survival)
    span = curves.survival[0] - curves.survival[-1]
    # The share of ranks that are not kept adds 0.00044 decades at most.
    most = SURVIVAL_TOLERANCE * span + math.log10(1.001)
    assert np.abs(drawn - np.log10(share)).max() <= most * (1 + 1e-9)
    assert curves.survival_x.size < 1000
    assert (curves.count, curves.positive) == (values.size, np.count_nonzero(values))


@pytest.mark.parametrize("name", SPECTRA)
def test_candidates_have_the_alpha_and_the_distance_of_their_tails(name: str) -> None:
    values = SPECTRA[name]
    positive = values[values > 0]
    curves = spectrum_curves(record_of(values))
    assert 20 <= curves.candidates.size <= 160
    for position in range(0, curves.candidates.size, 17):
        start = int(np.argmin(np.abs(np.log10(positive) - curves.candidates[position])))
        tail = positive[start:]
        # Every tail is fitted from its first value on.
        expected = reference.fit_power_law(tail, "median", xmin_pos=tail.size + 1.0)
        assert curves.alpha[position] == pytest.approx(expected["alpha"], rel=1e-9)
        assert expected["D"] - 0.001 <= curves.D[position] <= expected["D"] + 1e-9


@pytest.mark.parametrize("name", ["heavy", "few", "zeros", "graded"])
def test_the_density_is_that_of_all_eigenvalues(name: str) -> None:
    values = SPECTRA[name]
    curves = spectrum_curves(record_of(values))
    found = ~np.isnan(curves.density)
    edges = 10**curves.bin_edges
    share = (10 ** curves.density[found] * np.diff(edges)[found]).sum()
    assert share == pytest.approx(np.count_nonzero(values) / values.size, rel=1e-9)


def test_the_tail_is_the_fit() -> None:
    record = record_of(SPECTRA["heavy"])
    curves = spectrum_curves(record)
    at = 10**curves.tail_x
    assert at == pytest.approx([record.xmin, record.xmax])
    share = record.num_pl_spikes / record.num_evals
    model = share * (at / record.xmin) ** (1 - record.alpha)
    np.testing.assert_allclose(10**curves.tail_survival, model, rtol=1e-9)
    slope = np.diff(curves.tail_density) / np.diff(curves.tail_x)
    assert slope == pytest.approx(-record.alpha)
    # The density is minus the derivative of the survival.
    np.testing.assert_allclose(10**curves.tail_density, model * (record.alpha - 1) / at, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-140, 1.0, 1e140])
def test_the_law_of_random_weights_is_on_their_spectrum(scale: float) -> None:
    weights = np.random.default_rng(0).standard_normal((400, 1000))
    evals = np.linalg.svd(weights, compute_uv=False)[::-1] ** 2 * scale
    curves = spectrum_curves(record_of(evals, 400, 1000))
    inside = (curves.law_survival > math.log10(0.02)) & (curves.law_survival < math.log10(0.98))
    found = np.interp(curves.law_x[inside], curves.survival_x, curves.survival)
    assert inside.sum() > 20
    np.testing.assert_allclose(10**found, 10 ** curves.law_survival[inside], atol=0.01)
    centres = (curves.bin_edges[1:] + curves.bin_edges[:-1]) / 2
    middle = (centres > curves.law_x[5]) & (centres < curves.law_x[-30])
    law = np.interp(centres[middle], curves.law_x, curves.law_density)
    assert np.abs(law - curves.density[middle]).max() < 0.15
    low, high = (scale * edge for edge in reference.marchenko_pastur_edges(400, 1000))
    # The variance is estimated, so the edges move by a percent.
    assert 10 ** curves.law_x[-1] == pytest.approx(high, rel=0.01)
    assert 10 ** curves.law_x[0] == pytest.approx(low, rel=0.03)


@pytest.mark.parametrize("aspect", [1.0, 1.3, 4.0, 50.0])
def test_marchenko_pastur_survival_is_the_integral_of_the_density(aspect: float) -> None:
    low, high = marchenko_pastur_support(2.0, aspect)
    for part in (0.05, 0.4, 0.9):
        at = low + part * (high - low)
        expected, _ = quad(
            lambda x: float(marchenko_pastur_density(np.array([x]), np.array(2.0), aspect)[0]),
            at,
            high,
            limit=200,
        )
        found = marchenko_pastur_survival(np.array([at]), 2.0, aspect)[0]
        assert found == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=80), st.sampled_from([0.0, 0.01, 0.5]))
def test_thinning_moves_no_point_beyond_the_tolerance(y: list[float], tolerance: float) -> None:
    values, x = np.array(y), np.arange(len(y), dtype=float)
    kept = thin(x, values, tolerance)
    assert kept[0] == 0
    assert kept[-1] == len(y) - 1
    assert (np.diff(kept) > 0).all()
    assert np.abs(np.interp(x, x[kept], values[kept]) - values).max() <= tolerance + 1e-12


def test_no_curves_say_why() -> None:
    for record, reason in (
        (an_analysis()["bad"], "3 weights are NaN"),
        (an_analysis()["zero"], "the eigenvalues are all zero"),
        (LayerRecord("a", "linear", (1, 2, 2), "ok", num_evals=4), "from a file without spectra"),
    ):
        with pytest.raises(ValueError, match=reason):
            spectrum_curves(record)
        assert reason in curves_of(record)["missing"]


def test_one_eigenvalue_and_equal_ones_have_curves() -> None:
    for values in (np.array([2.0]), np.full(50, 3.0)):
        curves = spectrum_curves(record_of(values))
        assert curves.candidates.size == 0
        assert curves.survival.tolist() == [0.0]
        assert np.nansum(10**curves.density * np.diff(10**curves.bin_edges)) == pytest.approx(1)


# ------------------------------------------------------------------------------------------- depths


def test_places_of_the_models_that_people_have() -> None:
    def of(*names: str) -> list[tuple[int, str, str]]:
        return [
            (p.depth, p.block, p.group) for p in layer_positions(names, ["linear"] * len(names))
        ]

    assert of("wte", "h.0.mlp.fc", "h.10.mlp.fc", "h.2.mlp.fc") == [
        (0, "wte", "linear"),
        (1, "0", "mlp.fc"),
        (3, "10", "mlp.fc"),
        (2, "2", "mlp.fc"),
    ]
    assert of("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc") == [
        (0, "conv1", "linear"),
        (1, "layer1.0", "conv1"),
        (2, "layer1.1", "conv1"),
        (3, "layer2.0", "conv1"),
        (4, "fc", "linear"),
    ]
    assert of("0", "2") == [(0, "0", "linear"), (1, "2", "linear")]
    assert of("l.3.experts.0.w1", "l.3.experts.1.w1")[1] == (0, "3", "experts.*.w1")


def test_the_rarest_roles_share_a_group() -> None:
    names = [f"h.{block}.role{role}" for role in range(20) for block in range(2 + (role < 5))]
    found = layer_positions(names, ["linear"] * len(names), most=6)
    assert {place.group for place in found} == {f"role{i}" for i in range(5)} | {OTHER}


# ------------------------------------------------------------------------------------------ payload


# Half a step of a span of the least subnormal numbers is no number.
@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False) | st.just(math.nan), max_size=40))
def test_packed_values_come_back_to_half_a_step(given_values: list[float]) -> None:
    values = np.array(given_values, dtype=np.float64)
    least, step, numbers = packed(values)
    for value, number in zip(values, numbers, strict=True):
        if math.isnan(value):
            assert number is None
        else:
            span = np.nanmax(values) - np.nanmin(values)
            assert abs(least + step * number - value) <= 0.51e-4 * span + 1e-11 * abs(least)


def test_the_payload_has_what_the_records_have() -> None:
    analysis = an_analysis()
    page, curves = report_payload(analysis.as_side(), None)
    assert page["title"] == "some model"
    assert len(page["layers"]) == len(curves) == len(analysis)
    for record, layer in zip(analysis, page["layers"], strict=True):
        for name, value in zip(RECORD_FIELDS, layer["sides"][0], strict=True):
            if name == "stable_rank_per_window":
                expected = record.stable_rank / max(record.windows, 1)
            else:
                expected = getattr(record, name)
            if isinstance(expected, float):
                wanted = pytest.approx(expected, rel=1e-5) if math.isfinite(expected) else None
                assert value == wanted, name
            else:
                assert value == (list(expected) if name == "shape" else expected), name
    # Everything is JSON as it stands.
    json.dumps([page, curves], allow_nan=False)


def test_stable_rank_of_one_window_does_not_grow_with_their_number() -> None:
    matrix = torch.randn(8, 8, dtype=torch.float64)
    many = analyze({"fc.weight": matrix.repeat(4, 4)}, FixedAspectSampling(rows=8, per_dim=4))
    one = analyze({"fc.weight": matrix}, FullMatrix())
    assert many["fc"].windows == 16
    assert many["fc"].stable_rank == pytest.approx(16 * one["fc"].stable_rank)
    shown = []
    for analysis in (many, one):
        (layer,) = report_payload(analysis.as_side(), None)[0]["layers"]
        shown.append(dict(zip(RECORD_FIELDS, layer["sides"][0], strict=True)))
    assert shown[0]["stable_rank_per_window"] == pytest.approx(shown[1]["stable_rank_per_window"])
    assert shown[1]["stable_rank_per_window"] == shown[1]["stable_rank"]


def test_spectra_of_a_store_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with ResultsStore(path) as store:
        run = store.run({"source": "m"})
        run.put(0, a_layer("fc", 1), "digest")
        run.complete(["fc"])
    analysis = Analysis.from_store(path)
    page, curves = report_payload(analysis.as_side(), None)
    assert page["notes"] == []
    assert curves == report_payload(Analysis([a_layer("fc", 1)]).as_side(), None)[1]
    assert "window_evals" not in analysis["fc"].__dict__


def test_an_analysis_without_spectra_says_so(tmp_path: Path) -> None:
    an_analysis().to_json(tmp_path / "a.json")
    page, curves = report_payload(Analysis.from_json(tmp_path / "a.json").as_side(), None)
    (note,) = page["notes"]
    assert "to_json(path, spectra=True)" in note
    assert note.startswith("18 of 19 layers")
    assert {side["missing"] for side, _ in curves if side["windows"]} == {
        "the analysis was read from a file without spectra"
    }
    an_analysis().to_json(tmp_path / "b.json", spectra=True)
    page, curves = report_payload(Analysis.from_json(tmp_path / "b.json").as_side(), None)
    assert page["notes"] == []
    assert sum("missing" in side for side, _ in curves) == 2


def test_progress_is_told_of_every_layer() -> None:
    told = []
    report_payload(
        an_analysis().as_side(), None, lambda done, total, name: told.append((done, total))
    )
    assert told == [(i + 1, 19) for i in range(19)]


# --------------------------------------------------------------------------------------------- file


class Elements(HTMLParser):
    """The elements of a page, with the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        # What these hold is one text, up to their end.
        if self.cdata_elem is not None:
            self.texts.append((self.tags[-1][1] | {"tag": self.tags[-1][0]}, data))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    an_analysis().to_html(path)
    return path.read_text(encoding="utf-8")


def test_the_page_asks_for_nothing(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    assert [tag for tag, _ in elements.tags].count("script") == 4
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in elements.tags}
    for tag, attributes in elements.tags:
        assert not {"src", "href", "onclick", "onload", "style"} & set(attributes), tag


def test_the_policy_allows_the_pages_own_scripts_only(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    (policy,) = [
        attributes["content"]
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attributes, text in elements.texts
        if attributes.get("type") is None
    }
    assert set(re.findall(r"'sha256-[^']+'", policy)) == digests
    assert len(digests) == 3
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")


def test_hostile_names_are_data(page: str) -> None:
    elements = Elements()
    elements.feed(page)
    (data,) = [text for attributes, text in elements.texts if attributes.get("id") == "data"]
    names = [layer["name"] for layer in json.loads(data)["layers"]]
    assert HOSTILE.replace("\u2028", "\\u2028") in names
    assert "<img src=x" not in page
    assert "\\u003cimg src=x onerror" in page
    assert "\u2028" not in page


def test_the_title_is_text(tmp_path: Path) -> None:
    an_analysis().to_html(tmp_path / "a.html", title="</title><script>alert(1)</script>\udcff")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;\\udcff</title>" in text


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"path: the directory of '.*none/a\.html' does not"
    ):
        an_analysis().to_html(tmp_path / "none" / "a.html")


def test_the_same_analysis_gives_the_same_file(page: str, tmp_path: Path) -> None:
    an_analysis().to_html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_the_library_is_the_published_one() -> None:
    folder = files("farms_fast.views.html").joinpath("vendor")
    digest = hashlib.sha256(folder.joinpath("echarts.min.js").read_bytes()).hexdigest()
    assert digest == ECHARTS_SHA256
    for name in ("LICENSE", "NOTICE", "LICENSE-d3"):
        assert folder.joinpath(name).read_text(encoding="utf-8")


def test_notebooks_show_names_as_text() -> None:
    analysis = an_analysis()
    for html in (analysis._repr_html_(), analysis[HOSTILE]._repr_html_()):
        assert "<img" not in html
        assert "<script" not in html
        assert "&lt;img src=x" in html
    assert "nonfinite: 3 weights are NaN" in analysis._repr_html_()
    many = Analysis([a_layer("fc", 1)] * 100)._repr_html_()
    assert many.count("<tr>") == 42
    assert "60 more" in many


# ---------------------------------------------------------------------------------------------- CLI


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Run 1 is finished; run 2 has one layer of three."""
    path = tmp_path / "run.sqlite"
    with ResultsStore(path) as opened:
        first = opened.run({"source": "first"})
        first.put_many((i, a_layer(f"h.{i}.fc", i), "d") for i in range(2))
        first.complete(["h.0.fc", "h.1.fc"])
        opened.run({"source": "second"}, total=3).put(0, a_layer("h.0.fc", 7), "d")
    return path


def title_of(path: Path) -> str:
    found = re.search("<title>(.*)</title>", path.read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def test_report_of_a_store_and_of_json(store: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    result = run("report", store, "-o", page, "--run", "1")
    assert (result.exit_code, result.output) == (0, "")
    assert title_of(page) == "first"
    first = page.read_bytes()

    result = run("report", store, "--output", page)
    assert result.exit_code == 0
    assert result.stderr == "note: run 2 of run.sqlite is not finished: 1/3 layers\n"
    assert title_of(page) == "second"

    Analysis.from_store(store, 1).to_json(tmp_path / "a.json", spectra=True)
    result = run("report", tmp_path / "a.json", "-o", page, "--title", "Mine", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert title_of(page) == "Mine"
    assert len(page.read_bytes()) == pytest.approx(len(first), abs=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.sqlite", "-o", "a.html"), "no such file: 'none.sqlite'"),
        ((".", "-o", "a.html"), "source: '.' is a directory, expected a file"),
        (("run.sqlite", "-o", "none/a.html"), "output: the directory of 'none/a.html' does not"),
        (("run.sqlite", "-o", "run.sqlite"), "output: 'run.sqlite' is the file of source too"),
        (("run.sqlite", "-o", "a.html", "--run", "9"), "run: expected one of 1, 2, got 9"),
        (("a.json", "-o", "a.html", "--run", "1"), "run: 'a.json' is no results store"),
        (("other.txt", "-o", "a.html"), "'other.txt' is not a JSON file"),
        (("empty.json", "-o", "a.html"), "source: 'empty.json' holds no layer"),
    ],
)
def test_report_refuses_in_one_line(
    store: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    Path("other.txt").write_text("no analysis")
    an_analysis().to_json("a.json")
    Analysis([]).to_json("empty.json")
    result = run("report", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("a.html").exists()
