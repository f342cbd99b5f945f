"""The whole way from a model to a table: source, layers, windows, spectra, fits, records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from farms_fast.core.arguments import (
    MOST_RESAMPLES,
    DTypeLike,
    check_int,
    check_sampling,
    check_solver,
    default_device,
    dtype_of,
    memory_bytes,
    path_of,
    resolve_device,
)
from farms_fast.core.progress import Progress, reporter
from farms_fast.engine.distributed import Ranks, share
from farms_fast.engine.machine import machine_of
from farms_fast.engine.pipeline import run
from farms_fast.engine.plan import plan
from farms_fast.engine.stages import BatchStages, LayerState, Settings
from farms_fast.results.analysis import Analysis
from farms_fast.results.run_recorder import recording
from farms_fast.results.settings import AnalysisSettings, declared_sampling
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.windows import FixedAspectSampling, Sampling
from farms_fast.weights.constants import without_constants
from farms_fast.weights.sources import AdapterSource, open_source
from farms_fast.weights.sources.hub import local_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    dtype: DTypeLike = torch.float64,
    solver: str | None = None,
    memory: int | str | None = None,
    base: nn.Module | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    download: bool = False,
    key: str | None = None,
    store: str | os.PathLike[str] | None = None,
    force: bool = False,
    process_group: ProcessGroup | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: str = "auto",
    progress: bool | Progress = True,
) -> Analysis:
    """Spectrum, power-law fit and metrics of every layer of a model.

    Windows of equal order are solved together, whatever layers they come from.

    Args:
        model_or_state_dict_or_path: a module; a mapping of names to tensors; the path of a file of
            weights or of a checkpoint's folder; or a model's name on the Hugging Face Hub (see
            `open_source`).
        sampling: the windows; `FullMatrix()` for the whole matrices.
        xmin: where the tail starts, "median", "ks" or "peak" (see `fit_power_law`). The median
            rule's alpha repeats itself best between halves of the windows.
        xmin_pos: for the median rule. A setting that the rule does not read is recorded as its
            default: it is no other analysis, and no other run of a store.
        bins: for the peak rule, at most 2^20.
        bootstrap: resamples for the standard error and interval of alpha, at most 100,000; 0 for
            none.
        device: where to compute; None is CUDA when there is a device and this build has the CUDA
            ops, else the CPU.
        dtype: torch.float64 or torch.float32 (see `esd` for what the latter costs), or its name.
        solver: a name from `build_info()["solvers"]`; None chooses.
        memory: bytes that the run may take on its device, also as text such as "40GiB" or "500MB";
            None is half of the device's.
        base: the model that a LoRA adapter changes, where the first argument is the adapter's
            folder (see `open_source`).
        download: fetch a model by its name on the Hub, where the local cache lacks it.
        key: dotted path of the mapping that holds the weights, such as "state_dict_ema", where a
            checkpoint has several.
        store: an SQLite file that every layer is written to when it is finished, made if there is
            none: those of a batch are finished together, and on a CPU a batch takes about 10 s at
            most. A run with the same settings, source, selection of layers and release goes on
            where one has ended: layers whose weights are the same are not computed again (see
            `farms_fast.results.store`).
        force: compute every layer anew; older results stay in the store beside the new ones.
        process_group: share the layers out over the processes of a torch.distributed group, each
            of which makes this call. The first of them gets all layers, the others those that they
            took. `torchrun -m farms_fast analyze` does so by itself.
        include: glob or globs of the layers to analyse; None is all but embeddings.
        exclude: glob or globs of the layers to leave out.
        layout: how the kernels of convolutions are stored, where no module tells: "torch" as
            `(out, in, *positions)`, "channels_last" as `(*positions, in, out)`, as Keras, Flax and
            TensorFlow do, or "auto" as the tensor's name and shape tell. Kernels that may be either
            are skipped.
        progress: True for a bar on stderr when it is a terminal, False for none, or a function
            `progress(done_layers, all_layers, name)`.

    Returns:
        An `Analysis`. Layers with a value that is not finite, and layers that cannot be read, are
        in it with their status and message; tensors that are no layers are in `.skipped`.

    Raises:
        FileNotFoundError: the path does not exist.
        TypeError: an argument of another kind.
        ValueError: an unknown rule, device, dtype or solver, a pattern that matches nothing, no
            weights to read, a layer that does not fit into the memory, force without a store, or
            a store that is no results store.
        OSError: the store cannot be read or written. The layers before are in it.
        KeyboardInterrupt: of an interruption; with a store it says what is saved.

    Example:
        >>> import torch
        >>> import farms_fast
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32))
        >>> analysis = farms_fast.analyze(model, farms_fast.FixedAspectSampling(rows=16))
        >>> [(layer.name, layer.windows, layer.status) for layer in analysis]
        [('0', 225, 'ok'), ('1', 225, 'ok')]
    """
    rule = FitRule.checked(xmin, xmin_pos, bins, getattr(sampling, "compat", None))
    precision = dtype_of(dtype)
    resamples = check_int("bootstrap", bootstrap, most=MOST_RESAMPLES)
    budget = None if memory is None else memory_bytes(memory)
    check_sampling(sampling)
    where = resolve_device(device, default_device())
    check_solver(solver, where)
    if store is not None:
        path_of("store", store)
    ranks = Ranks.of(process_group)
    if force and store is None:
        raise ValueError("force: computes anew what a store holds, so it needs store=")
    source = open_source(model_or_state_dict_or_path, base=base, key=key, download=download)
    specs, skipped = source.layers(include, exclude, layout=layout)
    if include is None:  # what the caller asks for by name is what the caller wants
        specs, skipped = without_constants(source, specs, skipped)
    of_base = None
    if base is not None and isinstance(source, AdapterSource):
        of_base = _absolute(base) or source.base.description
    settings = AnalysisSettings(
        source=_absolute(model_or_state_dict_or_path) or source.description,
        base=of_base,
        key=key,
        include=_patterns(include),
        exclude=_patterns(exclude),
        layout=layout,
        sampling=declared_sampling(sampling),
        xmin=rule.xmin,
        xmin_pos=float(xmin_pos if rule.xmin == "median" else FitRule.xmin_pos),
        bins=int(bins) if rule.xmin == "peak" else FitRule.bins,
        bootstrap=resamples,
        dtype=str(precision).removeprefix("torch."),
        device=str(where),
        solver=solver or "auto",
    )
    planned = partial(
        plan,
        sampling=sampling,
        memory=budget,
        xmin=rule.xmin,
        bootstrap=resamples,
        dtype=precision,
        machine=machine_of(where),
    )
    full_plan = own_plan = planned(specs)
    positions: Sequence[int] = range(len(specs))
    if ranks.size > 1:
        owners = share([cost.seconds for _, cost in full_plan.layers], ranks.size)
        positions = [
            layer.index
            for (layer, _), owner in zip(full_plan.layers, owners, strict=True)
            if owner == ranks.rank
        ]
        own_plan = planned([specs[position] for position in positions])
    with recording(store, settings, ranks, len(full_plan.names), force) as recorder:
        with reporter(progress, len(own_plan.names), own_plan.windows) as report:

            def keep(layers: Sequence[LayerState]) -> None:
                for state in recorder.take(layers, positions, torch.finfo(precision).eps):
                    report(state.layer.spec.name, state.layer.windows, not state.known)

            is_known = recorder.is_known if recorder.needs_digests else None
            stages = BatchStages(
                source, Settings(where, precision, solver, rule, resamples), keep, is_known
            )
            run(own_plan.batches, stages, where, own_plan.overlapping)
        return recorder.analysis(full_plan.names, [*skipped, *full_plan.skipped])


def _absolute(model: object) -> str:
    """The path of a checkpoint wherever the process is; empty for what is no path."""
    if not isinstance(model, (str, os.PathLike)):
        return ""
    return os.path.abspath(local_path(os.fsdecode(model)))


def _patterns(patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
