"""What work costs: operations, bytes, seconds and memory, from shapes alone.

Operations and bytes are counted. Seconds come from measurements, kept in `measured.json` and
written by `python -m benchmarks.cost_table`: of one NVIDIA H200, and of two cores of an AMD EPYC
(Zen 4). Between measured orders they are interpolated, logarithm against logarithm. A call of a
CUDA solver takes a latency, in proportion to the order, and a time for each matrix; a core of a CPU
takes one matrix after the other. Assumed, not measured:

- another device takes the same times over `Machine.speed`, whatever the order and the solver;
- complex matrices take as long as the real ones of twice the order that a CUDA solver makes of
  them, and elsewhere four times as long as real ones; float32 takes as long as float64;
- weights come over to a GPU at 12 GB/s, as from pageable memory; the time of a disk is not in it.

So a prediction tells seconds from minutes, and which layer takes longer; it is no promise.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farms_fast.engine.machine import FULL_BATCH, Machine

# Bisection to full precision: steps for each eigenvalue, operations a step and row.
_BISECTION_STEPS, _STURM_OPERATIONS = 53, 4
# An exponential or a logarithm in float64.
_TRANSCENDENTAL = 20
# Real operations of a complex multiplication and addition, over those of a real one.
_COMPLEX = 4
# Over PCIe from memory that is not page-locked.
_UPLOAD_BYTES_PER_SECOND = 12e9
# Bytes that a resampled value is read and written with until it is in the op, about.
_RESAMPLE_BYTES = 100


@dataclass(frozen=True)
class Cost:
    """What some work takes; the sum of two is what one after the other takes.

    Attributes:
        flops: operations, a multiplication and an addition counting as two.
        bytes: that have to be read or written at least.
        seconds: predicted.
        memory: bytes of the device at most at any time: of a sum, the larger of the two.

    Example:
        >>> Cost(1, 2, 0.5, 100) + Cost(10, 20, 0.25, 70)
        Cost(flops=11, bytes=22, seconds=0.75, memory=100)
    """

    flops: float = 0
    bytes: float = 0
    seconds: float = 0
    memory: int = 0

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
        )


def total(costs: Sequence[Cost]) -> Cost:
    """Their sum."""
    return functools.reduce(Cost.__add__, costs, Cost())


@dataclass(frozen=True)
class Stage:
    """Work that has to be done before the next begins."""

    flops: float
    bytes: float


def gram_flops(order: int, inner: int) -> int:
    """Operations of one Gram matrix, k (k + 1) n, either triangle standing for the other."""
    return order * (order + 1) * inner


def eigenvalue_stages(order: int, inner: int, windows: int, item: int = 8) -> list[Stage]:
    """Gram matrix, tridiagonal form (4/3 k^3), its eigenvalues by bisection.

    The windows are read once and the eigenvalues written once; what lies between may stay on chip.

    Args:
        order: k, the shorter side of the windows.
        inner: their longer side.
        windows: how many.
        item: bytes of a number as stored.
    """
    bisection = _BISECTION_STEPS * _STURM_OPERATIONS * order**2
    return [
        Stage(windows * gram_flops(order, inner), windows * item * order * inner),
        Stage(windows * 4 / 3 * order**3, 0),
        Stage(windows * bisection, windows * 8 * order),
    ]


def fit_stages(values: int) -> list[Stage]:
    """A logarithm a value and one distance; what a scan visits besides is not needed work."""
    return [Stage(values * (2 * _TRANSCENDENTAL + 10), 8 * values)]


def eigenvalues_cost(
    machine: Machine,
    order: int,
    inner: int,
    windows: int,
    *,
    item: int = 8,
    is_complex: bool = False,
    calls: float = 1,
) -> Cost:
    """Gram matrices and eigenvalues of windows that are solved together.

    That overlapping windows share the work of their Gram matrices is not in it: 225 windows of 2000
    take a tenth less than predicted on a GPU, 225 of 250 a third less on a CPU.

    Args:
        machine: where.
        order: k, the shorter side of the windows.
        inner: their longer side.
        windows: how many.
        item: bytes of a number as stored.
        is_complex: whether the windows are complex.
        calls: of the solver, each with its latency; a part of one for a part of the windows.

    Returns:
        The cost, without memory.

    Example:
        >>> few = eigenvalues_cost(Machine("cuda"), 512, 512, 9)
        >>> many = eigenvalues_cost(Machine("cuda"), 512, 512, 512)
        >>> few.seconds / 9 > 3 * many.seconds / 512
        True
    """
    measured = _measured(machine.kind)
    work = slower = _COMPLEX if is_complex else 1
    dtype = torch.complex128 if is_complex else torch.float64
    # Of a full batch, as the measured ones are; what few windows take is told by the latency.
    chosen = machine.solver_facts(order, order, FULL_BATCH, dtype).solver
    whose = "library" if chosen == "cusolver" else "own"
    solved = order
    if is_complex and machine.kind == "cuda" and whose == "own":
        solved, slower = 2 * order, 1
    # Windows that are longer than wide differ from the measured ones in their Gram matrix only.
    square = _interpolate(_seconds_each(machine.kind, whose), solved)
    gram = _interpolate([(k, seconds / n) for k, n, seconds in measured["gram"]], order, slope=3)
    each = square + min(gram, square) * (inner / order - 1)
    if machine.kind == "cpu":
        seconds = each * measured["cores"] * math.ceil(windows / machine.cores)
    else:
        seconds = each * windows + calls * solved * _latency(measured["eigenvalues"][whose], solved)
    stages = eigenvalue_stages(order, inner, windows, item)
    return Cost(
        work * sum(stage.flops for stage in stages),
        sum(stage.bytes for stage in stages),
        slower * seconds / machine.speed,
    )


def fit_cost(
    machine: Machine, order: int, windows: int, rule: str, bootstrap: int, fit_values: int
) -> Cost:
    """Fits of one layer: pooled, and where it has several windows each, halves and resamples.

    Args:
        machine: where.
        order: eigenvalues of a window.
        windows: of the layer.
        rule: "median", "ks" or "peak".
        bootstrap: resamples.
        fit_values: values that one call takes at most.

    Returns:
        The cost, without memory.
    """
    measured = _measured(machine.kind)
    pooled = order * windows
    resamples = bootstrap if windows > 1 else 0
    # The pooled spectrum, once more as halves, and once more by windows.
    fitted = (3 if windows > 1 else 1) * pooled
    calls = 1 + math.ceil(resamples / max(1, fit_values // pooled))
    resampled = resamples * pooled
    times = dict(measured["fit"][rule])
    most, latency = max(times), times[min(times)]
    alone = (times[most] - latency) / most
    if machine.kind == "cuda":
        # One spectrum leaves most of the device idle, which others of the same call make use of.
        each = min(alone, measured["fits of many"][rule])
        longest = alone - each
    else:
        each, longest = alone, 0.0
    each += _RESAMPLE_BYTES / measured["copy_bytes_per_second"]
    each *= measured["cores"] / machine.cores
    seconds = calls * (latency + longest * pooled) + each * (fitted + resampled)
    stages = fit_stages(fitted + resampled)
    return Cost(
        sum(stage.flops for stage in stages),
        sum(stage.bytes for stage in stages) + resampled * _RESAMPLE_BYTES,
        seconds / machine.speed,
    )


def weights_cost(machine: Machine, weight_bytes: int) -> Cost:
    """Weights to the device; on a CPU they are read where they are."""
    if machine.kind == "cpu":
        return Cost()
    return Cost(0, weight_bytes, weight_bytes / _UPLOAD_BYTES_PER_SECOND)


def measured_on(kind: str) -> str:
    """What the times of a kind of device were measured on."""
    return str(_measured(kind)["measured_on"])


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("measured.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def _measured(kind: str) -> dict[str, Any]:
    return _table()[kind]


def _latency(solver: dict[str, Any], order: int) -> float:
    """Seconds of a call besides its matrices', a unit of order."""
    return next(float(each) for limit, each in solver["latency_per_order"] if order <= limit)


@functools.cache
def _seconds_each(kind: str, solver: str) -> tuple[tuple[int, float], ...]:
    """(order, seconds a matrix of a batch so large that the latency does not count)."""
    found = _measured(kind)["eigenvalues"][solver]
    return tuple(
        (order, (seconds - order * _latency(found, order)) / windows)
        for order, windows, seconds in found["rows"]
    )


def _interpolate(points: Sequence[tuple[int, float]], at: int, slope: float | None = None) -> float:
    """Logarithm against logarithm; beyond the ends by the nearest two, or one and a slope."""
    above = next((i for i, (x, _) in enumerate(points) if x >= at), len(points) - 1)
    (x, y), (u, v) = points[max(above - 1, 0)], points[max(above, min(1, len(points) - 1))]
    if x != u:
        slope = math.log(v / y) / math.log(u / x)
    elif slope is None:
        raise ValueError(f"points: expected at least two, got {len(points)}")
    return float(y * (at / x) ** slope)
