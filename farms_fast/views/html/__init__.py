"""Pages to look at: one self-contained file of an analysis, or of two compared."""

from farms_fast.views.html.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
