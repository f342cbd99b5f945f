"""How close farms_fast comes to the limits of the machine: `python -m benchmarks.roofline`.

For every case the operations that it cannot do without and the bytes that it has to move, the
ceilings of this machine (matrix products in float64 and float32, a copy) measured in the same run,
the limit that follows, and the measured time over it. A limit is the sum over the stages of the
larger of operations over the float64 ceiling and bytes over that of copies.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.cases import EigenCase, FitCase, GramCase, eigen_cases, fit_cases, gram_cases
from benchmarks.inputs import gaussian_windows, packed_spectra, weights
from benchmarks.machine import describe
from benchmarks.peers import GRAM_PEERS, contender
from farms_fast.engine.cost import Stage, eigenvalue_stages, fit_stages, gram_flops
from farms_fast.spectra.power_law import fit_power_laws, sort_spectra
from farms_fast.spectra.windows import WindowGrid


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in this run: operations and bytes a second."""

    gemm_float64: float
    gemm_float32: float
    copy: float

    def limit(self, stages: list[Stage]) -> float:
        return sum(max(s.flops / self.gemm_float64, s.bytes / self.copy) for s in stages)


def gram_stages(case: GramCase) -> list[Stage]:
    """Products that overlapping windows share are counted once, and so is either triangle.

    A product of two rows over a segment of columns, or of two columns over a segment of rows, is
    needed if any window has both. The weight is read and the Gram matrices are written once.
    """
    grid = case.sampling.grid(case.rows, case.columns)
    by_rows = grid.rows <= grid.columns
    starts = grid.row_starts if by_rows else grid.column_starts
    others = grid.column_starts if by_rows else grid.row_starts
    vectors = grid.rows if by_rows else grid.columns
    inner = grid.columns if by_rows else grid.rows
    flops = 2.0 * pairs_covered(starts, vectors) * length_covered(others, inner)
    written = 8 * grid.count * grid.order**2
    return [Stage(flops, 4 * case.rows * case.columns + written)]


def separate_gram_flops(grid: WindowGrid) -> float:
    """The same without sharing."""
    return float(grid.count * gram_flops(grid.order, max(grid.rows, grid.columns)))


def length_covered(starts: list[int], window: int) -> int:
    """Length of the union of [start, start + window)."""
    return _union(starts, window, lambda length: length)


def pairs_covered(starts: list[int], window: int) -> int:
    """Pairs i <= j that lie together in some [start, start + window)."""
    return _union(starts, window, lambda length: length * (length + 1) // 2)


def _union(starts: list[int], window: int, size: Callable[[int], int]) -> int:
    ordered = sorted(starts)
    total = size(window) * len(ordered)
    for before, after in pairwise(ordered):
        # What consecutive windows share was counted twice.
        total -= size(max(0, before + window - after))
    return total


def measure_ceilings(device: torch.device, quick: bool = False) -> Ceilings:
    size = 64 if quick else 8192 if device.type == "cuda" else 2048
    copied = 2**16 if quick else 2**31 if device.type == "cuda" else 2**28
    rates = []
    for dtype in (torch.float64, torch.float32):
        a, b = (torch.randn((size, size), dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        rates.append(
            2 * size**3 / _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        )
    source = torch.randn(copied // 8, dtype=torch.float64, device=device)
    target = torch.empty_like(source)
    return Ceilings(*rates, 2 * copied / _seconds(lambda: target.copy_(source), device))


def _seconds(call: Callable[[], object], device: torch.device, limit: float = 0.5) -> float:
    """The median of some calls, after one to warm up."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < limit and len(taken) < 21):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def measure_case(
    case: EigenCase | GramCase | FitCase, device: torch.device, solver: str, quick: bool
) -> tuple[float, list[Stage]]:
    """Seconds of farms_fast on a case, inputs rotated, and the case's stages."""
    run: Callable[..., object]
    sets: list[torch.Tensor]
    if isinstance(case, EigenCase):
        sets = gaussian_windows(case.batch, case.order, device, quick)
        run = contender(solver).prepare(case.order, case.batch)
        stages = eigenvalue_stages(case.order, case.order, case.batch)
    elif isinstance(case, GramCase):
        sets = weights(case.rows, case.columns, torch.float32, device, quick)
        run = GRAM_PEERS[0].prepare(case.sampling.grid(case.rows, case.columns))
        stages = gram_stages(case)
    else:
        sets = packed_spectra(case.size, case.spectra, 20, device, quick)
        stages = fit_stages(case.spectra * case.size)
        offsets = torch.arange(case.spectra + 1, device=device) * case.size

        def run(evals: torch.Tensor) -> object:
            return fit_power_laws(sort_spectra(evals, offsets), offsets, case.rule)[0]

    turn = iter(sets * 30)
    return _seconds(lambda: run(next(turn)), device, 0.2), stages


def family(case: object) -> str:
    return {EigenCase: "eigenvalues", GramCase: "gram", FitCase: "fit"}[type(case)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--json", type=Path, help="where to write the result")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    profile = "quick" if asked.quick else device.type
    ceilings = measure_ceilings(device, asked.quick)
    print(
        f"ceilings: float64 product {ceilings.gemm_float64 / 1e12:.3g} TFLOP/s, "
        f"float32 product {ceilings.gemm_float32 / 1e12:.3g} TFLOP/s, "
        f"copy {ceilings.copy / 1e9:.4g} GB/s"
    )
    print(f"{'case':<58} {'GFLOP':>9} {'GB':>8} {'limit':>10} {'measured':>10} {'x limit':>8}")
    rows = []
    for case in [*eigen_cases(profile), *gram_cases(profile), *fit_cases(profile)]:
        try:
            seconds, stages = measure_case(case, device, asked.solver, asked.quick)
        # One case that fails is that case's result.
        except RuntimeError as error:
            print(f"{case.id:<58} failed: {str(error).splitlines()[0]}")
            continue
        flops, moved = sum(s.flops for s in stages), sum(s.bytes for s in stages)
        limit = ceilings.limit(stages)
        print(
            f"{family(case) + ': ' + case.id:<58} {flops / 1e9:>9.4g} {moved / 1e9:>8.3g} "
            f"{limit * 1e3:>7.3g} ms {seconds * 1e3:>7.4g} ms {seconds / limit:>8.3g}",
            flush=True,
        )
        rows.append(
            {
                "family": family(case),
                "case": case.id,
                "flops": flops,
                "bytes": moved,
                "limit_seconds": limit,
                "seconds": seconds,
                "ratio": seconds / limit if limit else math.nan,
            }
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if asked.json:
        result = {
            "device": device.type,
            "profile": profile,
            "datetime": datetime.now(timezone.utc).isoformat(),
            "machine_info": describe(device),
            "ceilings": vars(ceilings),
            "cases": rows,
        }
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
