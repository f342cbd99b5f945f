"""Windows cut out of a weight, and their Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.agreement import FloatArray, check_gram
from benchmarks.cases import GramCase, gram_cases
from benchmarks.inputs import weights
from benchmarks.measure import Bench
from benchmarks.peers import CONTENDER, GRAM_PEERS, GramPeer, window_slices


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    device = metafunc.config.getoption("device")
    peers = [peer for peer in GRAM_PEERS if device in peer.devices]
    metafunc.parametrize("case", gram_cases(profile), ids=lambda case: case.id)
    metafunc.parametrize("peer", peers, ids=lambda peer: peer.name)


@dataclass(frozen=True)
class Problem:
    sets: list[Tensor]
    squared_norms: list[FloatArray]
    windows: dict[int, FloatArray]


@lru_cache(maxsize=16)
def problem(case: GramCase, device: torch.device, quick: bool) -> Problem:
    sets = weights(case.rows, case.columns, torch.float32, device, quick)
    grid = window_slices(case.sampling.grid(case.rows, case.columns))
    norms = [
        torch.stack([weight[position].double().square().sum() for position in grid]).cpu().numpy()
        for weight in sets
    ]
    chosen = {0, len(grid) - 1}
    return Problem(sets, norms, {i: sets[0][grid[i]].double().cpu().numpy() for i in chosen})


def test_gram(case: GramCase, peer: GramPeer, bench: Bench) -> None:
    bench.require(peer)
    given = problem(case, bench.device, bench.quick)
    grid = case.sampling.grid(case.rows, case.columns)
    result_bytes = grid.count * grid.order**2 * 8

    def check(found: object, number: int) -> float:
        known = given.windows if number == 0 else {}
        return check_gram(found, known, given.squared_norms[number])

    bench.measure(
        family="gram",
        case=case.id,
        peer=peer.name,
        run=peer.prepare(grid),
        inputs=given.sets,
        check=check,
        fresh=peer.fresh,
        # What windows share may take as much as the result, and a mebibyte is for their table.
        budget_bytes=2 * result_bytes + 2**20 if peer.name == CONTENDER else None,
        units=grid.count,
        sample="",
        accuracy="2^-52 inner longest vector^2",
        note=peer.note,
    )
