"""Records of layers, analyses, comparisons, their files and the results store."""
