"""Magnitude pruning: the smallest weights of a matrix go."""

from __future__ import annotations

import torch

from farms_fast.adapters.pruning.masks import (
    check_target,
    check_weight,
    lowest,
    lowest_in_groups,
)
from farms_fast.adapters.pruning.statistics import InputStatistics

__all__ = ["magnitude_prune_"]


@torch.no_grad()
def magnitude_prune_(
    weight: torch.Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    layer: str = "",
) -> torch.Tensor:
    """Sets the weights of least magnitude to zero, over the whole matrix.

    Args:
        weight: floating (out, in), any strides; written in place.
        ratio: share of all weights that are zero afterwards: exactly round(ratio * (out * in)),
            zeros that were there before counted. A matrix with more zeros than that stays as
            it is. None with `n_m`.
        statistics: not used; there so that all pruners are called alike.
        n_m: (n, m): n weights are kept of every m consecutive ones of a row, instead of a ratio.
        layer: the layer's name for messages.

    Returns:
        bool (out, in), true where the weight is zero now.

    Raises:
        TypeError: weight is no tensor.
        ValueError: weight is no finite floating matrix, both or none of ratio and n_m, one of
            them out of range, or groups that do not divide the columns.

    Example:
        >>> weight = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
        >>> _ = magnitude_prune_(weight, 0.5)
        >>> weight.tolist()
        [[3.0, 0.0], [0.0, 2.0]]
    """
    check_weight(weight, layer)
    check_target(weight, ratio, n_m, layer)
    scores = weight.abs()
    if n_m is not None:
        mask = lowest_in_groups(scores, *n_m)
    else:
        mask = lowest(scores, round((ratio or 0.0) * weight.numel()))
    mask |= weight == 0
    weight.masked_fill_(mask, 0)
    return mask
