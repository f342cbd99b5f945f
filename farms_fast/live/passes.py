"""What one device does for an analysis: prepared once, launched again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farms_fast.core.packing import pack
from farms_fast.engine.distributed import share
from farms_fast.engine.plan import Batch, LayerWindows, Plan
from farms_fast.engine.stages import Settings, solve_windows
from farms_fast.engine.streams import LANES, beside, side_by_side
from farms_fast.live.pending import RESULT_COLUMNS, Launched
from farms_fast.live.weights import Read, Snapshot, Stacks
from farms_fast.spectra.power_law import sort_spectra
from farms_fast.spectra.windows import window_table


@dataclass(frozen=True)
class _Pool:
    """Layers whose eigenvalues lie one after the other and are sorted and fitted in one call.

    Attributes:
        begin: of their values among those of the pass.
        end: of them.
        offsets: (layers + 1,), int64, on the device, from `begin`.
    """

    begin: int
    end: int
    offsets: Tensor


@dataclass(frozen=True)
class _Pass:
    """Batches that are solved, pooled and fitted together.

    Attributes:
        batches: in this order.
        tables: the window table of each, on the CPU, where the op reads it.
        lanes: which stream each takes.
        last: (windows,), where each window's largest eigenvalue is, on the device.
        window_layers: (windows,), the layer of each window, on the device.
        pools: in the order of the layers.
    """

    batches: tuple[Batch, ...]
    tables: tuple[Tensor, ...]
    lanes: tuple[int, ...]
    last: Tensor
    window_layers: Tensor
    pools: tuple[_Pool, ...]

    @property
    def layers(self) -> list[LayerWindows]:
        """In the order of the results."""
        return [layer for batch in self.batches for layer in batch.layers]


class DevicePasses:
    """The layers whose weights are on one device.

    Args:
        plan: their windows in batches; the index of a layer is its position in the model.
        settings: how they are computed.
        threshold: eigenvalues below it are dropped.
    """

    def __init__(self, plan: Plan, settings: Settings, threshold: float) -> None:
        self._settings = settings
        self._threshold = threshold
        self._names = {
            name: None for b in plan.batches for layer in b.layers for name in layer.spec.tensors
        }
        self._plan = plan
        self._streams: list[torch.cuda.Stream] = []
        if settings.device.type == "cuda":
            self._streams = beside(torch.cuda.Stream(settings.device))
        self._stacks, self._copied_stacks = Stacks(), Stacks()
        self._snapshot = Snapshot()
        with self._on_main():
            self._usual = self._all_prepared(reserved=0)
        self._beside_copy: list[_Pass] = []

    def start(self, read: Mapping[str, Read], overlap: bool) -> Launched:
        """Launches everything on the device's own streams, after what the current one was given.

        Args:
            read: the model's tensors as `LiveWeights.read` gives them.
            overlap: take a copy of the tensors on the current stream, which need not wait for the
                rest; otherwise what it is given next waits for the weights to be read.
        """
        tensors = {name: found for name, found in read.items() if name in self._names}
        if not self._streams:
            return self._launched(self._usual, tensors, self._stacks)
        current = torch.cuda.current_stream(self._settings.device)
        main = self._streams[0]
        main.wait_stream(current)
        with self._on_main():
            copies = self._room_for_copies(tensors) if overlap else None
        if copies is None:
            try:
                with self._on_main():
                    return self._launched(self._usual, tensors, self._stacks)
            finally:
                current.wait_stream(main)
        # Whatever still reads the copies of the time before.
        current.wait_stream(main)
        copies.take(tensors)
        main.wait_stream(current)
        with self._on_main():
            return self._launched(
                self._beside_copy, {**tensors, **copies.tensors}, self._copied_stacks
            )

    def _room_for_copies(self, tensors: Mapping[str, Read]) -> Snapshot | None:
        """Where the tensors can be copied to; None where the device has no memory for it."""
        there = {name: found for name, found in tensors.items() if isinstance(found, Tensor)}
        if not self._beside_copy:
            copied = sum(tensor.numel() * tensor.element_size() for tensor in there.values())
            self._beside_copy = self._all_prepared(reserved=copied)
        try:
            self._snapshot.allocate(there)
        except torch.OutOfMemoryError:
            self._snapshot, self._copied_stacks = Snapshot(), Stacks()
            torch.cuda.empty_cache()
            return None
        return self._snapshot

    def _on_main(self) -> contextlib.AbstractContextManager[object]:
        """The stream that everything is prepared, pooled and fitted on."""
        return torch.cuda.stream(self._streams[0]) if self._streams else contextlib.nullcontext()

    def _all_prepared(self, reserved: int) -> list[_Pass]:
        """The passes when so many bytes of the memory are taken already."""
        plan = self._plan
        least = max((batch.peak for batch in plan.batches), default=0) + reserved
        if least > plan.memory:
            raise ValueError(
                f"memory: expected at least {least} bytes with overlap=True, {reserved} of them "
                f"for the copy of the weights, got {plan.memory}"
            )
        return [
            self._prepared(batches)
            for batches in pack(plan.batches, lambda batch: batch.peak, plan.memory - reserved)
        ]

    def _launched(
        self, passes: Sequence[_Pass], tensors: Mapping[str, Read], stacks: Stacks
    ) -> Launched:
        failures: dict[int, str] = {}
        done: list[tuple[_Pass, Tensor]] = []
        for one in passes:
            done += self._within_memory(one, tensors, stacks, failures)
        device = self._settings.device
        columns = len(RESULT_COLUMNS)
        rows = torch.cat(
            [torch.empty(0, columns, dtype=torch.float64, device=device), *(row for _, row in done)]
        )
        event = None
        if device.type == "cuda":
            on_host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            rows = on_host.copy_(rows, non_blocking=True)
            event = torch.cuda.current_stream(device).record_event()
        layers = [layer for one, _ in done for layer in one.layers]
        sizes = [(x.index, x.windows, x.windows * x.grid.order) for x in layers]
        return Launched(sizes, rows, event, failures)

    def _within_memory(
        self,
        wanted: _Pass,
        tensors: Mapping[str, Read],
        stacks: Stacks,
        failures: dict[int, str],
    ) -> list[tuple[_Pass, Tensor]]:
        """The results of a pass; where the memory does not suffice those of its parts.

        A layer that cannot be read, or not be solved even alone, is in `failures`.
        """
        try:
            found = self._read(wanted, tensors, stacks, failures)
            if len(found) < len(wanted.layers):
                wanted = self._prepared(_without(wanted.batches, failures))
            return [(wanted, self._run(wanted, found))] if found else []
        except torch.OutOfMemoryError as caught:
            error = str(caught)
        # Beyond the handler, where the failed pass's tensors are no longer held by its frames.
        found = []
        if self._settings.device.type == "cuda":
            torch.cuda.empty_cache()
        parts: Sequence[Batch] = wanted.batches
        if len(parts) == 1:
            if len(wanted.layers) == 1:
                failures[wanted.layers[0].index] = f"out of memory: {error}"
                return []
            parts = parts[0].halves()
        done = []
        for part in parts:
            done += self._within_memory(self._prepared([part]), tensors, stacks, failures)
        return done

    def _read(
        self,
        wanted: _Pass,
        tensors: Mapping[str, Read],
        stacks: Stacks,
        failures: dict[int, str],
    ) -> list[Tensor]:
        """The layers' stacks; a layer that has none is in `failures`."""
        found = []
        for layer in wanted.layers:
            if layer.index in failures:
                continue
            try:
                given = [_tensor(tensors[name]) for name in layer.spec.tensors]
                stack = stacks.of(layer.index, layer.spec, given)
                _check_stack(stack, layer, self._settings.device)
                found.append(stack)
            except torch.OutOfMemoryError:
                raise
            # Whatever is wrong with one layer's tensors is that layer's result, not the run's.
            except Exception as error:
                failures[layer.index] = f"{type(error).__name__}: {error}"
        return found

    def _run(self, wanted: _Pass, stacks: Sequence[Tensor]) -> Tensor:
        """(layers, 7) of `RESULT_COLUMNS`, on the device."""
        evals = self._eigenvalues(wanted, stacks)
        packed = torch.cat([part.flatten().to(torch.float64) for part in evals])
        del evals
        bad = torch.zeros(len(wanted.layers), dtype=torch.int64, device=packed.device)
        bad.index_add_(0, wanted.window_layers, (~packed[wanted.last].isfinite()).to(torch.int64))
        if self._threshold > 0:
            # Zeros enter no fit; NaN stays.
            packed = torch.where(packed < self._threshold, 0.0, packed)
        rows = []
        for pool in wanted.pools:
            values = sort_spectra(packed[pool.begin : pool.end], pool.offsets)
            fits = self._settings.rule.fit_at(values, pool.offsets)
            kept = fits.alpha, fits.D, fits.xmin, fits.n_tail, fits.status, fits.dropped
            rows.append(torch.stack(kept, dim=1))
        return torch.cat([torch.cat(rows), bad.unsqueeze(1)], dim=1)

    def _eigenvalues(self, wanted: _Pass, stacks: Sequence[Tensor]) -> list[Tensor]:
        """(windows, k) of each batch."""
        evals = []
        begin = 0
        with side_by_side(self._streams) as lanes:
            for batch, table, lane in zip(wanted.batches, wanted.tables, wanted.lanes, strict=True):
                end = begin + len(batch.layers)
                with lanes[lane]:
                    evals.append(solve_windows(stacks[begin:end], table, batch, self._settings))
                begin = end
        return evals

    def _prepared(self, batches: Sequence[Batch]) -> _Pass:
        device = self._settings.device
        layers = [layer for batch in batches for layer in batch.layers]
        windows = torch.tensor([layer.windows for layer in layers], dtype=torch.int64, device="cpu")
        orders = torch.tensor(
            [layer.grid.order for layer in layers], dtype=torch.int64, device="cpu"
        )
        window_layers = torch.arange(len(layers), device="cpu").repeat_interleave(windows)
        last = orders[window_layers].cumsum(0) - 1
        tables = []
        for batch in batches:
            numbered = enumerate(batch.layers)
            rows = [window_table(x.grid, x.spec.shape[0], weight=n) for n, x in numbered]
            tables.append(torch.cat(rows))
        return _Pass(
            tuple(batches),
            tuple(tables),
            tuple(share([batch.cost.seconds for batch in batches], LANES)),
            last.to(device),
            window_layers.to(device),
            tuple(_pools((windows * orders).tolist(), _fit_values(batches), device)),
        )


