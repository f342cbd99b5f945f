"""Pruning of one matrix against plain NumPy in float64, and what holds for every pruner."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from farms_fast.adapters.pruning.masks import (
    lowest,
    lowest_in_groups,
    lowest_in_rows,
    split_in_proportion,
)
from farms_fast.adapters.pruning.pruners import PRUNERS, magnitude_prune_, pruner, wanda_prune_
from farms_fast.adapters.pruning.sparsegpt import inverse_factor, sparsegpt_prune_
from farms_fast.adapters.pruning.statistics import InputStatistics, full_float32
from tests.conftest import DEVICES
from tests.support.purity import left_as_it_was

Array = npt.NDArray[np.float64]
METHODS = tuple(PRUNERS)
DAMPING = 0.01


def inputs(columns: int, tokens: int = 400, seed: int = 0) -> torch.Tensor:
    """Activations with correlated columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return (
        x
        * torch.logspace(-1, 1, columns, dtype=torch.float64)[
            torch.randperm(columns, generator=generator)
        ]
    )


def matrix(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def statistics(x: torch.Tensor, dtype: torch.dtype = torch.float64) -> InputStatistics:
    found = InputStatistics(x.shape[1], hessian=True, dtype=dtype, layer="block.up")
    found.add(x)
    return found


def damped(x: torch.Tensor) -> Array:
    hessian: Array = (x.T @ x / len(x)).numpy()
    return hessian + DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))


def loss(before: Array, after: Array, hessian: Array) -> float:
    change = before - after
    return float(np.einsum("ri,ij,rj->", change, hessian, change))


