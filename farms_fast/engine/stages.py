"""What an analysis does with a batch: weights to the device, to eigenvalues, to fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from farms_fast.engine.plan import Batch, LayerWindows
from farms_fast.engine.solve import SolveTask
from farms_fast.engine.streams import use_on_current_stream
from farms_fast.spectra.bootstrap import FitRule, LayerFits, fit_layers
from farms_fast.spectra.power_law import nonfinite_message
from farms_fast.weights.digest import layer_digest_of
from farms_fast.weights.sources import Source
from farms_fast.weights.stacks import LayerSpec

# Whether the results of a layer of that name and digest are there already.
IsKnown = Callable[[str, str], bool]


@dataclass(frozen=True)
class Settings:
    """How a batch is computed."""

    device: torch.device
    dtype: torch.dtype
    solver: str | None
    rule: FitRule
    bootstrap: int  # resamples of each layer

    def least_spread(self, layer: LayerWindows) -> float:
        """How far the tail of a layer has to spread, as of `FitRule.least_spread`."""
        return self.rule.least_spread(layer.spec.dtype, layer.grid.order, self.dtype)


@dataclass
class LayerState:
    """What has come of a layer so far."""

    layer: LayerWindows
    digest: str = ""  # of its content; empty where there is no store
    known: bool = False  # its results were there before this run
    failure: tuple[str, str] | None = None  # status and message of a layer without a spectrum
    window_evals: NDArray[np.float64] | None = None  # (windows, k), each row ascending
    fits: LayerFits | None = None

    def fail(self, error: Exception) -> None:
        """Makes an error the layer's result."""
        self.failure = "error", f"{type(error).__name__}: {error}"


# What is done with the layers of a batch that is finished.
Keep = Callable[[Sequence[LayerState]], None]


@dataclass(frozen=True)
class LoadedBatch:
    """A batch whose weights are on the device."""

    batch: Batch
    layers: list[LayerState]
    unsolved: list[LayerState]  # those that are neither known nor failed
    stacks: list[Tensor]  # their weights, (S, R, C)


@dataclass(frozen=True)
class SolvedBatch:
    """A batch whose eigenvalues are under way."""

    batch: Batch
    layers: list[LayerState]
    unfitted: list[LayerState]  # those whose windows were solved
    evals: Tensor | None  # of their windows, (windows, k), each row ascending, on the device


class BatchStages:
    """The stages of `farms_fast.engine.pipeline.run` for an analysis.

    `keep` gets the layers of each batch when they are done. `is_known` is asked before a layer is
    computed; without it no digest is taken.
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

    def read(self, batch: Batch) -> LoadedBatch:
        """Brings unknown layers' weights to the device; one that cannot be read fails by itself."""
        loaded = LoadedBatch(batch, [LayerState(layer) for layer in batch.layers], [], [])
        for state in loaded.layers:
            stack = self._load(state)
            if stack is not None:
                loaded.unsolved.append(state)
                loaded.stacks.append(stack)
        self._last = ((), [])
        return loaded

    def _load(self, state: LayerState) -> Tensor | None:
        """A layer's stack on the device; None where the layer is known or has failed."""
        spec = state.layer.spec
        try:
            tensors = self._tensors(spec)
            if self._is_known is not None:
                state.digest = layer_digest_of(spec, tensors)
        # Whatever is wrong with one layer's tensors is that layer's result, not the run's.
        except Exception as error:
            state.fail(error)
            return None
        state.known = self._is_known is not None and self._is_known(spec.name, state.digest)
        if state.known:
            return None
        try:
            stack = spec.to_stack(*tensors).detach().resolve_conj().resolve_neg()
            # The batch is planned for it: another would cost the batch.
            if stack.shape != spec.shape or stack.is_complex() != state.layer.is_complex:
                raise ValueError(
                    f"to_stack: expected a {'complex' if state.layer.is_complex else 'real'} stack "
                    f"of shape {spec.shape}, got {stack.dtype} of shape {tuple(stack.shape)}"
                )
            return stack.to(self._settings.device, non_blocking=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            state.fail(error)
            return None

    def _tensors(self, spec: LayerSpec) -> list[Tensor]:
        if self._last[0] != spec.tensors:
            self._last = spec.tensors, [self._source.load(name) for name in spec.tensors]
        return self._last[1]

    def solve(self, loaded: LoadedBatch) -> SolvedBatch:
        """Launches one call of the solver for all windows of the batch."""
        batch, settings = loaded.batch, self._settings
        evals = None
        if loaded.stacks:
            for stack in loaded.stacks:
                use_on_current_stream(stack)
            layers = [state.layer for state in loaded.unsolved]
            windows = [(x.grid, x.spec.shape[0]) for x in layers]
            task = SolveTask.of(windows, batch.workspace, published=settings.rule.published)
            evals = task.solve(loaded.stacks, settings.dtype, settings.solver)
        return SolvedBatch(batch, loaded.layers, loaded.unsolved, evals)

    def finish(self, solved: SolvedBatch) -> None:
        """Fits the spectra and hands over the layers of the batch."""
        if solved.evals is not None:
            use_on_current_stream(solved.evals)
            self._fit(solved, solved.evals.to(torch.float64))
        self._keep(solved.layers)

    def _fit(self, solved: SolvedBatch, evals: Tensor) -> None:
        settings = self._settings
        # One transfer for all layers, and the only one before the fits.
        values = evals.cpu().numpy()
        finite: list[tuple[LayerState, slice]] = []
        end = 0
        for state in solved.unfitted:
            rows = slice(end, end := end + state.layer.windows)
            if bad := int((~np.isfinite(values[rows, -1])).sum()):
                state.failure = "nonfinite", nonfinite_message(bad, state.layer.windows)
            else:
                finite.append((state, rows))
        fits = fit_layers(
            [evals[rows] for _, rows in finite],
            [state.layer.spec.shape[0] for state, _ in finite],
            [state.layer.grid for state, _ in finite],
            settings.rule,
            settings.bootstrap,
            solved.batch.fit_values,
            [settings.least_spread(state.layer) for state, _ in finite],
        )
        for (state, rows), fit in zip(finite, fits, strict=True):
            # Not a part of the batch's array, which would live as long as any of its layers.
            state.window_evals = values[rows].copy()
            state.fits = fit

    def give_up(self, batch: Batch, error: str) -> None:
        """Hands over layers that do not fit into the device's memory."""
        failure = "error", f"out of memory: {error}"
        self._keep([LayerState(layer, failure=failure) for layer in batch.layers])
