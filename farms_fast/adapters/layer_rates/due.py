"""When a trainer's callback makes new rates: as its trainer says how far training has come."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.rate_table import RateTable
from farms_fast.adapters.layer_rates.rates import LayerRates
from farms_fast.core.arguments import check_int

__all__ = ["Clock"]


class Clock:
    """Calls `step` once an epoch or optimizer step, and `apply` otherwise.

    It goes by what is completed, so that a run which resumes in the middle of an epoch, or between
    two, goes on as the unbroken one.

    Args:
        rates: whose `unit` counts.
    """

    def __init__(self, rates: LayerRates) -> None:
        self.rates = rates
        self.seen = 0

    def tick(self, optimizer: Optimizer, epochs: int, steps: int) -> RateTable | None:
        """Sets the rates for the next batch; the table if they were made or looked at anew.

        Args:
            optimizer: made from the rates' groups.
            epochs: completed epochs.
            steps: completed steps of the optimizer.
        """
        now = epochs if self.rates.unit == "epoch" else steps
        if now <= self.seen:
            self.rates.apply(optimizer)
            return None
        self.seen = now
        return self.rates.step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and text, with the state of the rates."""
        return {"seen": self.seen, "rates": self.rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there; raises as `LayerRates.load_state_dict`, and then changes nothing."""
        if not isinstance(state, dict) or not {"seen", "rates"} <= state.keys():
            raise TypeError("state: expected what state_dict() gave")
        seen = check_int("state: 'seen'", state["seen"])
        self.rates.load_state_dict(state["rates"])
        self.seen = seen
