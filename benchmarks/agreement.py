"""Checks that two results are equal, for every contender and peer before it is timed.

Bounds are data: farms_fast and the float64 libraries are held to 8 k 2^-52 lambda_max, a peer that
promises less to what it promises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.testing import reference

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Accuracy:
    """Largest error of an eigenvalue, as a multiple of lambda_max: `absolute + per_order * k`."""

    text: str
    per_order: float = 0.0
    absolute: float = 0.0

    def bound(self, order: int) -> float:
        return self.absolute + self.per_order * order


FLOAT64 = Accuracy("8 k 2^-52 λmax", per_order=8 * 2.0**-52)
FLOAT32 = Accuracy("8 k 2^-23 λmax", per_order=8 * 2.0**-23)
# torch's svdvals on CUDA is cuSOLVER's Jacobi iteration, which stops early.
JACOBI32 = Accuracy("1e-3 λmax", absolute=1e-3)
JACOBI64 = Accuracy("1e-9 λmax", absolute=1e-9)


@dataclass(frozen=True)
class FitAccuracy:
    """Errors of a fit: of alpha (relative), of D, and D at its xmin over the least D."""

    text: str
    alpha: float
    distance: float
    pick: float


EXACT_FIT = FitAccuracy("1e-9", 1e-9, 1e-9, 1e-9)
FLOAT32_FIT = FitAccuracy("1e-3", 1e-3, 1e-3, 1e-3)


def lapack_eigenvalues(window: FloatArray) -> FloatArray:
    """The truth for one window: LAPACK in float64, of the window itself where that is not slow."""
    if min(window.shape) <= 512:
        return reference.eigenvalues(window)
    return np.asarray(np.linalg.eigvalsh(reference.gram(window)))


def check_eigenvalues(
    found: object,
    shape: tuple[int, int],
    truth: Mapping[int, FloatArray],
    squared_norms: FloatArray,
    accuracy: Accuracy,
) -> float:
    """Asserts that spectra are right, and returns the worst error as a fraction of the bound.

    Args:
        found: (matrices, k), of any library, each row in any order.
        shape: what it must be.
        truth: ascending eigenvalues of some of the matrices.
        squared_norms: squared Frobenius norms of all, which their eigenvalues sum up to.
        accuracy: the bound.
    """
    evals = np.sort(to_numpy(found), axis=-1)
    assert evals.shape == shape, f"expected {shape} eigenvalues, got {evals.shape}"
    assert np.isfinite(evals).all(), "an eigenvalue is not finite"
    order = shape[1]
    bound = accuracy.bound(order)
    worst = 0.0
    for index, expected in truth.items():
        if index < shape[0]:
            error = float(np.abs(evals[index] - expected).max() / expected[-1])
            worst = max(worst, error / bound)
            assert error <= bound, (
                f"matrix {index}: eigenvalues differ by {error:.3g} λmax, "
                f"expected at most {bound:.3g} ({accuracy.text})"
            )
    off = np.abs(evals.sum(axis=1) - squared_norms[: shape[0]])
    allowed = order * bound * evals[:, -1]
    wrong = np.flatnonzero(off > allowed)
    assert wrong.size == 0, f"matrix {wrong[0]}: its eigenvalues do not sum up to its norm"
    return worst


def check_gram(
    found: object, windows: Mapping[int, FloatArray], squared_norms: FloatArray
) -> float:
    """The same for Gram matrices: some against NumPy's, the traces of all."""
    if isinstance(found, (list, tuple)):
        traces = np.array([float(to_numpy(gram).trace()) for gram in found])
    elif isinstance(found, Tensor):
        traces = found.diagonal(dim1=1, dim2=2).sum(1).double().cpu().numpy()
    else:
        traces = to_numpy(found).trace(axis1=1, axis2=2)
    assert traces.shape == squared_norms.shape, f"expected {squared_norms.size} Gram matrices"
    worst = 0.0
    for index, window in windows.items():
        expected = reference.gram(window)
        # Rounding of a sum of `inner` products of vectors no longer than the longest.
        bound = 2.0**-52 * max(window.shape) * expected.diagonal().max()
        error = float(np.abs(to_numpy(found[index]) - expected).max())  # type: ignore[index]
        worst = max(worst, error / bound)
        assert error <= bound, f"window {index}: Gram matrices differ by {error:.3g}"
    off = np.abs(traces - squared_norms)
    assert (off <= 1e-11 * squared_norms).all(), f"window {off.argmax()}: wrong trace"
    return worst


