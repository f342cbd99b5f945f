"""Windows, eigenvalues, power-law fits, metrics and the bootstrap over windows."""
