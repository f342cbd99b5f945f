"""Training with a learning rate per layer: TempBalance, callbacks for trainers, logs, data."""

from farms_fast.adapters.layer_rates.logs import CsvLog, TensorBoardLog
from farms_fast.adapters.layer_rates.rate_table import LayerRate, RateTable
from farms_fast.adapters.layer_rates.rates import LayerRates, RateWarning
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