def to_numpy(values: object) -> FloatArray:
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    if hasattr(values, "get"):  # CuPy
        return np.asarray(values.get(), dtype=np.float64)
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True)
class FitTruth:
    """What a fit of a spectrum must find.

    Attributes:
        evals: ascending float64.
        least: the least D among the candidates that were scanned.
        candidates: how many the rule has.
        scanned: how many of them were scanned, all where that does not take minutes.
    """

    evals: Tensor
    least: float
    candidates: int
    scanned: int


def candidates_of(evals: Tensor, rule: str) -> range:
    """Indices at which the rule lets the tail start (xmin_pos 2, 100 bins)."""
    size = evals.numel()
    if rule == "median":
        return range(size // 2, size // 2 + 1)
    if rule == "ks":
        return range(size - 1)
    values = evals.cpu().numpy()
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[np.argmax(counts)]
    low = int(np.searchsorted(values, 0.95 * peak, "left"))
    high = int(np.searchsorted(values, 1.5 * peak, "right"))
    return range(low, min(high, size - 1))


def scan(evals: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and distance at each candidate (ascending indices), by their definitions."""
    size, logs = evals.numel(), evals.log()
    suffix = logs.flip(0).cumsum(0).flip(0)
    ranks = torch.arange(size, dtype=torch.float64, device=evals.device)
    alphas, distances = [], []
    # Temporaries that fill a GPU, or that stay in a CPU's cache.
    at_once = 2**26 if evals.is_cuda else 2**18
    for chunk in candidates.split(max(1, at_once // size)):
        n = (size - chunk).to(torch.float64)
        alpha = 1 + n / (suffix[chunk] - n * logs[chunk])
        first = int(chunk[0])
        model = 1 - torch.exp((1 - alpha)[:, None] * (logs[first:] - logs[chunk][:, None]))
        steps = (ranks[first:] - chunk[:, None]) / n[:, None]
        gap = (model - steps).abs_().masked_fill_(steps < 0, 0.0)
        alphas.append(alpha)
        distances.append(gap.amax(dim=1))
    return torch.cat(alphas), torch.cat(distances)


def fit_truth(evals: Tensor, rule: str, near: float | None = None, work: float = 5e8) -> FitTruth:
    """Scans the rule's candidates for the least D.

    Args:
        evals: the spectrum.
        rule: the rule.
        near: an xmin. Where all candidates are too many, those around it and a sample are scanned.
        work: values that may be visited.
    """
    possible = candidates_of(evals, rule)
    size = evals.numel()
    chosen = torch.arange(possible.start, possible.stop)
    if len(possible) * size > work:
        keep = max(2, int(work / size))
        chosen = chosen[:: -(-len(possible) // (keep // 2))]
        if near is not None:
            at = int(torch.searchsorted(evals, near))
            around = range(
                max(possible.start, at - keep // 4), min(possible.stop, at + keep // 4 + 1)
            )
            chosen = torch.cat([chosen, torch.tensor(list(around), dtype=torch.int64)]).unique()
    _, distances = scan(evals, chosen.to(evals.device))
    return FitTruth(evals, float(distances.min()), len(possible), chosen.numel())


def check_fit(
    alpha: float, distance: float, xmin: float, truth: FitTruth, accuracy: FitAccuracy
) -> float:
    """Asserts that a fit is right, and returns its worst error as a fraction of the bound."""
    assert np.isfinite([alpha, distance, xmin]).all(), f"no fit: alpha {alpha}, D {distance}"
    at = int((truth.evals - xmin).abs().argmin())
    exact_alpha, exact_distance = (
        float(x) for x in scan(truth.evals, torch.tensor([at], device=truth.evals.device))
    )
    errors = {
        "alpha": abs(alpha - exact_alpha) / exact_alpha / accuracy.alpha,
        "D": abs(distance - exact_distance) / accuracy.distance,
        "xmin": (exact_distance - truth.least) / accuracy.pick,
    }
    for name, error in errors.items():
        assert error <= 1, (
            f"{name}: {error:.3g} times the accepted error ({accuracy.text}); got alpha {alpha}, "
            f"D {distance}, xmin {xmin}, expected there alpha {exact_alpha}, D {exact_distance}, "
            f"least D {truth.least}"
        )
    return max(errors.values())
