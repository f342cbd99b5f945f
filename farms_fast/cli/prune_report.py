"""The text that `farms-fast prune` prints: a table by block, totals and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from farms_fast.cli.tables import counted, text_table
from farms_fast.core.text import fixed, printable

if TYPE_CHECKING:
    from farms_fast.adapters.pruning.sequential import PrunedLayer, PruningReport
    from farms_fast.adapters.pruning.sparsities import Allocation


def report_lines(
    report: PruningReport,
    allocated: Allocation,
    perplexities: Mapping[str, float],
    unknown: Sequence[str],
) -> Iterator[str]:
    """The lines to print; `unknown` are tensors of the checkpoint that the model lacks."""
    rows = []
    of_block: dict[str, list[PrunedLayer]] = {}
    for layer in report.layers:
        of_block.setdefault(layer.block, []).append(layer)
    for block, layers in of_block.items():
        weights = _weights(layers)
        asked = math.fsum(layer.target * math.prod(layer.shape) for layer in layers) / weights
        shown = allocated.outliers.get(block, allocated.shown_alpha(block))
        reached = sum(layer.zeros for layer in layers) / weights
        rows.append(
            (printable(block), str(weights), fixed(shown), f"{asked:.4f}", f"{reached:.4f}")
        )
    value = "outliers %" if allocated.outliers else "alpha"
    yield from text_table(("block", "weights", value, "ratio", "reached"), rows)
    yield ""
    for name in allocated.unfitted:
        yield f"no alpha: {printable(name)}"
    yield from _warnings(of_block, "owl" if allocated.outliers else "alpha")
    if unknown:
        yield (
            f"note: {len(unknown)} of the checkpoint's tensors that the model has no place for are "
            f"not in what was written, {printable(unknown[0])} the first"
        )
    before = sum(layer.zeros_before for layer in report.layers) / _weights(report.layers)
    there = f" ({before:.6f} before)" if before else ""
    yield (
        f"{len(report.layers)} layers pruned by {report.method}, sparsity {report.sparsity:.6f}"
        f"{there}, {len(report.skipped)} matrices left as they are"
    )
    if perplexities:
        yield ", ".join(f"perplexity {when} {value:.4f}" for when, value in perplexities.items())


def _warnings(of_block: Mapping[str, Sequence[PrunedLayer]], kind: str) -> Iterator[str]:
    """Warns of blocks that lose everything, and notes that patterns differ."""
    lost = [
        printable(block)
        for block, layers in of_block.items()
        if layers and all(layer.target == 1 for layer in layers)
    ]
    if lost:
        advice = "a smaller --epsilon, or --compat farms, which clips at 0.998"
        if kind == "owl":
            advice = "a smaller --owl-lambda"
        yield f"warning: all weights are lost of {', '.join(lost)}: take {advice}"
    patterns = Counter(
        f"{pattern[0]}:{pattern[1]}"
        for layers in of_block.values()
        for pattern in {layer.n_m for layer in layers if layer.n_m}
    )
    if len(patterns) > 1:
        each = ", ".join(f"{text} in {counted(n, 'block')}" for text, n in sorted(patterns.items()))
        yield f"note: patterns differ, {each}; --allocation uniform makes them alike"


def _weights(layers: Sequence[PrunedLayer]) -> int:
    return sum(math.prod(layer.shape) for layer in layers)
