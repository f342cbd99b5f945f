"""The analysis of a model that is being trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from farms_fast.core.arguments import (
    check_dtype,
    check_int,
    check_module,
    check_sampling,
    check_solver,
    not_negative,
)
from farms_fast.core.extension import has_cuda
from farms_fast.engine.machine import machine_of
from farms_fast.engine.plan import Plan, plan
from farms_fast.engine.stages import Settings
from farms_fast.live.passes import DevicePasses
from farms_fast.live.pending import EvalFilter, LayerAlpha, PendingAlphas
from farms_fast.live.weights import LiveWeights
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.windows import FixedAspectSampling, Sampling
from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.module_tensors import module_tensor
from farms_fast.weights.stacks import LayerSpec, WeightTransform

_DEFAULT_SAMPLING = FixedAspectSampling()


class LiveAnalysis:
    """Alphas of a live model's layers, again and again, at a cost that training does not notice.

    The same fits as those of `farms_fast.analyze` with `bootstrap=0`: alpha, D, xmin and n_tail
    are equal to the bit where the whole model is on one device. What depends on shapes alone is
    prepared once; each start only launches work: all layers are solved in batches of equal order,
    pooled, sorted and fitted on the device that holds them, and a few numbers a layer are read
    back. Nothing else is computed, and no file is written.

    Args:
        model: a module, no path and no state dict; on the CPU, on a CUDA device or spread over
            several; wrapped by `torch.compile`, by DistributedDataParallel and the like, or not.
            It is neither run nor changed. Layers are found and named as by `farms_fast.analyze`.
        sampling: the windows; `FullMatrix()` for the whole matrices.
        xmin: where the tail starts, "median", "ks" or "peak" (see `farms_fast.fit_power_law`).
        xmin_pos: for the median rule.
        bins: for the peak rule.
        dtype: torch.float64 or torch.float32 (see `farms_fast.esd` for what the latter costs).
        solver: a name from `build_info()["solvers"]`; None chooses.
        memory: bytes that an analysis may take on each device, a snapshot of the weights included;
            None is half of the device's.
        include: glob or globs of the layers to analyse; None is all but embeddings.
        exclude: glob or globs of the layers to leave out.
        layout: how kernels are stored that no module of torch's owns, as for `farms_fast.analyze`.
        min_evals: layers with fewer eigenvalues get the status "too_few".
        evals_threshold: eigenvalues below it are dropped: they neither count nor enter the fit.
        change: what stands for the model's weights, as in `layers_from_module`.

    Attributes:
        specs: the layers, in the model's order. Their `tensors` are names in its state dict.
        skipped: what is not analysed, with the reason.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown rule, dtype or solver, a number out of range, a pattern that matches
            nothing, a layer on the meta device or on one that this build cannot use, or one that
            does not fit into the memory.

    Example:
        >>> import torch
        >>> from farms_fast import FixedAspectSampling
        >>> from farms_fast.live import LiveAnalysis
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32))
        >>> live = LiveAnalysis(model, FixedAspectSampling(rows=16))
        >>> for epoch in range(2):
        ...     with torch.no_grad():
        ...         model[1].weight += torch.eye(32)
        ...     print([(layer.name, round(layer.alpha, 2)) for layer in live()])
        [('0', 2.18), ('1', 2.51)]
        [('0', 2.18), ('1', 3.9)]
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling = _DEFAULT_SAMPLING,
        xmin: str = "median",
        *,
        xmin_pos: float = 2,
        bins: int = 100,
        dtype: torch.dtype = torch.float64,
        solver: str | None = None,
        memory: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        layout: str = "auto",
        min_evals: int = 0,
        evals_threshold: float = 0.0,
        change: WeightTransform | None = None,
    ) -> None:
        check_module("model", model)
        rule = FitRule.checked(xmin, xmin_pos, bins, getattr(sampling, "compat", None))
        check_dtype(dtype)
        check_sampling(sampling)
        budget = None if memory is None else check_int("memory", memory, least=1)
        least = check_int("min_evals", min_evals)
        self._evals = EvalFilter(least, not_negative("evals_threshold", evals_threshold), rule.xmin)
        with _no_autocast_no_grad():
            specs, skipped = layers_from_module(
                model, include, exclude, change=change, layout=layout
            )
            devices = _devices(model, specs)
        plans: dict[torch.device, Plan] = {}
        for device in dict.fromkeys(devices):
            check_solver(solver, device)
            plans[device] = plan(
                [spec for spec, its in zip(specs, devices, strict=True) if its == device],
                sampling,
                budget,
                xmin=rule.xmin,
                bootstrap=0,
                dtype=dtype,
                machine=machine_of(device),
            )
        # Layers that no window fits on are among the skipped ones of their plan.
        names = {name for planned in plans.values() for name in planned.names}
        self.specs = tuple(spec for spec in specs if spec.name in names)
        self.skipped = [*skipped, *(skip for planned in plans.values() for skip in planned.skipped)]
        self._weights = LiveWeights(model, self.specs)
        position = {spec.name: number for number, spec in enumerate(self.specs)}
        self._passes = [
            DevicePasses(
                _renumbered(planned, position),
                Settings(device, dtype, solver, rule, bootstrap=0),
                self._evals.threshold,
            )
            for device, planned in plans.items()
        ]

    def __call__(self) -> list[LayerAlpha]:
        """`start` and its result; waits for the devices."""
        return self.start().result()

    def start(self, *, overlap: bool = False) -> PendingAlphas:
        """Launches the analysis of the weights as they are now.

        On CUDA nothing waits but, on the device, streams for one another: what the current stream
        is given afterwards may change the weights. On the CPU everything is done when this returns.

        Args:
            overlap: copy the weights, so that training goes on at once while the rest happens on a
                stream of its own; the copy's memory is kept for the next time. Otherwise the
                current stream waits until the analysis is done. No difference on the CPU.

        Raises:
            ValueError: a parameter's name, shape, dtype or device has changed since construction,
                or the copy does not fit into the memory.

        Example:
            >>> import torch
            >>> from farms_fast.live import LiveAnalysis
            >>> live = LiveAnalysis(torch.nn.Linear(64, 32))
            >>> pending = live.start(overlap=True)
            >>> [(layer.name, layer.n_evals) for layer in pending.result()]
            [('weight', 480)]
        """
        with _no_autocast_no_grad():
            self._weights.check()
            read = self._weights.read()
            parts = [passes.start(read, overlap) for passes in self._passes]
        return PendingAlphas(self.specs, self._evals, parts)


