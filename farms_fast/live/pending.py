"""Alphas that are under way, and what comes of them on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.spectra.power_law import STATUSES, PowerLawFit, fit_message, nonfinite_message
from farms_fast.weights.layers import LayerSpec


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
        zeros: how many of the `n_evals` are not positive, which no fit takes.
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


@dataclass(frozen=True)
class Demands:
    """What is asked of a layer's eigenvalues before its fit counts.

    Attributes:
        min_evals: how many there must be.
        threshold: those below it are dropped.
        xmin: the rule that fitted them, for messages.
    """

    min_evals: int
    threshold: float
    xmin: str

    def alpha_of(
        self, spec: LayerSpec, windows: int, evals: int, row: Sequence[float]
    ) -> LayerAlpha:
        """What one row of `RESULT_COLUMNS` says of a layer with so many eigenvalues."""
        alpha, distance, tail_start = row[:3]
        n_tail, status, dropped, bad = map(int, row[3:])
        if bad:
            return failed(spec, "nonfinite", nonfinite_message(bad, windows))
        kept = evals - dropped if self.threshold > 0 else evals
        if kept < self.min_evals:
            above = f" of at least {self.threshold:g}" if self.threshold > 0 else ""
            return failed(
                spec,
                "too_few",
                f"{kept} eigenvalues{above}, fewer than min_evals, which is {self.min_evals}",
                kept,
            )
        fit = PowerLawFit(
            alpha,
            distance,
            tail_start,
            n_tail,
            evals - dropped,
            dropped,
            STATUSES[status],
            self.xmin,
        )
        return LayerAlpha(
            spec.name,
            alpha,
            distance,
            tail_start,
            n_tail,
            kept,
            fit.status,
            fit_message(fit),
            kept - fit.n,
        )


# One row a layer, all float64: integers up to 2^53 keep their value.
RESULT_COLUMNS = ("alpha", "D", "xmin", "n_tail", "status", "dropped", "bad windows")


def failed(spec: LayerSpec, status: str, message: str, n_evals: int = 0) -> LayerAlpha:
    """A layer without a fit, and why."""
    return LayerAlpha(spec.name, math.nan, math.nan, math.nan, 0, n_evals, status, message)


@dataclass(frozen=True)
class Launched:
    """One device's part of an analysis.

    Attributes:
        layers: the rows' layers: position among the specs, windows, eigenvalues.
        rows: (layers, 7) of `RESULT_COLUMNS`, on the host once `done` has happened.
        done: None where the rows are there already.
        failures: what went wrong with layers that have no row, by position.
    """

    layers: Sequence[tuple[int, int, int]]
    rows: Tensor
    done: torch.cuda.Event | None
    failures: Mapping[int, str]


class PendingAlphas:
    """Alphas of all layers, as their weights were when `LiveAnalysis.start` was called."""

    def __init__(
        self, specs: Sequence[LayerSpec], demands: Demands, parts: Sequence[Launched]
    ) -> None:
        self._specs = specs
        self._demands = demands
        self._parts = parts
        self._found: list[LayerAlpha] | None = None

    def ready(self) -> bool:
        """Whether `result` would return without waiting for a device."""
        return all(part.done is None or part.done.query() for part in self._parts)

    def result(self) -> list[LayerAlpha]:
        """One entry a layer, in the order of `LiveAnalysis.specs`; waits where it has to."""
        if self._found is None:
            found: dict[int, LayerAlpha] = {}
            for part in self._parts:
                if part.done is not None:
                    part.done.synchronize()
                for (position, windows, evals), row in zip(
                    part.layers, part.rows.tolist(), strict=True
                ):
                    spec = self._specs[position]
                    found[position] = self._demands.alpha_of(spec, windows, evals, row)
                for position, message in part.failures.items():
                    found[position] = failed(self._specs[position], "error", message)
            self._found = [found[position] for position in range(len(self._specs))]
        return list(self._found)
