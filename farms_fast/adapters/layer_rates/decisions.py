"""From the alphas of layers to one factor for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from farms_fast.adapters.layer_rates.rate_table import LayerRate
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.live import LayerAlpha

# Scores of the kept layers or blocks, in order, to a positive factor for each.
Factors = Callable[[Sequence[float]], Sequence[float]]
# A layer that had one of these before is small; any other with too few eigenvalues has collapsed.
_NEVER_ENOUGH = ("too_few", "skipped", "frozen")


def decide(
    layers: Sequence[TunedLayer],
    blocks: Sequence[str],
    alphas: Mapping[str, LayerAlpha],
    factors: Factors,
    before: Mapping[str, str],
) -> list[LayerRate]:
    """Makes one row for each layer, with its factor; ValueError for factors that are not positive.

    `before` has the last status of each layer. The score of a block is the mean alpha of its
    layers. A layer without alpha has the factor 1; all layers have it where fewer than two scores
    differ. A layer with too few eigenvalues takes its block's factor, if there is one. If it had
    enough before, it has collapsed, which is a failure.
    """
    rows = []
    members: dict[str, list[float]] = {}
    for layer, block in zip(layers, blocks, strict=True):
        row = _measured(layer, block, alphas)
        if layer.left_alone is not None:
            status, message = layer.left_alone
            row = replace(row, status=status, message=message)
        elif row.status == "too_few" and before.get(row.name, "skipped") not in _NEVER_ENOUGH:
            row = replace(row, status="collapsed", message=f"{row.message}; it had enough before")
        elif row.status == "ok":
            members.setdefault(block, []).append(row.alpha)
        rows.append(row)
    scores = {block: math.fsum(values) / len(values) for block, values in members.items()}
    by_block = dict(zip(scores, _checked(list(scores.values()), factors), strict=True))
    for number, row in enumerate(rows):
        if row.block in scores and row.status in ("ok", "too_few"):
            message = row.message and f"{row.message}: takes its block's rate"
            score, factor = scores[row.block], by_block[row.block]
            rows[number] = replace(row, message=message, score=score, factor=factor)
    return rows


def _measured(layer: TunedLayer, block: str, alphas: Mapping[str, LayerAlpha]) -> LayerRate:
    """The mean over the parts of a layer; "ok" only if all of them are."""
    parts = [alphas[spec.name] for spec in layer.specs if spec.name in alphas]
    if not parts:
        return LayerRate(layer.name, status="skipped", message="not analysed", block=block)
    n_evals = sum(part.n_evals - part.zeros for part in parts)
    row = LayerRate(layer.name, n_evals=n_evals, block=block)
    failed = next((part for part in parts if part.status != "ok"), None)
    if failed is not None:
        message = failed.message or f"no power-law fit: {failed.status}"
        named = f"{failed.name}: {message}" if len(parts) > 1 else message
        return replace(row, status=failed.status, message=named)
    alpha = math.fsum(part.alpha for part in parts) / len(parts)
    return replace(row, alpha=alpha, D=math.fsum(part.D for part in parts) / len(parts))


def _checked(scores: list[float], factors: Factors) -> list[float]:
    """The factors, one for each score and positive; 1 where no two scores differ."""
    if len(set(scores)) < 2:
        return [1.0] * len(scores)
    made = [float(factor) for factor in factors(scores)]
    if len(made) != len(scores):
        raise ValueError(f"factors: expected one for each of {len(scores)} scores, got {len(made)}")
    for score, factor in zip(scores, made, strict=True):
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"factors: expected positive ones, got {factor} for score {score}")
    return made
