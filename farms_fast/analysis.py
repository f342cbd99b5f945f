"""The whole way from a model to a table: source, layers, windows, spectra, fits, records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from farms_fast._extension import __version__, has_cuda
from farms_fast.arguments import (
    check_dtype,
    check_sampling,
    check_solver,
    natural,
    resolve_device,
)
from farms_fast.engine.execute import LayerSpectrum, batch_spectra
from farms_fast.engine.plan import plan
from farms_fast.power_law import xmin_rule
from farms_fast.progress import Progress, reporter
from farms_fast.records import LayerRecord, Uncertainty
from farms_fast.results import Analysis
from farms_fast.sources import open_source
from farms_fast.uncertainty import FitRule, fit_layers
from farms_fast.windows import FixedAspectSampling, Sampling

_DEFAULT_SAMPLING = FixedAspectSampling()


def analyze(
    model_or_state_dict_or_path: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    sampling: Sampling = _DEFAULT_SAMPLING,
    xmin: str = "median",
    *,
    xmin_pos: float = 2,
    bins: int = 100,
    bootstrap: int = 100,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float64,
    solver: str | None = None,
    memory: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool | Progress = True,
) -> Analysis:
    """Spectrum, power-law fit and metrics of every layer of a model.

    Windows of equal order are solved together, whatever layers they come from.

    Args:
        model_or_state_dict_or_path: a module; a mapping of names to tensors; a safetensors file, a
            pickled state dict, or a folder of a checkpoint (see `farms_fast.sources.open_source`).
        sampling: the windows; `FullMatrix()` for the whole matrices.
        xmin: where the tail starts, "median", "ks" or "peak" (see `fit_power_law`). The median
            rule's alpha repeats itself best between halves of the windows.
        xmin_pos: for the median rule.
        bins: for the peak rule.
        bootstrap: resamples for the standard error and interval of alpha, 0 for none.
        device: where to compute; None is CUDA when there is a device and this build has the CUDA
            ops, else the CPU.
        dtype: torch.float64 or torch.float32 (see `esd` for what the latter costs).
        solver: a name from `build_info()["solvers"]`; None chooses.
        memory: bytes that the run may take on its device; None is no more than half of it.
        include: glob or globs of the layers to analyse; None is all but embeddings.
        exclude: glob or globs of the layers to leave out.
        progress: True for a bar on stderr when it is a terminal, False for none, or a function
            `progress(done_layers, all_layers, name)`.

    Returns:
        An `Analysis`. Layers with a value that is not finite, and layers that cannot be read, are
        in it with their status and message; tensors that are no layers are in `.skipped`.

    Raises:
        FileNotFoundError: the path does not exist.
        TypeError: an argument of another kind.
        ValueError: an unknown rule, device, dtype or solver, a pattern that matches nothing, no
            weights to read.

    Example:
        >>> import torch
        >>> import farms_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32))
        >>> analysis = farms_fast.analyze(model, farms_fast.FixedAspectSampling(rows=16))
        >>> [(layer.name, layer.windows, layer.status) for layer in analysis]
        [('0', 225, 'ok'), ('1', 225, 'ok')]
    """
    rule = FitRule(xmin_rule(xmin), xmin_pos, bins, getattr(sampling, "compat", None))
    check_dtype(dtype)
    resamples = natural("bootstrap", bootstrap)
    budget = None if memory is None else natural("memory", memory, least=1)
    check_sampling(sampling)
    where = resolve_device(device, _default_device())
    check_solver(solver, where)
    # A spectrum without values: the rule's own settings are checked before any weight is read.
    rule.fit(torch.empty(0, dtype=torch.float64), [0])
    source = open_source(model_or_state_dict_or_path)
    specs, skipped = source.layers(include, exclude)
    planned = plan(specs, sampling, budget)
    records: dict[int, LayerRecord] = {}
    total = sum(len(batch.layers) for batch in planned.batches)
    with reporter(progress) as report:
        for batch in planned.batches:
            spectra = batch_spectra(source, batch, where, dtype, solver, budget)
            for index, record in _records(spectra, rule, resamples, dtype):
                records[index] = record
                report(len(records), total, record.name)
    settings: dict[str, object] = {
        "source": source.description,
        "sampling": str(sampling),
        "xmin": rule.xmin,
        "xmin_pos": float(xmin_pos),
        "bins": int(bins),
        "bootstrap": resamples,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(where),
        "solver": solver or "auto",
        "farms_fast": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    ordered = [records[index] for index in sorted(records)]
    return Analysis(ordered, [*skipped, *planned.skipped], settings)


def _records(
    spectra: Sequence[LayerSpectrum], rule: FitRule, bootstrap: int, dtype: torch.dtype
) -> Iterator[tuple[int, LayerRecord]]:
    """The records of a batch's layers, each with its position in the model."""
    usable: list[tuple[LayerSpectrum, torch.Tensor]] = []
    for spectrum in spectra:
        spec = spectrum.layer.spec
        if spectrum.evals is None:
            status, message = "error", spectrum.error
        elif bad := int(spectrum.evals.isnan().any(dim=1).sum()):
            status = "nonfinite"
            message = f"NaN, infinity or overflow in {bad} of {len(spectrum.evals)} windows"
        else:
            usable.append((spectrum, spectrum.evals.to(torch.float64)))
            continue
        yield (
            spectrum.layer.index,
            LayerRecord.without_spectrum(spec.name, spec.kind, spec.shape, status, message),
        )
    layers = [spectrum.layer for spectrum, _ in usable]
    fits = fit_layers(
        [evals for _, evals in usable],
        [layer.spec.shape[0] for layer in layers],
        [layer.grid for layer in layers],
        rule,
        bootstrap,
    )
    for (_, evals), layer, fit in zip(usable, layers, fits, strict=True):
        low, high = fit.interval()
        spread = Uncertainty(fit.window_alphas, fit.standard_error, low, high, *fit.halves)
        yield (
            layer.index,
            LayerRecord.from_spectra(
                layer.spec.name,
                layer.spec.kind,
                layer.spec.shape,
                evals.cpu().numpy(),
                fit.pooled,
                layer.grid.rows,
                layer.grid.columns,
                spread,
                evals=fit.pooled_evals.cpu().numpy(),
                eps=torch.finfo(dtype).eps,
            ),
        )


def _default_device() -> torch.device:
    return torch.device("cuda" if has_cuda() and torch.cuda.is_available() else "cpu")
