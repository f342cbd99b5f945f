"""What is done with alphas: learning rates per layer, sparsities per layer."""
