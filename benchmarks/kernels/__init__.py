"""Programs behind NOTES.md: sanitizers, times before and after a change, and micro-benchmarks.

They call the ops by their names in `torch.ops.farms_fast`, so that they run over any build.
"""
