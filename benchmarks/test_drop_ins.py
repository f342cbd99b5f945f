"""Models through the drop-in functions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.drop_ins import (
    DROP_IN_PEERS,
    DropInCase,
    DropInPeer,
    check_drop_in,
    check_published,
    drop_in_cases,
    spectra_of,
)
from benchmarks.measure import Bench
from benchmarks.peers import CONTENDER, missing_modules
from farms_fast.core import ops


def parametrise(metafunc: pytest.Metafunc, profile: str) -> None:
    pairs = [
        pytest.param(case, peer, id=f"{case.id}-{peer.name}")
        for case in drop_in_cases(profile)
        for peer in DROP_IN_PEERS
    ]
    metafunc.parametrize(("case", "peer"), pairs)


@lru_cache(maxsize=8)
def nets(case: DropInCase, device: torch.device) -> list[nn.Module]:
    return [case.sources(seed, device) for seed in range(case.seeds)]


@lru_cache(maxsize=8)
def whole_spectra(case: DropInCase, device: torch.device) -> list[Tensor]:
    """The first network's spectra in float32, ascending, in the published order."""
    spectra = []
    for spectrum in spectra_of(nets(case, device)[0], case.windows):
        stack = torch.stack(spectrum.matrices)
        entries, rows, columns = stack.shape
        table = torch.zeros((entries, 6), dtype=torch.int64)
        table[:, 1], table[:, 4], table[:, 5] = torch.arange(entries), rows, columns
        evals = ops.window_eigvalsh([stack], table, min(rows, columns))
        spectra.append(evals.flatten().sort().values.float())
    return spectra


def test_drop_in(case: DropInCase, peer: DropInPeer, bench: Bench) -> None:
    bench.require(peer)
    if reason := missing_modules(case.needs):
        pytest.skip(reason)
    given = nets(case, bench.device)
    is_contender = peer.name == CONTENDER

    def check(found: Any, number: int) -> float | None:
        if is_contender:
            return check_drop_in(found, case, given[number], thorough=number == 0)
        return check_published(found, case, given[number])

    sampled = not is_contender and case.stride > 1
    bench.measure(
        family="drop_ins",
        case=case.id,
        peer=peer.name,
        run=peer.prepare(case, whole_spectra(case, bench.device)),
        inputs=given if is_contender else given[:1],
        check=check,
        scale=float(case.stride) if sampled else 1.0,
        units=1,
        sample=f"1/{case.stride} of windows and candidates" if sampled else "",
        accuracy="1e-3 of alpha and D" if is_contender else "of the sum, 1e-4 (CPU), 1e-2 (CUDA)",
        note=peer.note,
    )
