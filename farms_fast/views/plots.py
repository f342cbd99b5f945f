"""Plots of an analysis and of its layers, on matplotlib.

`analysis.plot_alpha()` and `analysis["layer"].plot_esd()` call these. Groups of layers differ
in shape and in dash as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from farms_fast.core.arguments import check_type
from farms_fast.core.optional import optional_import
from farms_fast.core.text import printable
from farms_fast.views.curves import spectrum_curves
from farms_fast.views.positions import layer_positions
from farms_fast.views.values import LayerValues

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of Okabe and Ito, told apart with any colour vision, and a marker and a dash for each.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#4d4d4d")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_DASHES = ("-", "--", "-.", ":")
_MOST_LABELS = 24


def plot_alpha(layers: Sequence[LayerValues], ax: Axes | None = None) -> Axes:
    """Draws every layer's alpha against its depth, one line per role in the block.

    Bars are the 95 % bootstrap intervals over the windows; a layer with one window has none. Where
    a block has several layers of one role, such as experts, their points are not joined. Layers
    without an alpha are not drawn; the title counts them.

    Args:
        layers: the layers in the model's order.
        ax: where to draw; None is a figure of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    ax = _axes(ax)
    positions = layer_positions([layer.name for layer in layers], [layer.kind for layer in layers])
    groups: dict[str, list[int]] = {}
    for index, position in enumerate(positions):
        if math.isfinite(layers[index].alpha):
            groups.setdefault(position.group, []).append(index)
    for number, (group, indices) in enumerate(groups.items()):
        # Side by side within a block, so that bars do not hide each other.
        aside = 0.5 * ((number + 0.5) / len(groups) - 0.5)
        indices.sort(key=lambda index: positions[index].depth)
        depths = [positions[index].depth for index in indices]
        alphas = np.array([layers[index].alpha for index in indices])
        lows = np.array([layers[index].alpha_low for index in indices])
        highs = np.array([layers[index].alpha_high for index in indices])
        dash = _DASHES[number % len(_DASHES)] if len(set(depths)) == len(depths) else "none"
        color = _COLORS[number % len(_COLORS)]
        marker = _MARKERS[number % len(_MARKERS)]
        at = np.array(depths) + aside
        (line,) = ax.plot(at, alphas, color=color, label=_plain(group), linewidth=1, linestyle=dash)
        line.set(marker=marker, markersize=4.5)
        known = np.isfinite(lows) & np.isfinite(highs)
        ax.vlines(at[known], lows[known], highs[known], color=color, linewidth=1)
    ax.set_ylabel("alpha")
    ax.set_xlabel("block")
    labels = dict(sorted((position.depth, position.block) for position in positions))
    step = max(1, math.ceil(len(labels) / _MOST_LABELS))
    ticks = list(labels)[::step]
    texts = [_plain(labels[tick], 16) for tick in ticks]
    ax.set_xticks(ticks, texts, rotation=90 if max(map(len, texts), default=0) > 4 else 0)
    missing = len(layers) - sum(map(len, groups.values()))
    if missing:
        ax.set_title(f"{missing} of {len(layers)} layers have no alpha", fontsize="medium")
    if groups:
        ax.legend(fontsize="small", frameon=False)
    ax.grid(alpha=0.25)
    return ax


def plot_esd(record: LayerValues, ax: Axes | None = None) -> Axes:
    """Draws a layer's spectral density on logarithmic axes, with what it is compared with.

    The dashed line is the fitted tail from xmin (dotted) on, the solid one the Marchenko-Pastur law
    of the windows' shape and variance.

    Args:
        record: the layer, with its spectrum.
        ax: where to draw; None is a figure of its own.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the record has no spectrum, or no eigenvalue above 0.
    """
    try:
        curves = spectrum_curves(record)
    except ValueError as error:
        raise ValueError(f"layer {record.name!r} has no spectrum to draw: {error}") from error
    ax = _axes(ax)
    centres = (curves.bin_edges[1:] + curves.bin_edges[:-1]) / 2
    ax.plot(10**centres, 10**curves.density, "o", color=_COLORS[0], markersize=3.5, label="ESD")
    if curves.law_x.size:
        law = 10**curves.law_x, 10**curves.law_density
        ax.plot(*law, color=_COLORS[6], linewidth=1, label="Marchenko-Pastur")
    if curves.tail_x.size:
        label = f"alpha {record.alpha:.3f}, D {record.D:.3f}"
        tail = 10**curves.tail_x, 10**curves.tail_density
        ax.plot(*tail, color=_COLORS[1], linestyle="--", linewidth=1.8, label=label)
        ax.axvline(record.xmin, color=_COLORS[1], linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("eigenvalue λ")
    ax.set_ylabel("density")
    ax.set_title(_plain(record.name, 60), fontsize="medium")
    ax.legend(fontsize="small", frameon=False)
    ax.grid(alpha=0.25)
    return ax


def _axes(ax: Axes | None) -> Axes:
    with optional_import("matplotlib", extra="plot", needed_for="plots", instead="use to_html"):
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    if ax is None:
        return plt.subplots(figsize=(8, 4.5), layout="constrained")[1]
    check_type("ax", ax, Axes, "None or matplotlib's Axes")
    return ax


def _plain(text: str, most: int = 40) -> str:
    """The end of a text of unknown origin as matplotlib shows it.

    A leading underscore would hide a label, a dollar sign would be mathematics.
    """
    text = printable(text)
    text = (text if len(text) <= most else f"…{text[1 - most :]}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
