"""Pickled checkpoints, read without running them: `read_checkpoint` of `reader`."""
