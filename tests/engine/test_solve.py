"""The one way from windows to eigenvalues to fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.engine import solve
from farms_fast.engine.solve import SolveTask, fit_pools, make_pools, solve_side_by_side
from farms_fast.engine.streams import make_streams
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.testing import reference
from tests.support.bounds import error_bound


def test_tasks_side_by_side_solve_their_own_stacks(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    sampling = FixedAspectSampling(rows=6, per_dim=2)
    shapes = [[(2, 12, 9), (1, 6, 8)], [(3, 7, 5)], [(1, 20, 6)]]
    grids = [[sampling, sampling], [FullMatrix()], [sampling]]
    tasks, stacks = [], []
    for number, (sizes, rules) in enumerate(zip(shapes, grids, strict=True)):
        windows = [(rule.grid(*size[1:]), size[0]) for rule, size in zip(rules, sizes, strict=True)]
        tasks.append(SolveTask.of(windows, stream=number % 2))
        stacks += [torch.randn(size, generator=generator).to(device) for size in sizes]
    evals = solve_side_by_side(tasks, stacks, make_streams(device))
    assert [tuple(own.shape) for own in evals] == [(10, 6), (3, 5), (4, 6)]
    assert [task.windows for task in tasks] == [(8, 2), (3,), (4,)]
    rest = iter(stacks)
    for task, own in zip(tasks, evals, strict=True):
        arrays = [next(rest).double().cpu().numpy() for _ in task.windows]
        for row, (weight, entry, top, left, rows, columns) in zip(own, task.table, strict=True):
            window = arrays[weight][entry, top : top + rows, left : left + columns]
            expected = reference.eigenvalues(window)
            np.testing.assert_allclose(row.cpu(), expected, rtol=0, atol=error_bound(expected))


def test_pools_fit_as_each_spectrum_alone(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    spectra = [1 + rng.pareto(2.0, size) for size in (40, 7, 90, 30)]
    lengths = [len(one) for one in spectra]
    values = torch.from_numpy(np.concatenate(spectra)).to(device)
    pools = make_pools(lengths, device, max_values=100)
    assert [(pool.begin, pool.end) for pool in pools] == [(0, 47), (47, 137), (137, 167)]
    rule = FitRule("ks")
    ordered, fits = zip(*fit_pools(values, pools, rule), strict=True)
    expected = [np.sort(one) for one in spectra]
    np.testing.assert_array_equal(torch.cat(ordered).cpu(), np.concatenate(expected))
    alone = [rule.fit(torch.from_numpy(one).to(device), [len(one)])[0] for one in expected]
    assert [fit for part in fits for fit in part.to_list()] == alone


def test_little_memory_halves_the_workspace_until_one_matrix_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    def refuses(*given: object) -> torch.Tensor:
        tried.append(given[-1])
        if given[-1] > allowed:
            raise torch.OutOfMemoryError("no room")
        return torch.zeros(1, 4)

    tried: list[object] = []
    monkeypatch.setattr(solve, "window_eigenvalues", refuses)
    task = SolveTask.of([(FullMatrix().grid(4, 4), 1)], workspace=1000)
    stack = torch.zeros(1, 4, 4).as_subclass(OnCuda)
    allowed = 300
    task.solve([stack])
    assert tried == [1000, 500, 250]
    tried.clear()
    allowed = 0
    with pytest.raises(torch.OutOfMemoryError):
        task.solve([stack])
    # A float64 matrix of 4 x 4 has 128 bytes, which 125 do not hold.
    assert tried == [1000, 500, 250]
