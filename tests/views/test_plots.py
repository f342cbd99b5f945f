"""Plots on matplotlib: what is drawn, of which layers, and what is missing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection

from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from tests.support.analyses import HOSTILE, VERY_LONG, a_layer, an_analysis


@pytest.fixture(autouse=True)
def no_screen() -> Iterator[None]:
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"backend": "agg"}):
        yield
        plt.close("all")


def whole(name: str = "fc") -> Analysis:
    return Analysis([a_layer(f"h.{i}.{role}", i) for i in range(4) for role in (name, "up")])


def test_alpha_is_drawn_with_its_interval_over_depth() -> None:
    analysis = whole()
    ax = analysis.plot_alpha()
    assert [line.get_label() for line in ax.lines] == ["fc", "up"]
    for line, role in zip(ax.lines, ("fc", "up"), strict=True):
        layers = [analysis[f"h.{i}.{role}"] for i in range(4)]
        np.testing.assert_array_equal(line.get_ydata(), [layer.alpha for layer in layers])
        assert np.abs(np.asarray(line.get_xdata()) - np.arange(4)).max() < 0.5
    ends = [c for c in ax.collections if isinstance(c, LineCollection)]
    low, high = ends[0].get_segments()[2][:, 1]
    assert (low, high) == (analysis["h.2.fc"].alpha_low, analysis["h.2.fc"].alpha_high)
    # Shape and dash as well as colour tell them apart.
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    assert (ax.get_ylabel(), ax.get_title()) == ("alpha", "")


def test_experts_are_not_joined() -> None:
    analysis = Analysis([a_layer(f"h.{i}.experts.{e}.w1", e) for i in range(2) for e in range(3)])
    (line,) = analysis.plot_alpha().lines
    assert line.get_linestyle() == "None"
    assert len(line.get_xdata()) == 6


def test_what_has_no_alpha_is_counted() -> None:
    assert an_analysis(1).plot_alpha().get_title() == "2 of 11 layers have no alpha"
    assert len(Analysis([]).plot_alpha().lines) == 0
    bad = LayerRecord("bad", "linear", (1, 4, 4), "error", "gone")
    assert Analysis([bad]).plot_alpha().get_title() == "1 of 1 layers have no alpha"


def test_the_callers_axes_are_drawn_on() -> None:
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(1, 2)
    analysis = whole()
    assert analysis.plot_alpha(axes[0]) is axes[0]
    assert analysis["h.0.fc"].plot_esd(ax=axes[1]) is axes[1]
    assert len(plt.get_fignums()) == 1


def test_the_spectrum_with_its_tail_and_the_law() -> None:
    record = a_layer("fc", 3)
    ax = record.plot_esd()
    labels = [line.get_label() for line in ax.lines]
    tail = f"alpha {record.alpha:.3f}, D {record.D:.3f}"
    assert labels[:3] == ["ESD", "Marchenko-Pastur", tail]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.lines[2].get_xdata() == pytest.approx([record.xmin, record.xmax])
    assert ax.lines[3].get_xdata()[0] == record.xmin
    single = LayerRecord("a", "linear", (1, 4, 4), "too_few", num_evals=2, M=0, N=0,
                         window_evals=np.array([[1.0, 2.0]]))  # fmt: skip
    assert [line.get_label() for line in single.plot_esd().lines] == ["ESD"]


def test_no_spectrum_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"'bad'.*no spectrum.*3 weights are NaN"):
        an_analysis()["bad"].plot_esd()


@pytest.mark.parametrize("name", [HOSTILE, "$x^{", "_hidden", VERY_LONG])
def test_any_name_can_be_drawn(name: str) -> None:
    analysis = Analysis([a_layer(f"h.{i}.{name}", i) for i in range(2)])
    ax = analysis.plot_alpha()
    assert len(ax.get_legend().get_texts()) == 1
    for drawn in (ax, analysis.layers[0].plot_esd()):
        drawn.figure.savefig(io.BytesIO(), format="png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[plot\]'"):
        whole().plot_alpha()
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[plot\]'"):
        a_layer("fc", 1).plot_esd()