def _tensor(read: Read) -> Tensor:
    if isinstance(read, Exception):
        raise read
    return read


def _check_stack(stack: Tensor, layer: LayerWindows, device: torch.device) -> None:
    """Raises ValueError for what the plan was not made for: the others of its batch go on."""
    dtype = stack.dtype if layer.is_complex and stack.is_complex() else layer.spec.dtype
    planned = (layer.spec.shape, dtype, device)
    found = (tuple(stack.shape), stack.dtype, stack.device)
    if found != planned:
        raise ValueError(f"expected a stack of {_told(*planned)}, got {_told(*found)}")


def _told(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {shape}, {dtype}, on {device}"


def _without(batches: Sequence[Batch], failures: Mapping[int, str]) -> list[Batch]:
    """The batches without layers that failed."""
    left = []
    for batch in batches:
        layers = tuple(layer for layer in batch.layers if layer.index not in failures)
        if layers:
            left.append(replace(batch, layers=layers))
    return left


def _fit_values(batches: Sequence[Batch]) -> int:
    """Values that the batches' peaks have room to fit at a time."""
    total = 0
    for batch in batches:
        evals = batch.windows * batch.order
        total += min(batch.fit_values, evals)
    return total


def _pools(sizes: Sequence[int], most: int, device: torch.device) -> Iterator[_Pool]:
    """Layers of so many values each, at most so many values in one call, or one layer."""
    begin = 0
    for run in pack(sizes, int, most):
        lengths = torch.tensor(run, dtype=torch.int64, device="cpu")
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        end = begin + sum(run)
        yield _Pool(begin, end, offsets.to(device))
        begin = end
