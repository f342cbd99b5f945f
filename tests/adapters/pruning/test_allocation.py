"""Sparsities by layer: the published figures, exact totals, blocks, N:M, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farms_fast
from farms_fast.adapters.pruning.allocation import (
    EPSILON_PRESETS,
    allocate_sparsity,
    epsilon_preset,
    group_by_block,
    uniform_sparsity,
)
from farms_fast.adapters.pruning.owl import outlier_ratio, owl_sparsity
from farms_fast.adapters.pruning.sparsities import Allocation
from farms_fast.results.analysis import Analysis
from farms_fast.results.record import LayerRecord

DATA = Path(__file__).parent / "data" / "llama-7b-alpha.json"
HIDDEN, INNER = 4096, 11008
LLAMA_LAYERS = ("q", "k", "v", "o", "gate", "up", "down")
LLAMA_PARAMS = [HIDDEN * HIDDEN] * 4 + [HIDDEN * INNER] * 3


def llama_alphas(key: str = "peak_farms_rows2000_q1_perdim15") -> list[float]:
    alphas: list[float] = json.loads(DATA.read_text(encoding="utf-8"))[key]
    return alphas


def llama(sparsity: float, epsilon: float, **options: object) -> Allocation:
    return allocate_sparsity(
        llama_alphas(),
        sparsity,
        epsilon,
        params=LLAMA_PARAMS * 32,
        block_size=7,
        **options,  # type: ignore[arg-type]
    )


def record(name: str, alpha: float, shape: tuple[int, int, int] = (1, 4, 4)) -> LayerRecord:
    status = "too_few" if math.isnan(alpha) else "ok"
    return LayerRecord(name, "linear", shape, status, alpha=alpha)


def llama_analysis() -> Analysis:
    names = [f"model.layers.{b}.x.{leaf}" for b in range(32) for leaf in LLAMA_LAYERS]
    shapes = [(1, HIDDEN, HIDDEN)] * 4 + [(1, INNER, HIDDEN)] * 3
    records = [
        record(name, alpha, shape)
        for name, alpha, shape in zip(names, llama_alphas(), shapes * 32, strict=True)
    ]
    return Analysis([*records, record("lm_head", 9.0, (1, 32000, HIDDEN))])


def test_published_figures_at_80_percent() -> None:
    allocation = llama(0.8, 0.2)
    ratios = allocation.ratios.values()
    assert (round(min(ratios), 4), round(max(ratios), 4)) == (0.6390, 0.9586)
    assert round(allocation.scale, 4) == 0.7988
    assert allocation.total == pytest.approx(0.8, abs=1e-14)
    assert allocation.limited == ()


def test_excess_over_one_is_shared_out() -> None:
    allocation = llama(0.85, 0.2)
    unlimited = {
        b: allocation.relative[n[0]] * allocation.scale for b, n in allocation.blocks.items()
    }
    assert round(max(unlimited.values()), 4) == 1.0185
    above = [block for block, ratio in unlimited.items() if ratio > 1]
    assert len(above) == 2

    assert allocation.total == pytest.approx(0.85, abs=1e-14)
    ratios = allocation.block_ratios
    assert [block for block, ratio in ratios.items() if ratio == 1] == above
    factors = [ratios[block] / unlimited[block] for block in ratios if block not in above]
    # The others grow in proportion: by 36.9 thousandths of two blocks over thirty of about 0.85.
    assert np.ptp(factors) < 1e-14
    assert factors[0] > 1
    assert len(allocation.limited) == 2 * 7


@pytest.mark.parametrize(
    ("sparsity", "epsilon", "clipped"), [(0.85, 0.2, 0.998), (0.7, 0.9, 0.99999)]
)
def test_published_clipping(sparsity: float, epsilon: float, clipped: float) -> None:
    allocation = llama(sparsity, epsilon, compat="farms")
    unlimited = {n: r * allocation.scale for n, r in allocation.relative.items()}
    assert max(unlimited.values()) > 1
    expected = {n: clipped if r > 1 else r for n, r in unlimited.items()}
    assert allocation.ratios == expected
    assert allocation.total < sparsity - 1e-4


def test_an_analysis_knows_its_blocks_and_sizes() -> None:
    bare, known = llama(0.8, 0.2), allocate_sparsity(llama_analysis(), 0.8, 0.2)
    assert list(known.ratios.values()) == list(bare.ratios.values())
    assert list(known.params.values()) == list(bare.params.values())
    assert list(known.block_ratios) == [f"model.layers.{b}" for b in range(32)]
    assert known.left_out == ("lm_head",)


def test_level_layer_gives_every_layer_its_own() -> None:
    allocation = allocate_sparsity(llama_analysis(), 0.7, 0.2, level="layer")
    alphas = np.array(llama_alphas())
    ratios = np.array(list(allocation.ratios.values()))
    assert (np.argsort(ratios, kind="stable") == np.argsort(alphas, kind="stable")).all()
    relative = (alphas - alphas.min()) / np.ptp(alphas) * 0.4 + 0.8
    weights = np.array(LLAMA_PARAMS * 32, dtype=float)
    expected = relative * 0.7 * weights.sum() / (relative * weights).sum()
    np.testing.assert_allclose(ratios, expected, rtol=1e-13)
    assert allocation.total == pytest.approx(0.7, abs=1e-14)


@pytest.mark.parametrize("level", ["block", "layer"])
def test_equal_alphas_and_epsilon_zero_are_uniform(level: str) -> None:
    for alphas, epsilon in (([3.0] * 4, 0.3), ([2.0, 3.0, 4.0, 5.0], 0.0)):
        allocation = allocate_sparsity(
            alphas,
            0.6,
            epsilon,
            level,  # type: ignore[arg-type]
            params=[1, 2, 3, 4],
            block_size=2 if level == "block" else None,
        )
        assert list(allocation.ratios.values()) == pytest.approx([0.6] * 4, abs=1e-15)


@given(
    st.lists(st.tuples(st.floats(1.1, 20), st.integers(1, 10**9)), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
    st.floats(0, 0.999),
)
def test_total_is_exact_and_order_is_that_of_alpha(
    layers: list[tuple[float, int]], sparsity: float, epsilon: float
) -> None:
    alphas, params = zip(*layers, strict=True)
    allocation = allocate_sparsity(alphas, sparsity, epsilon, level="layer", params=params)
    ratios = np.array(list(allocation.ratios.values()))
    assert allocation.total == pytest.approx(sparsity, rel=1e-9)
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert (np.diff(ratios[np.argsort(alphas, kind="stable")]) >= -1e-12).all()


def test_failed_fits() -> None:
    nan = math.nan
    alphas = {"l.0.q": 2.0, "l.0.k": nan, "l.1.q": nan, "l.1.k": nan, "l.2.q": 5.0, "l.2.k": 3.0}
    allocation = allocate_sparsity(Analysis([record(n, a) for n, a in alphas.items()]), 0.5, 0.2)
    assert allocation.unfitted == ("l.0.k", "l.1.q", "l.1.k")
    # Block means 2, none and 4: the one without lies in the middle of the range.
    assert list(allocation.block_ratios.values()) == pytest.approx([0.4, 0.5, 0.6])
    by_layer = allocate_sparsity(list(alphas.values()), 0.5, 0.3, level="layer", params=1)
    relative = [0.7, 1, 1, 1, 1.3, 0.9]
    assert list(by_layer.relative.values()) == pytest.approx(relative)
    with pytest.raises(ValueError, match=r"alphas: expected some, got none: all 2 fits failed"):
        allocate_sparsity([nan, nan], 0.5, 0.2, level="layer", params=1)


def test_a_status_that_is_not_ok_counts_as_no_alpha() -> None:
    layers = [record("l.0.q", 2.0), record("l.1.q", 4.0)]
    layers[1].status = "nonfinite"
    assert allocate_sparsity(Analysis(layers), 0.5, 0.2).unfitted == ("l.1.q",)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"sparsity: expected a number between 0 and 1, got 0", {"sparsity": 0}),
        (r"sparsity: .* got 1.0", {"sparsity": 1.0}),
        (r"sparsity: .* got nan", {"sparsity": math.nan}),
        (r"sparsity: .* got '0.5'", {"sparsity": "0.5"}),
        (r"epsilon: expected a number from 0 to 1 .*, got 1.2", {"epsilon": 1.2}),
        (r"epsilon: .* got -0.1", {"epsilon": -0.1}),
        (r"level: expected 'block' or 'layer', got 'head'", {"level": "head"}),
        (r"compat: expected None or 'farms', got 'owl'", {"compat": "owl"}),
        (r"params: bare alphas need the number of weights .* got None", {"params": None}),
        (r"params: expected 4, as many as alphas, got 3", {"params": [1, 2, 3]}),
        (r"params: expected an integer of at least 1, got 0", {"params": 0}),
        (r"block_size: level 'block' needs .* got None", {"block_size": None}),
        (r"block_size: level 'layer' has no blocks, expected None, got 2", {"level": "layer"}),
        (r"block_size: 3 layers a block do not divide 4 alphas", {"block_size": 3}),
        (
            r"alphas: expected positive finite numbers, .* got inf for '0.1'",
            {"analysis_or_alphas": [2, math.inf, 3, 4]},
        ),
        (r"alphas: .* got -2.0 for '1.0'", {"analysis_or_alphas": [2, 3, -2, 4]}),
        (r"alphas: expected at least one, got none", {"analysis_or_alphas": []}),
    ],
)
def test_bad_arguments(message: str, arguments: dict[str, object]) -> None:
    good = {
        "analysis_or_alphas": [2.0, 3.0, 4.0, 5.0],
        "sparsity": 0.5,
        "epsilon": 0.2,
        "params": 10,
        "block_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        allocate_sparsity(**(good | arguments))  # type: ignore[arg-type]


def test_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"analysis_or_alphas: expected an Analysis, .* got str"):
        allocate_sparsity("model.safetensors", 0.5, 0.2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"alphas: expected numbers, got 'x' for 'a.0.q'"):
        allocate_sparsity({"a.0.q": "x"}, 0.5, 0.2, params=1)  # type: ignore[dict-item]
    analysis = Analysis([record("l.0.q", 2.0), record("l.1.q", 3.0)])
    with pytest.raises(ValueError, match="params: an Analysis knows its own"):
        allocate_sparsity(analysis, 0.5, 0.2, params=1)
    with pytest.raises(ValueError, match=r"params: .* number of weights of 'l.1.q' too"):
        allocate_sparsity({"l.0.q": 2.0, "l.1.q": 3.0}, 0.5, 0.2, params={"l.0.q": 1})


def test_total_out_of_reach() -> None:
    # Half of the weights have r = 0, so no more than the other half can go.
    with pytest.raises(ValueError, match=r"epsilon: 0.6 of all weights cannot be pruned .* 0.500"):
        allocate_sparsity([2.0, 3.0], 0.6, 1.0, level="layer", params=1)
    reached = allocate_sparsity([2.0, 3.0], 0.4, 1.0, level="layer", params=1)
    assert list(reached.ratios.values()) == pytest.approx([0, 0.8])


def test_blocks_by_name() -> None:
    assert group_by_block(["0.layers.0.q", "0.layers.1.q", "1"]) == {
        "0.layers.0": ["0.layers.0.q"],
        "0.layers.1": ["0.layers.1.q"],
    }
    nested = [f"h.{b}.experts.{e}.up" for b in range(2) for e in range(3)]
    assert group_by_block(nested) == {"h.0": nested[:3], "h.1": nested[3:]}
    # A first block of another kind is a block of the list all the same.
    mixed = ["l.0.dense.up", "l.1.moe.up", "l.2.moe.up"]
    assert list(group_by_block(mixed)) == ["l.0", "l.1", "l.2"]
    two = ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q", "decoder.block.1.q"]
    assert len(group_by_block(two)) == 4


@pytest.mark.parametrize("names", [[], ["0", "2", "4"], ["fc", "l.0.q"], ["l.0.q", "l.1.up"]])
def test_no_repeated_blocks(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"layers: expected repeated blocks"):
        group_by_block(names)


def test_analysis_without_repeated_blocks() -> None:
    with pytest.raises(ValueError, match=r"layers: expected repeated blocks .* none in 2 names"):
        allocate_sparsity(Analysis([record("fc1", 2.0), record("fc2", 3.0)]), 0.5, 0.2)


def test_modules_of_a_pruner() -> None:
    analysis = Analysis(
        [
            record("h.0.attn.c_attn.q", 2.0),
            record("h.0.attn.c_attn.k", 3.0),
            record("h.0.attn.c_attn.v", 4.0, (1, 8, 4)),
            record("h.0.mlp", 5.0),
            record("h.0.router", 1.5),
            record("h.1.attn.c_attn.q", 4.0, (1, 16, 4)),
            record("h.1.mlp", 6.0),
        ]
    )
    modules = {"h.0.attn.c_attn": 64, "h.0.mlp": 16, "h.1.attn.c_attn": 64, "h.1.mlp": 16}
    by_layer = allocate_sparsity(analysis, 0.5, 0.2, level="layer")
    joined = by_layer.for_modules(modules)
    assert joined.total == pytest.approx(0.5, abs=1e-15)
    parts = [by_layer.relative[f"h.0.attn.c_attn.{part}"] for part in "qkv"]
    assert joined.relative["h.0.attn.c_attn"] == pytest.approx(
        (16 * parts[0] + 16 * parts[1] + 32 * parts[2]) / 64
    )
    assert {block: len(names) for block, names in joined.blocks.items()} == {"h.0": 2, "h.1": 2}

    by_block = allocate_sparsity(analysis, 0.5, 0.2)
    with_another = by_block.for_modules({**modules, "h.1.too_small": 4})
    assert with_another.ratios["h.1.too_small"] == with_another.ratios["h.1.mlp"]
    assert with_another.total == pytest.approx(0.5, abs=1e-15)
    with pytest.raises(ValueError, match="modules: 'lm_head' is neither a layer of the allocation"):
        by_block.for_modules({**modules, "lm_head": 4})
    with pytest.raises(ValueError, match="modules: expected at least one, got none"):
        by_block.for_modules({})


def test_same_modules_give_the_same_ratios() -> None:
    allocation = llama(0.85, 0.2)
    again = allocation.for_modules(allocation.params)
    assert again.ratios == pytest.approx(allocation.ratios, rel=1e-14)
    clipped = llama(0.85, 0.2, compat="farms")
    again = clipped.for_modules(clipped.params)
    assert again.ratios == pytest.approx(clipped.ratios, rel=1e-14)


@pytest.mark.parametrize("m", [4, 8, 16])
def test_n_of_m(m: int) -> None:
    allocation = llama(0.7, 0.3)
    patterns = allocation.n_m(m)
    assert set(patterns) == set(allocation.ratios)
    for names in allocation.blocks.values():
        kept = {patterns[name] for name in names}
        assert len(kept) == 1
        ((n, of),) = kept
        assert of == m
        assert abs(n - (1 - allocation.ratios[names[0]]) * m) < 1
    zeros = sum((1 - n / m) * allocation.params[name] for name, (n, _) in patterns.items())
    # One block's N is the smallest step, and the total is within half of it.
    assert abs(zeros / sum(allocation.params.values()) - 0.7) <= 0.5 / m / 32 + 1e-12


def test_n_of_m_rounds_the_largest_remainders_up() -> None:
    # Kept of 8: 2.32, 2.4, 2.48 and 2.4 of 9.6, so that 9.6 - 8 is nearest to two more.
    allocation = allocate_sparsity([4.0, 3.0, 2.0, 3.0], 0.7, 1 / 70, "layer", params=5)
    assert [round(8 * (1 - ratio), 6) for ratio in allocation.ratios.values()] == [
        2.32,
        2.4,
        2.48,
        2.4,
    ]
    assert [n for n, _ in allocation.n_m(8).values()] == [2, 3, 3, 2]


def test_n_of_m_of_ratios_that_are_whole() -> None:
    assert set(uniform_sparsity({"l.0.q": 5, "l.1.q": 7}, 0.7).n_m(10).values()) == {(3, 10)}
    with pytest.raises(ValueError, match="m: expected an integer of at least 1, got 0"):
        llama(0.7, 0.3).n_m(0)


def test_uniform() -> None:
    allocation = uniform_sparsity({"l.0.q": 5, "lm_head": 3, "l.1.q": 7}, 0.7)
    assert allocation.ratios == {"l.0.q": 0.7, "l.1.q": 0.7, "lm_head": 0.7}
    assert allocation.total == pytest.approx(0.7, abs=1e-15)
    with pytest.raises(ValueError, match="sparsity"):
        uniform_sparsity({"l.0.q": 5}, 0.0)


def test_owl_by_hand() -> None:
    # 2·λ·(D−Dmin)/(Dmax−Dmin) = 0, .05, .1; their mean over 1, 1 and 2 parts is .0625.
    layers = {"a": {"a.q": 10}, "b": {"b.q": 10}, "c": {"c.q": 5, "c.k": 15}}
    allocation = owl_sparsity({"a": 1.0, "b": 2.0, "c": 3.0}, 0.7, 0.05, layers=layers)
    densities = [0.2375, 0.2875, 0.3375]
    assert list(allocation.block_ratios.values()) == pytest.approx([1 - d for d in densities])
    assert allocation.ratios["c.q"] == allocation.ratios["c.k"]
    assert allocation.total == pytest.approx(0.7, abs=1e-15)


def test_owl_is_uniform_for_equal_outliers_and_exact_above_one() -> None:
    assert set(owl_sparsity([3.0, 3.0], 0.7).ratios.values()) == {0.7}
    allocation = owl_sparsity([1.0, 2.0, 9.0], 0.97)
    assert max(allocation.ratios.values()) == 1
    assert allocation.total == pytest.approx(0.97, abs=1e-14)


def test_owl_refuses() -> None:
    with pytest.raises(ValueError, match=r"lam: 0.08 makes the sparsity of block '1' negative"):
        owl_sparsity([1.0, 2.0], 0.05)
    with pytest.raises(ValueError, match=r"lam: expected a number of at least 0, got -1"):
        owl_sparsity([1.0, 2.0], 0.5, -1)
    with pytest.raises(ValueError, match=r"outliers: expected finite numbers"):
        owl_sparsity([1.0, math.nan], 0.5)
    with pytest.raises(ValueError, match=r"layers: expected those of the 2 blocks"):
        owl_sparsity([1.0, 2.0], 0.5, layers={"0": {"q": 1}})
    with pytest.raises(ValueError, match=r"sparsity"):
        owl_sparsity([1.0, 2.0], 1.5)
    with pytest.raises(ValueError, match=r"threshold"):
        outlier_ratio([torch.ones(2)], 0.0)
    with pytest.raises(ValueError, match=r"scores: expected finite ones, got 0"):
        outlier_ratio([])
    with pytest.raises(ValueError, match=r"scores: expected finite ones, got 2"):
        outlier_ratio([torch.tensor([1.0, math.nan])])


def test_outliers_are_counted_over_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(20, 30, generator=generator) ** 8 * scale for scale in (1.0, 3.0)]
    every = torch.cat([s.flatten() for s in scores]).double()
    expected = 100 * float((every > 5 * every.mean()).double().mean())
    assert 1 < expected < 20
    assert outlier_ratio(iter(scores)) == pytest.approx(expected, abs=1e-12)


def test_presets() -> None:
    assert [epsilon_preset("LLaMA-7B", "wanda", s) for s in (0.7, 0.75, 0.8, 0.85)] == [
        0.3,
        0.3,
        0.3,
        0.15,
    ]
    assert [epsilon_preset("llama-7b", "sparsegpt", s) for s in (0.7, 0.85)] == [0.2, 0.2]
    assert list(EPSILON_PRESETS["llama-7b"]["magnitude"].values()) == [0.6, 0.4, 0.3, 0.2]
    assert list(EPSILON_PRESETS["llama-13b"]["magnitude"].values()) == [0.6, 0.5, 0.4, 0.1]
    for method in ("wanda", "sparsegpt"):
        assert list(EPSILON_PRESETS["llama-13b"][method].values()) == [0.3, 0.3, 0.3, 0.25]
    with pytest.raises(ValueError, match="model: expected one of llama-7b, llama-13b, got 'opt'"):
        epsilon_preset("opt", "wanda", 0.7)
    with pytest.raises(ValueError, match="method: expected one of magnitude, wanda, sparsegpt"):
        epsilon_preset("llama-7b", "obs", 0.7)
    with pytest.raises(
        ValueError, match=r"sparsity: expected one of 0.7, 0.75, 0.8, 0.85, got 0.5"
    ):
        epsilon_preset("llama-7b", "wanda", 0.5)


def test_result_as_json_and_as_text() -> None:
    layers = [record("l.0.q", 2.0), record("l.1.q", math.nan), record("l.2.q", 3.0)]
    allocation = allocate_sparsity(Analysis(layers), 0.5, 0.2)
    found = json.loads(json.dumps(allocation.to_dict(), allow_nan=False))
    assert found["settings"] == {
        "allocation": "alpha",
        "sparsity": 0.5,
        "epsilon": 0.2,
        "level": "block",
        "compat": None,
    }
    assert [(e["name"], e["block"], e["alpha"], e["params"]) for e in found["layers"]] == [
        ("l.0.q", "l.0", 2.0, 16),
        ("l.1.q", "l.1", None, 16),
        ("l.2.q", "l.2", 3.0, 16),
    ]
    assert [e["ratio"] for e in found["layers"]] == list(allocation.ratios.values())
    assert found["unfitted"] == ["l.1.q"]
    lines = str(allocation).splitlines()
    assert len(lines) == 4
    assert "total 0.500000" in lines[0]
    assert lines[1] == "  l.0  16 weights, alpha 2.000, sparsity 0.4000"
    assert lines[2] == "  l.1  16 weights, sparsity 0.5000"


def test_a_layer_of_equal_singular_values_gets_the_uniform_ratio() -> None:
    torch.manual_seed(0)
    weights = {f"l.{number}.q": torch.randn(24, 24) for number in range(3)}
    weights["l.1.q"] = torch.nn.init.orthogonal_(torch.empty(24, 24))
    analysis = farms_fast.analyze(weights, farms_fast.FullMatrix(), progress=False)
    allocation = allocate_sparsity(analysis, 0.6, 0.2)
    assert allocation.unfitted == ("l.1.q",)
    assert allocation.relative["l.1.q"] == 1.0


def test_from_a_model() -> None:
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(
        torch.nn.ModuleDict({"q": torch.nn.Linear(24, 24), "up": torch.nn.Linear(24, 48)})
        for _ in range(3)
    )
    model = torch.nn.ModuleDict({"layers": blocks, "head": torch.nn.Linear(24, 100)})
    analysis = farms_fast.analyze(
        model, farms_fast.FixedAspectSampling(rows=12, per_dim=3), progress=False
    )
    allocation = allocate_sparsity(analysis, 0.6, 0.2)
    assert list(allocation.params.values()) == [24 * 24, 24 * 48] * 3
    assert allocation.total == pytest.approx(0.6, abs=1e-14)
    assert allocation.left_out == ("head",)
