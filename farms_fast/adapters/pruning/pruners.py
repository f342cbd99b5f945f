"""The pruners by name, with magnitude pruning and Wanda (arXiv 2306.11695).

Each prunes one matrix in place. Magnitude compares |W| over the matrix; Wanda compares
|W|·√(mean x²) within a row; SparseGPT has a module of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farms_fast.adapters.pruning.masks import (
    NM,
    check_target,
    check_weight,
    lowest,
    lowest_in_groups,
    lowest_in_rows,
)
from farms_fast.adapters.pruning.sparsegpt import sparsegpt_prune_
from farms_fast.adapters.pruning.statistics import InputStatistics, check_statistics


class PruneFunction(Protocol):
    """The signature of every pruner."""

    def __call__(
        self,
        weight: Tensor,
        ratio: float | None,
        statistics: InputStatistics | None = None,
        *,
        n_m: NM | None = None,
        layer: str = "",
    ) -> Tensor:
        """Prunes a matrix in place.

        Args:
            weight: floating (out, in), any strides.
            ratio: share of all weights that are zero afterwards, exactly round(ratio * (out * in)),
                existing zeros included; None with `n_m`.
            statistics: those of the layer's inputs; magnitude needs none.
            n_m: (n, m) instead of a ratio: keeps n of every m consecutive weights of a row.
            layer: the layer's name for messages.

        Returns:
            bool (out, in), true where the weight is zero now.

        Raises:
            TypeError: weight is no tensor, or statistics are missing.
            ValueError: weight is no finite floating matrix, both or none of ratio and n_m are
                given, one of them is out of range, groups do not divide the columns, or the
                statistics are empty, not finite or of another number of inputs.
        """
        ...


@torch.no_grad()
def magnitude_prune_(
    weight: Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: NM | None = None,
    layer: str = "",
) -> Tensor:
    """Sets the weights of least |W| in the whole matrix to zero; called as `PruneFunction`.

    A matrix with more zeros than asked for does not change.
    """
    check_target(weight, ratio, n_m, layer)
    count = round((ratio or 0.0) * weight.numel())
    return _zero_lowest_(weight, weight.abs(), n_m, lambda scores: lowest(scores, count))


def wanda_scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """|W|·√(mean x²), Wanda's score of every weight: (out, in) in the dtype of the statistics."""
    check_weight(weight, getattr(statistics, "layer", ""))
    return _scores(weight, check_statistics(statistics, weight))


def _scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    norms = statistics.norms.to(weight.device)
    return weight.abs().to(norms.dtype) * norms


@torch.no_grad()
def wanda_prune_(
    weight: Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: NM | None = None,
    layer: str = "",
) -> Tensor:
    """Sets the weights of least |W|·√(mean x²) of each row to zero; called as `PruneFunction`.

    Every row gets the same number of zeros to within one. A row with more zeros does not change, so
    that the total can exceed the ratio.
    """
    check_target(weight, ratio, n_m, layer)
    scores = _scores(weight, check_statistics(statistics, weight, layer))
    return _zero_lowest_(weight, scores, n_m, lambda scores: lowest_in_rows(scores, ratio or 0.0))


def _zero_lowest_(
    weight: Tensor, scores: Tensor, n_m: NM | None, lowest_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sets the weights of the lowest scores, and those in their place of N:M, to zero."""
    zero = weight == 0
    # Inputs that are always zero give scores of zero too; zero weights go before them.
    scores.masked_fill_(zero, -1)
    mask = lowest_of(scores) if n_m is None else lowest_in_groups(scores, *n_m)
    mask |= zero
    weight.masked_fill_(mask, 0)
    return mask


@dataclass(frozen=True)
class Pruner:
    """A pruner.

    Attributes:
        name: "magnitude", "wanda" or "sparsegpt".
        needs_inputs: whether it needs `InputStatistics`, and so calibration.
        needs_hessian: whether it needs them with `hessian=True`.
        prune_: the function.
    """

    name: str
    needs_inputs: bool
    needs_hessian: bool
    prune_: PruneFunction

    def statistics(
        self, columns: int, *, device: str | torch.device | None = None, layer: str = ""
    ) -> InputStatistics | None:
        """Empty statistics for a layer with that many inputs; None if the pruner needs none.

        Example:
            >>> pruner("sparsegpt").statistics(64).has_hessian, pruner("magnitude").statistics(64)
            (True, None)
        """
        if not self.needs_inputs:
            return None
        return InputStatistics(columns, hessian=self.needs_hessian, device=device, layer=layer)


#: Every pruner by name.
PRUNERS = {
    "magnitude": Pruner("magnitude", False, False, magnitude_prune_),
    "wanda": Pruner("wanda", True, False, wanda_prune_),
    "sparsegpt": Pruner("sparsegpt", True, True, sparsegpt_prune_),
}


def pruner(name: str) -> Pruner:
    """The pruner of that name.

    Raises:
        ValueError: there is none.

    Example:
        >>> pruner("wanda").needs_hessian
        False
    """
    if not isinstance(name, str) or name not in PRUNERS:
        raise ValueError(f"method: expected one of {', '.join(PRUNERS)}, got {name!r}")
    return PRUNERS[name]
