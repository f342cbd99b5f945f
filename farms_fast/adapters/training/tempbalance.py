"""TempBalance: the larger the alpha of a layer, the larger its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from farms_fast.adapters.layer_rates.rates import DEFAULT_SAMPLING, LayerRates
from farms_fast.spectra.windows import Sampling

ASSIGNMENTS = ("linear", "sqrt", "log2", "step")


class TempBalance(LayerRates):
    """Learning rates per layer from alpha (TempBalance, arXiv 2312.00359; with FARMS, 2506.06280).

    The rate of a layer, with base rate η and the alphas α of the n kept layers, is

    - `"linear"`: η·[a + (b − a)·(α − min α)/(max α − min α)]
    - `"sqrt"`: η·n·√α / Σ√α
    - `"log2"`: η·n·log₂α / Σ log₂α
    - `"step"`: η·[a + (b − a)·r/n], r the layer's rank among the alphas, 0 for the smallest; of
      equal alphas the earlier layer has the lower rank

    Layers that are left alone or have no fit keep η. All layers keep it where there is nothing to
    compare: one layer, or equal alphas.

    Args:
        model, sampling, xmin, skip_first, skip_last: as in `LayerRates`.
        assign: the rule.
        lr_range: (a, b), positive and in order; used by "linear" and "step".
        min_evals: as in `LayerRates`; 5 as published.
        **options: the other arguments of `LayerRates`, with the same defaults: `per="layer"`,
            `xmin_pos=2`, `bins=100`, `evals_threshold=0.0`, `norm="name"`, `every=1`,
            `unit="epoch"`, `overlap=False`, `initial=True`, `include=None`, `exclude=None`,
            `dtype=torch.float64`, `solver=None`, `memory=None`, `process_group="default"`,
            `log=None`, `change=None`.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an unknown rule, a range out of order, or as `LayerRates`.

    Example:
        >>> import torch
        >>> from farms_fast import FixedAspectSampling
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
        >>> rates = TempBalance(model, FixedAspectSampling(rows=16))
        >>> optimizer = torch.optim.SGD(rates.param_groups(lr=0.1))
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> table = rates.step(optimizer)
        >>> [(row.name, row.status, row.factor) for row in table]
        [('0', 'skipped', 1.0), ('1', 'ok', 1.5), ('2', 'ok', 0.5), ('3', 'skipped', 1.0)]
        >>> [(group["name"], round(group["lr"], 4)) for group in optimizer.param_groups]
        [('rest', 0.0976), ('1', 0.1463), ('2', 0.0488)]
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling = DEFAULT_SAMPLING,
        xmin: str = "median",
        *,
        assign: str = "linear",
        lr_range: tuple[float, float] = (0.5, 1.5),
        skip_first: bool = True,
        skip_last: bool = True,
        min_evals: int = 5,
        **options: Any,
    ) -> None:
        self._check_options(options)
        if assign not in ASSIGNMENTS:
            known = ", ".join(map(repr, ASSIGNMENTS))
            raise ValueError(f"assign: expected one of {known}, got {assign!r}")
        self.assign = assign
        self.lr_range = _range(lr_range)
        options |= {"skip_first": skip_first, "skip_last": skip_last, "min_evals": min_evals}
        super().__init__(model, sampling, xmin, **options)

    @property
    def settings(self) -> dict[str, object]:
        """The rule, and its range where it has one."""
        if self.assign in ("linear", "step"):
            return {"assign": self.assign, "lr_range": list(self.lr_range)}
        return {"assign": self.assign}

    def factors(self, scores: Sequence[float]) -> list[float]:
        """Rate over base rate for each alpha.

        Args:
            scores: at least two alphas, not all equal.
        """
        n = len(scores)
        low, high = self.lr_range
        if self.assign == "linear":
            smallest, largest = min(scores), max(scores)
            spread = largest - smallest
            return [low + (high - low) * ((alpha - smallest) / spread) for alpha in scores]
        if self.assign == "step":
            by_alpha = sorted(range(n), key=lambda index: scores[index])
            ranks = sorted(range(n), key=by_alpha.__getitem__)
            return [low + (high - low) * rank / n for rank in ranks]
        shaped = [math.sqrt(a) if self.assign == "sqrt" else math.log2(a) for a in scores]
        total = math.fsum(shaped)
        return [n * value / total for value in shaped]


def _range(lr_range: object) -> tuple[float, float]:
    try:
        ends = list(lr_range)  # type: ignore[call-overload]
        if any(isinstance(end, (bool, str)) for end in ends):
            raise TypeError
        low, high = map(float, ends)
    except (TypeError, ValueError):
        raise TypeError(f"lr_range: expected two numbers, got {lr_range!r}") from None
    if not 0 < low <= high < math.inf:
        raise ValueError(f"lr_range: expected positive numbers in order, got {lr_range!r}")
    return low, high
