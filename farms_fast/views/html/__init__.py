"""Pages to look at: one self-contained file of an analysis, or of two compared."""

from farms_fast.views.html.page import write_page
from farms_fast.views.html.payload import comparison_payload, report_payload

__all__ = ["comparison_payload", "report_payload", "write_page"]
