"""Eigenvalues of batches of square windows, from the windows on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.agreement import FloatArray, check_eigenvalues, lapack_eigenvalues
from benchmarks.cases import EigenCase, eigen_cases
from benchmarks.inputs import gaussian_windows
from benchmarks.measure import Bench
from benchmarks.peers import CONTENDER, EIGEN_PEERS, EigenPeer, contender


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    device = metafunc.config.getoption("device")
    names = [contender(metafunc.config.getoption("solver")), *EIGEN_PEERS]
    peers = [peer for peer in names if device in peer.devices]
    metafunc.parametrize("case", eigen_cases(profile), ids=lambda case: case.id)
    metafunc.parametrize("peer", peers, ids=lambda peer: peer.name)


@dataclass(frozen=True)
class Problem:
    sets: list[Tensor]
    squared_norms: list[FloatArray]


@lru_cache(maxsize=16)
def problem(case: EigenCase, device: torch.device, quick: bool) -> Problem:
    sets = gaussian_windows(case.batch, case.order, device, quick)
    return Problem(sets, [w.square().sum(dim=(1, 2)).cpu().numpy() for w in sets])


@lru_cache(maxsize=32)
def truth(case: EigenCase, device: torch.device, quick: bool) -> dict[int, FloatArray]:
    """LAPACK's eigenvalues of the first matrix and, where that is quick, of two more."""
    windows = problem(case, device, quick).sets[0]
    chosen = [0, case.batch // 2, case.batch - 1][: 3 if case.order <= 1000 else 1]
    return {i: lapack_eigenvalues(windows[i].cpu().numpy()) for i in set(chosen)}


def test_eigenvalues(case: EigenCase, peer: EigenPeer, bench: Bench) -> None:
    bench.require(peer)
    given = problem(case, bench.device, bench.quick)
    expected = truth(case, bench.device, bench.quick)
    is_contender = peer.name == CONTENDER
    windows = given.sets[0]

    def of(matrices: int) -> Any:
        run, ready = peer.prepare(case.order, matrices), peer.fresh(windows[:matrices])
        return lambda: run(ready)

    count = case.batch
    if not is_contender:
        count = bench.sample(of, case.batch, peer.one_by_one)
    accuracy = peer.accuracy[bench.device.type]

    def check(found: object, number: int) -> float:
        known = expected if number == 0 else {}
        shape = (count, case.order)
        return check_eigenvalues(found, shape, known, given.squared_norms[number], accuracy)

    budget = None
    if bench.device.type == "cuda" and is_contender:
        # The op's own default, a quarter of the device, and its result.
        memory = torch.cuda.get_device_properties(bench.device).total_memory
        budget = memory // 4 + windows.shape[0] * case.order * np.dtype(np.float64).itemsize
    bench.measure(
        family="eigenvalues",
        case=case.id,
        peer=peer.name,
        run=peer.prepare(case.order, count),
        inputs=[w[:count] for w in given.sets],
        check=check,
        fresh=peer.fresh,
        scale=case.batch / count,
        budget_bytes=budget,
        units=case.batch,
        sample="" if count == case.batch else f"{count} of {case.batch}",
        accuracy=accuracy.text,
        note=peer.note,
    )
