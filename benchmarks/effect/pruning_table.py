"""From the perplexities of pruned models to the table that is printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "alpha", "farms", "owl")


def chosen(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every method, sparsity and allocation: the spread that is best on the validation text.

    A sparsity that a seed has left out is left out.

    Returns:
        One entry each, with the seeds' perplexities on the test text and, next to those of uniform
        ratios, the differences of their logarithms, all in the order of the seeds.
    """
    groups: dict[tuple[str, float, str], dict[float, list[Mapping[str, Any]]]] = {}
    missing = {sparsity for run in runs for sparsity in run["left_out"]}
    for run in runs:
        for entry in run["pruned"]:
            if entry["sparsity"] in missing:
                continue
            key = (entry["method"], entry["sparsity"], entry["allocation"])
            groups.setdefault(key, {}).setdefault(entry["spread"], []).append(entry)
    rows = []
    for (method, sparsity, allocation), by_spread in groups.items():
        spread, entries = min(
            by_spread.items(),
            key=lambda item: statistics.fmean(math.log(e["validation"]) for e in item[1]),
        )
        uniform = groups[method, sparsity, "uniform"][0.0]
        rows.append(
            {
                "method": method,
                "sparsity": sparsity,
                "allocation": allocation,
                "spread": spread,
                "test": [e["test"] for e in entries],
                "log_ratio": [
                    math.log(e["test"] / u["test"]) for e, u in zip(entries, uniform, strict=True)
                ],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Perplexities as Markdown, with the difference to uniform ratios in percent."""
    sparsities = sorted({row["sparsity"] for row in rows})
    by_key = {(row["method"], row["allocation"], row["sparsity"]): row for row in rows}
    lines = [
        "| method | allocation | " + " | ".join(f"{s:g}" for s in sparsities) + " |",
        "|---|---|" + "---|" * len(sparsities),
    ]
    for method in METHODS:
        for allocation in ALLOCATIONS:
            cells = []
            for sparsity in sparsities:
                row = by_key[method, allocation, sparsity]
                cell = mean_and_spread(row["test"])
                if allocation != "uniform":
                    change = [100 * math.expm1(value) for value in row["log_ratio"]]
                    cell += f" ({mean_and_spread(change, sign=True)} %, {row['spread']:g})"
                cells.append(cell)
            lines.append(f"| {method} | {allocation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float], *, sign: bool = False) -> str:
    mean = statistics.fmean(values)
    digits = 1 if sign else max(0, 3 - len(f"{abs(mean):.0f}"))
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text
