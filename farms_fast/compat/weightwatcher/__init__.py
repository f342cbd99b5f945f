"""WeightWatcher's table of details under its own names."""

from farms_fast.compat.weightwatcher.details import weightwatcher

__all__ = ["weightwatcher"]
