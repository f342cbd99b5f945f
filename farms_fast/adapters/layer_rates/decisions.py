"""From the alphas of layers to one factor for each: what is kept, what is averaged, what fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from farms_fast.adapters.layer_rates.rate_table import LayerRate
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.live import LayerAlpha

__all__ = ["Factors", "decide"]

# Scores of the kept layers or blocks, in order, to a positive factor for each.
Factors = Callable[[Sequence[float]], Sequence[float]]
# After these a layer with too few eigenvalues is one that is small, not one that has collapsed.
_NEVER_ENOUGH = ("too_few", "skipped", "frozen")


def decide(
    layers: Sequence[TunedLayer],
    blocks: Sequence[str],
    alphas: Mapping[str, LayerAlpha],
    left_alone: Mapping[str, tuple[str, str]],
    factors: Factors,
    before: Mapping[str, str],
) -> list[LayerRate]:
    """One row a layer, with its factor.

    Layers of one block have the mean of their alphas as one score. A layer without alpha has the
    factor 1, and so has every layer where there are fewer than two different scores. A layer with
    too few eigenvalues takes its block's factor, if there is one, unless it had enough before: then
    it has collapsed, which is a failure.

    Args:
        layers: the model's.
        blocks: the block of each.
        alphas: the measured alphas by the names of the layers' parts.
        left_alone: status and message of layers that are not tuned, by name.
        factors: scores to factors.
        before: the status of each layer at the last time, by name; empty if there was none.

    Raises:
        ValueError: `factors` gives another number of factors, or one that is not positive.
    """
    rows = [_measured(layer, block, alphas) for layer, block in zip(layers, blocks, strict=True)]
    for number, row in enumerate(rows):
        if row.name in left_alone:
            status, message = left_alone[row.name]
            rows[number] = replace(row, status=status, message=message)
        elif row.status == "too_few" and before.get(row.name, "skipped") not in _NEVER_ENOUGH:
            message = f"{row.message}; it had enough before"
            rows[number] = replace(row, status="collapsed", message=message)
    members: dict[str, list[float]] = {}
    for row in rows:
        if row.status == "ok":
            members.setdefault(row.block, []).append(row.alpha)
    scores = {block: math.fsum(found) / len(found) for block, found in members.items()}
    made = _factors(list(scores.values()), factors)
    by_block = dict(zip(scores, made, strict=True))
    decided = []
    for row in rows:
        if row.block in scores and row.status in ("ok", "too_few"):
            message = row.message and f"{row.message}: takes its block's rate"
            row = replace(row, message=message, score=scores[row.block], factor=by_block[row.block])
        decided.append(row)
    return decided


def _measured(layer: TunedLayer, block: str, alphas: Mapping[str, LayerAlpha]) -> LayerRate:
    """The mean over the parts of a layer; not ok unless all of them are."""
    parts = [alphas[spec.name] for spec in layer.specs if spec.name in alphas]
    if not parts:
        return LayerRate(layer.name, status="skipped", message="not analysed", block=block)
    n_evals = sum(part.n_evals - part.zeros for part in parts)
    failed = next((part for part in parts if part.status != "ok"), None)
    if failed is not None:
        message = failed.message or f"no power-law fit: {failed.status}"
        if len(parts) > 1:
            message = f"{failed.name}: {message}"
        return LayerRate(
            layer.name, n_evals=n_evals, status=failed.status, message=message, block=block
        )
    return LayerRate(
        layer.name,
        alpha=math.fsum(part.alpha for part in parts) / len(parts),
        D=math.fsum(part.D for part in parts) / len(parts),
        n_evals=n_evals,
        block=block,
    )


def _factors(scores: list[float], factors: Factors) -> list[float]:
    if len(set(scores)) < 2:  # nothing to compare: every rate stays what it is
        return [1.0] * len(scores)
    made = [float(factor) for factor in factors(scores)]
    if len(made) != len(scores):
        raise ValueError(f"factors: expected one for each of {len(scores)} scores, got {len(made)}")
    for score, factor in zip(scores, made, strict=True):
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factors: expected positive ones, got {factor} for score {score}")
    return made
