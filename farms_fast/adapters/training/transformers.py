"""A callback for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import math
from typing import Any

from farms_fast.adapters.layer_rates.rate_scheduler import StepCounter
from farms_fast.adapters.layer_rates.rates import LayerRates
from farms_fast.core.arguments import check_type
from farms_fast.core.optional import optional_import

with optional_import("transformers", extra="transformers", needed_for="TrainerRates"):
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

__all__ = ["TrainerRates"]


class TrainerRates(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Makes and sets the rates of a `LayerRates` while a transformers Trainer trains.

    Before each step it sets every tuned group to the base rate times its factor, after whatever
    the scheduler did. It counts a call at the first step of an epoch or at every step, as the
    rates' `unit` says; every so many calls (`every`) make new rates. The Trainer reports the base
    rate as the learning rate. `trainer_state.json` keeps the rates, and
    `train(resume_from_checkpoint=...)` restores them.

    Args:
        rates: the rates from whose `param_groups` the Trainer's optimizer is made.

    Raises:
        TypeError: `rates` is something else.
        ValueError: a checkpoint is of another model, or the optimizer of other groups.

    Example:
        >>> import torch
        >>> from farms_fast.adapters.training import TempBalance
        >>> from farms_fast.adapters.training.transformers import TrainerRates
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
        >>> rates = TempBalance(model)
        >>> optimizer = torch.optim.AdamW(rates.param_groups(lr=2e-5, no_decay="vectors"))
        >>> callback = TrainerRates(rates)
        >>> # Trainer(model, args, ..., optimizers=(optimizer, None), callbacks=[callback])
    """

    def __init__(self, rates: LayerRates | None = None) -> None:
        if rates is not None:
            check_type("rates", rates, LayerRates, "LayerRates")
        self._counter_or_none = None if rates is None else StepCounter(rates)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores what a checkpoint had."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step != 0 and saved is not None:
            self._counter.load_state_dict(saved["attributes"]["restored"])

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Sets the rates for the step."""
        # A sum of fractions may fall short of the whole epoch.
        epochs = math.floor((state.epoch or 0) + 1e-9)
        self._counter.advance(optimizer, epochs, state.global_step)

    def state(self) -> dict[str, Any]:
        """Returns what the Trainer saves."""
        counter = self._counter_or_none
        restored = None if counter is None else counter.state_dict()
        return {"args": {}, "attributes": {"restored": restored}}

    @property
    def _counter(self) -> StepCounter:
        if self._counter_or_none is None:
            raise ValueError(
                "rates: expected LayerRates, got none; restore_callback_states_from_checkpoint "
                "makes callbacks anew without them and is not needed here"
            )
        return self._counter_or_none
