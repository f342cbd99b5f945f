"""A callback for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from farms_fast.adapters.layer_rates.logs import scalars
from farms_fast.adapters.layer_rates.rate_scheduler import StepCounter
from farms_fast.adapters.layer_rates.rates import LayerRates
from farms_fast.core.arguments import check_int, check_type
from farms_fast.core.optional import optional_import

with optional_import("lightning", extra="lightning", needed_for="LightningRates"):
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

__all__ = ["LightningRates"]


class LightningRates(Callback):  # type: ignore[misc]
    """Makes and sets the rates of a `LayerRates` while Lightning trains.

    Before each batch it sets every tuned group to the base rate times its factor, after whatever
    the schedulers did. It counts a call at the first batch of an epoch or after each step of the
    optimizer, as the rates' `unit` says; every so many calls (`every`) make new rates. Lightning's
    checkpoints save and restore the rates.

    Args:
        rates: the rates. For rates that `configure_optimizers` makes: the name of the
            LightningModule's attribute that has them, or a function of the module that returns
            them.
        optimizer: which of the trainer's optimizers was made from their groups, from 0. With
            several optimizers give the Trainer one callback for each that has rates: this number
            keeps their states apart.
        log: write base rate, alphas, factors and rates to the trainer's loggers.

    Raises:
        TypeError: `rates` is something else, or leads to something else, or `optimizer` is no
            integer.
        ValueError: `optimizer` is negative or True or False.
        IndexError: the trainer has no such optimizer; raised when training starts.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from farms_fast.adapters.training import TempBalance
        >>> from farms_fast.adapters.training.lightning import LightningRates
        >>> class Classifier(LightningModule):
        ...     def configure_optimizers(self):
        ...         self.rates = TempBalance(self)
        ...         optimizer = torch.optim.SGD(self.rates.param_groups(lr=0.1), momentum=0.9)
        ...         schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        ...         return [optimizer], [schedule]
        >>> callback = LightningRates("rates")  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        rates: LayerRates | str | Callable[[Any], LayerRates] = "rates",
        *,
        optimizer: int = 0,
        log: bool = True,
    ) -> None:
        if not (isinstance(rates, (LayerRates, str)) or callable(rates)):
            raise TypeError(
                f"rates: expected LayerRates, an attribute's name or a function, got {rates!r}"
            )
        check_type("optimizer", optimizer, int, "an index of the trainer's optimizers")
        self._rates = rates
        self._optimizer = check_int("optimizer", optimizer)
        self._log = log
        self._counter: StepCounter | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint, another one for each optimizer."""
        name = type(self).__qualname__
        return f"{name}[optimizer={self._optimizer}]" if self._optimizer else name

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks up the rates, and restores what a checkpoint had."""
        rates: Any = self._rates
        if isinstance(rates, str):
            rates = getattr(pl_module, rates, None)
        elif not isinstance(rates, LayerRates):
            rates = rates(pl_module)
        if not isinstance(rates, LayerRates):
            raise TypeError(f"rates: expected {self._rates!r} to lead to LayerRates, got {rates!r}")
        if self._optimizer >= len(trainer.optimizers):
            raise IndexError(
                f"optimizer: expected an index of the trainer's {len(trainer.optimizers)} "
                f"optimizers, got {self._optimizer}"
            )
        self._counter = StepCounter(rates)
        if self._restored is not None:
            self._counter.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sets the rates for the batch."""
        assert self._counter is not None  # training has started
        optimizer = trainer.optimizers[self._optimizer]
        table = self._counter.advance(optimizer, trainer.current_epoch, trainer.global_step)
        if table is not None and self._log and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(scalars(table), step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Returns what goes into a checkpoint."""
        return (self._restored or {}) if self._counter is None else self._counter.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint had until training starts."""
        self._restored = state_dict or None
