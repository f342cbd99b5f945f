"""Which windows are solved together, and what it costs: buckets of equal order across layers.

A solver's cost per matrix falls steeply with the batch (9 windows of 512 cost twelve times as much
each as 512 of them), so windows of one order meet in one batch whatever layers they come from. The
plan is a pure function of shapes: it reads no weight and asks no device.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from farms_fast.engine.cost import Cost, eigenvalues_cost, fit_cost, total, weights_cost
from farms_fast.engine.machine import Machine
from farms_fast.engine.memory import (
    MAX_EIGENVALUES,
    MAX_FIT_VALUES,
    Limits,
    MemoryBudget,
    MemoryRequirement,
    limits,
)
from farms_fast.spectra.power_law import xmin_rule
from farms_fast.spectra.windows import Sampling, WindowGrid
from farms_fast.weights.stacks import LayerSpec, Skipped

_H200 = Machine()
# Batches that a run has on the device at a time.
UNDER_WAY = 3
# Predicted for a batch on a CPU, where more windows at a time gain nothing once all cores have had
# a few each.
MAX_SECONDS = 10.0
_ROUNDS = 4


@dataclass(frozen=True)
class LayerWindows:
    """A layer and the windows laid over every matrix of its stack.

    Attributes:
        index: the layer's position in the model's order.
        spec: what the layer is and how to read it.
        grid: windows of one matrix of the stack.
    """

    index: int
    spec: LayerSpec
    grid: WindowGrid

    @property
    def windows(self) -> int:
        """Windows of the whole stack."""
        return self.spec.shape[0] * self.grid.count

    @property
    def inner(self) -> int:
        """The longer side of a window."""
        return max(self.grid.rows, self.grid.columns)

    @property
    def is_complex(self) -> bool:
        """Whether its stack is complex, as stored or made of two reals."""
        return self.spec.dtype.is_complex or _stores_two_reals(self.spec)

    @property
    def item(self) -> int:
        """Bytes of a number of its stack; there are no complex numbers of two half reals."""
        stored = int(self.spec.dtype.itemsize)
        return 2 * max(stored, 4) if _stores_two_reals(self.spec) else stored

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer's stack."""
        return math.prod(self.spec.shape) * self.item


