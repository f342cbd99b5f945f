"""What is drawn of spectra and layers: curves, plots, notebook tables and pages."""
