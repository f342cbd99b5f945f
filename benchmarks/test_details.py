"""WeightWatcher's table of details, by the drop-in function and by WeightWatcher itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fit_peers import no_gpu, on_the_cpu, quiet
from benchmarks.jobs import MINILM, minilm_folder, network, tiny
from benchmarks.measure import Bench
from benchmarks.models import resnet18
from benchmarks.peers import CONTENDER, missing_modules
from farms_fast.compat import weightwatcher
from farms_fast.testing.reference import fit_power_law
from farms_fast.weights.sources import open_source

# How far alpha may be from WeightWatcher's.
_ALPHA = 1e-4
# Layers of which all eigenvalues are computed again.
_RECOMPUTED = 3


@dataclass(frozen=True)
class DetailsCase:
    """A model and the options of its analysis.

    Attributes:
        id: its name.
        sources: (seed, device) to a module or a path.
        options: of `analyze`.
        needs: modules.
        seeds: how many sets of weights are rotated.
    """

    id: str
    sources: Callable[[int, torch.device], Any]
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seeds: int = 1


@dataclass(frozen=True)
class DetailsPeer:
    """A way to the table.

    Attributes:
        name: as the tables show it.
        prepare: (case, device) to a function from a source to the table.
        devices: where it runs.
        needs: modules.
        note: what it does.
    """

    name: str
    prepare: Callable[[DetailsCase, torch.device], Callable[[Any], Any]]
    devices: tuple[str, ...]
    needs: tuple[str, ...] = ()
    note: str = ""

    def missing(self) -> str:
        return missing_modules(self.needs)


def details_cases(profile: str) -> list[DetailsCase]:
    randomize = {"randomize": True}
    if profile == "quick":
        return [
            DetailsCase("tiny network", tiny),
            DetailsCase("tiny network, randomize", tiny, randomize),
        ]
    resnet = partial(network, resnet18)
    return [
        DetailsCase("ResNet-18 (CIFAR)", resnet, seeds=2),
        DetailsCase("ResNet-18 (CIFAR), randomize", resnet, randomize, seeds=2),
        DetailsCase("MiniLM checkpoint", minilm_folder, needs=MINILM),
        DetailsCase("MiniLM checkpoint, randomize", minilm_folder, randomize, MINILM),
    ]


def _contender(case: DetailsCase, device: torch.device) -> Callable[[Any], Any]:
    return lambda given: weightwatcher(given, device=device, **case.options)


def _package(case: DetailsCase, device: torch.device) -> Callable[[Any], Any]:
    package = on_the_cpu()

    def run(given: Any) -> Any:
        logging.disable(logging.CRITICAL)
        try:
            with quiet(), no_gpu():
                return package.WeightWatcher(model=given).analyze(**case.options)
        finally:
            logging.disable(logging.NOTSET)

    return run


DETAILS_PEERS = (
    DetailsPeer(CONTENDER, _contender, ("cpu", "cuda"), note="farms_fast.compat.weightwatcher"),
    DetailsPeer(
        "WeightWatcher",
        _package,
        ("cpu", "cuda"),
        needs=("weightwatcher",),
        note="WeightWatcher(model).analyze() with the same options, on the CPU: on a GPU it rounds "
        "weights to half precision",
    ),
)


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    pairs = [
        pytest.param(case, peer, id=f"{case.id}-{peer.name}")
        for case in details_cases(profile)
        for peer in DETAILS_PEERS
    ]
    metafunc.parametrize(("case", "peer"), pairs)


def _weight(source: Any, name: str) -> Tensor:
    weight: Tensor = source.load(f"{name}.weight").detach().float().cpu()
    return weight.permute(2, 3, 0, 1) if weight.ndim == 4 else weight


def check_contender(found: Any, given: Any, thorough: bool) -> float:
    """The norm of every layer; alpha of the smallest from singular values of NumPy."""
    source = open_source(given)
    worst, recomputed = 0.0, 0
    for row in found.sort_values("num_evals").itertuples():
        weight = _weight(source, row.longname).double().numpy()
        scale = 0.5 if weight.ndim == 4 else 1.0
        norm = scale * float(np.square(weight).sum())
        assert abs(row.norm - norm) <= 1e-10 * norm, f"{row.longname}: wrong norm"
        # Fewer than 20 have a rule of their own.
        if thorough and row.num_evals >= 20 and recomputed < _RECOMPUTED:
            recomputed += 1
            evals = scale * np.linalg.svd(weight, compute_uv=False).ravel() ** 2
            expected = float(fit_power_law(evals[evals > 1e-5], "ks")["alpha"])
            error = abs(row.alpha - expected) / _ALPHA
            assert error <= 1, f"{row.longname}: alpha {row.alpha}, expected {expected}"
            worst = max(worst, error)
    return worst


def check_package(found: Any, given: Any, device: torch.device) -> float:
    """Its alphas against those of the drop-in function."""
    expected = weightwatcher(given, device=device)
    assert found.longname.tolist() == expected.longname.tolist(), "other layers"
    error = float(np.abs(found.alpha - expected.alpha).max()) / _ALPHA
    assert error <= 1, f"alpha differs by {error * _ALPHA:.3g}"
    return error


def test_details(case: DetailsCase, peer: DetailsPeer, bench: Bench) -> None:
    bench.require(peer)
    if reason := missing_modules(case.needs):
        pytest.skip(reason)
    if peer.name != CONTENDER and bench.device.type == "cuda" and "randomize" in case.options:
        pytest.skip("takes a minute of the GPU's machine without the GPU, see the CPU's table")
    inputs = [case.sources(seed, bench.device) for seed in range(case.seeds)]
    is_contender = peer.name == CONTENDER

    def check(found: Any, number: int) -> float | None:
        if is_contender:
            return check_contender(found, inputs[number], thorough=number == 0)
        return check_package(found, inputs[number], bench.device) if number == 0 else None

    bench.measure(
        family="details",
        case=case.id,
        peer=peer.name,
        run=peer.prepare(case, bench.device),
        inputs=inputs if is_contender else inputs[:1],
        check=check,
        units=1,
        sample="",
        accuracy="alpha within 1e-4 of WeightWatcher's",
        note=peer.note,
    )
