"""The published FARMS arithmetic, told again from its description, as slow and plain as can be.

One float32 `svdvals` a window and one step of a loop a candidate. Nothing here is shared with the
package, so that the two can be compared. What is left out is what the published code cannot do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fitted:
    """One spectrum: all eigenvalues (float32, ascending), those of the fit, alpha and D."""

    evals: Tensor
    entered: Tensor
    alpha: float
    D: float


def squared(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix) ** 2


def starts(extent: int, window: int, ops: int) -> list[int]:
    """Multiples of a whole step, no further than extent - window, which may be negative."""
    room = extent - window
    step = max(1, room // (ops - 1))
    number = min(ops, max(1, room // step + 1))
    return [min(k * step, room) for k in range(number)]


def linear_windows(
    weight: Tensor, m: int, q: float, ops: int | None, step: int, shrink: bool
) -> Iterator[Tensor]:
    """Slices, cut where they reach beyond the matrix as Python cuts them."""
    height, width = weight.shape
    if ops is None:
        n = int(m * q)
        across = range(max(1, (width - n) // step + 1))
        for i in range(max(1, (height - m) // step + 1)):
            for j in across:
                yield weight[i * step : i * step + m, j * step : j * step + n]
        return
    if shrink:
        m = min(m, height, width)
    n = int(m * q)
    for top in starts(height, m, ops):
        for left in starts(width, n, ops):
            yield weight[top : top + m, left : left + n]


def conv_blocks(weight: Tensor, q: float) -> list[list[Tensor]]:
    """For every block, its slice at each kernel position; every slice stands upright first."""
    out, into, high, wide = weight.shape
    if out + into >= high + wide:
        slices = [weight[:, :, i, j] for i in range(high) for j in range(wide)]
    else:
        slices = [weight[o, i] for o in range(out) for i in range(into)]
    slices = [s if s.shape[0] >= s.shape[1] else s.T for s in slices]
    tall, short = slices[0].shape
    m = max(1, int(short // q)) if q > 1 else short
    n = short if q > 1 else max(1, int(short // (1 / q)))
    return [[s[b * m : b * m + m, :n] for s in slices] for b in range(tall // short)]


def candidates(evals: Tensor, rule: str | None, bins: int) -> Iterator[int]:
    """Indices at which the tail may start, the last value's left out."""
    low, high = -math.inf, math.inf
    if rule == "xmin_peak":
        logs = evals.log10()
        counts = logs.histc(bins, float(logs.min()), float(logs.max()))
        edges = torch.linspace(float(logs.min()), float(logs.max()), bins + 1)
        peak = 10 ** edges[counts.argmax()]
        low, high = float((0.95 * peak).log10()), float(1.5 * peak)
    for index, value in enumerate(evals[:-1].tolist()):
        if low <= value <= high:
            yield index


def tail(evals: Tensor, start: int) -> tuple[float, float]:
    """Alpha and D of the tail that begins there, in the precision of the eigenvalues."""
    values = evals[start:]
    logs = values.log()
    n = float(len(values))
    alpha = 1 + n / (logs.sum() - n * logs[0])
    steps = torch.arange(len(values), dtype=evals.dtype) / n
    gap = (1 - (values / values[0]) ** (1 - alpha) - steps).abs().max()
    return float(alpha), float(gap)


def fit(evals: Tensor, rule: str | None, xmin_pos: float, bins: int) -> tuple[float, float]:
    if rule == "xmin_mid":
        return tail(evals, int(len(evals) / xmin_pos))
    best = (0.0, 1.0)
    for start in candidates(evals, rule, bins):
        alpha, gap = tail(evals, start)
        if alpha > 1 and gap < best[1]:
            best = (alpha, gap)
    return best


def fitted(
    parts: list[Tensor],
    rule: str | None,
    xmin_pos: float = 2,
    bins: int = 100,
    threshold: float | None = None,
) -> Fitted:
    """The pooled spectrum of some matrices."""
    evals = torch.cat([squared(part).flatten() for part in parts]).sort().values
    entered = evals
    if threshold is not None and bool((evals > threshold).any()):
        entered = evals[evals > threshold]
    return Fitted(evals, entered, *fit(entered, rule, xmin_pos, bins))
