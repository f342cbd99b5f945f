"""Models through the drop-in functions of `farms_fast.compat` and through the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models, published
from benchmarks.jobs import MINILM, minilm_folder
from benchmarks.peers import BOTH, CONTENDER, missing_modules
from farms_fast.compat import net_esd_estimator, net_esd_estimator_farms
from farms_fast.compat.farms.published_windows import (
    PublishedWindows,
    block_windows,
    sampled_windows,
)
from farms_fast.compat.farms.spectra import kernel_positions

Results = dict[str, list[Any]]
# The published default.
_CONV_NORM = 0.5


@dataclass(frozen=True)
class DropInCase:
    """A model and a function that was published for it.

    Attributes:
        id: its name.
        sources: (seed, device) to a module.
        windows: the function takes windows, with its own defaults.
        rule: `fix_fingers`.
        stride: the published way takes every so many windows and candidates.
        seeds: how many sets of weights are rotated.
        needs: modules.
    """

    id: str
    sources: Callable[[int, torch.device], nn.Module]
    windows: bool
    rule: str
    stride: int = 1
    seeds: int = 2
    needs: tuple[str, ...] = ()

    def drop_in(self, net: nn.Module) -> Results:
        function = net_esd_estimator_farms if self.windows else net_esd_estimator
        return function(net, fix_fingers=self.rule)


def _resnet18(seed: int, device: torch.device) -> nn.Module:
    return models.initialised(models.resnet18(), seed, device)


def _tiny(seed: int, device: torch.device) -> nn.Module:
    built = nn.ModuleDict({"conv": nn.Conv2d(6, 24, 3), "fc": nn.Linear(80, 36)})
    return models.initialised(built, seed, device)


def _minilm(seed: int, device: torch.device) -> nn.Module:
    """The linear layers of the checkpoint, as the published functions want a module."""
    from safetensors.torch import load_file

    file = Path(minilm_folder(seed, device)) / "model.safetensors"
    layers = nn.ModuleDict()
    for name, tensor in load_file(file).items():
        if tensor.ndim == 2 and "embeddings" not in name:
            module = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            module.weight = nn.Parameter(tensor.float(), requires_grad=False)
            layers[name.removesuffix(".weight").replace(".", "_")] = module
    return layers.to(device)


def drop_in_cases(profile: str) -> list[DropInCase]:
    if profile == "quick":
        return [
            DropInCase("tiny network, windows, median", _tiny, True, "xmin_mid"),
            DropInCase("tiny network, whole matrices, peak", _tiny, False, "xmin_peak", stride=3),
        ]
    stride = 7 if profile == "cuda" else 5
    return [
        DropInCase(
            "ResNet-18 (CIFAR), net_esd_estimator_farms, median", _resnet18, True, "xmin_mid"
        ),
        DropInCase("ResNet-18 (CIFAR), net_esd_estimator, median", _resnet18, False, "xmin_mid"),
        DropInCase(
            "MiniLM, net_esd_estimator_farms, peak", _minilm, True, "xmin_peak", stride, 1, MINILM
        ),
        DropInCase(
            "MiniLM, net_esd_estimator, peak", _minilm, False, "xmin_peak", stride, 1, MINILM
        ),
    ]


@dataclass(frozen=True)
class Spectrum:
    """The matrices of one published spectrum."""

    layer: str
    matrices: list[Tensor]


def spectra_of(net: nn.Module, windows: bool) -> Iterator[Spectrum]:
    """Every spectrum that is fitted, with the windows of the functions' defaults."""
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach()
        stack = kernel_positions(weight)
        if weight.ndim == 4:
            stack = stack * math.sqrt(_CONV_NORM)
        if not windows:
            yield Spectrum(name, list(stack))
        elif weight.ndim == 4:
            tall = stack if stack.shape[1] >= stack.shape[2] else stack.mT
            blocks = block_windows(tall.shape[1], tall.shape[2], 2.0)
            for start in blocks.row_starts:
                yield Spectrum(name, [_cut(matrix, blocks, start, 0) for matrix in tall])
        else:
            grid = sampled_windows(weight.shape[0], weight.shape[1], 100, 2.0, 10)
            positions = [(row, column) for row in grid.row_starts for column in grid.column_starts]
            yield Spectrum(name, [_cut(stack[0], grid, *position) for position in positions])


def _cut(matrix: Tensor, windows: PublishedWindows, row: int, column: int) -> Tensor:
    return matrix[row : row + windows.rows, column : column + windows.columns]


