"""Alphas of a live model's layers, again and again, on the device where its weights are."""

from farms_fast.live.analysis import LiveAnalysis
from farms_fast.live.pending import LayerAlpha, PendingAlphas

__all__ = ["LayerAlpha", "LiveAnalysis", "PendingAlphas"]
