"""What a page is given to draw: plain values for JSON, as short as what they show allows.

Curves are written as whole numbers on a grid of 10,000 steps over their own range, so rounding
moves a point by at most half a ten-thousandth of the axis. `curves` says what
thinning them before that costs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from farms_fast.core.progress import Progress, reporter
from farms_fast.core.text import printable
from farms_fast.views.curves import SpectrumCurves, spectrum_curves
from farms_fast.views.positions import layer_positions
from farms_fast.views.values import DifferenceValues, LayerValues, Side

Array = npt.NDArray[np.float64]

_STEPS = 10_000
_MOST_BINS = 24

RECORD_FIELDS = (
    *("status", "message", "shape", "windows", "window_rows", "window_cols"),
    *("alpha", "alpha_se", "alpha_low", "alpha_high", "alpha_even", "alpha_odd", "split_half"),
    *("window_alpha_mean", "window_alpha_std", "D", "sigma", "xmin", "num_pl_spikes"),
    *("num_evals", "dropped", "stable_rank", "stable_rank_per_window", "spectral_norm"),
    *("log_spectral_norm", "log_norm", "alpha_weighted", "log_alpha_norm", "entropy"),
    *("mp_softrank", "matrix_rank", "Q"),
)
"""What a page has of a record besides its name and kind, in this order.

`stable_rank_per_window` is `stable_rank` over `windows`: the sum of all windows' eigenvalues
over the largest of them grows with the number of windows.
"""

# What is drawn at once, and per layer a list with its curves, or why it has none, by side.
Payload = tuple[dict[str, Any], list[list[Any]]]
_Pair = tuple[LayerValues | None, LayerValues | None]


def report_payload(side: Side, title: str | None, progress: bool | Progress = False) -> Payload:
    """The page of one analysis; spectra are read one at a time and not kept."""
    pairs: list[_Pair] = [(layer, None) for layer in side.layers]
    page = {
        **_page("report", pairs),
        "title": title or _title(side.settings),
        "sides": [_side(side)],
        "notes": _missing_spectra(side.layers),
    }
    return page, _all_curves(pairs, progress)


def comparison_payload(
    layers: Sequence[DifferenceValues],
    sides: tuple[Side, Side],
    notes: Sequence[str],
    settings_that_differ: Sequence[str],
    title: str | None,
    progress: bool | Progress = False,
) -> Payload:
    """The page of two analyses, as of `report_payload`."""
    a, b = (_title(side.settings) for side in sides)
    pairs: list[_Pair] = [(layer.a, layer.b) for layer in layers]
    page = {
        **_page("compare", pairs, layers),
        "title": title or (f"{a} and {b}" if a != b else a),
        "sides": [_side(side) for side in sides],
        "notes": list(notes),
        "settings_that_differ": list(settings_that_differ),
    }
    return page, _all_curves(pairs, progress)


def _page(
    mode: str, pairs: Sequence[_Pair], differences: Sequence[DifferenceValues] = ()
) -> dict[str, Any]:
    # The first side's, or the second's where only that has the layer.
    layers = [layer for layer in (a or b for a, b in pairs) if layer is not None]
    positions = layer_positions([layer.name for layer in layers], [layer.kind for layer in layers])
    groups = list(dict.fromkeys(position.group for position in positions))
    blocks = dict(sorted((position.depth, position.block) for position in positions))
    return {
        "mode": mode,
        "fields": list(RECORD_FIELDS),
        "groups": [printable(group) for group in groups],
        # By depth, which has no gaps.
        "blocks": [printable(block) for block in blocks.values()],
        "layers": [
            {
                "name": printable(layer.name),
                "kind": printable(layer.kind),
                "group": groups.index(position.group),
                "depth": position.depth,
                "sides": [_record(side) for side in pair],
                **(_difference(difference) if difference else {}),
            }
            for layer, pair, position, difference in zip_longest(
                layers, pairs, positions, differences
            )
        ],
    }


def _difference(layer: DifferenceValues) -> dict[str, Any]:
    return {
        "difference": _plain(layer.difference),
        "difference_se": _plain(layer.difference_se),
        "z": _plain(layer.z),
        "paired": layer.paired,
        "overlap": layer.intervals_overlap,
        "note": printable(layer.note),
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "name": _title(side.settings),
        "mean_alpha": _plain(side.mean_alpha),
        "failed": sum(layer.status != "ok" for layer in side.layers),
        "layers": len(side.layers),
        "settings": [
            [printable(str(name)), printable(_setting(value))]
            for name, value in side.settings.items()
        ],
        "skipped": [
            [printable(t.name), "x".join(map(str, t.shape)) or "scalar", printable(t.reason)]
            for t in side.skipped
        ],
    }


def _missing_spectra(layers: Sequence[LayerValues]) -> list[str]:
    empty = [record for record in layers if record.num_evals and not record.has_spectrum]
    if not empty:
        return []
    return [
        f"{len(empty)} of {len(layers)} layers have no spectrum here: the analysis was read from "
        "a file without spectra. A results store has them, and so has a JSON file of "
        "to_json(path, spectra=True)."
    ]


def _title(settings: Mapping[str, object]) -> str:
    source = str(settings.get("source") or "")
    name = os.path.basename(source.rstrip("/")) or source
    # A folder named "model" says less than the one that it is in.
    parent = os.path.basename(os.path.dirname(source.rstrip("/")))
    if name in ("model", "model.safetensors", "checkpoint", "pytorch_model.bin") and parent:
        name = f"{parent}/{name}"
    return printable(name) or "model"


def _setting(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return "-" if value in (None, "") else str(value)


def _record(record: LayerValues | None) -> list[Any] | None:
    if record is None:
        return None
    values: dict[str, Any] = {
        **record.scalars(),
        "shape": record.shape,
        # Of windows alike it is that of one, however many were pooled.
        "stable_rank_per_window": record.stable_rank / max(record.windows, 1),
    }
    return [_plain(values[name]) for name in RECORD_FIELDS]


def _plain(value: Any) -> Any:
    """A value as JSON has it: six digits, null for what is not finite."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _all_curves(pairs: Sequence[_Pair], progress: bool | Progress) -> list[list[Any]]:
    curves = []
    windows = sum(record.windows for pair in pairs for record in pair if record)
    with reporter(progress, len(pairs), windows) as report:
        for pair in pairs:
            records = [record for record in pair if record is not None]
            curves.append([None if record is None else curves_of(record) for record in pair])
            report(records[0].name, sum(record.windows for record in records), True)
    return curves


