"""Results on disk as they come: one SQLite file that survives a kill at any moment."""

from farms_fast.results.store.merging import merge
from farms_fast.results.store.results_store import ResultsStore, RunInfo, StoredRun

__all__ = ["ResultsStore", "RunInfo", "StoredRun", "merge"]
