"""What part of an epoch an analysis takes, for neural operators of published sizes."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.effect.fine_tuning import CHANNELS, relative_error
from benchmarks.effect.operators import (
    TINY,
    DenoisingOperator,
    FourierOperator,
    parameter_count,
)
from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.live import LiveAnalysis


def published_sizes() -> dict[str, Callable[[], nn.Module]]:
    """An FNO of 64 x 64 modes and width 64, and a model of DPOT-Tiny's size, for 10 frames."""
    return {
        "fno": lambda: FourierOperator(CHANNELS, 10, 64, (64, 64)),
        "dpot": lambda: DenoisingOperator(CHANNELS, 10, TINY),
    }


def share_of_time(
    args: argparse.Namespace, name: str, model: nn.Module, *, grid: int = 128
) -> list[dict[str, Any]]:
    """Seconds of a training step and of an analysis, and what part of an epoch the latter is."""
    history = 10
    model = model.to(args.device)
    frames = torch.randn(args.share_batch, history + 1, CHANNELS, grid, grid, device=args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = relative_error(model(frames[:, :history]), frames[:, history]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    training = _seconds(step, args)
    rows = []
    for label, sampling in (
        ("full", FullMatrix()),
        ("farms", FixedAspectSampling(args.share_rows, args.q, args.share_per_dim)),
    ):
        live = LiveAnalysis(
            model, sampling, args.xmin, solver=args.solver, evals_threshold=args.filter_zeros
        )
        analysis = _seconds(live, args)
        epoch = training * math.ceil(args.epoch / args.share_batch)
        rows.append(
            {
                "model": name,
                "parameters": parameter_count(model),
                "sampling": label,
                "solver": args.solver or "auto",
                "layers": len(live.specs),
                "matrices": sum(spec.shape[0] for spec in live.specs),
                "step_seconds": training,
                "analysis_seconds": analysis,
                "epoch_seconds": epoch,
                "share": analysis / epoch,
            }
        )
    return rows


def _seconds(what: Callable[[], object], args: argparse.Namespace) -> float:
    """The median, after some rounds that are not counted."""
    times = []
    for number in range(args.share_steps + 3):
        _wait(args.device)
        began = time.perf_counter()
        what()
        _wait(args.device)
        if number >= 3:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