def curves_of(record: LayerValues) -> dict[str, Any]:
    """A layer's curves, or why it has none, and its windows' alphas."""
    windows = _window_bins(record)
    try:
        curves = spectrum_curves(record)
    except ValueError as error:
        return {"missing": printable(str(error)), "windows": windows}
    return {**_curves(curves), "windows": windows}


def _curves(curves: SpectrumCurves) -> dict[str, Any]:
    return {
        "count": curves.count,
        "positive": curves.positive,
        "bins": [_plain(float(curves.bin_edges[0])), _plain(float(curves.bin_edges[-1]))],
        "density": packed(curves.density),
        "survival": [packed(curves.survival_x), packed(curves.survival)],
        "tail": [_numbers(c) for c in (curves.tail_x, curves.tail_density, curves.tail_survival)],
        "law": [packed(c) for c in (curves.law_x, curves.law_density, curves.law_survival)],
        "scan": [packed(c) for c in (curves.candidates, curves.D, curves.alpha)],
    }


def packed(values: Array) -> list[Any]:
    """Values as `[least, step, whole numbers]`: each is `least + step * number`; NaN as null."""
    finite = np.isfinite(values)
    if not finite.any():
        return [0.0, 0.0, [None] * values.size]
    least = float(values[finite].min())
    step = float(values[finite].max() - least) / _STEPS
    scaled = np.where(finite, (values - least) / (step or 1.0), 0.0)
    numbers = np.rint(scaled).astype(int).tolist()
    steps = [number if known else None for number, known in zip(numbers, finite, strict=True)]
    # Digits enough that the ends of the axis are exact to a thousandth of a step.
    return [float(f"{least:.12g}"), float(f"{step:.8g}"), steps]


def _numbers(values: Array) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _window_bins(record: LayerValues) -> dict[str, Any] | None:
    """Histogram of the windows' own alphas; those beyond the inner 98 % are counted at the ends."""
    alphas = record.window_alphas[np.isfinite(record.window_alphas)]
    if alphas.size < 2:
        return None
    fitted = (record.alpha, record.alpha_low, record.alpha_high)
    known = [value for value in fitted if math.isfinite(value)]
    low, high = np.quantile(alphas, [0.01, 0.99])
    low, high = min(low, *known, high), max(high, *known, low)
    if high <= low:
        low, high = low - 0.05, high + 0.05
    bins = int(min(_MOST_BINS, max(6, 2 * math.ceil(math.sqrt(alphas.size)))))
    counts, _ = np.histogram(np.clip(alphas, low, high), bins=bins, range=(low, high))
    return {
        "low": _plain(low),
        "high": _plain(high),
        "counts": counts.tolist(),
        "outside": int(np.count_nonzero((alphas < low) | (alphas > high))),
        "unknown": int(record.window_alphas.size - alphas.size),
    }
