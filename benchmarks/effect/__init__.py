"""What layer-wise decisions do to trained models: scripts that print a table of effects."""
