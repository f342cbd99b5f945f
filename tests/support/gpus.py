"""GPUs that are not there."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from farms_fast.core import solver_choice
from farms_fast.core.gpu_records import Gpu

A100 = Gpu("NVIDIA A100-SXM4-80GB", 80, 108, "13000 (580.1)", "12080", "11703")
H200 = Gpu("NVIDIA H200", 90, 132, "13000 (580.1)", "12080", "11703")
# Its rows are those of GPUs that are told of by their compute capability, so that
# `ops.solver_facts` shows them.
INDEX = -1


def pretend(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, is_capturing: bool = False) -> None:
    """Makes a GPU be there at `INDEX`, of which nothing is known yet in this process."""
    monkeypatch.setattr(Gpu, "at", classmethod(lambda cls, index: gpu))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(solver_choice, "_settled", set())
    monkeypatch.setattr(solver_choice, "_decisions", {})
