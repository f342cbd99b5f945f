"""Published entry points under their own names: change one import, keep the numbers.

`net_esd_estimator` and `net_esd_estimator_farms` are those of FARMS and AlphaPruning,
`modelbalancing.net_esd_estimator` is ModelBalancing's, `weightwatcher` is the table of
WeightWatcher's `analyze`.
"""

from farms_fast.compat.farms.estimators import net_esd_estimator, net_esd_estimator_farms
from farms_fast.compat.farms.spectra import FitWarning
from farms_fast.compat.weightwatcher import weightwatcher

__all__ = ["FitWarning", "net_esd_estimator", "net_esd_estimator_farms", "weightwatcher"]
