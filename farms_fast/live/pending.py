"""Alphas that are under way, and what comes of them on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.spectra.power_law import STATUSES, PowerLawFit, fit_message, nonfinite_message
from farms_fast.weights.stacks import LayerSpec

# One row a layer, all float64: integers up to 2^53 keep their value.
RESULT_COLUMNS = ("alpha", "D", "xmin", "n_tail", "status", "dropped", "bad windows")


@dataclass(frozen=True)
class LayerAlpha:
    """The power-law fit of one layer's pooled spectrum, at one moment of its life.

    Attributes:
        name: the layer's name.
        alpha: exponent of the tail; NaN unless the status is "ok".
        D: Kolmogorov-Smirnov distance between tail and fit; NaN unless ok.
        xmin: smallest eigenvalue of the tail; NaN unless ok.
        n_tail: eigenvalues in the tail; 0 unless ok.
        n_evals: eigenvalues of all windows that are not below the threshold; 0 where they are not
            finite or there are none.
        status: "ok", "too_few", "degenerate_tail" or "no_candidate" as in
            `farms_fast.PowerLawFit`, "nonfinite" where a window has a value that is not finite,
            or "error" (see message).
        message: what went wrong, empty when nothing did.
        zeros: how many of the `n_evals` are zero but for rounding, which no fit takes.
    """

    name: str
    alpha: float
    D: float
    xmin: float
    n_tail: int
    n_evals: int
    status: str
    message: str
    zeros: int = 0

    @classmethod
    def failed(cls, name: str, status: str, message: str, n_evals: int = 0) -> LayerAlpha:
        """A layer without a fit, and why."""
        return cls(name, math.nan, math.nan, math.nan, 0, n_evals, status, message)


@dataclass(frozen=True)
class EvalFilter:
    """Which eigenvalues count, and how many a layer needs for its fit to count."""

    min_evals: int
    threshold: float
    xmin: str  # the rule that fitted them, for messages

    def alpha_of(self, name: str, windows: int, evals: int, row: Sequence[float]) -> LayerAlpha:
        """What one row of `RESULT_COLUMNS` says of a layer with so many eigenvalues."""
        alpha, distance, xmin = row[:3]
        n_tail, status, dropped, bad = map(int, row[3:])
        if bad:
            return LayerAlpha.failed(name, "nonfinite", nonfinite_message(bad, windows))
        used = evals - dropped
        n_evals = used if self.threshold > 0 else evals
        if n_evals < self.min_evals:
            above = f" of at least {self.threshold:g}" if self.threshold > 0 else ""
            found = f"{n_evals} eigenvalues{above}, fewer than min_evals, which is {self.min_evals}"
            return LayerAlpha.failed(name, "too_few", found, n_evals)
        ended = STATUSES[status]
        fit = PowerLawFit(alpha, distance, xmin, n_tail, used, dropped, ended, self.xmin)
        return LayerAlpha(
            name, alpha, distance, xmin, n_tail, n_evals, ended, fit_message(fit), n_evals - used
        )


@dataclass(frozen=True)
class DeviceResults:
    """One device's part of an analysis."""

    layers: Sequence[tuple[int, int, int]]  # of each row: position, windows, eigenvalues
    rows: Tensor  # (layers, 7) of `RESULT_COLUMNS`, on the host once `done` has happened
    done: torch.cuda.Event | None  # None where the rows are there already
    failures: Mapping[int, str]  # what went wrong with layers that have no row, by position


class PendingAlphas:
    """Alphas of all layers, as their weights were when `LiveAnalysis.start` was called."""

    def __init__(
        self, specs: Sequence[LayerSpec], evals: EvalFilter, parts: Sequence[DeviceResults]
    ) -> None:
        self._names = [spec.name for spec in specs]
        self._evals = evals
        self._parts = parts
        self._alphas: list[LayerAlpha] | None = None

    def ready(self) -> bool:
        """Whether `result` would return without waiting for a device."""
        return all(part.done is None or part.done.query() for part in self._parts)

    def result(self) -> list[LayerAlpha]:
        """One entry a layer, in the order of `LiveAnalysis.specs`; waits where it has to."""
        if self._alphas is None:
            alphas: dict[int, LayerAlpha] = {}
            for part in self._parts:
                if part.done is not None:
                    part.done.synchronize()
                for (position, windows, evals), row in zip(
                    part.layers, part.rows.tolist(), strict=True
                ):
                    name = self._names[position]
                    alphas[position] = self._evals.alpha_of(name, windows, evals, row)
                for position, message in part.failures.items():
                    alphas[position] = LayerAlpha.failed(self._names[position], "error", message)
            self._alphas = [alphas[position] for position in range(len(self._names))]
        return list(self._alphas)
