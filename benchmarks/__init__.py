"""Benchmarks: every case against its peers, results checked before anything is timed."""
