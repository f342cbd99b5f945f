"""The tables of what pruning does to a real language model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.effect.pruning_table import mean_and_spread
from benchmarks.effect.real_llm_plan import SHUFFLES, UNIFORM, Cell, Plan

SHUFFLED = "shuffled"


def report_lines(
    plan: Plan, cells: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]
) -> list[str]:
    """A table for each method and text, as Markdown, of the groups that have results."""
    dense = ", ".join(f"{split} {value:.2f}" for split, value in facts["dense"].items())
    lines = [f"Perplexity of the dense model: {dense}."]
    for method in dict.fromkeys(method for method, _ in plan.groups):
        sparsities = sorted(s for m, s in plan.groups if m == method)
        for title, epsilon, split in (
            (f"epsilon {plan.first_epsilon:g} for all", plan.first_epsilon, "test"),
            ("epsilon by the validation text", None, "test"),
            ("the same epsilon, news", None, "news"),
        ):
            groups = {s: _group(plan, cells, (method, s), epsilon, split) for s in sparsities}
            lines += _table(f"{method}, {title}", groups)
    return [
        *lines,
        "",
        "Perplexity, mean ± standard deviation over calibration seeds (and "
        "shuffles); in brackets the change against uniform ratios of the same seed, the rank, and "
        "the epsilon on which the validation text of the first seed decided. OWL's lambda is "
        "epsilon times the sparsity, so that its ratios spread as widely.",
    ]


Row = dict[str, Any]


def _group(
    plan: Plan,
    cells: Mapping[str, Mapping[str, Any]],
    group: tuple[str, float],
    epsilon: float | None,
    split: str,
) -> dict[str, Row]:
    """Rows by arm, with ranks; None for epsilon takes that of the validation text.

    Arms with the same result have the same rank.
    """
    method, sparsity = group
    rows: dict[str, Row] = {}
    for arm in (*plan.arms, *plan.variants):
        spread = plan.chosen(method, sparsity, arm, cells) if epsilon is None else epsilon
        if arm == UNIFORM:
            spread = 0.0
        name = SHUFFLED if arm in SHUFFLES else arm
        for seed in plan.seeds_of(method, arm) if spread is not None else ():
            entry = _entry(plan, cells, method, sparsity, arm, spread, seed)
            uniform = _entry(plan, cells, method, sparsity, UNIFORM, 0.0, seed)
            if entry is None or uniform is None:
                continue
            row = rows.setdefault(name, {"values": [], "change": [], "epsilons": []})
            row["values"].append(entry[split])
            row["change"].append(math.log(entry[split] / uniform[split]))
            row["epsilons"].append(spread)
    means = {arm: statistics.fmean(row["change"]) for arm, row in rows.items()}
    ranked = [means[arm] for arm in rows if arm not in plan.variants]
    for arm, row in rows.items():
        better = sum(mean < means[arm] - 1e-12 for mean in ranked)
        row["rank"] = None if arm in plan.variants else better + 1
    return rows


def _entry(
    plan: Plan,
    cells: Mapping[str, Mapping[str, Any]],
    method: str,
    sparsity: float,
    arm: str,
    epsilon: float | None,
    seed: int,
) -> Mapping[str, Any] | None:
    one = UNIFORM if epsilon == 0 else arm
    seed = seed if seed in plan.seeds_of(method, one) else plan.seeds[0]
    return cells.get(Cell(method, sparsity, one, epsilon or 0.0, seed).key)


def _table(title: str, groups: Mapping[float, Mapping[str, Row]]) -> list[str]:
    groups = {sparsity: rows for sparsity, rows in groups.items() if rows}
    arms = list(dict.fromkeys(arm for rows in groups.values() for arm in rows))
    if not arms:
        return []
    lines = [
        "",
        f"| {title} | " + " | ".join(f"{sparsity:g}" for sparsity in groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for arm in arms:
        found = (_cell(arm, rows.get(arm)) for rows in groups.values())
        lines.append(f"| {arm} | " + " | ".join(found) + " |")
    return lines


def _cell(arm: str, row: Row | None) -> str:
    if row is None:
        return "-"
    text = mean_and_spread(row["values"])
    rank = f", rank {row['rank']}" if row["rank"] else ""
    if arm == UNIFORM:
        return f"{text} ({rank[2:]})"
    change = [100 * math.expm1(value) for value in row["change"]]
    return f"{text} ({mean_and_spread(change, sign=True)} %{rank}, ε {_range(row['epsilons'])})"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
