"""The pruners by name, and what each has to know of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from farms_fast.adapters.pruning.magnitude import magnitude_prune_
from farms_fast.adapters.pruning.sparsegpt import sparsegpt_prune_
from farms_fast.adapters.pruning.statistics import InputStatistics
from farms_fast.adapters.pruning.wanda import wanda_prune_

__all__ = ["PRUNERS", "PruneFunction", "Pruner", "pruner"]


class PruneFunction(Protocol):
    """How every pruner is called."""

    def __call__(
        self,
        weight: torch.Tensor,
        ratio: float | None,
        statistics: InputStatistics | None = None,
        *,
        n_m: tuple[int, int] | None = None,
        layer: str = "",
    ) -> torch.Tensor:
        """Prunes `weight` (out, in) in place and returns the mask, true where it is zero."""
        ...


@dataclass(frozen=True)
class Pruner:
    """A pruner.

    Attributes:
        name: "magnitude", "wanda" or "sparsegpt".
        needs_inputs: whether it needs `InputStatistics`, and so calibration.
        needs_hessian: whether these have to be made with `hessian=True`.
        prune_: the function.
    """

    name: str
    needs_inputs: bool
    needs_hessian: bool
    prune_: PruneFunction

    def statistics(
        self, columns: int, *, device: str | torch.device | None = None, layer: str = ""
    ) -> InputStatistics | None:
        """Empty statistics of a layer with that many inputs, None where none are needed.

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
