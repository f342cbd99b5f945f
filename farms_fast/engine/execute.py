"""What is done with a batch: weights to the device, to eigenvalues, to records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farms_fast.digests import layer_digest_of
from farms_fast.engine.plan import Batch, LayerWindows
from farms_fast.records import LayerRecord, Uncertainty, nonfinite_message
from farms_fast.sources import Source
from farms_fast.spectrum import window_eigenvalues
from farms_fast.uncertainty import FitRule, fit_layers
from farms_fast.windows import window_table

# The record that is there already for a layer of that name and content.
Known = Callable[[str, str], LayerRecord | None]


@dataclass(frozen=True)
class Settings:
    """How a batch is computed.

    Attributes:
        device: where.
        dtype: precision, float64 or float32.
        solver: a solver's name, None to choose.
        rule: how spectra are fitted.
        bootstrap: resamples a layer.
    """

    device: torch.device
    dtype: torch.dtype
    solver: str | None
    rule: FitRule
    bootstrap: int


@dataclass
class LayerState:
    """A layer on its way from weights to record.

    Attributes:
        layer: the layer.
        digest: of its content; empty where there is no store.
        stack: (S, R, C) on the device, until it is solved.
        record: what came of it, once it is there.
        known: whether that record was there before this run.
    """

    layer: LayerWindows
    digest: str = ""
    stack: Tensor | None = None
    record: LayerRecord | None = None
    known: bool = False

    def fail(self, status: str, message: str) -> None:
        """Records a layer that has no spectrum, with the reason."""
        spec = self.layer.spec
        self.record = LayerRecord.without_spectrum(
            spec.name, spec.kind, spec.shape, status, message
        )


# What is done with the layers of a batch that is finished.
Keep = Callable[[Sequence[LayerState]], None]


@dataclass
class SolvedBatch:
    """A batch whose eigenvalues are under way.

    Attributes:
        batch: the batch.
        layers: its layers, without their weights.
        evals: (windows, k), the windows of those without a record one layer after the other, each
            row ascending, on the device; None where there are none.
    """

    batch: Batch
    layers: list[LayerState]
    evals: Tensor | None = None


class BatchStages:
    """The stages of `farms_fast.engine.pipeline.run` for an analysis.

    Args:
        source: where the weights are.
        settings: how they are computed.
        keep: is called with the layers of each batch when they have their records.
        known: asked for the record of a layer before it is computed; None where none can be known,
            and no digest is needed.
    """

    def __init__(
        self, source: Source, settings: Settings, keep: Keep, known: Known | None = None
    ) -> None:
        """Nothing is read yet."""
        self._source = source
        self._settings = settings
        self._keep = keep
        self._known = known
        # The tensors read last: those of a fused weight serve the layers of all of its parts.
        self._last: tuple[tuple[str, ...], list[Tensor]] = ((), [])

    def read(self, batch: Batch) -> SolvedBatch:
        """Weights of the layers that are not known yet.

        A layer that cannot be read gets a record that says so and does not stop the others.
        """
        layers = [self._load(layer) for layer in batch.layers]
        self._last = ((), [])
        return SolvedBatch(batch, layers)

    def _load(self, layer: LayerWindows) -> LayerState:
        spec, state = layer.spec, LayerState(layer)
        try:
            if self._last[0] != spec.tensors:
                self._last = spec.tensors, [self._source.load(name) for name in spec.tensors]
            tensors = self._last[1]
            if self._known is not None:
                state.digest = layer_digest_of(spec, tensors)
        # Whatever is wrong with one layer's tensors is that layer's result, not the run's.
        except Exception as error:
            state.fail("error", f"{type(error).__name__}: {error}")
            return state
        if self._known is not None:
            state.record = self._known(spec.name, state.digest)
            state.known = state.record is not None
        if state.record is None:
            try:
                stack = spec.to_stack(*tensors).detach().resolve_conj().resolve_neg()
                state.stack = stack.to(self._settings.device, non_blocking=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                state.fail("error", f"{type(error).__name__}: {error}")
        return state

    def solve(self, loaded: SolvedBatch) -> SolvedBatch:
        """Launches one call of the solver for all windows of the batch."""
        stacks: list[Tensor] = []
        tables: list[Tensor] = []
        for state in loaded.layers:
            if state.stack is not None:
                grid, entries = state.layer.grid, state.layer.spec.shape[0]
                _used_on_current_stream(state.stack)
                tables.append(window_table(grid, entries, weight=len(stacks)))
                stacks.append(state.stack)
        if stacks:
            loaded.evals = solve_windows(stacks, torch.cat(tables), loaded.batch, self._settings)
            # The launched work holds on to the weights' memory; nobody else needs them any more.
            for state in loaded.layers:
                state.stack = None
        return loaded

    def finish(self, solved: SolvedBatch) -> None:
        """Fits the spectra and hands over the records of the batch."""
        if solved.evals is not None:
            _used_on_current_stream(solved.evals)
            self._fit(solved, solved.evals.to(torch.float64))
        self._keep(solved.layers)

    def _fit(self, solved: SolvedBatch, evals: Tensor) -> None:
        settings = self._settings
        # One transfer for all layers, and the only one before the fits.
        values = evals.cpu().numpy()
        usable: list[tuple[LayerState, slice]] = []
        end = 0
        for state in solved.layers:
            if state.record is not None:
                continue
            rows = slice(end, end := end + state.layer.windows)
            if bad := int((~np.isfinite(values[rows, -1])).sum()):
                state.fail("nonfinite", nonfinite_message(bad, state.layer.windows))
            else:
                usable.append((state, rows))
        fits = fit_layers(
            [evals[rows] for _, rows in usable],
            [state.layer.spec.shape[0] for state, _ in usable],
            [state.layer.grid for state, _ in usable],
            settings.rule,
            settings.bootstrap,
            solved.batch.fit_values,
        )
        for (state, rows), fit in zip(usable, fits, strict=True):
            spec, grid = state.layer.spec, state.layer.grid
            low, high = fit.interval()
            spread = Uncertainty(fit.window_alphas, fit.standard_error, low, high, *fit.halves)
            state.record = LayerRecord.from_spectra(
                spec.name,
                spec.kind,
                spec.shape,
                # Not a part of the batch's array, which would live as long as any of its layers.
                values[rows].copy(),
                fit.pooled,
                grid.rows,
                grid.columns,
                spread,
                evals=fit.pooled_evals,
                eps=torch.finfo(settings.dtype).eps,
            )

    def give_up(self, batch: Batch, error: str) -> None:
        """The records of layers that do not fit into the device's memory."""
        layers = [LayerState(layer) for layer in batch.layers]
        for state in layers:
            state.fail("error", f"out of memory: {error}")
        self._keep(layers)


def _used_on_current_stream(tensor: Tensor) -> None:
    """Keeps the allocator from reusing memory of another thread's stream too early."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def solve_windows(
    stacks: Sequence[Tensor], table: Tensor, batch: Batch, settings: Settings
) -> Tensor:
    """Eigenvalues of a batch; when a CUDA device's memory ends, again with half of the workspace.

    Args:
        stacks: (S, R, C) each, on the settings' device.
        table: the batch's windows of the stacks (see `farms_fast.windows.window_table`).
        batch: their order, and the workspace to begin with.
        settings: the precision and the solver.

    Returns:
        (windows, k) of the settings' dtype, on the device; only launched on CUDA.

    Raises:
        torch.OutOfMemoryError: one matrix and its workspace do not fit.
    """
    budget = batch.workspace
    while True:
        try:
            return window_eigenvalues(
                stacks, table, batch.order, settings.dtype, settings.solver, budget
            )
        except torch.OutOfMemoryError:
            if settings.device.type != "cuda":
                raise
            torch.cuda.empty_cache()
            budget //= 2
            # One matrix and its workspace must fit; below that the op names what it needs.
            if budget < batch.order**2 * settings.dtype.itemsize:
                raise
