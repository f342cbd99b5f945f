"""Published entry points under their own names: change one import, keep the numbers.

`net_esd_estimator` and `net_esd_estimator_farms` are those of FARMS and AlphaPruning,
`modelbalancing.net_esd_estimator` is ModelBalancing's.
"""

from farms_fast.compat.estimators import net_esd_estimator, net_esd_estimator_farms
from farms_fast.compat.spectra import FitWarning

__all__ = ["FitWarning", "net_esd_estimator", "net_esd_estimator_farms"]
