"""What is done with a batch: weights to the device, to eigenvalues, to records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.engine.plan import Batch, LayerWindows
from farms_fast.spectra.bootstrap import FitRule, LayerFits, fit_layers
from farms_fast.spectra.esd import window_eigenvalues
from farms_fast.spectra.power_law import nonfinite_message
from farms_fast.spectra.windows import window_table
from farms_fast.weights.digest import layer_digest_of
from farms_fast.weights.sources import Source

# Whether the results of a layer of that name and digest are there already.
IsKnown = Callable[[str, str], bool]


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
    """A layer on its way from weights to fits.

    Attributes:
        layer: the layer.
        digest: of its content; empty where there is no store.
        stack: (S, R, C) on the device, until it is solved.
        known: whether its results were there before this run.
        failure: status and message of a layer without a spectrum.
        window_evals: (windows, k), the eigenvalues of each window, ascending by row.
        fits: of those eigenvalues.
    """

    layer: LayerWindows
    digest: str = ""
    stack: Tensor | None = None
    known: bool = False
    failure: tuple[str, str] | None = None
    window_evals: NDArray[np.float64] | None = None
    fits: LayerFits | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to compute."""
        return self.known or self.failure is not None or self.fits is not None


# What is done with the layers of a batch that is finished.
Keep = Callable[[Sequence[LayerState]], None]


@dataclass
class SolvedBatch:
    """A batch whose eigenvalues are under way.

    Attributes:
        batch: the batch.
        layers: its layers, without their weights.
        evals: (windows, k), the windows of those not done one layer after the other, each
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
        keep: is called with the layers of each batch when they are done.
        is_known: asked before a layer is computed; None where none can be known, and no digest is
            needed.
    """

    def __init__(
        self, source: Source, settings: Settings, keep: Keep, is_known: IsKnown | None = None
    ) -> None:
        self._source = source
        self._settings = settings
        self._keep = keep
        self._is_known = is_known
        # The tensors read last: those of a fused weight serve the layers of all of its parts.
        self._last: tuple[tuple[str, ...], list[Tensor]] = ((), [])

    def read(self, batch: Batch) -> SolvedBatch:
        """Weights of the layers that are not known yet.

        A layer that cannot be read fails alone and does not stop the others.
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
            if self._is_known is not None:
                state.digest = layer_digest_of(spec, tensors)
        # Whatever is wrong with one layer's tensors is that layer's result, not the run's.
        except Exception as error:
            state.failure = "error", f"{type(error).__name__}: {error}"
            return state
        if self._is_known is not None:
            state.known = self._is_known(spec.name, state.digest)
        if not state.known:
            try:
                stack = spec.to_stack(*tensors).detach().resolve_conj().resolve_neg()
                state.stack = stack.to(self._settings.device, non_blocking=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                state.failure = "error", f"{type(error).__name__}: {error}"
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
        """Fits the spectra and hands over the layers of the batch."""
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
            if state.is_done:
                continue
            rows = slice(end, end := end + state.layer.windows)
            if bad := int((~np.isfinite(values[rows, -1])).sum()):
                state.failure = "nonfinite", nonfinite_message(bad, state.layer.windows)
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
            # Not a part of the batch's array, which would live as long as any of its layers.
            state.window_evals = values[rows].copy()
            state.fits = fit

    def give_up(self, batch: Batch, error: str) -> None:
        """Hands over layers that do not fit into the device's memory."""
        layers = [LayerState(layer) for layer in batch.layers]
        for state in layers:
            state.failure = "error", f"out of memory: {error}"
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
        table: the batch's windows of the stacks (see `farms_fast.spectra.windows.window_table`).
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
