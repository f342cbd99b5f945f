"""A callback for Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from farms_fast.adapters.layer_rates import LayerRates
from farms_fast.adapters.layer_rates.due import Clock
from farms_fast.adapters.layer_rates.logs import scalars
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
    the schedulers did; at the first batch of an epoch, or after each step of the optimizer, as the
    rates' `unit` says, it counts a call, and every so many calls (`every`) the rates are made
    anew. The rates are saved and restored with Lightning's checkpoints.

    Args:
        rates: the rates; or the name of the LightningModule's attribute that has them, for those
            that `configure_optimizers` makes; or a function of the module that returns them.
        optimizer: which of the trainer's optimizers was made from their groups, from 0. With
            several optimizers give the Trainer one callback for each that has rates: their states
            are kept apart by this number.
        log: write base rate, alphas, factors and rates to the trainer's loggers.

    Raises:
        TypeError: `rates` is something else, or leads to something else, or `optimizer` is no
            integer.
        ValueError: `optimizer` is negative or True or False.
        IndexError: the trainer has no such optimizer; said when training starts.

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
        self._where = rates
        self._optimizer = check_int("optimizer", optimizer)
        self._log = log
        self._clock: Clock | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Under which a checkpoint has the state: another for each optimizer."""
        name = type(self).__qualname__
        return f"{name}[optimizer={self._optimizer}]" if self._optimizer else name

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the rates, and gives them what a checkpoint had."""
        where = self._where
        if isinstance(where, LayerRates):
            rates = where
        else:
            found = getattr(pl_module, where, None) if isinstance(where, str) else where(pl_module)
            if not isinstance(found, LayerRates):
                raise TypeError(f"rates: expected {where!r} to lead to LayerRates, got {found!r}")
            rates = found
        if self._optimizer >= len(trainer.optimizers):
            raise IndexError(
                f"optimizer: expected an index of the trainer's {len(trainer.optimizers)} "
                f"optimizers, got {self._optimizer}"
            )
        self._clock = Clock(rates)
        if self._restored is not None:
            self._clock.load_state_dict(self._restored)
            self._restored = None

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sets the rates for the batch."""
        assert self._clock is not None  # training has started
        optimizer = trainer.optimizers[self._optimizer]
        table = self._clock.tick(optimizer, trainer.current_epoch, trainer.global_step)
        if table is not None and self._log and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(scalars(table), step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        if self._clock is None:
            return self._restored or {}
        return self._clock.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what a checkpoint had until training starts."""
        self._restored = state_dict or None
