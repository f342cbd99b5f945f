"""Pages in a real browser: Debian's chromium and chromium-driver, without a screen.

``apt-get install chromium chromium-driver``; where there is none, these tests are skipped.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farms_fast.results.analysis import Analysis
from farms_fast.results.comparison import compare
from farms_fast.results.record import LayerRecord
from farms_fast.views.html import payload
from farms_fast.views.html.payload import curves_of
from tests.support.analyses import HOSTILE, RIGHT_TO_LEFT, VERY_LONG, a_layer, an_analysis

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
ActionChains = pytest.importorskip("selenium.webdriver.common.action_chains").ActionChains
Select = pytest.importorskip("selenium.webdriver.support.ui").Select
Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="no chromium and chromedriver on PATH (Debian: chromium, chromium-driver)",
)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1200",
)
PLOTS = ("plot-alpha", "plot-D", "plot-rank")
PANELS = ("layer-density", "layer-survival", "layer-scan", "layer-windows")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        # The driver is on this machine: nothing is downloaded, no proxy is asked.
        for name, value in (("SE_OFFLINE", "true"), ("SE_AVOID_STATS", "true"), ("NO_PROXY", "*")):
            patch.setenv(name, value)
        patch.setenv("no_proxy", "*")
        service = webdriver.ChromeService(executable_path=DRIVER)
        found = webdriver.Chrome(service=service, options=options)
        try:
            yield found
        finally:
            found.quit()


class Page:
    """A page that has been opened, and what a person does with it."""

    def __init__(self, browser: Any, path: Path, fragment: str = "") -> None:
        self.browser = browser
        browser.get("about:blank")
        for kind in ("browser", "performance"):
            browser.get_log(kind)
        browser.get(path.as_uri() + fragment)
        Wait(browser, 30).until(lambda _: self.run("document.documentElement.dataset.drawn"))
        self.ready, self.drawn = (
            int(self.run(f"document.documentElement.dataset.{moment}"))
            for moment in ("ready", "drawn")
        )

    def run(self, expression: str) -> Any:
        return self.browser.execute_script(f"return {expression}")

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        (found,) = self.all(selector)
        return found

    def until(self, expression: str) -> None:
        Wait(self.browser, 5).until(lambda _: self.run(expression))

    def names(self) -> list[str]:
        """Of the rows that are shown, in their order."""
        return self.run(
            "[...document.querySelectorAll('tbody tr:not([hidden]) td.name')]"
            ".filter(cell => cell.checkVisibility()).map(cell => cell.textContent)"
        )

    def column(self, label: str) -> list[str]:
        heads = [head.text.rstrip(" ↕↑↓") for head in self.all("#table thead th")]
        place = heads.index(label) + 1
        return self.run(
            f"[...document.querySelectorAll('#table tbody tr:not([hidden]) td:nth-child({place})')]"
            ".map(cell => cell.textContent)"
        )

    def sort(self, label: str) -> str:
        for head in self.all("#table thead th"):
            if head.text.rstrip(" ↕↑↓") == label:
                head.find_element(By.TAG_NAME, "button").click()
                return head.get_attribute("aria-sort")
        raise AssertionError(f"no column {label!r}")

    def marks(self, plot: str) -> int:
        """How much is drawn in a chart."""
        return self.run(f"document.querySelectorAll('#{plot} svg path').length")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def requests(self) -> set[str]:
        """What the page has asked for, but for its own file and data that are in it."""
        messages = [
            json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")
        ]
        urls = {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }
        return {url for url in urls if not re.match(r"file:///.*\.html|data:|about:|chrome:", url)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "report.html"
    an_analysis().to_html(path)
    return path


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "compare.html"
    a = an_analysis()
    b = Analysis([*list(an_analysis(2, seed=3)), a_layer("extra", 1)], [], {"xmin": "ks"})
    compare(a, b).to_html(path)
    return path


@pytest.fixture
def page(browser: Any, report: Path) -> Page:
    return Page(browser, report)


def test_it_opens_without_a_complaint_or_a_request(page: Page) -> None:
    assert page.one("h1").text == "some model"
    assert len(page.names()) == 19
    for plot in PLOTS:
        assert page.marks(plot) > 12
    # A walk through all layers, the odd ones too.
    for index in range(19):
        page.run(f"(location.hash = 'layer={index}')")
        page.until(f"document.getElementById('layer').dataset.index === '{index}'")
    assert page.complaints() == []
    assert page.requests() == set()
    # Names such as "__proto__" have not reached what every object has.
    assert page.run("Object.keys(Object.prototype).concat(Object.keys(Object))") == []


def test_the_policy_keeps_everything_else_out(page: Page) -> None:
    page.run(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'document.title = \"taken\"'}))"
    )
    page.run("document.body.append(Object.assign(new Image(), {src: 'file:///nothing.png'}))")
    assert page.browser.title == "some model"
    page.until("true")
    complaints = "\n".join(page.complaints())
    assert "Executing inline script violates" in complaints
    assert 'violates the following Content Security Policy directive: "img-src' in complaints


def test_the_table_sorts_with_what_has_no_value_last(page: Page) -> None:
    analysis = an_analysis()
    alphas = sorted((x.alpha for x in analysis if x.status == "ok"), reverse=True)
    expected = [f"{alpha:.3f}" for alpha in alphas]
    assert page.sort("alpha") == "descending"
    assert page.column("alpha") == [*expected, "\u2013", "\u2013"]
    assert page.sort("alpha") == "ascending"
    assert page.column("alpha") == [*expected[::-1], "\u2013", "\u2013"]
    assert page.sort("layer") == "ascending"
    names = [name for name in page.names() if name.startswith("model.")]
    assert names[:2] == ["model.layers.0.attn.k", "model.layers.0.attn.q"]
    assert page.sort("#") == "ascending"
    assert page.names()[0] == analysis.layers[0].name
    # From the keyboard too.
    page.all("#table thead button")[1].send_keys(Keys.ENTER)
    assert page.one("#table th:nth-child(2)").get_attribute("aria-sort") == "ascending"


def test_the_table_filters_and_the_plots_follow(page: Page) -> None:
    before = page.marks("plot-alpha")
    box = page.one("#filter")
    box.send_keys("LAYERS.1. attn")
    assert page.names() == ["model.layers.1.attn.q", "model.layers.1.attn.k"]
    assert page.one("#shown").text == "2 of 19 layers"
    page.until(f"document.querySelectorAll('#plot-alpha svg path').length < {before}")
    box.clear()
    box.send_keys("nothing of the kind")
    assert page.names() == []
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    assert len(page.names()) == 19
    Select(page.one("#role")).select_by_visible_text("mlp.up")
    assert page.names() == [f"model.layers.{block}.mlp.up" for block in range(3)]
    Select(page.one("#role")).select_by_visible_text("all")
    Select(page.one("#show")).select_by_visible_text("failed (2)")
    assert page.names() == ["bad", "zero"]
    assert page.complaints() == []


def test_a_layer_is_shown_with_all_of_its_curves(page: Page) -> None:
    record = an_analysis()["model.layers.1.mlp.up"]
    link = page.browser.find_element(By.LINK_TEXT, "model.layers.1.mlp.up")
    link.send_keys(Keys.ENTER)
    page.until("!document.getElementById('layer').hidden")
    assert page.one("#layer h2").text == "model.layers.1.mlp.up"
    assert not page.one("#overview").is_displayed()
    for panel in PANELS:
        assert page.marks(panel) > 5, panel
    legends = page.run("document.querySelector('#layer-density svg').textContent")
    for name in ("ESD", "fitted tail", "Marchenko\u2013Pastur", "xmin"):
        assert name in legends
    shown = page.one("#layer .facts").text
    assert f"{record.alpha:.3f} ± 0.050" in shown
    assert f"{record.alpha_low:.3f} to {record.alpha_high:.3f}" in shown
    assert f"{record.num_pl_spikes} of {record.num_evals} eigenvalues" in shown

    page.one("body").send_keys(Keys.ARROW_RIGHT)
    page.until("document.querySelector('#layer h2').textContent === 'model.layers.1.mlp.down'")
    page.one("body").send_keys(Keys.ESCAPE)
    page.until("document.getElementById('layer').hidden")
    assert page.run("document.activeElement.textContent") == "model.layers.1.mlp.down"
    page.browser.back()
    page.until("!document.getElementById('layer').hidden")
    assert page.complaints() == []


def test_next_follows_the_table(page: Page) -> None:
    page.one("#filter").send_keys("attn.q")
    page.sort("alpha")
    first, second, _ = page.names()
    page.all("#table tbody tr:not([hidden]) td.name")[0].click()
    page.until("!document.getElementById('layer').hidden")
    assert page.one("#layer h2").text == first
    assert "1 of 3" in page.one("#layer .bar").text
    page.all("#layer .bar button")[2].click()
    page.until(f"document.querySelector('#layer h2').textContent === {json.dumps(second)}")


def test_a_point_of_a_plot_tells_its_layer_and_opens_it(page: Page) -> None:
    analysis = an_analysis()
    record = analysis["model.layers.1.attn.k"]
    x, y = page.run(
        "(() => { const chart = echarts.getInstanceByDom(document.getElementById('plot-alpha'));"
        f"const wanted = ({{ layer }}) => layer === {analysis.layers.index(record)};"
        "const point = chart.getOption().series.flatMap(({ data }) => data).find(wanted);"
        "return chart.convertToPixel({ seriesIndex: 0 }, point.value); })()"
    )
    room = page.one("#plot-alpha")
    aside = x - room.size["width"] / 2, y - room.size["height"] / 2
    mouse = ActionChains(page.browser).move_to_element_with_offset(room, *map(round, aside))
    mouse.perform()
    page.until("document.querySelector('.tip')")
    assert page.one(".tip strong").text == record.name
    assert f"alpha {record.alpha:.3f} ({record.alpha_low:.3f} to" in page.one(".tip").text
    mouse.click().perform()
    page.until(f"document.querySelector('#layer h2')?.textContent === {json.dumps(record.name)}")
    assert page.complaints() == []


@pytest.mark.parametrize(
    "name", [HOSTILE, RIGHT_TO_LEFT, VERY_LONG, "__proto__", "model.layers.0.constructor"]
)
def test_any_name_is_text(page: Page, name: str) -> None:
    index = next(i for i, layer in enumerate(an_analysis()) if layer.name == name)
    printed = name.replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
    assert page.names()[index] == printed
    page.run(f"(location.hash = 'layer={index}')")
    page.until("!document.getElementById('layer').hidden")
    assert page.run("document.querySelector('#layer h2').textContent") == printed
    assert page.run("document.querySelectorAll('body img, body iframe').length") == 0
    assert page.browser.title == "some model"
    # Nothing is pushed out of the page.
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.run(wide) <= 0
    page.one("#filter").get_attribute("value")
    assert page.complaints() == []


def test_layers_without_curves_say_why(browser: Any, report: Path) -> None:
    names = [layer.name for layer in an_analysis()]
    page = Page(browser, report, f"#layer={names.index('bad')}")
    assert [note.text for note in page.all("#layer .note")] == [
        "nonfinite: 3 weights are NaN",
        "No spectrum to draw: 3 weights are NaN.",
    ]
    assert page.all("#layer .chart") == []
    page = Page(browser, report, f"#layer={names.index('__proto__')}")
    # One window has a spectrum, but no windows to compare.
    drawn = [chart.get_attribute("id") for chart in page.all("#layer .chart")]
    assert drawn == list(PANELS[:3])


def ground(page: Page) -> str:
    return page.run("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark(browser: Any, report: Path) -> None:
    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    try:
        prefer("dark")
        page = Page(browser, report)
        assert ground(page) == "rgb(20, 23, 26)"
        colour = "document.querySelector('#plot-alpha svg text').getAttribute('fill')"
        dark = page.run(colour)
        prefer("light")
        page.until(f"{colour} !== {json.dumps(dark)}")
        assert ground(page) == "rgb(255, 255, 255)"
        button = page.one("#theme")
        assert button.text == "Theme: automatic"
        button.click()
        assert (button.text, ground(page)) == ("Theme: light", "rgb(255, 255, 255)")
        button.click()
        assert (button.text, ground(page)) == ("Theme: dark", "rgb(20, 23, 26)")
        # It is remembered.
        assert ground(Page(browser, report)) == "rgb(20, 23, 26)"
        page = Page(browser, report)
        page.one("#theme").click()
        assert ground(page) == "rgb(255, 255, 255)"
        assert page.complaints() == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_it_prints(page: Page) -> None:
    pdf = base64.b64decode(page.browser.print_page())
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.documentElement.dataset.theme") == "light"
    assert page.run("document.querySelector('#plot-alpha svg').clientWidth") == 660
    page.run("window.dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelector('#plot-alpha svg').clientWidth") > 900


def test_five_hundred_layers(
    browser: Any, tmp_path: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [a_layer("", seed, windows=60) for seed in range(20)]
    layers = [
        dataclasses.replace(kinds[i % 20], name=f"model.layers.{i // 7}.role{i % 7}")
        for i in range(500)
    ]
    # The curves of equal layers are computed once: here they are to fill the page.
    known: dict[float, dict[str, Any]] = {}
    monkeypatch.setattr(
        payload,
        "curves_of",
        lambda record: known.setdefault(record.alpha, known.get(record.alpha) or curves_of(record)),
    )
    path = tmp_path / "many.html"
    Analysis(layers, [], {"source": "many"}).to_html(path)
    size = path.stat().st_size
    assert size < 15e6
    page = Page(browser, path)
    record_property("bytes", size)
    record_property("milliseconds until it can be used", page.ready)
    record_property("milliseconds until the last plot", page.drawn)
    print(f"500 layers: {size / 1e6:.1f} MB, {page.ready} ms, all plots after {page.drawn} ms")
    assert len(page.names()) == 500
    page.sort("D")
    page.one("#filter").send_keys("role3")
    assert len(page.names()) == 71
    assert page.complaints() == []


def test_a_comparison(browser: Any, comparison: Path) -> None:
    page = Page(browser, comparison)
    assert len(page.names()) == 20
    for plot in ("plot-scatter", "plot-difference"):
        assert page.marks(plot) > 20
    notes = [note.text for note in page.all("#notes .note")]
    assert notes[0].startswith("the analyses were made with different settings (")
    assert page.sort("difference") == "descending"
    shown = [float(text.replace("\u2212", "-")) for text in page.column("difference")[:12]]
    assert shown == sorted(shown, reverse=True)
    Select(page.one("#show")).select_by_visible_text("only in A (4)")
    assert page.names() == [f"model.layers.2.{role}" for role in ("attn.q", "attn.k", "mlp.up",
                                                                  "mlp.down")]  # fmt: skip
    Select(page.one("#show")).select_by_visible_text("only in B (1)")
    assert page.names() == ["extra"]
    for index in range(20):
        page.run(f"(location.hash = 'layer={index}')")
        page.until(f"document.getElementById('layer').dataset.index === '{index}'")
    page.run("(location.hash = 'layer=1')")
    page.until("document.querySelector('#layer h2').textContent === 'model.layers.0.attn.q'")
    text = page.run("document.querySelector('#layer-density svg').textContent")
    assert "fitted tail A" in text
    assert "fitted tail B" in text
    assert page.complaints() == []
    assert page.requests() == set()


def test_an_analysis_of_one_layer_without_spectrum(browser: Any, tmp_path: Path) -> None:
    layer = LayerRecord("only", "linear", (1, 4, 4), "ok", alpha=2.5, num_evals=4)
    Analysis([layer]).to_html(tmp_path / "one.html", title="<i>one</i>")
    page = Page(browser, tmp_path / "one.html")
    assert page.one("h1").text == "<i>one</i>"
    assert "1 of 1 layers have no spectrum" in page.one("#notes").text
    page.one("td.name a").click()
    page.until("!document.getElementById('layer').hidden")
    assert "without spectra" in page.one("#no-spectrum").text
    assert page.complaints() == []
