"""Power-law fits of one ascending spectrum."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import FitTruth, check_fit, fit_truth
from benchmarks.cases import RULES, FitCase, fit_cases
from benchmarks.fit_peers import FIT_PEERS, Fit, FitPeer
from benchmarks.inputs import sets_past_cache, spectrum
from benchmarks.measure import SAMPLE_SECONDS, Bench
from benchmarks.peers import CONTENDER
from farms_fast import fit_power_law

# Values that a scan for the truth may visit; an H200 scans all candidates of 450,000.
_WORK = {"cpu": 4e8, "cuda": 2.5e11}


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    pairs = [
        pytest.param(case, peer, id=f"{case.id}-{peer.name}")
        for case in fit_cases(profile)
        for peer in FIT_PEERS
        if case.rule in peer.rules
    ]
    assert {case.rule for case in fit_cases(profile)} <= set(RULES)
    metafunc.parametrize(("case", "peer"), pairs)


@lru_cache(maxsize=16)
def spectra(size: int, device: torch.device, quick: bool) -> list[Tensor]:
    # Few enough to make: a hundred sets of a small spectrum are past every first-level cache.
    sets = min(100, sets_past_cache(size * 8, device, quick))
    return [spectrum(size, seed, device) for seed in range(sets)]


@lru_cache(maxsize=32)
def truth(case: FitCase, device: torch.device, quick: bool) -> FitTruth:
    evals = spectra(case.size, device, quick)[0]
    near = fit_power_law(evals, case.rule).xmin
    return fit_truth(evals, case.rule, near, _WORK[device.type])


def test_fit(case: FitCase, peer: FitPeer, bench: Bench) -> None:
    bench.require(peer)
    if case.rule == "ks" and case.size > peer.largest:
        pytest.skip(f"takes minutes at {case.size}; measured up to {peer.largest}")
    expected = truth(case, bench.device, bench.quick)
    sets = spectra(case.size, bench.device, bench.quick)
    xmin = fit_power_law(sets[0], case.rule).xmin
    seconds = SAMPLE_SECONDS[bench.device.type]
    ready = peer.prepare(sets[0], case.rule, xmin, seconds)

    def check(found: Fit, number: int) -> float:
        if number == 0:
            return check_fit(*found, expected, peer.accuracy)
        return 0.0

    is_contender = peer.name == CONTENDER
    bench.measure(
        family="fit",
        case=case.id,
        peer=peer.name,
        run=ready.run,
        # Those that scan a sample know the right result of the first spectrum alone.
        inputs=sets if is_contender else sets[:1],
        check=check,
        scale=1 / ready.work,
        units=1,
        sample="" if ready.work == 1 else f"{ready.work:.2g} of the scan",
        accuracy=peer.accuracy.text,
        note=peer.note,
        scanned=f"{expected.scanned} of {expected.candidates} candidates",
    )
