"""The benchmark of what layer-wise sparsities do to a language model: its harness, at toy size."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.effect import llm_pruning
from benchmarks.effect.pruning_table import chosen
from benchmarks.effect.text import read_text, tokens_of

BYTES = 200_000
ARGUMENTS = [
    "--quick", "--device", "cpu", "--seeds", "0", "1", "--sparsities", "0.5", "0.8",
    "--epsilons", "0.1", "0.3", "--steps", "12", "--hidden", "64", "--layers", "2",
    "--text-bytes", str(BYTES),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("effect") / "effect.json"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = llm_pruning.main([*ARGUMENTS, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == result["rows"]
    return result, printed.getvalue()


def test_every_cell_is_measured(run: tuple[dict[str, Any], str]) -> None:
    result, printed = run
    keys = [(row["method"], row["allocation"], row["sparsity"]) for row in result["rows"]]
    assert len(set(keys)) == len(keys) == 3 * 4 * 2
    for row in result["rows"]:
        assert len(row["test"]) == len(row["log_ratio"]) == 2
        assert all(1 < value < math.inf for value in row["test"])
        assert row["spread"] in {"uniform": (0.0,), "owl": (0.08,)}.get(
            row["allocation"], (0.1, 0.3)
        )
    for line in ("| sparsegpt | farms | ", "| magnitude | uniform | ", "alphas (farms)"):
        assert line in printed
    # As saved and read again, too.
    lines = llm_pruning.report_lines(json.loads(json.dumps(result)))
    assert "\n".join(lines) == printed.rstrip("\n")


def test_sparsities_are_exact_and_differ_between_blocks(run: tuple[dict[str, Any], str]) -> None:
    for seed in run[0]["runs"]:
        assert 1 < seed["dense"]["test"] < 512
        for entry in seed["pruned"]:
            # Each of 14 layers is rounded to a whole number of its 4096 weights or more.
            assert entry["reached"] == pytest.approx(entry["sparsity"], abs=0.5 / 4096)
            assert (len(set(entry["block_ratios"])) == 1) == (entry["allocation"] == "uniform")
    assert run[0]["runs"][0]["dense"] != run[0]["runs"][1]["dense"]


def test_a_seed_repeats_itself(run: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    settings, _ = llm_pruning.parse(ARGUMENTS)
    for split, tokens in tokens_of(read_text(BYTES), settings.size.vocabulary).items():
        torch.save(tokens, tmp_path / f"{split}.pt")
    again = llm_pruning.run_seed(settings, 1, str(tmp_path))
    first = run[0]["runs"][1]
    assert again["dense"] == first["dense"]
    assert again["pruned"] == first["pruned"]
    too_late = llm_pruning.run_seed(settings, 1, str(tmp_path), deadline=0)
    assert too_late["left_out"] == [0.5, 0.8]
    assert too_late["pruned"] == []


def entry(allocation: str, spread: float, validation: float, test: float) -> dict[str, Any]:
    return {"method": "wanda", "sparsity": 0.5, "allocation": allocation, "spread": spread,
            "validation": validation, "test": test}  # fmt: skip


def test_spread_is_chosen_on_the_validation_text_over_all_seeds() -> None:
    runs = [
        {"left_out": [], "pruned": [entry("uniform", 0.0, 10, 11), entry("farms", 0.1, 8, 9),
                    entry("farms", 0.3, 7, 20)]},
        {"left_out": [], "pruned": [entry("uniform", 0.0, 10, 10), entry("farms", 0.1, 8, 12),
                    entry("farms", 0.3, 9, 1)]},
    ]  # fmt: skip
    uniform, farms = chosen(runs)
    assert uniform["log_ratio"] == [0.0, 0.0]
    # 7 and 9 have a smaller geometric mean than 8 and 8, whatever comes out on the test text.
    assert farms["spread"] == 0.3
    assert farms["test"] == [20, 1]
    assert farms["log_ratio"] == pytest.approx([math.log(20 / 11), math.log(0.1)])


def test_sparsity_that_a_seed_left_out_is_not_reported() -> None:
    whole = {"left_out": [], "pruned": [entry("uniform", 0.0, 10, 11)]}
    assert len(chosen([whole, whole])) == 1
    assert chosen([whole, {"left_out": [0.5], "pruned": []}]) == []


def test_text_is_split_by_files_and_the_same_again() -> None:
    text = read_text(BYTES)
    assert read_text(BYTES) == text
    splits = [set(documents) for documents in text.documents.values()]
    assert len(set().union(*splits)) == sum(len(split) for split in splits)
    assert sum(text.bytes.values()) >= BYTES
    more = read_text(3 * BYTES)
    assert all(
        more.documents[split][: len(documents)] == documents
        for split, documents in text.documents.items()
    )
    with pytest.raises(ValueError, match=r"text: no .* documents in 10 bytes"):
        read_text(10)


def test_tokens_are_those_of_the_documents() -> None:
    text = read_text(BYTES)
    tokens = tokens_of(text, 300)
    for split, documents in text.documents.items():
        assert int((tokens[split] == 0).sum()) == len(documents)
        assert 0 <= int(tokens[split].min()) <= int(tokens[split].max()) < 300
