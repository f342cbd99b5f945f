"""Spectra of neural-network weights, exact and fast, and what they say about every layer."""

from farms_fast._extension import __version__, build_info
from farms_fast.windows import FixedAspectSampling, FullMatrix

__all__ = ["FixedAspectSampling", "FullMatrix", "__version__", "build_info"]
