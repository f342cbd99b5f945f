"""When a trainer's callback makes new rates."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.rate_table import RateTable
from farms_fast.adapters.layer_rates.rates import LayerRates
from farms_fast.core.arguments import check_int


class StepCounter:
    """Calls `step` once for each epoch or optimizer step, and `apply` otherwise.

    It counts what the trainer has completed. So a resumed run goes on as the unbroken one would,
    whether it was stopped between two epochs or within one.

    The `unit` of the rates says what is counted.
    """

    def __init__(self, rates: LayerRates) -> None:
        self.rates = rates
        self.seen = 0

    def advance(self, optimizer: Optimizer, epochs: int, steps: int) -> RateTable | None:
        """Sets the rates for the next batch, and returns the table if it called `step`."""
        now = epochs if self.rates.unit == "epoch" else steps
        if now <= self.seen:
            self.rates.apply(optimizer)
            return None
        self.seen = now
        return self.rates.step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns numbers and text, with the state of the rates."""
        return {"seen": self.seen, "rates": self.rates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes from a state; raises as `LayerRates.load_state_dict`, changing nothing."""
        if not isinstance(state, dict) or not {"seen", "rates"} <= state.keys():
            raise TypeError("state: expected what state_dict() gave")
        seen = check_int("state: 'seen'", state["seen"])
        self.rates.load_state_dict(state["rates"])
        self.seen = seen
