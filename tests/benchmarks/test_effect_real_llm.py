"""The benchmark on a trained language model: its plan, its ratios and its harness, at toy size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.effect import real_llm, sensitivity
from benchmarks.effect.prose import Tokens, calibration_set
from benchmarks.effect.real_llm_plan import FARMS, OWL, SHUFFLES, UNIFORM, Cell, Plan, ratios_of

BLOCKS = 6
KINDS = {"self_attn.q_proj": 100, "self_attn.v_proj": 50, "mlp.up_proj": 300}
MODULES = {f"layers.{b}.{kind}": size for b in range(BLOCKS) for kind, size in KINDS.items()}


def facts() -> dict[str, Any]:
    values = {name: 2.0 + 0.3 * at + 0.1 * (at % 3) for at, name in enumerate(MODULES)}
    return {
        "modules": MODULES,
        "alphas": {FARMS: values, "FARMS peak": values},
        "outliers": {"0": {f"layers.{b}": 9.0 - b for b in range(BLOCKS)}},
    }


def by_block(ratios: dict[str, float]) -> list[float]:
    found = [{ratios[f"layers.{b}.{kind}"] for kind in KINDS} for b in range(BLOCKS)]
    assert all(len(values) == 1 for values in found)
    return [values.pop() for values in found]


@pytest.mark.parametrize("arm", [FARMS, OWL, "reversed", *SHUFFLES, "per layer", "MLP only"])
def test_every_arm_prunes_as_much_over_the_same_range(arm: str) -> None:
    ratios = ratios_of(Cell("wanda", 0.6, arm, 0.1), facts())
    total = sum(ratios[name] * size for name, size in MODULES.items())
    assert total / sum(MODULES.values()) == pytest.approx(0.6, abs=1e-12)
    assert max(ratios.values()) - min(ratios.values()) == pytest.approx(0.12, rel=0.1)


def test_controls_keep_the_ratios_and_change_their_order() -> None:
    farms = by_block(ratios_of(Cell("wanda", 0.6, FARMS, 0.1), facts()))
    assert farms == sorted(farms)
    turned = by_block(ratios_of(Cell("wanda", 0.6, "reversed", 0.1), facts()))
    assert turned == pytest.approx(farms[::-1])
    shuffled = [by_block(ratios_of(Cell("wanda", 0.6, arm, 0.1), facts())) for arm in SHUFFLES]
    assert all(sorted(one) == pytest.approx(farms) for one in shuffled)
    assert len({tuple(one) for one in [farms, turned, *shuffled]}) == 2 + len(SHUFFLES)
    # Another seed of calibration keeps the shuffle.
    again = by_block(ratios_of(Cell("wanda", 0.6, SHUFFLES[0], 0.1, seed=1), facts()))
    assert again == shuffled[0]


def test_a_block_alone_leaves_the_others_whole() -> None:
    ratios = ratios_of(Cell("wanda", 0.8, "alone 2 MLP"), facts())
    assert {name for name, ratio in ratios.items() if ratio} == {"layers.2.mlp.up_proj"}
    ratios = ratios_of(Cell("wanda", 0.8, "alone 2 attention"), facts())
    assert sum(1 for ratio in ratios.values() if ratio == 0.8) == 2


def test_the_validation_text_chooses_among_the_same_candidates_for_all() -> None:
    plan = Plan((("wanda", 0.6),), (0, 1), (0.1, 0.2), 0.1, (UNIFORM, FARMS, OWL))
    done: dict[str, dict[str, float]] = {}
    validation = {(UNIFORM, 0.0): 9.0, (FARMS, 0.1): 8.0, (FARMS, 0.2): 7.0, (OWL, 0.1): 9.5}
    measured = []
    for _ in range(50):
        cell = next(plan.cells(done), None)
        if cell is None:
            break
        measured.append(cell)
        done[cell.key] = {"validation": validation.get((cell.arm, cell.epsilon), 10.0)}
    assert len(set(measured)) == len(measured) == len(done)
    assert measured[0] == Cell("wanda", 0.6, UNIFORM)
    assert plan.chosen("wanda", 0.6, FARMS, done) == 0.2
    assert plan.chosen("wanda", 0.6, OWL, done) == 0.0
    # The chosen epsilon on every seed; OWL's is uniform, which needs no cell of its own.
    assert Cell("wanda", 0.6, FARMS, 0.2, 1) in measured
    assert Cell("wanda", 0.6, OWL, 0.2, 1) not in measured


def test_rank_correlation_has_the_textbook_value() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    # Ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3.
    assert sensitivity.spearman(first, second) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))
    assert sensitivity.spearman(first, -second) == pytest.approx(-4.5 / math.sqrt(4.5 * 5.0))
    assert math.isnan(sensitivity.spearman(first, np.ones(4)))


def test_calibration_samples_do_not_overlap() -> None:
    samples = calibration_set(torch.arange(1000), 8, 100, seed=3)
    assert samples.shape == (8, 100)
    assert len(samples.unique()) == 800
    with pytest.raises(ValueError, match="expected 11 samples of 100 tokens, got 1000 tokens"):
        calibration_set(torch.arange(1000), 11, 100, seed=3)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    sizes = {"calibration": 200, "validation": 100, "test": 100, "news": 60}
    tokens = Tokens(
        {split: torch.randint(64, (size,)) for split, size in sizes.items()},
        dict.fromkeys(sizes, 1),
    )
    tokens.save(tmp_path / "tokens.npz")
    assert Tokens.load(tmp_path / "tokens.npz").digest == tokens.digest
    out = tmp_path / "results.jsonl"
    arguments = [
        "--model", str(tmp_path / "model"), "--tokens", str(tmp_path / "tokens.npz"),
        "--out", str(out), "--device", "cpu", "--samples", "4", "--seqlen", "16",
        "--per-dim", "2", "--seeds", "0", "1", "--epsilons", "0.1", "0.2", "--methods", "wanda",
        "--sparsities", "0.6", "--arms", UNIFORM, FARMS, OWL, "--variants",
    ]  # fmt: skip
    assert real_llm.main([*arguments, "--minutes", "0"]) == {}
    assert len(out.read_text().splitlines()) == 1  # the facts

    found = real_llm.main(arguments)
    printed = capsys.readouterr().out
    assert "All cells are done." in printed
    assert "| FARMS median | " in printed
    # Two seeds at the first epsilon, the other candidate, and its second seed if it is chosen.
    assert 2 * 3 + 2 <= len([cell for cell in found if "alone" not in cell]) <= 2 * 3 + 4
    assert sum("alone" in cell for cell in found) == 3 * 4
    for entry in found.values():
        assert 1 < entry["test"] < math.inf
        if "alone" not in entry["cell"]["arm"]:
            assert entry["reached"] == pytest.approx(0.6, abs=1e-3)

    lines = out.read_text().splitlines()
    # A run that was killed: its last line is cut, and what is missing is measured again.
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])
    again = real_llm.main(arguments)
    key = next(key for key in found if json.loads(lines[-1])["cell"] == found[key]["cell"])
    assert again[key]["test"] == found[key]["test"]
    assert len(out.read_text().splitlines()) == len(lines)

    rows = sensitivity.main([str(out), "--json", str(tmp_path / "found.json")])
    assert len(rows) == 1
    assert {row["blocks"] for row in rows[0]["correlations"]} == {4}
    assert np.isfinite(rows[0]["added loss"]["all"]).all()
