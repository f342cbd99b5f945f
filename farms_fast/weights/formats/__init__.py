"""Weights that are computed from what is stored: quantised, low-rank and complex ones."""