@dataclass(frozen=True)
class Batch:
    """Layers whose windows are solved in one call.

    Attributes:
        order: k of every window.
        layers: one or more, of one dtype.
        workspace: bytes that its Gram matrices and the solver's workspace may take; 0 for the
            op's default.
        fit_values: values that one call of the fit may take.
        peak: bytes of the device that it takes at most, predicted.
        price: what its layers cost, asked when somebody wants to know.
    """

    order: int
    layers: tuple[LayerWindows, ...]
    workspace: int = 0
    fit_values: int = MAX_FIT_VALUES
    peak: int = 0
    price: Callable[[Sequence[LayerWindows]], tuple[Cost, ...]] | None = field(
        default=None, compare=False, repr=False
    )

    @functools.cached_property
    def costs(self) -> tuple[Cost, ...]:
        """Of each layer, its part of the batch's; the memory is that of the layer alone."""
        return () if self.price is None else self.price(self.layers)

    @property
    def cost(self) -> Cost:
        """Predicted, with the memory that it takes at most."""
        return total([*self.costs, Cost(memory=self.peak)])

    @property
    def windows(self) -> int:
        """Windows of all layers."""
        return sum(layer.windows for layer in self.layers)

    def halves(self) -> tuple[Batch, Batch]:
        """The first and the second half of the layers, of which there must be several."""
        middle = len(self.layers) // 2
        return replace(self, layers=self.layers[:middle]), replace(
            self, layers=self.layers[middle:]
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers' stacks."""
        return sum(layer.weight_bytes for layer in self.layers)


@dataclass(frozen=True)
class Plan:
    """What an analysis will do.

    Attributes:
        batches: in the order of their first layers.
        skipped: layers on which no window fits, with the reason.
        memory: bytes of the device that the run may take.
        overlapping: whether that holds three batches at a time, so that one can be read and one be
            finished while another is solved.
    """

    batches: tuple[Batch, ...]
    skipped: tuple[Skipped, ...]
    memory: int = 0
    overlapping: bool = False

    @property
    def cost(self) -> Cost:
        """Of all batches: their seconds one after the other, the memory of those under way."""
        cost = total([batch.cost for batch in self.batches])
        together = UNDER_WAY if self.overlapping else 1
        peaks = [batch.peak for batch in self.batches]
        sums = [sum(peaks[i : i + together]) for i in range(len(peaks))]
        return replace(cost, memory=max(sums, default=0))

    @property
    def windows(self) -> int:
        """Of all layers."""
        return sum(batch.windows for batch in self.batches)

    @property
    def names(self) -> list[str]:
        """Of the layers, in the model's order."""
        layers = [layer for batch in self.batches for layer in batch.layers]
        return [layer.spec.name for layer in sorted(layers, key=lambda layer: layer.index)]

    @property
    def layers(self) -> tuple[tuple[LayerWindows, Cost], ...]:
        """Every layer with its cost, in the model's order."""
        pairs = [
            pair for batch in self.batches for pair in zip(batch.layers, batch.costs, strict=True)
        ]
        return tuple(sorted(pairs, key=lambda pair: pair[0].index))


def plan(
    specs: Sequence[LayerSpec],
    sampling: Sampling,
    memory: int | None = None,
    *,
    xmin: str = "median",
    bootstrap: int = 100,
    dtype: torch.dtype = torch.float64,
    machine: Machine = _H200,
) -> Plan:
    """Groups the layers' windows into batches of equal order and dtype.

    Three batches share the memory, one that is read, one that is solved and one that is finished;
    where a layer needs more than a third of it, each batch has all of it and runs alone. A batch is
    closed where the next layer would take it beyond its shares (see `MemoryBudget`), beyond 2^19
    eigenvalues, or on a CPU beyond 10 seconds, because finished layers come batch by batch. A layer
    larger than that is a batch of its own, and what it leaves of the memory is the solver's.

    Args:
        specs: the layers, in the model's order.
        sampling: the windows of each.
        memory: bytes that the run may take on its device; None is half of the machine's.
        xmin: the rule of the fits, for their cost.
        bootstrap: resamples of each layer with several windows.
        dtype: precision of the computation, float64 or float32.
        machine: what the seconds are predicted for.

    Returns:
        The plan. Its cost's memory is at most `memory`.

    Raises:
        ValueError: a layer does not fit into the memory even with one window solved at a time, or
            the rule is unknown.

    Example:
        >>> import torch
        >>> from farms_fast import FullMatrix
        >>> from farms_fast.weights.layers import layers_from_headers
        >>> from farms_fast.weights.stacks import TensorHeader
        >>> shapes = {"a": (8, 4), "b": (6, 6), "c": (4, 9)}
        >>> headers = [TensorHeader(n, s, torch.float32) for n, s in shapes.items()]
        >>> specs, _ = layers_from_headers(headers)
        >>> planned = plan(specs, FullMatrix())
        >>> [(b.order, [x.spec.name for x in b.layers]) for b in planned.batches]
        [(4, ['a', 'c']), (6, ['b'])]
        >>> max(planned.layers, key=lambda pair: pair[1].seconds)[0].spec.name
        'b'
    """
    planner = _Planner(machine, dtype, xmin_rule(xmin), bootstrap)
    total_memory = machine.memory // 2 if memory is None else memory
    skipped: list[Skipped] = []
    buckets: dict[tuple[int, torch.dtype, bool], list[LayerWindows]] = {}
    for index, spec in enumerate(specs):
        _, rows, columns = spec.shape
        grid = sampling.grid(rows, columns)
        if grid.count == 0:
            reason = f"no window of {sampling} fits {rows} x {columns}"
            skipped.append(Skipped(spec.name, spec.shape, reason))
            continue
        # Weights stored as two reals become complex stacks: never beside real ones.
        key = (grid.order, spec.dtype, _stores_two_reals(spec))
        buckets.setdefault(key, []).append(LayerWindows(index, spec, grid))
    layers = [layer for bucket in buckets.values() for layer in bucket]
    needs = [planner.need(_Size.of(layer)) for layer in layers]
    overlapping = all(need.min_bytes <= total_memory // UNDER_WAY for need in needs)
    budget = MemoryBudget.of(total_memory // UNDER_WAY if overlapping else total_memory)
    for layer, need in zip(layers, needs, strict=True):
        _check_fits(layer, need, budget, memory is None)
    batches = [
        planner.batch(part, budget)
        for bucket in buckets.values()
        for part in planner.split(bucket, budget)
    ]
    batches.sort(key=lambda batch: batch.layers[0].index)
    return Plan(tuple(batches), tuple(skipped), total_memory, overlapping)


def _stores_two_reals(spec: LayerSpec) -> bool:
    return spec.kind == "spectral" and not spec.dtype.is_complex


_FORGOTTEN_UNIT = 2**14


def _check_fits(
    layer: LayerWindows, need: MemoryRequirement, budget: MemoryBudget, default: bool
) -> None:
    if need.min_bytes > budget.total:
        name, grid = layer.spec.name, layer.grid
        # Nobody means so little: the unit was left out.
        unit = f" ({budget.total} is bytes; {budget.total}GiB for gibibytes)"
        unit = unit if budget.total < _FORGOTTEN_UNIT else ""
        raise ValueError(
            f"memory: expected at least the {need.min_bytes} bytes that layer {name!r} takes with "
            f"one of its {layer.windows} windows of {grid.rows} x {grid.columns} solved at a time, "
            f"got {budget.total}" + (", half of the device's" if default else "") + unit
        )


@dataclass(frozen=True)
class _Size:
    """What the needs of layers of one order and dtype depend on; that of more layers is a sum."""

    order: int
    inner: int  # the longest side of a window
    windows: int
    most_windows: int  # of one layer
    weights: int  # bytes
    is_complex: bool

    @classmethod
    def of(cls, layer: LayerWindows) -> _Size:
        order, windows = layer.grid.order, layer.windows
        return cls(order, layer.inner, windows, windows, layer.weight_bytes, layer.is_complex)

    def __add__(self, other: _Size) -> _Size:
        return replace(
            self,
            inner=max(self.inner, other.inner),
            windows=self.windows + other.windows,
            most_windows=max(self.most_windows, other.most_windows),
            weights=self.weights + other.weights,
        )


@dataclass(frozen=True)
class _Planner:
    """What the needs and costs of batches depend on besides their layers."""

    machine: Machine
    dtype: torch.dtype
    rule: str
    bootstrap: int

    def need(self, size: _Size) -> MemoryRequirement:
        return MemoryRequirement(
            weights=size.weights,
            windows=size.windows,
            order=size.order,
            longest=size.order * size.most_windows,
            matrix=self.machine.window_bytes(*self.call(size)),
            item=int(self.dtype.itemsize),
        )

    def call(self, size: _Size) -> tuple[int, int, int, torch.dtype]:
        """What solvers go by: the windows' order, longer side and number, the Grams' dtype."""
        dtype = self.dtype.to_complex() if size.is_complex else self.dtype
        return size.order, size.inner, size.windows, dtype

    def split(
        self, layers: Sequence[LayerWindows], budget: MemoryBudget
    ) -> list[list[LayerWindows]]:
        parts: list[list[LayerWindows]] = []
        size: _Size | None = None
        for layer in layers:
            own = _Size.of(layer)
            size = own if size is None else size + own
            if not parts or not self._fits(size, budget):
                parts.append([])
                size = own
            parts[-1].append(layer)
        return parts

    def _fits(self, size: _Size, budget: MemoryBudget) -> bool:
        need = self.need(size)
        return not self._is_long(size) and (
            need.weights <= budget.weights
            and need.spectra <= budget.spectra
            and need.eigenvalues <= MAX_EIGENVALUES
            and need.min_bytes <= budget.total
        )

    def _is_long(self, size: _Size) -> bool:
        """Whether too much is lost when a run is killed; GPUs are never as long at a batch."""
        if self.machine.kind != "cpu" or size.windows <= _ROUNDS * self.machine.cores:
            return False
        one_by_one = eigenvalues_cost(self.machine, size.order, size.inner, size.windows)
        return one_by_one.seconds > MAX_SECONDS

    def limits(self, size: _Size, budget: MemoryBudget) -> Limits:
        at_a_time = self.machine.solver_facts(*self.call(size)).max_batch
        return limits(self.need(size), budget, self.bootstrap, at_a_time)

    def batch(self, layers: Sequence[LayerWindows], budget: MemoryBudget) -> Batch:
        size = functools.reduce(operator.add, map(_Size.of, layers))
        bounds, order = self.limits(size, budget), size.order
        price = functools.partial(self.costs, bounds=bounds, budget=budget)
        return Batch(order, tuple(layers), bounds.workspace, bounds.fit_values, bounds.peak, price)

    def costs(
        self, layers: Sequence[LayerWindows], bounds: Limits, budget: MemoryBudget
    ) -> tuple[Cost, ...]:
        machine, order = self.machine, layers[0].grid.order
        windows = sum(layer.windows for layer in layers)
        calls = math.ceil(windows / bounds.chunk)
        costs = []
        for layer in layers:
            solved = eigenvalues_cost(
                machine,
                order,
                layer.inner,
                layer.windows,
                item=layer.item,
                is_complex=layer.is_complex,
                calls=calls * layer.windows / windows,
            )
            fitted = fit_cost(
                machine, order, layer.windows, self.rule, self.bootstrap, bounds.fit_values
            )
            loaded = weights_cost(machine, layer.weight_bytes)
            memory = Cost(memory=self.limits(_Size.of(layer), budget).peak)
            costs.append(total([loaded, solved, fitted, memory]))
        return tuple(costs)
