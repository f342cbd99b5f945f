"""Does alpha know which blocks of a real language model are fragile?

Reads what `benchmarks.effect.real_llm` has measured with one block alone pruned, and prints rank
correlations of the loss that this adds with alpha and with OWL's score::

    python -m benchmarks.effect.sensitivity results.jsonl --json found.json --plot found.svg

A large alpha means that pruning takes more from a block: where alpha knows which blocks are
fragile, its correlation with their loss is negative. OWL's is positive.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.effect.real_llm_plan import FARMS, PARTS, block_means, in_part
from benchmarks.effect.real_llm_results import Run, read_runs
from farms_fast.adapters.pruning.allocation import group_by_block

Array = npt.NDArray[np.float64]


def facts_of(run: Run) -> dict[str, Any]:
    if run.facts is None:
        raise ValueError("results: expected a line of facts, got cells alone")
    return run.facts


def alone(run: Run) -> list[dict[str, Any]]:
    """The cells with one block pruned and no other."""
    return [entry for entry in run.cells.values() if entry["cell"]["arm"].startswith("alone ")]


def sensitivity(run: Run, split: str = "test") -> dict[str, Array]:
    """Nats a token that a block's pruning adds, by part; NaN where it was not measured."""
    facts = facts_of(run)
    count = len(group_by_block(facts["modules"]))
    found = {part: np.full(count, np.nan) for part in PARTS}
    for entry in alone(run):
        _, number, part = entry["cell"]["arm"].split()
        found[part][int(number)] = math.log(entry[split] / facts["dense"][split])
    return found


def predictors(facts: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """What could tell a block's sensitivity, in the order of the blocks, by part."""
    alphas = facts["alphas"]
    by_part: dict[str, dict[str, Array]] = {}
    for part in PARTS:
        names = {"FARMS median": FARMS, **{k: k for k in alphas if k != FARMS}}
        by_part[part] = {
            label: np.array(list(block_means(alphas[arm], part).values()))
            for label, arm in names.items()
        }
    for seed, outliers in facts["outliers"].items():
        by_part["all"][f"OWL, seed {seed}"] = np.array(list(outliers.values()))
    by_part["all"]["depth"] = np.arange(len(by_part["all"][FARMS]), dtype=np.float64)
    for part in PARTS:
        for kind in _kinds(facts["modules"], part):
            values = [
                next((alphas[FARMS][n] for n in names if n.endswith(f".{kind}")), math.nan)
                for names in group_by_block(alphas[FARMS]).values()
            ]
            by_part[part][f"FARMS median of {kind}"] = np.array(values)
    return by_part


def _kinds(modules: Mapping[str, int], part: str) -> list[str]:
    if part == "all":
        return []
    return list(dict.fromkeys(n.rsplit(".", 1)[-1] for n in modules if in_part(n, part)))


def spearman(first: Array, second: Array) -> float:
    """Rank correlation; NaN if either is constant."""
    ranks = np.stack([_ranks(first), _ranks(second)])
    if (np.ptp(ranks, axis=1) == 0).any():
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Array) -> Array:
    """Ranks from 0, ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(means[inverse], np.float64)


def with_interval(first: Array, second: Array, repeats: int = 2000) -> dict[str, Any]:
    """Spearman's correlation with the 95 % interval of a bootstrap over the blocks."""
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    if len(first) < 4:
        return {"rho": math.nan, "low": math.nan, "high": math.nan, "blocks": len(first)}
    generator = np.random.default_rng(0)
    drawn = [
        spearman(first[at], second[at])
        for at in generator.integers(len(first), size=(repeats, len(first)))
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    rho = spearman(first, second)
    return {"rho": rho, "low": float(low), "high": float(high), "blocks": len(first)}


def correlations(run: Run) -> list[dict[str, Any]]:
    """Every predictor against every part's sensitivity, with and without both ends."""
    losses, by_part = sensitivity(run), predictors(facts_of(run))
    rows = []
    for part, loss in losses.items():
        for name, values in by_part[part].items():
            whole = with_interval(values, loss)
            inner = with_interval(values[1:-1], loss[1:-1])
            rows.append({"part": part, "predictor": name, **whole, "without ends": inner})
    return rows


def report_lines(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    sparsity = alone(run)[0]["cell"]["sparsity"]
    lines = [
        f"Rank correlation with the loss that one block alone, pruned to {sparsity:g} by Wanda, "
        "adds (95 % bootstrap interval over blocks).",
        "",
        "| pruned part | predictor | all blocks | without the first and the last |",
        "|---|---|---|---|",
    ]
    for row in rows:
        both = " | ".join(map(_number, (row, row["without ends"])))
        lines.append(f"| {row['part']} | {row['predictor']} | {both} |")
    return lines


def _number(row: Mapping[str, Any]) -> str:
    return f"{row['rho']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f}; {row['blocks']})"


def plot(run: Run, path: Path) -> None:
    """Loss and predictors by block, and one against the other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses, by_part = sensitivity(run), predictors(facts_of(run))
    owl = next(name for name in by_part["all"] if name.startswith("OWL"))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for part, loss in losses.items():
        axes[0].semilogy(loss, marker=".", label=part)
    axes[0].set(xlabel="block", ylabel="added loss (nats a token)", title="One block pruned")
    axes[0].legend()
    for axis, name in ((axes[1], FARMS), (axes[2], owl)):
        values, found = by_part["all"][name], with_interval(by_part["all"][name], losses["all"])
        axis.scatter(values, losses["all"], s=14)
        for block, point in enumerate(zip(values, losses["all"], strict=True)):
            axis.annotate(str(block), point, fontsize=6, xytext=(2, 2), textcoords="offset points")
        label = "alpha, FARMS median" if name == FARMS else "OWL's outliers (%)"
        axis.set(xlabel=label, yscale="log", title=f"Spearman {_number(found)}")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints the tables of every run in a file; returns what `--json` gets."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effect.sensitivity", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("results", type=Path, help="the file of benchmarks.effect.real_llm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an image of the last run in the file")
    given = parser.parse_args(arguments)
    found = []
    for run in read_runs(given.results).values():
        if not alone(run):
            continue
        rows = correlations(run)
        losses = {part: values.tolist() for part, values in sensitivity(run).items()}
        found.append({"correlations": rows, "added loss": losses})
        print("\n".join(report_lines(run, rows)))
        if given.plot:
            plot(run, given.plot)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
