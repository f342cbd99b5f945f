"""From layers to spectra: what is solved together, and how it runs."""
