"""What a page is given to draw: plain values for JSON, as short as what they show allows.

Curves are written as whole numbers on a grid of 10,000 steps over their own range, so rounding
moves a point by at most half a ten-thousandth of the axis. :mod:`farms_fast.curves` says what
thinning them before that costs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from farms_fast.comparison import Comparison, LayerDifference
from farms_fast.curves import SpectrumCurves, spectrum_curves
from farms_fast.depths import places
from farms_fast.progress import Progress, reporter
from farms_fast.records import LayerRecord
from farms_fast.results import Analysis, printable

__all__ = ["RECORD_FIELDS", "comparison_payload", "curves_of", "packed", "report_payload"]

Array = npt.NDArray[np.float64]

_STEPS = 10_000
_MOST_BINS = 24

RECORD_FIELDS = (
    "status",
    "message",
    "shape",
    "windows",
    "window_rows",
    "window_cols",
    "alpha",
    "alpha_se",
    "alpha_low",
    "alpha_high",
    "alpha_even",
    "alpha_odd",
    "split_half",
    "window_alpha_mean",
    "window_alpha_std",
    "D",
    "sigma",
    "xmin",
    "num_pl_spikes",
    "num_evals",
    "dropped",
    "stable_rank",
    "stable_rank_per_window",
    "spectral_norm",
    "log_spectral_norm",
    "log_norm",
    "alpha_weighted",
    "log_alpha_norm",
    "entropy",
    "mp_softrank",
    "matrix_rank",
    "Q",
)
"""What a page has of a record besides its name and kind, in this order.

``stable_rank_per_window`` is ``stable_rank`` over ``windows``: the sum of all windows' eigenvalues
over the largest of them grows with the number of windows.
"""


def report_payload(
    analysis: Analysis, title: str | None, progress: bool | Progress = False
) -> tuple[dict[str, Any], list[list[Any]]]:
    """The page of one analysis.

    Args:
        analysis: The layers; their spectra are read one at a time and not kept.
        title: Of the page; None is taken from the source.
        progress: As of :func:`farms_fast.analyze`.

    Returns:
        What is drawn at once, and per layer a list with its curves or the reason why it has none.
    """
    layers = [LayerDifference(record, None) for record in analysis]
    page = {
        **_page("report", layers),
        "title": title or _title(analysis.settings),
        "sides": [_side(analysis)],
        "notes": _missing_spectra(analysis),
    }
    return page, _all_curves(layers, progress)


def comparison_payload(
    comparison: Comparison, title: str | None, progress: bool | Progress = False
) -> tuple[dict[str, Any], list[list[Any]]]:
    """The page of two analyses; arguments and result as :func:`report_payload`'s."""
    a, b = (_title(analysis.settings) for analysis in (comparison.a, comparison.b))
    page = {
        **_page("compare", comparison.layers),
        "title": title or (f"{a} and {b}" if a != b else a),
        "sides": [_side(comparison.a), _side(comparison.b)],
        "notes": comparison.notes,
        "settings_that_differ": list(comparison.settings_that_differ),
    }
    return page, _all_curves(comparison.layers, progress)


def _page(mode: str, layers: Sequence[LayerDifference]) -> dict[str, Any]:
    found = places([layer.name for layer in layers], [layer.record.kind for layer in layers])
    groups = list(dict.fromkeys(place.group for place in found))
    blocks = dict(sorted((place.depth, place.block) for place in found))
    return {
        "mode": mode,
        "fields": list(RECORD_FIELDS),
        "groups": [printable(group) for group in groups],
        # By depth, which has no gaps.
        "blocks": [printable(block) for block in blocks.values()],
        "layers": [
            {
                "name": printable(layer.name),
                "kind": printable(layer.record.kind),
                "group": groups.index(place.group),
                "depth": place.depth,
                "sides": [_record(layer.a), _record(layer.b)],
                **(_difference(layer) if mode == "compare" else {}),
            }
            for layer, place in zip(layers, found, strict=True)
        ],
    }


def _difference(layer: LayerDifference) -> dict[str, Any]:
    return {
        "difference": _plain(layer.difference),
        "difference_se": _plain(layer.difference_se),
        "z": _plain(layer.z),
        "paired": layer.paired,
        "overlap": layer.intervals_overlap,
        "note": printable(layer.note),
    }


def _side(analysis: Analysis) -> dict[str, Any]:
    return {
        "name": _title(analysis.settings),
        "mean_alpha": _plain(analysis.mean_alpha),
        "failed": len(analysis.failed),
        "layers": len(analysis),
        "settings": [
            [printable(str(name)), printable(_setting(value))]
            for name, value in analysis.settings.items()
        ],
        "skipped": [
            [
                printable(tensor.name),
                "x".join(map(str, tensor.shape)) or "scalar",
                printable(tensor.reason),
            ]
            for tensor in analysis.skipped
        ],
    }


def _missing_spectra(analysis: Analysis) -> list[str]:
    empty = [record for record in analysis if record.num_evals and not record.has_spectrum]
    if not empty:
        return []
    return [
        f"{len(empty)} of {len(analysis)} layers have no spectrum here: the analysis was read from "
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


def _record(record: LayerRecord | None) -> list[Any] | None:
    if record is None:
        return None
    values = record.scalars() | {
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


# ------------------------------------------------------------------------------------------- curves


def _all_curves(layers: Sequence[LayerDifference], progress: bool | Progress) -> list[list[Any]]:
    found = []
    windows = sum(record.windows for layer in layers for record in (layer.a, layer.b) if record)
    with reporter(progress, len(layers), windows) as report:
        for layer in layers:
            records = [record for record in (layer.a, layer.b) if record is not None]
            found.append([None if r is None else curves_of(r) for r in (layer.a, layer.b)])
            report(layer.name, sum(record.windows for record in records), True)
    return found


def curves_of(record: LayerRecord) -> dict[str, Any]:
    """A layer's curves, or why it has none, and its windows' alphas.

    Example:
        >>> curves_of(LayerRecord("fc", "linear", (1, 2, 2), "nonfinite", "1 of 4 weights is NaN"))
        {'missing': '1 of 4 weights is NaN', 'windows': None}
    """
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
    """Values as ``[least, step, whole numbers]``: each is ``least + step * number``; NaN as null.

    Example:
        >>> packed(np.array([1.0, np.nan, 2.0, 1.25]))
        [1.0, 0.0001, [0, None, 10000, 2500]]
    """
    finite = np.isfinite(values)
    if not finite.any():
        return [0.0, 0.0, [None] * values.size]
    least = float(values[finite].min())
    step = float(values[finite].max() - least) / _STEPS
    scaled = np.where(finite, (values - least) / (step or 1.0), 0.0)
    numbers = np.rint(scaled).astype(int).tolist()
    whole = [number if known else None for number, known in zip(numbers, finite, strict=True)]
    # Digits enough that the ends of the axis are exact to a thousandth of a step.
    return [float(f"{least:.12g}"), float(f"{step:.8g}"), whole]


def _numbers(values: Array) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _window_bins(record: LayerRecord) -> dict[str, Any] | None:
    """Histogram of the windows' own alphas; those beyond the inner 98 % are counted at the ends."""
    alphas = record.window_alphas[np.isfinite(record.window_alphas)]
    if alphas.size < 2:
        return None
    known = [
        value
        for value in (record.alpha, record.alpha_low, record.alpha_high)
        if math.isfinite(value)
    ]
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
