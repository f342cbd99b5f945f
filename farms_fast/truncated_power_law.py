"""Truncated power laws; see `farms_fast.compat.weightwatcher.truncated_power_law`."""

from farms_fast.compat.weightwatcher.truncated_power_law import (
    TruncatedPowerLawFit,
    fit_truncated_power_law,
)

__all__ = ["TruncatedPowerLawFit", "fit_truncated_power_law"]
