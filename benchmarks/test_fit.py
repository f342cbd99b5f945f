"""Power-law fits of ascending spectra, one or many in a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import FitTruth, check_fit, fit_truth
from benchmarks.cases import RULES, FitCase, fit_cases
from benchmarks.fit_peers import FIT_PEERS, Fit, FitPeer
from benchmarks.inputs import packed_spectra
from benchmarks.measure import SAMPLE_SECONDS, Bench
from benchmarks.peers import CONTENDER
from farms_fast import fit_power_law
from farms_fast.spectra.power_law import fit_power_laws, sort_spectra

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
def spectra(size: int, count: int, device: torch.device, quick: bool) -> list[Tensor]:
    # Few enough to make: a hundred sets of a small spectrum are past every first-level cache.
    return packed_spectra(size, count, 100, device, quick)


@lru_cache(maxsize=32)
def truth(case: FitCase, device: torch.device, quick: bool) -> FitTruth:
    evals = spectra(case.size, 1, device, quick)[0]
    near = fit_power_law(evals, case.rule).xmin
    return fit_truth(evals, case.rule, near, _WORK[device.type])


def together_run(case: FitCase) -> Callable[[Tensor], Fit]:
    """All spectra of a set in one call; the fit of the first."""

    def run(packed: Tensor) -> Fit:
        offsets = torch.arange(case.spectra + 1, device=packed.device) * case.size
        first = fit_power_laws(sort_spectra(packed, offsets), offsets, case.rule)[0]
        return first.alpha, first.D, first.xmin

    return run


def test_fit(case: FitCase, peer: FitPeer, bench: Bench) -> None:
    bench.require(peer)
    if case.rule == "ks" and case.size > peer.largest:
        pytest.skip(f"takes minutes at {case.size}; measured up to {peer.largest}")
    expected = truth(case, bench.device, bench.quick)
    is_contender = peer.name == CONTENDER
    # A peer fits one spectrum at a time.
    together = case.spectra if is_contender else 1
    sets = spectra(case.size, together, bench.device, bench.quick)
    one = sets[0][: case.size]
    xmin = fit_power_law(one, case.rule).xmin
    seconds = SAMPLE_SECONDS[bench.device.type]
    ready = peer.prepare(one, case.rule, xmin, seconds)
    run = ready.run if together == 1 else together_run(case)
    part = ready.work * together / case.spectra

    def check(found: Fit, number: int) -> float:
        if number == 0:
            return check_fit(*found, expected, peer.accuracy)
        return 0.0

    bench.measure(
        family="fit",
        case=case.id,
        peer=peer.name,
        run=run,
        # Those that scan a sample know the right result of the first spectrum alone.
        inputs=sets if is_contender else sets[:1],
        check=check,
        scale=1 / part,
        units=1,
        sample="" if part == 1 else f"{part:.2g} of the scan",
        accuracy=peer.accuracy.text,
        note=peer.note,
        scanned=f"{expected.scanned} of {expected.candidates} candidates",
    )
