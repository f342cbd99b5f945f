"""Fits of the tails of many layers, by the rules that WeightWatcher offers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from farms_fast.compat.weightwatcher.options import Options
from farms_fast.compat.weightwatcher.spectra import FloatArray, LayerSpectra
from farms_fast.compat.weightwatcher.truncated_power_law import fit_truncated_power_law
from farms_fast.spectra.bootstrap import FitRule

# Eigenvalues up to this are no part of a tail.
_THRESHOLD = 1e-5
# Fewer values than _SMALL are fitted by a rule of their own, with _SMALL_TAIL of them at least.
_SMALL = 20
_SMALL_TAIL = 8
_MAX_FINGERS = 10
_LEAST_ALPHA = 2.0
_OVER_TRAINED = 2.0
_UNDER_TRAINED = 6.0


@dataclass(frozen=True)
class TailFit:
    """What the table says of a layer's tail, by its columns; the defaults say that there is no fit.

    `xmax` is None where powerlaw leaves it open, and `Lambda` the rate of a truncated power law's
    exponential. `num_fingers` eigenvalues were clipped, and `raw_alpha` is alpha without clipping.
    """

    alpha: float = -1.0
    xmin: float = -1.0
    xmax: float | None = None
    D: float = -1.0
    sigma: float = -1.0
    num_pl_spikes: int = -1
    Lambda: float = -1.0
    num_fingers: int = 0
    raw_alpha: float = -1.0
    status: str = "failed"

    @classmethod
    def of(cls, alpha: float, xmin: float, D: float, sigma: float, Lambda: float = -1.0) -> TailFit:
        """A fit that succeeded."""
        return cls(alpha, xmin, None, D, sigma, Lambda=Lambda, status="success")

    @property
    def failed(self) -> bool:
        """Whether there is no fit."""
        return self.status == "failed"

    @property
    def warning(self) -> str:
        """WeightWatcher's verdict on alpha; a failed fit's -1 counts as below 2."""
        if self.alpha < _OVER_TRAINED:
            return "over-trained"
        return "under-trained" if self.alpha > _UNDER_TRAINED else ""


def fit_tails(spectra: Sequence[LayerSpectra], options: Options) -> list[TailFit]:
    """Fits the tail of every layer; a layer that cannot be fitted has a fit that failed."""
    clipped = [_clipped(one.evals, options.clip) for one in spectra]
    if options.truncated or options.force_xmax or options.fix_fingers == "xmin_peak":
        fits = [_fit_like_powerlaw(evals, options) for evals in clipped]
    elif options.fix_fingers == "clip_xmax":
        fits = _fit_without_fingers(spectra, options)
    else:
        # A zero is dropped by the fit, and the order stays.
        packed = [
            torch.where((own := one.packed[: evals.size]) > _THRESHOLD, own, 0.0)
            for one, evals in zip(spectra, clipped, strict=True)
        ]
        fits = _fit_power_laws(packed, options.pl_package)
    fitted = zip(fits, clipped, strict=True)
    return [_completed(fit, evals, options.pl_package) for fit, evals in fitted]


def _clipped(evals: FloatArray, clip: int) -> FloatArray:
    """All but so many of the largest; nothing where that would be more than half of them."""
    return evals[:0] if clip > evals.size / 2 else evals[: evals.size - clip]


def _completed(fit: TailFit, evals: FloatArray, package: str) -> TailFit:
    if fit.failed:
        return fit
    xmax = float(evals[-1]) if fit.xmax is None and package == "ww" else fit.xmax
    return replace(fit, xmax=xmax, num_pl_spikes=int(np.count_nonzero(evals >= fit.xmin)))


def _fit_power_laws(packed: Sequence[Tensor], package: str) -> list[TailFit]:
    """The rule of least D for all spectra in one call.

    WeightWatcher's own lets a tail begin in the middle of equal values; powerlaw's does not.
    """
    if not packed:
        return []
    small_rule = package == "ww"
    rule = FitRule("ks", compat="weightwatcher" if small_rule else None)
    results = rule.fit(torch.cat(list(packed)), [len(spectrum) for spectrum in packed])
    fits: list[TailFit] = []
    for spectrum, fit in zip(packed, results.to_list(), strict=True):
        if small_rule and fit.n < _SMALL:
            fits.append(_fit_few(spectrum[spectrum > 0].cpu().numpy()))
        elif fit.status == "ok":
            fits.append(TailFit.of(fit.alpha, fit.xmin, fit.D, fit.sigma))
        else:
            fits.append(TailFit())
    return fits


def _fit_few(values: FloatArray) -> TailFit:
    """The rule for fewer than 20 values: alpha with n - 1 for n, and eight values in the tail.

    With fewer than eight values all of them are the tail, and sigma is that of alpha = 0; so it is
    in WeightWatcher, and so are alpha = 0 and D = 1 where all values of a tail are equal.
    """
    size = values.size
    if size < 2:
        return TailFit()
    logs = np.log(values)
    unknown = -1 / math.sqrt(size)
    best = TailFit.of(0.0, float(values[0]), 1.0, unknown)
    for start in range(max(size - _SMALL_TAIL, 0) + 1):
        n = size - start
        excess = float(np.sum(logs[start:]) - n * logs[start])
        if excess <= 1e-12:
            continue
        alpha = 1 + (n - 1) / excess
        law = 1 - (values[start:] / values[start]) ** (1 - alpha)
        distance = float(np.max(np.abs(law - np.arange(n) / n)))
        if distance < best.D:
            sigma = (alpha - 1) / math.sqrt(n) if size >= _SMALL_TAIL else unknown
            best = TailFit.of(alpha, float(values[start]), distance, sigma)
    return best


def _fit_like_powerlaw(evals: FloatArray, options: Options) -> TailFit:
    """A law that is truncated, ends at the largest value, or has its xmin near the peak."""
    values = evals[evals > _THRESHOLD]
    if values.size < 2:
        return TailFit()
    low, high = 0.0, math.inf
    if options.fix_fingers == "xmin_peak":
        counts, edges = np.histogram(np.log10(values), bins=100)
        peak = 10 ** edges[np.argmax(counts)]
        top = 1.5 * peak if options.xmin_max is None else options.xmin_max
        # The lower end is a logarithm beside an upper end that is none, as in WeightWatcher.
        low, high = sorted((float(np.log10(0.95 * peak)), float(top)))
    if options.truncated:
        fit = fit_truncated_power_law(values, (low, high))
        if fit.status != "ok":
            return TailFit()
        return TailFit.of(fit.alpha, fit.xmin, fit.D, math.nan, fit.Lambda)
    scanned = _scanned(values, low, high, options.force_xmax)
    return replace(scanned, xmax=float(evals[-1])) if options.force_xmax else scanned


def _scanned(values: FloatArray, low: float, high: float, to_largest: bool) -> TailFit:
    """The candidate of least D in a range, whose own largest candidate is left out.

    With `to_largest` D is that of the law that ends at the largest value; alpha stays as it is.
    """
    starts, first = np.unique(values, return_index=True)
    candidates = first[(starts >= low) & (starts <= high)][:-1]
    logs = np.log(values)
    best = TailFit()
    for start in candidates:
        tail = logs[start:] - logs[start]
        n = tail.size
        alpha = 1 + n / float(np.sum(tail))
        law = -np.expm1((1 - alpha) * tail)
        if to_largest:
            law /= law[-1]
        known = np.concatenate([[True], np.diff(tail) > 0])
        distance = float(np.max(np.abs(law - np.arange(n) / n)[known]))
        if best.failed or distance < best.D:
            sigma = (alpha - 1) / math.sqrt(n)
            best = TailFit.of(alpha, float(values[start]), distance, sigma)
    return best


def _fit_without_fingers(spectra: Sequence[LayerSpectra], options: Options) -> list[TailFit]:
    """Clips the largest eigenvalues one after the other until alpha has dropped far enough."""
    variants: list[Tensor] = []
    limits: list[int] = []
    for one in spectra:
        limit = options.max_fingers
        # A limit below half of the eigenvalues is replaced by the default.
        limits.append(_MAX_FINGERS if limit is None or limit < one.evals.size / 2 else limit)
        values = one.packed[int(np.count_nonzero(one.evals <= _THRESHOLD)) :]
        clips = (0, *_clips(limits[-1]))
        variants += [values[: max(0, len(values) - clip)] for clip in clips]
    fits = iter(_fit_power_laws(variants, options.pl_package))
    chosen: list[TailFit] = []
    for one, limit in zip(spectra, limits, strict=True):
        raw = next(fits)
        after: dict[int, TailFit] = {}
        for clip in _clips(limit):
            fit = next(fits)
            if options.pl_package == "powerlaw":
                # It has NaN where the rule of "ww" fails, and NaN stops nothing.
                fit = TailFit(alpha=math.nan, status="success") if fit.failed else fit
            elif clip < one.evals.size:
                # A clipped fit's largest value is that of what was fitted.
                fit = replace(fit, xmax=float(one.evals[-1 - clip]))
            after[clip] = fit
        chosen.append(_unclipped_unless_better(raw, after, limit, options.finger_thresh))
    return chosen


def _clips(limit: int) -> range:
    # Three more are fitted after the last that is looked at; an error there is one of the fit.
    return range(2, max(limit, 2) + 3)


def _unclipped_unless_better(
    raw: TailFit, after: dict[int, TailFit], limit: int, threshold: float
) -> TailFit:
    if raw.failed or limit <= 2:
        return TailFit()
    best, fingers, last = raw, 0, 0
    for clip in range(2, limit):
        last, fit = clip, after[clip]
        if fit.failed:
            return TailFit()
        if fit.alpha + threshold < raw.alpha:
            best, fingers = fit, clip - 1
            break
        if fit.alpha <= _LEAST_ALPHA:
            break
    for clip in range(last + 1, last + 4):
        if after[clip].failed:
            return TailFit()
        if abs(after[clip].alpha - after[last].alpha) > threshold:
            break
    return replace(best, num_fingers=fingers, raw_alpha=raw.alpha)
