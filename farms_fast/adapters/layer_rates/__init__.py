"""What every rule shares that makes a layer's learning rate from its alpha."""

from farms_fast.adapters.layer_rates.logs import CsvLog, TensorBoardLog
from farms_fast.adapters.layer_rates.rate_table import LayerRate, RateTable
from farms_fast.adapters.layer_rates.rates import LayerRates, RateWarning

__all__ = ["CsvLog", "LayerRate", "LayerRates", "RateTable", "RateWarning", "TensorBoardLog"]
