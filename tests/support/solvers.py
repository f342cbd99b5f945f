"""What the solvers of this GPU take."""

from __future__ import annotations

import torch

from farms_fast.core import ops


def one_stage_largest() -> int:
    """The largest real order of `one_stage`: what a block holds, or from Hopper on a cluster.

    Without a GPU that of a block with 160 kB of shared memory, for the names of tests that are
    then skipped.
    """
    capability = ops.compute_capability() if torch.cuda.is_available() else 80
    return {80: 160, 90: 512, 100: 512, 103: 512}.get(capability, 128)
