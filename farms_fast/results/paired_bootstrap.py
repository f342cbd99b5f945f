"""How uncertain the difference of two alphas is that were taken over the same windows.

Before and after fine-tuning, windows that are unlike the rest of the matrix are so both times: the
two alphas err alike, and their difference is far more certain than either. Resampling both spectra
by the same draws of windows gives the standard error of the difference itself. On all-MiniLM-L6-v2
with noise of 2 % added, it is 0.002 under the median rule, where independent errors of the two
would add up to 0.012.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from farms_fast.results.record import LayerRecord
from farms_fast.spectra.bootstrap import FitRule, fit_layers
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix, Sampling, WindowGrid

__all__ = ["DECIDING_SETTINGS", "difference_error", "independent_error", "same_windows"]

DECIDING_SETTINGS = ("sampling", "xmin", "xmin_pos", "bins")
"""Analyses in which one of these differs have alphas of different meaning."""
# Fewer windows have too few ways to be drawn.
_LEAST_WINDOWS = 4


def independent_error(a: LayerRecord, b: LayerRecord) -> float:
    """Standard error of the difference of two alphas that have nothing in common; NaN without."""
    return math.hypot(a.alpha_se, b.alpha_se)


def same_windows(settings_a: Mapping[str, object], settings_b: Mapping[str, object]) -> bool:
    """Whether two analyses took the same windows of equal matrices, and fitted them alike."""
    return all(
        name in settings_a and settings_a[name] == settings_b.get(name)
        for name in DECIDING_SETTINGS
    )


def difference_error(
    a: LayerRecord, b: LayerRecord, settings: Mapping[str, object], device: torch.device
) -> float | None:
    """Standard error of `b.alpha - a.alpha` by one bootstrap of both.

    Args:
        a: a layer.
        b: the same layer of the other analysis.
        settings: of both analyses, as `analyze` writes them.
        device: where to fit the resamples.

    Returns:
        The standard deviation of the difference over as many resamples as the analyses took; None
        where the two do not have the same windows, fewer than four of them, no spectra, or
        resamples that could not be fitted.
    """
    shape = a.shape, a.windows, a.window_rows, a.window_cols
    if shape != (b.shape, b.windows, b.window_rows, b.window_cols) or a.windows < _LEAST_WINDOWS:
        return None
    resamples = settings.get("bootstrap")
    if not isinstance(resamples, int) or resamples < 2:
        return None
    sampling = _sampling(str(settings["sampling"]))
    grid = None if sampling is None else _grid(a, sampling)
    if grid is None:
        return None
    windows = [record.read_window_evals() for record in (a, b)]
    if any(values.shape[0] != a.windows for values in windows):
        return None
    rule = FitRule(
        str(settings["xmin"]),
        float(str(settings["xmin_pos"])),
        int(str(settings["bins"])),
        getattr(sampling, "compat", None),
    )
    # Sampled alike, both get the same draws.
    found = fit_layers(
        [torch.from_numpy(np.array(values)).to(device) for values in windows],
        [a.shape[0]] * 2,
        [grid] * 2,
        rule,
        resamples,
    )
    drawn_a, drawn_b = (fits.resampled for fits in found)
    if drawn_a.size != resamples or drawn_b.size != resamples:
        return None
    return float((drawn_b - drawn_a).std(ddof=1))


def _grid(record: LayerRecord, sampling: Sampling) -> WindowGrid | None:
    """The windows of a layer's matrices; None where the record has others."""
    entries, rows, columns = record.shape
    grid = sampling.grid(rows, columns)
    as_recorded = (grid.rows, grid.columns, entries * grid.count)
    return grid if as_recorded == (record.window_rows, record.window_cols, record.windows) else None


def _sampling(text: str) -> Sampling | None:
    """The sampling that an analysis has written into its settings; None for one of another kind."""
    kinds: dict[str, Callable[..., Sampling]] = {
        "FixedAspectSampling": FixedAspectSampling,
        "FullMatrix": FullMatrix,
    }
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            return None
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        return kinds[call.func.id](**options)
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError):
        return None
