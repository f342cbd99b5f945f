"""The CPU ops on any number of threads: the same bits, and none for small work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from farms_fast.core import ops
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix, Sampling, window_table

THREADS = (1, 2, 3, 5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Orders on both sides of where tiles, panels and solvers change, and of where work is shared out.
@pytest.mark.parametrize(
    ("shape", "dtype", "sampling"),
    [
        ((129, 150), torch.float64, FullMatrix()),
        ((300, 337), torch.float64, FullMatrix()),
        ((300, 337), torch.float32, FullMatrix()),
        ((700, 640), torch.float16, FullMatrix()),
        ((200, 220), torch.complex128, FullMatrix()),
        ((3, 90_000), torch.float32, FullMatrix()),
        ((300, 420), torch.float32, FixedAspectSampling(rows=100, per_dim=4)),
        ((300, 420), torch.float64, FixedAspectSampling(rows=260, per_dim=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
def test_the_same_bits_on_any_number_of_threads(
    threads: Callable[[int], None],
    shape: tuple[int, int],
    dtype: torch.dtype,
    sampling: Sampling,
    precision: torch.dtype,
) -> None:
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weight = torch.randn(1, *shape, dtype=wide).to(dtype)
    grid = sampling.grid(*shape)
    windows = window_table(grid)
    budgets = (0, 2**23)
    found = []
    for number in THREADS:
        threads(number)
        gram = ops.window_gram([weight], windows, grid.order, precision)
        solved = [
            ops.window_eigvalsh([weight], windows, grid.order, precision, memory_budget=budget)
            for budget in budgets
        ]
        found.append([gram, ops.eigvalsh(gram), *solved])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_matrix_alone_is_shared_out_and_right(threads: Callable[[int], None]) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 900, 1000)))
    expected = np.linalg.svd(weight[0].numpy(), compute_uv=False)[::-1] ** 2
    for number in THREADS:
        threads(number)
        evals = ops.window_eigvalsh([weight], window_table(FullMatrix().grid(900, 1000)), 900)
        bound = 8 * 900 * 2.0**-52 * expected[-1]
        np.testing.assert_allclose(evals[0], expected, rtol=0, atol=bound)


COUNT_THREADS = """
import os
import numpy as np
import torch
import farms_fast

torch.set_num_threads(3)
counts = []
for order in (16, 128, 600):
    weight = np.random.default_rng(0).standard_normal((order, order))
    farms_fast.fit_power_law(farms_fast.esd(weight), xmin="ks")
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0], counts[2] - counts[0])
"""


def test_small_work_stays_on_the_calling_thread() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True
    )
    small, large = map(int, ran.stdout.split())
    assert small == 0
    assert large >= 2
