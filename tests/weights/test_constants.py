"""Tables that their numbers tell to be no weights."""

from __future__ import annotations

import math

import pytest
import torch

from farms_fast import FullMatrix, analyze
from farms_fast.weights.constants import is_mask, is_sinusoidal
from farms_fast.weights.stacks import Skipped


def sinusoids(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rates = torch.exp(torch.arange(0.0, cols, 2) * -(math.log(1e4) / cols))
    angles = torch.arange(float(rows))[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).reshape(rows, cols).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_table_of_sines(dtype: torch.dtype, turned: bool) -> None:
    table = sinusoids(200, 32, dtype)
    assert is_sinusoidal(table.T if turned else table)
    padded = torch.cat([torch.zeros(2, 32, dtype=dtype), table])
    assert is_sinusoidal(padded)
    assert is_sinusoidal(table[:, None, :])
    assert is_sinusoidal(torch.cat([table[:, ::2], table[:, 1::2]], 1))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(200, 32),
        0.02 * torch.randn(200, 32),
        torch.zeros(200, 32),
        torch.ones(200, 32),
        torch.eye(64),
        torch.rand(200, 32).round(),
        torch.linalg.qr(torch.randn(64, 64))[0],
        sinusoids(200, 32) + 0.05 * torch.randn(200, 32),
        torch.randn(4, 3),
        torch.full((20, 20), math.nan),
    ],
)
def test_weights_are_no_tables_of_sines(weight: torch.Tensor) -> None:
    assert not is_sinusoidal(weight)


@pytest.mark.parametrize("forbidden", [1.0, -math.inf, torch.finfo(torch.float32).min, -1e4])
def test_masks(forbidden: float) -> None:
    mask = torch.zeros(100, 100).masked_fill(torch.ones(100, 100).triu(1) == 1, forbidden)
    assert is_mask(mask)
    assert is_mask(mask[None, None])
    changed = mask.clone()
    changed[99, 99] = 0.5
    assert not is_mask(changed)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(9, 9), torch.ones(9, 9), torch.randn(9, 9), torch.randn(9, 9).sign()],
)
def test_weights_are_no_masks(weight: torch.Tensor) -> None:
    assert not is_mask(weight)


def test_tables_are_skipped_unless_they_are_asked_for() -> None:
    state = {
        "encoder.table": sinusoids(60, 16),
        "causal": torch.ones(1, 20, 20).tril(),
        "mixing": torch.randn(20, 16),
        "fc.weight": sinusoids(60, 16),
    }
    analysis = analyze(state, FullMatrix(), progress=False, bootstrap=0)
    assert [layer.name for layer in analysis] == ["mixing", "fc"]
    sines, mask = "a table of sines along its positions", "a table of two values, a mask"
    found = {skip.name: skip.reason for skip in analysis.skipped}
    assert found["encoder.table"].startswith(sines)
    assert found["causal"].startswith(mask)
    assert Skipped("encoder.table", (1, 60, 16), found["encoder.table"]) in analysis.skipped
    asked = analyze(state, FullMatrix(), progress=False, bootstrap=0, include="encoder.*")
    assert [layer.name for layer in asked] == ["encoder.table"]


def test_parameters_of_modules_are_weights_whatever_they_hold() -> None:
    net = torch.nn.Module()
    net.table = torch.nn.Parameter(sinusoids(60, 16))
    analysis = analyze(net, FullMatrix(), progress=False, bootstrap=0)
    assert [layer.name for layer in analysis] == ["table"]
