"""Who fits power laws: farms_fast, the published way, WeightWatcher and the powerlaw package."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks import published
from benchmarks.agreement import EXACT_FIT, FLOAT32_FIT, FitAccuracy, candidates_of
from benchmarks.peers import BOTH, CONTENDER, missing_modules
from farms_fast import fit_power_law

Fit = tuple[float, float, float]


@dataclass(frozen=True)
class FitRun:
    """A fit to be timed.

    Attributes:
        run: spectrum to alpha, D and xmin.
        work: the part of the candidates that it visits, weighted by what each costs.
    """

    run: Callable[[Tensor], Fit]
    work: float


@dataclass(frozen=True)
class FitPeer:
    """Fits one ascending float64 spectrum.

    Attributes:
        name: as the tables show it.
        rules: the rules that it has.
        prepare: (spectrum, rule, xmin of the right result, seconds) to what is timed. Where all
            candidates would take more than the seconds, some of them with the right one among them.
        accuracy: its promise.
        devices: where it runs.
        needs: modules.
        note: what it does.
        largest: the largest spectrum that it is asked to scan under the ks rule. What it takes
            grows with the square of the size, so that beyond it takes minutes, and neither takes
            a part of the candidates from which one could extrapolate.
    """

    name: str
    rules: tuple[str, ...]
    prepare: Callable[[Tensor, str, float, float], FitRun]
    accuracy: FitAccuracy
    devices: tuple[str, ...] = BOTH
    needs: tuple[str, ...] = ()
    note: str = ""
    largest: int = 2**62

    def missing(self) -> str:
        return missing_modules(self.needs)


def _contender(evals: Tensor, rule: str, xmin: float, seconds: float) -> FitRun:
    def run(values: Tensor) -> Fit:
        fit = fit_power_law(values, rule)
        return fit.alpha, fit.D, fit.xmin

    return FitRun(run, 1.0)


def _published(evals: Tensor, rule: str, xmin: float, seconds: float) -> FitRun:
    possible = candidates_of(evals, rule)
    # Microseconds a candidate: about ten kernel launches, or about ten passes over its tail.
    cost = 150e-6 if evals.is_cuda else 30e-6 + 20e-9 * evals.numel()
    stride = max(1, int(len(possible) * cost / seconds))
    at = int((evals - xmin).abs().argmin())
    chosen = possible[(at - possible.start) % stride :: stride]
    return FitRun(lambda values: published.fit(values, chosen), len(chosen) / len(possible))


def no_gpu() -> contextlib.AbstractContextManager[object]:
    """Whoever asks torch for a GPU is told that there is none."""
    return mock.patch("torch.cuda.is_available", return_value=False)


def on_the_cpu() -> Any:
    """WeightWatcher as it is on a machine without a GPU.

    Where it finds one it rounds weights to half precision, which is another table. It looks when it
    is imported, and again as it goes.
    """
    with quiet(), no_gpu():
        import weightwatcher
    return weightwatcher


def _weightwatcher(evals: Tensor, rule: str, xmin: float, seconds: float) -> FitRun:
    WWFit = on_the_cpu().WW_powerlaw.WWFit

    def run(values: Tensor) -> Fit:
        fit = WWFit(values.numpy())
        return float(fit.alpha), float(fit.D), float(fit.xmin)

    return FitRun(run, 1.0)


def _powerlaw(evals: Tensor, rule: str, xmin: float, seconds: float) -> FitRun:
    with quiet():
        import powerlaw
    # It searches for xmin as the ks rule does, and otherwise takes one that it is given.
    given = None if rule == "ks" else xmin

    def run(values: Tensor) -> Fit:
        with quiet():
            fit = powerlaw.Fit(values.numpy(), xmin=given, verbose=False)
            return float(fit.alpha), float(fit.D), float(fit.xmin)

    return FitRun(run, 1.0)


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    """These packages print and warn as they go."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


FIT_PEERS = (
    FitPeer(
        CONTENDER, ("median", "peak", "ks"), _contender, EXACT_FIT, note="sorts its input as well"
    ),
    FitPeer(
        "published FARMS",
        ("median", "peak", "ks"),
        _published,
        FLOAT32_FIT,
        note="one step of a Python loop a candidate, in float32, where the spectrum lives",
    ),
    FitPeer(
        "WeightWatcher",
        ("ks",),
        _weightwatcher,
        EXACT_FIT,
        ("cpu",),
        ("weightwatcher",),
        note="WWFit, its own power-law fit, in float64 on the CPU",
        largest=20_000,
    ),
    FitPeer(
        "powerlaw",
        ("median", "ks"),
        _powerlaw,
        EXACT_FIT,
        ("cpu",),
        ("powerlaw",),
        note="powerlaw.Fit in float64 on the CPU; given the right xmin under the median rule",
        largest=20_000,
    ),
)
