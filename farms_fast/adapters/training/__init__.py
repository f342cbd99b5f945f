"""Training with a learning rate per layer: TempBalance, callbacks for trainers, logs, data."""

from farms_fast.adapters.layer_rates import (
    CsvLog,
    LayerRate,
    LayerRates,
    RateTable,
    RateWarning,
    TensorBoardLog,
)
from farms_fast.adapters.training.tempbalance import TempBalance

__all__ = [
    "CsvLog",
    "LayerRate",
    "LayerRates",
    "RateTable",
    "RateWarning",
    "TempBalance",
    "TensorBoardLog",
]
