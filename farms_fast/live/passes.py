"""What one device does for an analysis: prepared once, launched again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from farms_fast.core.packing import split_by_budget
from farms_fast.engine.distributed import share
from farms_fast.engine.plan import Batch, LayerWindows, Plan
from farms_fast.engine.solve import Pool, SolveTask, fit_pools, make_pools, solve_side_by_side
from farms_fast.engine.stages import Settings
from farms_fast.engine.streams import STREAMS, make_streams
from farms_fast.live.pending import RESULT_COLUMNS, DeviceResults
from farms_fast.live.weights import LiveTensor, Snapshot, Stacks

# What went wrong with layers, by position: they cannot be read, or do not fit by themselves.
_Failures: TypeAlias = dict[int, str]


@dataclass(frozen=True)
class _Pass:
    """Batches that are solved, pooled and fitted together."""

    batches: Sequence[Batch]
    tasks: Sequence[SolveTask]
    layers: Sequence[LayerWindows]  # of all batches, in the order of pools and results
    last: Tensor  # (windows,), where each window's largest eigenvalue is, on the device
    window_layers: Tensor  # (windows,), the layer of each window, on the device
    pools: Sequence[Pool]

    @classmethod
    def of(cls, batches: Sequence[Batch], settings: Settings) -> _Pass:
        """Prepares everything that depends on shapes alone."""
        device, published = settings.device, settings.rule.published
        layers = [layer for batch in batches for layer in batch.layers]
        windows, orders = (
            torch.tensor(counts, dtype=torch.int64, device="cpu")
            for counts in ([x.windows for x in layers], [x.grid.order for x in layers])
        )
        window_layers = torch.arange(len(layers), device="cpu").repeat_interleave(windows)
        last = orders[window_layers].cumsum(0) - 1
        streams = share([batch.cost.seconds for batch in batches], STREAMS)
        tasks = [
            SolveTask.of(
                [(x.grid, x.spec.shape[0]) for x in batch.layers],
                batch.workspace,
                stream,
                published,
            )
            for batch, stream in zip(batches, streams, strict=True)
        ]
        # As many values at a time as the batches' peaks leave memory to fit.
        fit_values = sum(min(x.fit_values, x.windows * x.order) for x in batches)
        spreads = list(map(settings.least_spread, layers))
        pools = make_pools((windows * orders).tolist(), device, fit_values, spreads)
        return cls(batches, tasks, layers, last.to(device), window_layers.to(device), pools)

    def without(self, failures: Mapping[int, str], settings: Settings) -> _Pass:
        """The pass of the layers that have not failed."""
        left = [
            replace(batch, layers=tuple(x for x in batch.layers if x.index not in failures))
            for batch in self.batches
        ]
        return _Pass.of([batch for batch in left if batch.layers], settings)


class DevicePasses:
    """The layers whose weights are on one device; eigenvalues below the threshold are dropped.

    In their `plan`, the index of a layer is its position in the model.
    """

    def __init__(self, plan: Plan, settings: Settings, threshold: float) -> None:
        self._settings = settings
        self._device = settings.device
        self._threshold = threshold
        self._names = {
            name for b in plan.batches for layer in b.layers for name in layer.spec.tensors
        }
        self._plan = plan
        # Everything is prepared, pooled and fitted on the first.
        self._streams = make_streams(self._device)
        self._stacks, self._copied_stacks = Stacks(), Stacks()
        self._snapshot = Snapshot()
        with self._on_main():
            self._passes = self._all_prepared(reserved=0)
        self._passes_beside_copy: list[_Pass] = []

    def start(self, read: Mapping[str, LiveTensor], overlap: bool) -> DeviceResults:
        """Launches everything on the device's own streams, after what the current one was given.

        With `overlap` the current stream only copies the tensors; without, what it is given next
        waits for the weights to be read.
        """
        tensors = {name: tensor for name, tensor in read.items() if name in self._names}
        if not self._streams:
            return self._launch(self._passes, tensors, self._stacks)
        current = torch.cuda.current_stream(self._device)
        main = self._streams[0]
        main.wait_stream(current)
        with self._on_main():
            copies = self._allocate_copies(tensors) if overlap else None
        if copies is None:
            try:
                with self._on_main():
                    return self._launch(self._passes, tensors, self._stacks)
            finally:
                current.wait_stream(main)
        # Whatever still reads the copies of the time before.
        current.wait_stream(main)
        copies.take(tensors)
        main.wait_stream(current)
        with self._on_main():
            return self._launch(
                self._passes_beside_copy, {**tensors, **copies.tensors}, self._copied_stacks
            )

    def _allocate_copies(self, tensors: Mapping[str, LiveTensor]) -> Snapshot | None:
        """Where the tensors can be copied to; None where the device has no memory for it."""
        there = {name: read for name, read in tensors.items() if isinstance(read, Tensor)}
        if not self._passes_beside_copy:
            copied = sum(tensor.numel() * tensor.element_size() for tensor in there.values())
            self._passes_beside_copy = self._all_prepared(reserved=copied)
        try:
            self._snapshot.allocate(there)
        except torch.OutOfMemoryError:
            self._snapshot, self._copied_stacks = Snapshot(), Stacks()
            torch.cuda.empty_cache()
            return None
        return self._snapshot

    def _on_main(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[0]) if self._streams else contextlib.nullcontext()

    def _all_prepared(self, reserved: int) -> list[_Pass]:
        """The passes when so many bytes of the memory are taken already."""
        plan = self._plan
        needed = max((batch.peak for batch in plan.batches), default=0) + reserved
        if needed > plan.memory:
            raise ValueError(
                f"memory: expected at least {needed} bytes with overlap=True, {reserved} of them "
                f"for the copy of the weights, got {plan.memory}"
            )
        budget = plan.memory - reserved
        parts = split_by_budget(plan.batches, lambda batch: batch.peak, budget)
        return [_Pass.of(part, self._settings) for part in parts]

    def _launch(
        self, passes: Sequence[_Pass], tensors: Mapping[str, LiveTensor], stacks: Stacks
    ) -> DeviceResults:
        failures: _Failures = {}
        done: list[tuple[_Pass, Tensor]] = []
        for planned in passes:
            done += self._run_within_memory(planned, tensors, stacks, failures)
        empty = torch.empty(0, len(RESULT_COLUMNS), dtype=torch.float64, device=self._device)
        rows = torch.cat([empty, *(part for _, part in done)])
        event = None
        if self._streams:
            on_host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            rows = on_host.copy_(rows, non_blocking=True)
            event = torch.cuda.current_stream(self._device).record_event()
        layers = [layer for ran, _ in done for layer in ran.layers]
        sizes = [(x.index, x.windows, x.windows * x.grid.order) for x in layers]
        return DeviceResults(sizes, rows, event, failures)

    def _run_within_memory(
        self, planned: _Pass, tensors: Mapping[str, LiveTensor], stacks: Stacks, failures: _Failures
    ) -> list[tuple[_Pass, Tensor]]:
        """The results of a pass; where the memory does not suffice those of its parts."""
        try:
            read = self._read(planned, tensors, stacks, failures)
            if len(read) < len(planned.layers):
                planned = planned.without(failures, self._settings)
            return [(planned, self._run(planned, read))] if read else []
        except torch.OutOfMemoryError as caught:
            error = str(caught)
        # Beyond the handler, where the failed pass's tensors are no longer held by its frames.
        read = []
        if self._streams:
            torch.cuda.empty_cache()
        parts: Sequence[Batch] = planned.batches
        if len(parts) == 1:
            if len(planned.layers) == 1:
                failures[planned.layers[0].index] = f"out of memory: {error}"
                return []
            parts = parts[0].halves()
        done = []
        for part in parts:
            smaller = _Pass.of([part], self._settings)
            done += self._run_within_memory(smaller, tensors, stacks, failures)
        return done

    def _read(
        self, planned: _Pass, tensors: Mapping[str, LiveTensor], stacks: Stacks, failures: _Failures
    ) -> list[Tensor]:
        """The layers' stacks; a layer that has none is in `failures`."""
        read = []
        for layer in planned.layers:
            if layer.index in failures:
                continue
            try:
                own = [_raise_or_tensor(tensors[name]) for name in layer.spec.tensors]
                stack = stacks.of(layer.index, layer.spec, own)
                _check_stack(stack, layer, self._device)
                read.append(stack)
            except torch.OutOfMemoryError:
                raise
            # Whatever is wrong with one layer's tensors is that layer's result, not the run's.
            except Exception as error:
                failures[layer.index] = f"{type(error).__name__}: {error}"
        return read

    def _run(self, planned: _Pass, stacks: Sequence[Tensor]) -> Tensor:
        """(layers, 7) of `RESULT_COLUMNS`, on the device."""
        settings = self._settings
        evals = solve_side_by_side(
            planned.tasks, stacks, self._streams, settings.dtype, settings.solver
        )
        values = torch.cat([part.flatten().to(torch.float64) for part in evals])
        del evals
        bad = torch.zeros(len(planned.layers), dtype=torch.int64, device=values.device)
        bad.index_add_(0, planned.window_layers, (~values[planned.last].isfinite()).to(torch.int64))
        if self._threshold > 0:
            # Zeros enter no fit; NaN stays.
            values = torch.where(values < self._threshold, 0.0, values)
        rows = []
        for _, fits in fit_pools(values, planned.pools, settings.rule):
            columns = fits.alpha, fits.D, fits.xmin, fits.n_tail, fits.status, fits.dropped
            rows.append(torch.stack(columns, dim=1))
        return torch.cat([torch.cat(rows), bad.unsqueeze(1)], dim=1)


def _raise_or_tensor(read: LiveTensor) -> Tensor:
    if isinstance(read, Exception):
        raise read
    return read


def _check_stack(stack: Tensor, layer: LayerWindows, device: torch.device) -> None:
    """Raises ValueError for what the plan was not made for: the others of its batch go on."""
    dtype = stack.dtype if layer.is_complex and stack.is_complex() else layer.spec.dtype
    expected = (layer.spec.shape, dtype, device)
    got = (tuple(stack.shape), stack.dtype, stack.device)
    if got != expected:
        raise ValueError(f"expected a stack of {_describe(*expected)}, got {_describe(*got)}")


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {shape}, {dtype}, on {device}"
