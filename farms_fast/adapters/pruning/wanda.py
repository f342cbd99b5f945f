"""Wanda (arXiv 2306.11695): weights times the size of their inputs, compared within a row."""

from __future__ import annotations

import torch

from farms_fast.adapters.pruning.masks import (
    check_target,
    check_weight,
    lowest_in_groups,
    lowest_in_rows,
)
from farms_fast.adapters.pruning.statistics import InputStatistics, check_statistics

__all__ = ["wanda_prune_", "wanda_scores"]


def wanda_scores(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    """|W| · √(mean of x²), the score of every weight.

    Args:
        weight: floating (out, in).
        statistics: of the layer's inputs, on the weight's device or another.

    Returns:
        (out, in) in the dtype of the statistics.

    Raises:
        TypeError: the weight is no tensor, or statistics are missing.
        ValueError: the weight is no finite floating matrix, or statistics of another number of
            inputs, of none, or of NaN (they say which).

    Example:
        >>> statistics = InputStatistics(2)
        >>> statistics.add(torch.tensor([[3.0, 1.0]]))
        >>> wanda_scores(torch.tensor([[1.0, -2.0]]), statistics).tolist()
        [[3.0, 2.0]]
    """
    check_weight(weight, statistics.layer if isinstance(statistics, InputStatistics) else "")
    return _scores(weight, check_statistics(statistics, weight))


def _scores(weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
    norms = statistics.norms.to(weight.device)
    return weight.abs().to(norms.dtype) * norms


@torch.no_grad()
def wanda_prune_(
    weight: torch.Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    layer: str = "",
) -> torch.Tensor:
    """Sets the weights of least |W|·√(mean x²) to zero, row by row.

    Args:
        weight: floating (out, in), any strides; written in place.
        ratio: share of the weights that are zero afterwards: round(ratio * (out * in)) in total and
            the same number in every row to within one, zeros that were there before counted. A
            row with more zeros than its number stays as it is, so that the total can only be
            higher. None with `n_m`.
        statistics: of the layer's inputs.
        n_m: (n, m): n weights are kept of every m consecutive ones of a row, instead of a ratio.
        layer: the layer's name for messages.

    Returns:
        bool (out, in), true where the weight is zero now.

    Raises:
        TypeError: weight is no tensor, or statistics are missing.
        ValueError: as `magnitude_prune_` and
            `wanda_scores`.

    Example:
        >>> statistics = InputStatistics(2)
        >>> statistics.add(torch.tensor([[3.0, 1.0]]))
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> wanda_prune_(weight, 0.5, statistics).tolist()
        [[False, True]]
    """
    check_weight(weight, layer)
    check_target(weight, ratio, n_m, layer)
    scores = _scores(weight, check_statistics(statistics, weight, layer))
    zero = weight == 0
    # Inputs that are always zero give scores of zero as well; zero weights go before them.
    scores.masked_fill_(zero, -1)
    if n_m is not None:
        mask = lowest_in_groups(scores, *n_m)
    else:
        mask = lowest_in_rows(scores, ratio or 0.0)
    mask |= zero
    weight.masked_fill_(mask, 0)
    return mask
