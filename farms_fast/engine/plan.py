"""Which windows are solved together: buckets of equal order across layers.

A solver's cost per matrix falls steeply with the batch (9 windows of 512 cost thirteen times as
much each as 512 of them), so windows of one order meet in one batch whatever layers they come from.
The plan is a pure function of shapes: it reads no weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from farms_fast.layers import LayerSpec, Skipped
from farms_fast.windows import Sampling, WindowGrid

# Weights that a batch holds on the device at once when no budget is set.
DEFAULT_WEIGHT_BYTES = 4 * 2**30
# Eigenvalues that a batch yields at most, so that sorting and resampling them stays bounded too.
MAX_EIGENVALUES = 2**24


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
    def weight_bytes(self) -> int:
        """Bytes of the layer's weights as stored."""
        numbers = math.prod(self.spec.shape) * (2 if _stores_two_reals(self.spec) else 1)
        return numbers * int(self.spec.dtype.itemsize)


@dataclass(frozen=True)
class Batch:
    """Layers whose windows are solved in one call.

    Attributes:
        order: k of every window.
        layers: one or more, of one dtype.
    """

    order: int
    layers: tuple[LayerWindows, ...]

    @property
    def windows(self) -> int:
        """Windows of all layers."""
        return sum(layer.windows for layer in self.layers)


@dataclass(frozen=True)
class Plan:
    """What an analysis will do.

    Attributes:
        batches: in the order of their first layers.
        skipped: layers on which no window fits, with the reason.
    """

    batches: tuple[Batch, ...]
    skipped: tuple[Skipped, ...]


def plan(specs: Sequence[LayerSpec], sampling: Sampling, memory: int | None = None) -> Plan:
    """Groups the layers' windows into batches of equal order and dtype.

    Args:
        specs: the layers, in the model's order.
        sampling: the windows of each.
        memory: bytes that the run may take on its device; a quarter of it is for weights. None for
            4 GiB of weights. A layer larger than that is a batch of its own.

    Returns:
        The plan.

    Example:
        >>> import torch
        >>> from farms_fast import FullMatrix
        >>> from farms_fast.layers import TensorHeader, layers_from_headers
        >>> shapes = {"a": (8, 4), "b": (6, 6), "c": (4, 9)}
        >>> headers = [TensorHeader(n, s, torch.float32) for n, s in shapes.items()]
        >>> specs, _ = layers_from_headers(headers)
        >>> [(b.order, [x.spec.name for x in b.layers]) for b in plan(specs, FullMatrix()).batches]
        [(4, ['a', 'c']), (6, ['b'])]
    """
    limit = DEFAULT_WEIGHT_BYTES if memory is None else memory // 4
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
    batches = [
        Batch(order, tuple(part))
        for (order, *_), layers in buckets.items()
        for part in _split(layers, order, limit)
    ]
    batches.sort(key=lambda batch: batch.layers[0].index)
    return Plan(tuple(batches), tuple(skipped))


def _stores_two_reals(spec: LayerSpec) -> bool:
    return spec.kind == "spectral" and not spec.dtype.is_complex


def _split(layers: list[LayerWindows], order: int, limit: int) -> list[list[LayerWindows]]:
    parts: list[list[LayerWindows]] = []
    weight_bytes = evals = 0
    for layer in layers:
        weight_bytes += layer.weight_bytes
        evals += layer.windows * order
        if not parts or weight_bytes > limit or evals > MAX_EIGENVALUES:
            parts.append([])
            weight_bytes, evals = layer.weight_bytes, layer.windows * order
        parts[-1].append(layer)
    return parts
