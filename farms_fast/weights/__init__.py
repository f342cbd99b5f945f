"""From models and files to the matrices of their layers."""
