"""Spectra of neural-network weights, exact and fast, and what they say about every layer.

The empirical spectral density (ESD) of a weight matrix W is the set of eigenvalues of W·Wᵀ. FARMS
(Fixed-Aspect-Ratio Matrix Subsampling, arXiv 2506.06280) takes it over windows of one aspect ratio,
so that the power-law exponent alpha of its tail no longer depends on the matrix's shape.

Example:
    >>> import torch
    >>> import farms_fast
    >>> model = torch.nn.Linear(256, 512)
    >>> analysis = farms_fast.analyze(model, farms_fast.FixedAspectSampling(rows=128))
    >>> len(analysis), analysis.layers[0].windows
    (1, 225)
"""

from farms_fast.core.extension import __version__, build_info
from farms_fast.results.analysis import Analysis
from farms_fast.results.comparison import Comparison, compare
from farms_fast.results.record import LayerRecord
from farms_fast.run_analysis import analyze
from farms_fast.spectra.esd import esd
from farms_fast.spectra.power_law import PowerLawFit, fit_power_law
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix

__all__ = [
    "Analysis",
    "Comparison",
    "FixedAspectSampling",
    "FullMatrix",
    "LayerRecord",
    "PowerLawFit",
    "__version__",
    "analyze",
    "build_info",
    "compare",
    "esd",
    "fit_power_law",
]


def __dir__() -> list[str]:
    return __all__
