"""Which tensors are layers, and how each becomes a stack of matrices."""