def candidates_of(evals: Tensor, rule: str) -> range:
    """Indices at which the published rule lets the tail start (xmin_pos 2, 100 bins)."""
    size = evals.numel()
    if rule == "xmin_mid":
        return range(size // 2, size // 2 + 1)
    values = evals.cpu().double().numpy()
    counts, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[np.argmax(counts)]
    low = int(np.searchsorted(values, math.log10(0.95 * peak), "left"))
    high = int(np.searchsorted(values, 1.5 * peak, "right"))
    return range(low, min(high, size - 1))


@dataclass(frozen=True)
class Published:
    """What the published way gave for a spectrum.

    Attributes:
        layer: its layer.
        evals: all eigenvalues, or those of some windows.
        fit: alpha, D, xmin; the best of some candidates where not all are taken.
    """

    layer: str
    evals: Tensor
    fit: tuple[float, float, float]


def published_way(
    case: DropInCase, net: nn.Module, stride: int, whole: list[Tensor] | None = None
) -> list[Published]:
    """One `svdvals` a matrix, one step a candidate.

    Args:
        case: what to do.
        net: the module.
        stride: every so many windows and candidates are taken.
        whole: the whole spectra, to be fitted where not all windows are solved.
    """
    found = []
    for number, spectrum in enumerate(spectra_of(net, case.windows)):
        evals = published.pool(published.window_eigenvalues(spectrum.matrices[::stride]))
        fitted = evals if whole is None else whole[number]
        chosen = candidates_of(fitted, case.rule)[::stride]
        found.append(Published(spectrum.layer, evals, published.fit(fitted, chosen)))
    return found


def _contender(case: DropInCase, whole: list[Tensor]) -> Callable[[nn.Module], Any]:
    return case.drop_in


def _published(case: DropInCase, whole: list[Tensor]) -> Callable[[nn.Module], Any]:
    def run(net: nn.Module) -> list[Published]:
        return published_way(case, net, case.stride, None if case.stride == 1 else whole)

    return run


@dataclass(frozen=True)
class DropInPeer:
    """A way to do it.

    Attributes:
        name: as the tables show it.
        prepare: (case, whole spectra) to what is timed.
        note: what it does.
    """

    name: str
    prepare: Callable[[DropInCase, list[Tensor]], Callable[[nn.Module], Any]]
    note: str
    devices: tuple[str, ...] = BOTH
    needs: tuple[str, ...] = field(default=())

    def missing(self) -> str:
        return missing_modules(self.needs)


DROP_IN_PEERS = (
    DropInPeer(CONTENDER, _contender, "the function of farms_fast.compat, with its defaults"),
    DropInPeer(
        "published FARMS",
        _published,
        "one float32 torch.linalg.svdvals a matrix, one step a candidate, over the same windows",
    ),
)

# Of alpha and D under the median rule, of D under the peak rule, between float32 and float64.
_FIT = 1e-3
# Of the sum of float32 eigenvalues; torch's svdvals on CUDA stops early.
_SUM = {"cpu": 1e-4, "cuda": 1e-2}


def check_drop_in(found: Results, case: DropInCase, net: nn.Module, thorough: bool) -> float:
    """Every layer's moments; with `thorough`, the cheapest layers against the published way."""
    parts: dict[str, list[Spectrum]] = {}
    for spectrum in spectra_of(net, case.windows):
        parts.setdefault(spectrum.layer, []).append(spectrum)
    assert found["longname"] == list(parts), "other layers"
    cost = {
        name: sum(len(s.matrices) * min(s.matrices[0].shape) ** 3 for s in spectra)
        for name, spectra in parts.items()
    }
    few = set(sorted(parts, key=cost.__getitem__)[:3])
    worst = 0.0
    for at, (name, spectra) in enumerate(parts.items()):
        norm = sum(float(m.double().square().sum()) for s in spectra for m in s.matrices)
        assert abs(found["eigs"][at].astype(np.float64).sum() - norm) <= 1e-5 * norm, name
        if not (thorough and name in few):
            continue
        fits = []
        for spectrum in spectra:
            # On the CPU, where float32 singular values are as good as float32 is.
            matrices = [matrix.cpu() for matrix in spectrum.matrices]
            evals = published.pool(published.window_eigenvalues(matrices))
            fits.append(published.fit(evals, candidates_of(evals, case.rule)))
        errors = [abs(found["D"][at] - float(np.mean([fit[1] for fit in fits])))]
        if case.rule == "xmin_mid":
            errors.append(abs(found["alpha"][at] - float(np.mean([fit[0] for fit in fits]))))
        assert max(errors) <= _FIT, f"{name}: alpha or D differ by {max(errors):.3g}"
        worst = max(worst, max(errors) / _FIT)
    return worst


def check_published(found: list[Published], case: DropInCase, net: nn.Module) -> float:
    """The sums of the eigenvalues, which are the squared norms of the matrices."""
    worst = 0.0
    for result, spectrum in zip(found, spectra_of(net, case.windows), strict=True):
        taken = spectrum.matrices[:: case.stride]
        norm = sum(float(m.double().square().sum()) for m in taken)
        allowed = _SUM[result.evals.device.type] * norm
        error = abs(float(result.evals.double().sum()) - norm) / allowed
        assert error <= 1, f"{result.layer}: wrong sum of eigenvalues"
        worst = max(worst, error)
    return worst
