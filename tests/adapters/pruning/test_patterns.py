"""Allocations over the modules of a pruner, and as N:M: nothing is lost on the way."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import farms_fast
from farms_fast.adapters.pruning.allocation import allocate_sparsity, uniform_sparsity
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.owl import owl_sparsity
from farms_fast.adapters.pruning.sequential import prune_model
from farms_fast.adapters.pruning.sparsities import kept_of_groups
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord
from tests.support.language_models import small_model

HIDDEN, INNER = 4096, 11008
SIZES = {"q": HIDDEN**2, "k": HIDDEN**2, "o": HIDDEN**2, "up": HIDDEN * INNER}


def random_llama(seed: int) -> tuple[dict[str, float], dict[str, int]]:
    draw = random.Random(seed)
    params = {f"model.layers.{b}.{leaf}": size for b in range(8) for leaf, size in SIZES.items()}
    return {name: draw.uniform(2, 5) for name in params}, params


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("level", ["block", "layer"])
def test_its_own_layers_change_nothing(seed: int, level: str) -> None:
    alphas, params = random_llama(seed)
    for epsilon in (0.2, 0.9):  # below and above where ratios reach 1
        allocation = allocate_sparsity(alphas, 0.7, epsilon, level, params=params)  # type: ignore[arg-type]
        again = allocation.for_modules(params)
        assert again.ratios == allocation.ratios
        assert again.relative == allocation.relative
        assert again.alphas == allocation.alphas
        assert again.scale == allocation.scale
        for m in (4, 8, 16):
            assert again.n_m(m) == allocation.n_m(m)


def test_outliers_and_uniform_ratios_change_as_little() -> None:
    _, params = random_llama(0)
    layers = {f"model.layers.{b}": {} for b in range(8)}
    for name, size in params.items():
        layers[name.rpartition(".")[0]][name] = size
    outliers = {block: 1 + math.sin(number) for number, block in enumerate(layers)}
    for allocation in (uniform_sparsity(params, 0.7), owl_sparsity(outliers, 0.7, layers=layers)):
        assert allocation.for_modules(params).ratios == allocation.ratios


@pytest.mark.parametrize("seed", range(20))
def test_layers_that_were_not_analysed_do_not_split_blocks(seed: int) -> None:
    alphas, params = random_llama(seed)
    allocation = allocate_sparsity(alphas, 0.7, 0.2, params=params)
    more = params | {f"model.layers.{b}.router": HIDDEN for b in range(8)}
    carried = allocation.for_modules(more)
    for names in carried.blocks.values():
        assert len(names) == 5
        assert len({carried.ratios[name] for name in names}) == 1
        assert len({carried.n_m(8)[name] for name in names}) == 1


# ------------------------------------------------------------------------------------------- alphas


def fused() -> Analysis:
    alphas = {"h.0.qkv.q": 2.0, "h.0.qkv.k": 3.0, "h.0.qkv.v": 5.5, "h.0.up": 4.5}
    alphas |= {"h.1.qkv.q": 4.0, "h.1.qkv.k": 4.0, "h.1.qkv.v": 4.0, "h.1.up": 7.0}
    alphas |= {"h.2.qkv.q": 3.0, "h.2.qkv.k": 3.0, "h.2.qkv.v": 3.5, "h.2.up": math.nan}
    sizes = {"q": 4, "k": 4, "v": 8, "up": 16}
    records = []
    for name, alpha in alphas.items():
        status = "too_few" if math.isnan(alpha) else "ok"
        shape = (1, sizes[name.rpartition(".")[2]], 4)
        records.append(LayerRecord(name, "linear", shape, status, alpha=alpha))
    return Analysis(records)


MODULES = {f"h.{b}.{leaf}": 64 for b in range(3) for leaf in ("qkv", "up")}


def test_the_alpha_of_a_block_is_that_of_its_ratio() -> None:
    carried = allocate_sparsity(fused(), 0.5, 0.2).for_modules(MODULES)
    # Over four layers of a block, where the two modules would give another mean.
    alphas = {"h.0": 15 / 4, "h.1": 19 / 4, "h.2": 9.5 / 3}
    assert carried.block_alphas == pytest.approx(alphas)
    found = json.loads(json.dumps(carried.to_dict(), allow_nan=False))
    values = np.array(list(found["block_alphas"].values()))
    relative = (values - values.min()) / np.ptp(values) * 0.4 + 0.8
    ratios = relative * 0.5 / relative.mean()  # of blocks of one size
    assert list(found["blocks"].values()) == pytest.approx(ratios.tolist(), rel=1e-12)
    lines = str(carried).splitlines()[1:]
    for line, (block, alpha) in zip(lines, alphas.items(), strict=True):
        assert line.strip().startswith(f"{block}  128 weights, alpha {alpha:.3f}, ")


def test_the_alpha_of_a_module_in_parts_is_that_of_its_ratio() -> None:
    allocation = allocate_sparsity(fused(), 0.5, 0.2, level="layer")
    carried = allocation.for_modules(MODULES)
    assert carried.block_alphas == {}
    assert carried.alphas["h.0.qkv"] == pytest.approx((2 + 3 + 2 * 5.5) / 4)
    relative = (carried.alphas["h.0.qkv"] - 2) / (7 - 2) * 0.4 + 0.8
    assert carried.relative["h.0.qkv"] == pytest.approx(relative, rel=1e-14)
    for layer in carried.to_dict()["layers"]:  # type: ignore[attr-defined]
        assert layer["ratio"] == pytest.approx(layer["relative"] * carried.scale, rel=1e-14)
    assert carried.unfitted == ("h.2.up",)


def test_windows_or_whole_matrices_are_told_apart() -> None:
    model = small_model()
    for sampling, kind in (
        (farms_fast.FixedAspectSampling(rows=16, per_dim=2), "farms"),
        (farms_fast.FullMatrix(), "alpha"),
    ):
        analysis = farms_fast.analyze(model, sampling, bootstrap=0, progress=False)
        allocation = allocate_sparsity(analysis, 0.5, 0.2)
        assert allocation.settings["allocation"] == kind
        assert str(allocation).startswith(f"Allocation(allocation {kind}, ")


def test_an_allocation_over_parts_prunes_fused_weights() -> None:
    model = small_model("gpt2")
    sampling = farms_fast.FixedAspectSampling(rows=16, per_dim=2)
    allocation = allocate_sparsity(
        farms_fast.analyze(model, sampling, bootstrap=0, progress=False), 0.5, 0.2
    )
    sizes = {layer.name: math.prod(layer.shape) for layer in find_blocks(model).layers}
    assert set(allocation.ratios) != set(sizes)
    report = prune_model(model, "magnitude", allocation, progress=False)
    wanted = allocation.for_modules(sizes).ratios
    assert {layer.name: layer.target for layer in report.layers} == wanted
    with pytest.raises(ValueError, match=r"n_m: expected .*; Allocation.for_modules carries"):
        prune_model(model, "magnitude", allocation, n_m=allocation.n_m(4), progress=False)


# --------------------------------------------------------------------------------------------- N:M


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**6)), min_size=1, max_size=30),
    st.integers(1, 16),
)
def test_only_a_ratio_of_one_loses_all(units: list[tuple[float, int]], size: int) -> None:
    ratios, counts = zip(*units, strict=True)
    wanted = sum((1 - r) * size * c for r, c in units)
    least = sum(c for r, c in units if r < 1)
    try:
        kept = kept_of_groups(ratios, counts, size)
    except ValueError:
        assert least > wanted
        return
    assert all((0 if r == 1 else 1) <= n <= size for n, r in zip(kept, ratios, strict=True))
    got = sum(n * c for n, c in zip(kept, counts, strict=True))
    if len(set(counts)) == 1 and least <= wanted:
        # Equal units: within half of the smallest step.
        assert abs(got - wanted) <= counts[0] / 2 * (1 + 1e-6) + 1e-3


def test_the_excess_is_taken_from_the_smallest_remainders() -> None:
    # Wanted of 4: 0.4, 2.2, 2.9, 1.3 and 1.2, 8 in all. Raising the first to 1 leaves room for one.
    ratios = [0.9, 0.45, 0.275, 0.675, 0.7]
    assert kept_of_groups(ratios, [10] * 5, 4) == [1, 2, 3, 1, 1]
    # Wanted 0.1, 0.1, 0.1, 2.9 and 1.8, 5 in all: what the first three got is taken from the last.
    assert kept_of_groups([0.975] * 3 + [0.275, 0.55], [10] * 5, 4) == [1, 1, 1, 1, 1]
    assert kept_of_groups([0.975] * 3 + [0.275, 0.3], [10] * 5, 4) == [1, 1, 1, 2, 1]
    assert kept_of_groups([1.0, 0.5], [10, 10], 4) == [0, 2]


def test_a_block_is_not_lost_without_a_ratio_of_one() -> None:
    # Wanted of 4: 1.42, 1.29, 1.16 and 0.13, which rounded alone would be 2, 1, 1 and 0.
    alphas = [2.0, 2.4, 2.8, 6.0]
    allocation = allocate_sparsity(alphas, 0.75, 0.2, params=100, block_size=1)
    assert max(allocation.ratios.values()) < 1
    patterns = allocation.n_m(4)
    assert [n for n, _ in patterns.values()] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"m: with 1 of 4 kept at least, no more than 0\.7500 of"):
        uniform_sparsity({"l.0.q": 8, "l.1.q": 8}, 0.9).n_m(4)
