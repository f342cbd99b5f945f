"""Runs a batch: weights to the device, windows to eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.engine.plan import Batch, LayerWindows
from farms_fast.sources import Source
from farms_fast.spectrum import window_eigenvalues
from farms_fast.windows import window_table


@dataclass(frozen=True)
class LayerSpectrum:
    """The eigenvalues of a layer's windows, or why there are none.

    Attributes:
        layer: the layer.
        evals: (windows, k), ascending by row, on the device; None where the layer could not be
            read.
        error: why, empty when it could.
    """

    layer: LayerWindows
    evals: Tensor | None
    error: str = ""


def batch_spectra(
    source: Source,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    solver: str | None,
    memory: int | None,
) -> list[LayerSpectrum]:
    """Eigenvalues of every window of a batch, layer by layer.

    Args:
        source: where the weights are.
        batch: the layers.
        device: where to compute.
        dtype: precision, float64 or float32.
        solver: a solver's name, None to choose.
        memory: bytes that the run may take on its device; half of it is workspace here.

    Returns:
        One entry a layer, in the batch's order. A layer that cannot be read has an error instead of
        eigenvalues and does not stop the others.
    """
    stacks: list[Tensor] = []
    tables: list[Tensor] = []
    errors: dict[int, str] = {}
    for layer in batch.layers:
        try:
            stack = layer.spec.to_stack(*(source.load(name) for name in layer.spec.tensors))
            stack = stack.detach().resolve_conj().resolve_neg().to(device, non_blocking=True)
        except torch.OutOfMemoryError:
            raise
        # Whatever else is wrong with one layer's tensors is that layer's result, not the run's.
        except Exception as error:
            errors[layer.index] = f"{type(error).__name__}: {error}"
            continue
        tables.append(window_table(layer.grid, entries=layer.spec.shape[0], weight=len(stacks)))
        stacks.append(stack)
    if stacks:
        workspace = None if memory is None else memory // 2
        evals = _solve(stacks, torch.cat(tables), batch.order, dtype, solver, workspace)
        parts = iter(evals.split([len(table) for table in tables]))
    return [
        LayerSpectrum(layer, None, errors[layer.index])
        if layer.index in errors
        else LayerSpectrum(layer, next(parts))
        for layer in batch.layers
    ]


def _solve(
    stacks: list[Tensor],
    table: Tensor,
    order: int,
    dtype: torch.dtype,
    solver: str | None,
    workspace: int | None,
) -> Tensor:
    """The fused op; when the device runs out of memory, again with half of the workspace."""
    budget = workspace or 0
    while True:
        try:
            return window_eigenvalues(stacks, table, order, dtype, solver, budget)
        except torch.OutOfMemoryError:
            if stacks[0].device.type != "cuda":
                raise
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(stacks[0].device)
            budget = (budget or free) // 2
            # One matrix and its workspace must fit; below that the op names what it needs.
            if budget < order * order * dtype.itemsize:
                raise