@contextlib.contextmanager
def _no_autocast_no_grad() -> Iterator[None]:
    """Disables autocast, gradients and inference mode while weights are read.

    A parametrised weight is computed as it is outside of the caller's contexts, and a tensor made
    in inference mode could not be written outside of it the next time.
    """
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def _devices(model: nn.Module, specs: Sequence[LayerSpec]) -> list[torch.device]:
    """Where each layer's weight is, or the model's first one where a weight cannot be had."""
    first = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    devices = []
    for spec in specs:
        try:
            device = module_tensor(model, spec.tensors[0]).device
        except Exception:  # the layer's own result will say what it is
            device = first
        if device.type == "meta":
            raise ValueError(
                f"model: {spec.tensors[0]!r} is on the meta device: load the weights first"
            )
        if device.type != "cpu" and not (device.type == "cuda" and has_cuda()):
            expected = (
                "the CPU or CUDA devices" if has_cuda() else "the CPU (no CUDA in this build)"
            )
            raise ValueError(
                f"model: expected weights on {expected}, got {spec.tensors[0]!r} on {device}"
            )
        devices.append(device)
    return devices


def _renumbered(planned: Plan, position: Mapping[str, int]) -> Plan:
    """The plan with each layer's position among all devices' layers."""
    batches = [
        replace(batch, layers=tuple(replace(x, index=position[x.spec.name]) for x in batch.layers))
        for batch in planned.batches
    ]
    return replace(planned, batches=tuple(batches))
