"""Outlier-weighed layer-wise sparsity (OWL, arXiv 2310.05175), a baseline without spectra."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from farms_fast.adapters.pruning.sparsities import (
    Allocation,
    as_number,
    check_positive,
    check_sparsity,
    scale_to_total,
    weight_counts,
)
from farms_fast.core.arguments import check_type, is_real


def outlier_ratio(scores: Iterable[torch.Tensor], threshold: float = 5.0) -> float:
    """OWL's D: the percentage of a block's scores that exceed M times their mean.

    Args:
        scores: |W|·‖x‖ of every layer of a block (`wanda_scores`), any shapes.
        threshold: M.

    Returns:
        The percentage.

    Raises:
        TypeError: scores that are no tensors.
        ValueError: no scores, scores that are not finite, or a threshold that is not positive.

    Example:
        >>> outlier_ratio([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0])], 2.0)
        25.0
    """
    check_positive("threshold", threshold)
    check_type("scores", scores, Iterable, "tensors")
    every = list(scores)
    for given in every:
        if not isinstance(given, torch.Tensor):
            raise TypeError(f"scores: expected tensors, got {type(given).__name__} for one")
    number = sum(tensor.numel() for tensor in every)
    total = math.fsum(float(tensor.sum(dtype=torch.float64)) for tensor in every)
    if not number or not math.isfinite(total):
        raise ValueError(f"scores: expected finite ones, got {number} that sum to {total}")
    limit = threshold * total / number
    return 100.0 * sum(int((tensor > limit).sum()) for tensor in every) / number


def owl_sparsity(
    outliers: Mapping[str, float] | Sequence[float],
    sparsity: float,
    lam: float = 0.08,
    *,
    layers: Mapping[str, Mapping[str, int]] | None = None,
) -> Allocation:
    """Distributes a model's sparsity over its blocks by their outliers.

    `density = 2 lam (D - D_min) / (D_max - D_min) - mean + 1 - S`, where the mean is that of the
    first term over all weights, so that the total is exactly S. A block with a sparsity above 1
    gets 1, and the excess goes to the others.

    Args:
        outliers: D (`outlier_ratio`) by block name, or in order.
        sparsity: S, share of the weights to prune in total, within (0, 1).
        lam: half the width of the range of densities, at least 0.
        layers: number of weights by layer name, by block name; None makes every block one layer,
            all equally large.

    Returns:
        The ratios by layer.

    Raises:
        TypeError: outliers that are no numbers, or a number of weights that is no integer.
        ValueError: a sparsity out of range, a lam that is negative or makes a sparsity negative,
            outliers that are not finite, or layers of other blocks.

    Example:
        >>> allocation = owl_sparsity([2.0, 4.0, 3.0], 0.7)
        >>> [round(ratio, 3) for ratio in allocation.ratios.values()]
        [0.78, 0.62, 0.7]
    """
    check_sparsity(sparsity)
    if not is_real(lam) or not 0 <= lam < math.inf:
        raise ValueError(f"lam: expected a number of at least 0, got {lam!r}")
    by_block = _by_block(outliers)
    values = np.array(list(by_block.values()), dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"outliers: expected finite numbers by block, got {by_block}")
    sizes = {block: {block: 1} for block in by_block} if layers is None else layers
    if not isinstance(sizes, Mapping) or set(sizes) != set(by_block):
        got = f"{len(sizes)} blocks" if isinstance(sizes, Mapping) else type(sizes).__name__
        raise ValueError(
            f"layers: expected those of the {len(by_block)} blocks of outliers, got {got}"
        )
    counts = {block: weight_counts(f"layers[{block!r}]", sizes[block]) for block in by_block}
    params = {name: count for block in counts.values() for name, count in block.items()}
    weights = np.array([float(sum(block.values())) for block in counts.values()])
    spread = np.ptp(values)
    density = 2 * lam * (values - values.min()) / spread if spread else np.zeros_like(values)
    relative = sparsity - density + (weights * density).sum() / weights.sum()
    if (relative < 0).any():
        worst = list(by_block)[int(relative.argmin())]
        raise ValueError(
            f"lam: {lam:g} makes the sparsity of block {worst!r} negative ({relative.min():.4f}) "
            f"at a total of {sparsity:g}"
        )
    scale, ratios = scale_to_total(relative, weights, float(sparsity))
    block_of = {name: at for at, block in enumerate(counts.values()) for name in block}
    return Allocation(
        ratios={name: float(ratios[block_of[name]]) for name in params},
        params=params,
        relative={name: float(relative[block_of[name]]) for name in params},
        blocks={block: tuple(names) for block, names in counts.items()},
        scale=scale,
        settings={"allocation": "owl", "sparsity": float(sparsity), "lam": float(lam)},
        outliers=by_block,
    )


def _by_block(outliers: object) -> dict[str, float]:
    if isinstance(outliers, (str, bytes)) or not isinstance(outliers, Iterable):
        raise TypeError(
            f"outliers: expected numbers by block or in order, got {type(outliers).__name__}"
        )
    pairs = outliers.items() if isinstance(outliers, Mapping) else enumerate(outliers)
    return {str(block): as_number("outliers", value, str(block)) for block, value in pairs}
