"""Whole jobs: a model's weights to alpha per layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.job_checks import (
    ACCURACY,
    check_contender,
    check_live,
    check_published,
    check_weightwatcher,
)
from benchmarks.jobs import (
    JOB_PEERS,
    JobCase,
    JobPeer,
    Layer,
    analysis_of,
    job_cases,
    layers_of,
)
from benchmarks.measure import Bench
from benchmarks.peers import CONTENDER, missing_modules
from farms_fast import esd


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    pairs = [
        pytest.param(case, peer, id=f"{case.id}-{peer.name}")
        for case in job_cases(profile)
        for peer in JOB_PEERS
        if peer.measures(case)
    ]
    metafunc.parametrize(("case", "peer"), pairs)


@dataclass(frozen=True)
class Problem:
    sources: list[Any]
    layers: list[list[Layer]]
    pooled: dict[str, Tensor]


_CASES: dict[str, JobCase] = {}


@lru_cache(maxsize=16)
def problem(name: str, device: torch.device) -> Problem:
    case = _CASES[name]
    sources = [case.sources(seed, device) for seed in range(case.seeds)]
    layers = [layers_of(source, case.sampling, device) for source in sources]
    pooled = {}
    for layer in layers[0]:
        parts = esd(layer.stack, case.sampling)
        pooled[layer.name] = parts.flatten().sort().values
    return Problem(sources, layers, pooled)


def test_job(case: JobCase, peer: JobPeer, bench: Bench) -> None:
    bench.require(peer)
    if reason := missing_modules(case.needs):
        pytest.skip(reason)
    _CASES[case.id] = case
    given = problem(case.id, bench.device)
    is_contender = peer.name == CONTENDER
    is_whole = is_contender or peer.live_only

    def check(found: Any, number: int) -> float | None:
        layers = given.layers[number]
        if is_contender and case.live:
            analysis = analysis_of(given.sources[number], case, bench.device)
            check_live(found, analysis)
            found = analysis
        if is_whole:
            return check_contender(found, layers, case, thorough=number == 0)
        if number > 0:
            return None
        if peer.name == "WeightWatcher":
            return check_weightwatcher(found, given.pooled)
        accuracy = ACCURACY[bench.device.type]
        return check_published(found, layers, case, given.pooled, accuracy)

    scale, sample = 1.0, ""
    if not is_whole and case.stride > 1:
        scale, sample = float(case.stride), f"1/{case.stride} of windows and candidates"
        if peer.full_only:
            layers = len(given.layers[0])
            taken = len(range(0, layers, case.stride))
            scale, sample = layers / taken, f"{taken} of {layers} layers"
    budget = None
    if is_whole and bench.device.type == "cuda":
        memory = torch.cuda.get_device_properties(bench.device).total_memory
        budget = case.memory or memory // 2
    sources = [peer.source(case, source) for source in given.sources]
    bench.measure(
        family="jobs",
        case=case.id,
        peer=peer.name,
        run=peer.prepare(case, bench.device, given.pooled),
        inputs=sources if is_whole else sources[:1],
        check=check,
        scale=scale,
        budget_bytes=budget,
        units=1,
        sample=sample,
        accuracy="as its eigenvalues and its fit",
        note=peer.note,
    )