def first_lowest(scores: Array, count: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(scores.size, dtype=bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def column_by_column(
    weight: Array, hessian: Array, ratio: float | None, block: int, n_m: tuple[int, int] | None
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Optimal brain surgeon with a fixed order of columns and an explicit inverse for every one."""
    w = weight.copy()
    rows, cols = w.shape
    pruned = np.zeros(w.shape, dtype=bool)
    step = block if n_m is None else n_m[1]
    for j in range(cols):
        inverse = np.linalg.inv(hessian[j:, j:])
        if j % step == 0:
            width = min(step, cols - j)
            # What column i would cost by its own turn: the ones before it are gone by then.
            cost = np.stack(
                [w[:, i] ** 2 / np.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, j + width)],
                axis=1,
            )
            if n_m is None:
                assert ratio is not None
                upto = [math.floor(ratio * rows * column + 0.5 + 1e-9) for column in (j, j + width)]
                count = upto[1] - upto[0]
                pruned[:, j : j + width] = first_lowest(cost, count)
            else:
                for row in range(rows):
                    gone = np.argsort(cost[row], kind="stable")[: n_m[1] - n_m[0]]
                    pruned[row, j + gone] = True
        gone_rows = pruned[:, j]
        w[gone_rows, j:] -= np.outer(w[gone_rows, j] / inverse[0, 0], inverse[0])
        w[gone_rows, j] = 0
    return w, pruned


def least_squares(weight: Array, pruned: npt.NDArray[np.bool_], hessian: Array) -> Array:
    """The kept weights that are best, all at once, with the pruned ones at zero."""
    best = np.zeros_like(weight)
    for row, (w, gone) in enumerate(zip(weight, pruned, strict=True)):
        kept = ~gone
        best[row, kept] = w[kept] + np.linalg.solve(
            hessian[np.ix_(kept, kept)], hessian[np.ix_(kept, gone)] @ w[gone]
        )
    return best


class TestMasks:
    @given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**32 - 1))
    def test_exact_numbers_with_ties(self, rows: int, cols: int, ratio: float, seed: int) -> None:
        values = np.random.default_rng(seed).integers(0, 3, (rows, cols)).astype(np.float64)
        scores = torch.from_numpy(values)
        count = round(ratio * (rows * cols))
        assert (lowest(scores, count).numpy() == first_lowest(values, count)).all()

        by_row = lowest_in_rows(scores, ratio).numpy()
        numbers = by_row.sum(axis=1)
        assert numbers.sum() == count
        assert np.ptp(numbers) <= 1
        for row in range(rows):
            assert (by_row[row] == first_lowest(values[row], int(numbers[row]))).all()

    @given(st.integers(0, 4), st.integers(0, 2**32 - 1))
    def test_groups(self, n: int, seed: int) -> None:
        values = np.random.default_rng(seed).integers(0, 3, (3, 12)).astype(np.float64)
        mask = lowest_in_groups(torch.from_numpy(values), n, 4).numpy()
        for row in range(3):
            for start in range(0, 12, 4):
                part = slice(start, start + 4)
                assert (mask[row, part] == first_lowest(values[row, part], 4 - n)).all()

    @given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.floats(0, 1))
    def test_shares_fit_and_add_up(self, room: list[int], part: float) -> None:
        total = int(part * sum(room))
        shares = split_in_proportion(total, room)
        assert sum(shares) == total
        assert all(0 <= share <= size for share, size in zip(shares, room, strict=True))


class TestStatistics:
    @pytest.mark.parametrize("device", DEVICES)
    def test_running_means(self, device: str) -> None:
        x = inputs(12)
        found = InputStatistics(12, hessian=True, layer="up")
        norms = InputStatistics(12, layer="up")
        for part in x.float().to(device).split([7, 0, 200, 193]):
            found.add(part.reshape(1, -1, 12))
            norms.add(part)
        assert found.tokens == norms.tokens == 400
        expected = x.T @ x / 400
        assert found.hessian.dtype == torch.float32
        assert found.hessian.device.type == device
        scale = float(expected.abs().max())
        assert (found.hessian.cpu() - expected).abs().max() < 1e-5 * scale
        torch.testing.assert_close(
            norms.mean_squares.cpu().double(), expected.diagonal(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(found.norms, norms.norms, rtol=1e-5, atol=0)

    def test_sums_are_float32_for_any_activations(self) -> None:
        x = (inputs(4) * 300).to(torch.float16)
        found = InputStatistics(4)
        found.add(x)
        assert torch.isfinite(found.mean_squares).all()
        assert float(found.mean_squares.max()) > torch.finfo(torch.float16).max

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("hessian", [False, True])
    def test_activations_that_are_not_finite(self, bad: float, hessian: bool) -> None:
        found = InputStatistics(3, hessian=hessian, layer="layers.3.up")
        found.add(torch.tensor([[1.0, bad, 1.0]]))
        found.add(torch.ones(5, 3))
        message = r"activations of layer 'layers.3.up': .* in 1 of 3 columns"
        with pytest.raises(ValueError, match=message):
            _ = found.norms
        weight = torch.ones(2, 3)
        with left_as_it_was(weight), pytest.raises(ValueError, match=message):
            wanda_prune_(weight, 0.5, found)

    def test_refusals(self) -> None:
        found = InputStatistics(3, layer="up")
        with pytest.raises(ValueError, match=r"'up': no calibration"):
            _ = found.norms
        with pytest.raises(ValueError, match=r"'up': expected shape \(..., 3\), got \(2, 4\)"):
            found.add(torch.ones(2, 4))
        found.add(torch.ones(2, 3))
        with pytest.raises(ValueError, match="expected those made with hessian=True"):
            _ = found.hessian

    def test_precision_of_products_is_put_back(self) -> None:
        backend = torch.backends.cuda.matmul
        before = backend.fp32_precision
        try:
            backend.fp32_precision = "tf32"
            with full_float32():
                assert backend.fp32_precision == "ieee"
            assert backend.fp32_precision == "tf32"
        finally:
            backend.fp32_precision = before
        with left_as_it_was():
            statistics(inputs(4)).hessian.sum()


class TestEveryPruner:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("ratio", [0.0, 0.37, 0.8, 1.0])
    def test_sparsity_is_exact(
        self, method: str, device: str, dtype: torch.dtype, ratio: float
    ) -> None:
        weight = matrix(40, 300).to(device, dtype)
        before = weight.clone()
        mask = pruner(method).prune_(weight, ratio, statistics(inputs(300), torch.float32))
        assert int(mask.sum()) == round(ratio * 40 * 300)
        assert bool(((weight == 0) == mask).all())
        if ratio == 0 or method != "sparsegpt":
            assert bool((weight == before.masked_fill(mask, 0)).all())
        else:
            assert bool((weight != before).any())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("n_m", [(2, 4), (1, 4), (3, 8), (0, 4), (4, 4)])
    @pytest.mark.parametrize("device", DEVICES)
    def test_n_of_m_is_exact(self, method: str, n_m: tuple[int, int], device: str) -> None:
        n, m = n_m
        weight = matrix(10, 264).float().to(device)
        mask = pruner(method).prune_(weight, None, statistics(inputs(264), torch.float32), n_m=n_m)
        assert bool(((weight != 0).reshape(10, -1, m).sum(-1) == n).all())
        assert bool(((weight == 0) == mask).all())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("rows", "columns", "ratio"), [(3, 15, 0.7), (5, 9, 0.3)])
    def test_halves_are_rounded_alike(
        self, method: str, rows: int, columns: int, ratio: float
    ) -> None:
        # 31.5 and 13.5, or next to them, by the order of the factors.
        assert round(ratio * (rows * columns)) != round(ratio * columns * rows)
        weight = matrix(rows, columns).float()
        stats = statistics(inputs(columns), torch.float32)
        mask = pruner(method).prune_(weight, ratio, stats)
        assert int(mask.sum()) == round(ratio * (rows * columns))

    @pytest.mark.parametrize("method", METHODS)
    def test_views_and_parameters(self, method: str) -> None:
        stats = statistics(inputs(20), torch.float32)
        plain = matrix(6, 20).float()
        layer = nn.Linear(6, 20)
        layer.weight.data.copy_(plain.T)
        stored_in_by_out = layer.weight.T
        mask = pruner(method).prune_(plain, 0.5, stats)
        again = pruner(method).prune_(stored_in_by_out, 0.5, stats)
        assert bool((mask == again).all())
        assert torch.equal(plain, layer.weight.T)
        assert layer.weight.requires_grad

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("n_m", [None, (2, 4)])
    def test_zeros_that_were_there_stay_and_count(
        self, method: str, n_m: tuple[int, int] | None
    ) -> None:
        weight = matrix(20, 256).float()
        zero = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.4
        weight.masked_fill_(zero, 0)
        mask = pruner(method).prune_(
            weight, 0.6 if n_m is None else None, statistics(inputs(256), torch.float32), n_m=n_m
        )
        assert bool((weight[zero] == 0).all())
        assert bool(mask[zero].all())
        assert bool(((weight == 0) == mask).all())
        if n_m is None:
            assert int(mask.sum()) == round(0.6 * weight.numel())
        else:
            assert int((weight != 0).reshape(20, -1, 4).sum(-1).max()) == 2

    def test_zeros_stay_where_compensation_would_fill_them(self) -> None:
        # Each column of the second half is nearly one of the first, and takes over its weights.
        x = inputs(128)
        x = torch.cat([x, x + 0.01 * inputs(128, seed=5)], dim=1)
        weight = matrix(10, 256)
        weight[:, 128::2] = 0
        before = weight.clone()
        mask = sparsegpt_prune_(weight, 0.6, statistics(x))
        assert bool((weight[:, 128::2] == 0).all())
        assert bool(((weight == 0) == mask).all())
        assert int(mask.sum()) == 1536
        # If they were only nearly zero, they would take over what goes in the first half.
        before[:, 128::2] = 1e-6
        sparsegpt_prune_(before, 0.6, statistics(x))
        assert float(before[:, 128::2].abs().max()) > 0.1

    def test_zeros_go_before_weights_of_inputs_that_are_always_zero(self) -> None:
        x = inputs(64)
        x[:, :8] = 0
        weight = matrix(8, 64)
        weight[:, 20:24] = 0
        before = weight.clone()
        mask = wanda_prune_(weight, 4 / 64, statistics(x))
        assert bool((weight == before).all())
        assert bool((mask == (before == 0)).all())

    @pytest.mark.parametrize("method", METHODS)
    def test_more_zeros_than_asked_for_are_left_alone(self, method: str) -> None:
        weight = torch.ones(4, 32)
        weight[:, ::2] = 0
        before = weight.clone()
        mask = pruner(method).prune_(weight, 0.3, statistics(inputs(32), torch.float32))
        assert bool((weight == before).all())
        assert bool((mask == (before == 0)).all())

    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    def test_inputs_that_are_always_zero_lose_their_weights_first(self, method: str) -> None:
        x = inputs(64)
        x[:, 16:24] = 0
        weight = matrix(8, 64).float()
        mask = pruner(method).prune_(weight, 0.25, statistics(x, torch.float32))
        assert bool(mask[:, 16:24].all())
        assert int(mask.sum()) == 8 * 16
        few = matrix(8, 64).float()
        mask = pruner(method).prune_(few, 0.0625, statistics(x, torch.float32))
        assert int(mask.sum()) == int(mask[:, 16:24].sum()) == 8 * 4
        assert bool(torch.isfinite(few).all())

    @pytest.mark.parametrize("method", METHODS)
    def test_same_bits_again(self, method: str) -> None:
        first, second = matrix(30, 200).float(), matrix(30, 200).float()
        stats = statistics(inputs(200), torch.float32)
        with left_as_it_was(stats.hessian):
            pruner(method).prune_(first, 0.5, stats)
            pruner(method).prune_(second, 0.5, stats)
        assert bool((first == second).all())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("message", "change"),
        [
            (r"ratio of layer 'up': expected a number from 0 to 1, got 1.2", {"ratio": 1.2}),
            (r"ratio of layer 'up': .* got nan", {"ratio": math.nan}),
            (r"ratio of layer 'up': .* got '0.5'", {"ratio": "0.5"}),
            (r"ratio, n_m: expected one of the two, got ratio=None", {"ratio": None}),
            (r"ratio, n_m: expected one of the two", {"n_m": (2, 4)}),
            (r"n_m of layer 'up': groups of 5 do not divide the 4", {"ratio": None, "n_m": (2, 5)}),
            (r"n_m of layer 'up': expected n <= m, .* 5:4", {"ratio": None, "n_m": (5, 4)}),
            (r"n_m of layer 'up': expected \(n, m\), .* got 2", {"ratio": None, "n_m": 2}),
            (
                r"weight of layer 'up': expected finite values",
                {"weight": torch.full((2, 4), math.nan)},
            ),
            (
                r"weight of layer 'up': expected a floating matrix .* \(4,\)",
                {"weight": torch.ones(4)},
            ),
            (
                r"weight of layer 'up': .* torch.int8",
                {"weight": torch.ones(2, 4, dtype=torch.int8)},
            ),
        ],
    )
    def test_bad_arguments(self, method: str, message: str, change: dict[str, object]) -> None:
        good = {
            "weight": torch.ones(2, 4),
            "ratio": 0.5,
            "statistics": statistics(inputs(4), torch.float32),
            "layer": "up",
        }
        with pytest.raises(ValueError, match=message):
            pruner(method).prune_(**(good | change))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor, got list"):
            pruner(method).prune_(**(good | {"weight": [[1.0]]}))  # type: ignore[arg-type]

    @pytest.mark.parametrize("prune_", [wanda_prune_, sparsegpt_prune_])
    def test_statistics_have_to_be_those_of_the_inputs(
        self, prune_: Callable[..., torch.Tensor]
    ) -> None:
        with pytest.raises(TypeError, match=r"statistics of layer 'up': .* got None"):
            prune_(torch.ones(2, 4), 0.5, None, layer="up")
        with pytest.raises(ValueError, match=r"expected those of 4 inputs .*, got 5"):
            prune_(torch.ones(2, 4), 0.5, statistics(inputs(5)), layer="up")

    def test_unknown_pruner(self) -> None:
        with pytest.raises(
            ValueError, match=r"method: expected one of magnitude, wanda, sparsegpt"
        ):
            pruner("obs")


def test_magnitude_takes_the_smallest_of_the_whole_matrix() -> None:
    weight = matrix(13, 17)
    mask = magnitude_prune_(weight.clone(), 0.43)
    assert (mask.numpy() == first_lowest(weight.abs().numpy(), round(0.43 * 13 * 17))).all()


def test_wanda_compares_within_a_row() -> None:
    x, weight = inputs(50), matrix(9, 50)
    mask = wanda_prune_(weight.clone(), 0.5, statistics(x)).numpy()
    scores = np.abs(weight.numpy()) * np.sqrt(np.mean(x.numpy() ** 2, axis=0))
    for row in range(9):
        assert (mask[row] == first_lowest(scores[row], 25)).all()


class TestSparseGPT:
    @pytest.mark.parametrize("ratio", [0.3, 0.8])
    @pytest.mark.parametrize("block", [1, 16, 128])
    def test_is_column_by_column_surgery(self, ratio: float, block: int) -> None:
        x, weight = inputs(40), matrix(15, 40)
        expected, pruned = column_by_column(weight.numpy(), damped(x), ratio, block, None)
        mask = sparsegpt_prune_(weight, ratio, statistics(x), block=block)
        assert (mask.numpy() == pruned).all()
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("n_m", [(2, 4), (3, 8)])
    def test_is_column_by_column_surgery_of_groups(self, n_m: tuple[int, int]) -> None:
        x, weight = inputs(40), matrix(15, 40)
        expected, pruned = column_by_column(weight.numpy(), damped(x), None, 0, n_m)
        mask = sparsegpt_prune_(weight, None, statistics(x), n_m=n_m, block=10)
        assert (mask.numpy() == pruned).all()
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-9)

    def test_pruned_columns_before_kept_ones_give_the_least_squares_optimum(self) -> None:
        # Later columns are all free then, so nothing is lost by going column by column.
        x, weight = inputs(40), matrix(15, 40)
        weight[:, :20] *= 1e-4
        weight[:, 20:] += weight[:, 20:].sign()
        before = weight.numpy().copy()
        mask = sparsegpt_prune_(weight, 0.5, statistics(x)).numpy()
        assert mask[:, :20].all()
        best = least_squares(before, mask, damped(x))
        np.testing.assert_allclose(weight.numpy(), best, rtol=0, atol=1e-9)
        assert abs(best - before)[:, 20:].max() > 1e-5

    @pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
    def test_lies_between_least_squares_and_no_update(self, ratio: float) -> None:
        x, weight = inputs(40), matrix(15, 40)
        before, hessian = weight.numpy().copy(), damped(x)
        pruned, by_magnitude, by_wanda = weight.clone(), weight.clone(), weight.clone()
        mask = sparsegpt_prune_(pruned, ratio, statistics(x)).numpy()
        magnitude_prune_(by_magnitude, ratio)
        wanda_prune_(by_wanda, ratio, statistics(x))
        found = loss(before, pruned.numpy(), hessian)
        best = loss(before, least_squares(before, mask, hessian), hessian)
        assert best * (1 - 1e-12) <= found
        assert found < loss(before, np.where(mask, 0, before), hessian)
        assert found < loss(before, by_wanda.numpy(), hessian)
        assert found < 0.5 * loss(before, by_magnitude.numpy(), hessian)

    def test_float32_is_near_float64(self) -> None:
        x = inputs(300, 4000)
        exact, rounded = matrix(30, 300), matrix(30, 300).float()
        mask = sparsegpt_prune_(exact, 0.6, statistics(x))
        again = sparsegpt_prune_(rounded, 0.6, statistics(x, torch.float32))
        assert float((mask != again).double().mean()) < 1e-3
        same = mask == again
        assert float((exact - rounded)[same].abs().max()) < 1e-2

    def test_factor_is_that_of_the_damped_inverse(self) -> None:
        x = inputs(30)
        factor, dead, damping = inverse_factor(statistics(x).hessian, DAMPING)
        assert damping == DAMPING
        assert not dead.any()
        assert bool((factor.tril(-1) == 0).all())
        expected = np.linalg.inv(damped(x))
        np.testing.assert_allclose((factor.T @ factor).numpy(), expected, rtol=1e-8)

    def test_damping_is_raised_until_the_factorisation_succeeds(self) -> None:
        # Not positive semidefinite: the least eigenvalue is −0.5, with 1 as the mean diagonal.
        hessian = torch.ones(4, 4) * 0.5 + torch.eye(4) * 0.5
        hessian[0, 1] = hessian[1, 0] = 1.5
        factor, _, damping = inverse_factor(hessian, DAMPING)
        assert damping == pytest.approx(1.0)
        expected = torch.linalg.inv(hessian + torch.eye(4))
        torch.testing.assert_close(factor.T @ factor, expected)

    def test_few_tokens_in_float32(self) -> None:
        # Two tokens make a Hessian of rank 2; the damping makes it regular.
        weight = matrix(8, 64).float()
        sparsegpt_prune_(weight, 0.5, statistics(inputs(64, 2), torch.float32))
        assert bool(torch.isfinite(weight).all())
        assert int((weight == 0).sum()) == 8 * 32

    def test_all_inputs_dead_is_magnitude_by_block(self) -> None:
        weight, other = matrix(8, 64), matrix(8, 64)
        mask = sparsegpt_prune_(weight, 0.5, statistics(torch.zeros(5, 64).double()))
        assert bool((mask == magnitude_prune_(other, 0.5)).all())
        assert bool((weight == other).all())

    def test_hopeless_hessian(self) -> None:
        with pytest.raises(ValueError, match=r"hessian of layer 'up': .* 100 times"):
            inverse_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]), layer="up")
        with pytest.raises(ValueError, match=r"damping: expected a number above 0, got 0"):
            inverse_factor(torch.eye(2), 0)
        with pytest.raises(ValueError, match=r"block: expected an integer of at least 1"):
            sparsegpt_prune_(torch.ones(2, 4), 0.5, statistics(inputs(4)), block=0)


@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    down=st.integers(0, 7),
    along=st.integers(0, 7),
)
def test_elements_that_share_memory_are_refused(
    rows: int, cols: int, down: int, along: int
) -> None:
    weight = torch.randn(64).as_strided((rows, cols), (down, along))
    places = {i * down + j * along for i in range(rows) for j in range(cols)}
    if len(places) == rows * cols:
        magnitude_prune_(weight, 0.5)
        assert int((weight == 0).sum()) == round(0.5 * rows * cols)
    else:
        before = weight.clone()
        with pytest.raises(ValueError, match="weight: expected each element in memory of its own"):
            magnitude_prune_(weight, 0.5)
        assert torch.equal(weight, before)
