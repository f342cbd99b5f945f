"""What TB_Sigmoid rates do to the fine-tuning of a neural operator, and what they cost.

A model learns to predict flows at one viscosity, and is fine-tuned at another with a part of the
data: with one rate for all layers, with TB_Sigmoid from alphas of whole matrices, and with
TB_Sigmoid from FARMS. The errors are PDEBench's nRMSE of one frame and over a rollout, their
spread that over seeds.

    python -m benchmarks.effect.sciml --profile h200 --out sciml.json
    python -m benchmarks.effect.sciml --profile toy
    python -m benchmarks.effect.sciml --pretrain-data A.hdf5 --data B.hdf5 --model dpot
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.effect.analysis_share import published_sizes, share_of_time
from benchmarks.effect.fine_tuning import ARMS, Bench, Errors, Task, make_tasks
from benchmarks.machine import describe

PROFILES: dict[str, dict[str, Any]] = {
    "toy": {
        "device": "cpu", "grid": 16, "frames": 6, "train": 6, "test": 2, "history": 2, "width": 8,
        "modes": [6, 4], "layers": 2, "head": 8, "depth": 1, "patch": 4, "batch": 4, "seeds": 2,
        "fractions": [50.0, 100.0], "pretrain_steps": 12, "steps": 8, "every": 4, "rows": 4,
        "eta": [0.02, 0.01], "duration": 0.25, "workers": 0, "min_evals": 2,
        "share_models": [],
    },
    "h200": {"device": "cuda", "workers": 9, "budget": 120.0},
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Every option, with the defaults of a run on a GPU."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.effect.sciml",
        description="Fine-tuning of a neural operator with and without TB_Sigmoid rates.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = found.add_argument
    add("--profile", choices=list(PROFILES), help="other defaults: toy for a CPU, h200")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=0, help="processes, 0 for this one alone")
    add("--budget", type=float, help="seconds after which no further fine-tuning is begun")
    add("--out", type=Path, help="JSON file for all figures")
    data = found.add_argument_group("data")
    add = data.add_argument
    add("--pretrain-data", type=Path, help="PDEBench file to pre-train on; simulated if none")
    add("--data", type=Path, help="PDEBench file to fine-tune on; simulated if none")
    add("--space-step", type=int, default=1, help="takes every so many points of a file")
    add("--time-step", type=int, default=1, help="takes every so many times of a file")
    add("--train", type=int, default=256, help="flows to train on")
    add("--test", type=int, default=48, help="flows to test on, which follow those")
    add("--grid", type=int, default=64)
    add("--frames", type=int, default=21)
    add("--duration", type=float, default=1.0)
    add("--eta", type=float, nargs=2, default=[0.01, 0.003], help="shear and bulk viscosities")
    add("--mach", type=float, default=0.3)
    model = found.add_argument_group("model")
    add = model.add_argument
    add("--model", choices=["fno", "dpot"], default="fno")
    add("--history", type=int, default=4, help="frames that go in")
    add("--width", type=int, default=32)
    add("--layers", type=int, default=4, help="of the FNO")
    add("--modes", type=int, nargs=2, default=[16, 12])
    add("--depth", type=int, default=4, help="of the DPOT")
    add("--patch", type=int, default=8)
    add("--blocks", type=int, default=2)
    add("--head", type=int, default=32)
    training = found.add_argument_group("training")
    add = training.add_argument
    add("--seeds", type=int, default=3)
    add("--fractions", type=float, nargs="+", default=[5.0, 25.0, 100.0], help="percent")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--batch", type=int, default=32)
    add("--pretrain-steps", type=int, default=2000)
    add("--steps", type=int, default=1000)
    add("--pretrain-lr", type=float, default=2e-3)
    add("--lr", type=float, default=5e-4)
    add("--weight-decay", type=float, default=1e-6)
    rates = found.add_argument_group("rates")
    add = rates.add_argument
    add("--scale", type=float, nargs=2, default=[1.0, 2.0], metavar=("LOW", "HIGH"))
    add("--tau", type=float, default=10.0)
    add("--per", choices=["layer", "block"], default="layer")
    add("--xmin", default="median")
    add("--solver", help="for the eigenvalues, as in farms_fast.analyze")
    add("--filter-zeros", type=float, default=1e-5)
    add("--min-evals", type=int, default=5)
    add("--every", type=int, default=25, help="training steps between analyses")
    add("--rows", type=int, default=16, help="of FARMS windows")
    add("--q", type=float, default=1.0)
    add("--per-dim", type=int, default=3, help="FARMS windows in each dimension at least")
    share = found.add_argument_group("share of the time")
    add = share.add_argument
    add("--share-models", nargs="*", choices=["fno", "dpot"], default=["fno", "dpot"])
    add("--share-steps", type=int, default=12, help="training steps and analyses to time")
    add("--share-batch", type=int, default=16)
    add("--share-rows", type=int, default=32, help="of FARMS windows, beside --q")
    add("--share-per-dim", type=int, default=2)
    add("--epoch", type=int, default=9900, help="pairs of an epoch: 900 flows, 21 times, 10 go in")
    add("--only-share", action="store_true", help="no fine-tuning")
    return found


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, a profile's defaults among them."""
    found = parser()
    profile = found.parse_args(arguments).profile
    if profile:
        found.set_defaults(**PROFILES[profile])
    return found.parse_args(arguments)


_ARGS: argparse.Namespace | None = None
_FOLDER: Path | None = None


def _begin(args: argparse.Namespace, folder: Path) -> None:
    """Starts a worker up while the data is still being made."""
    global _ARGS, _FOLDER
    _ARGS, _FOLDER = args, folder
    torch.set_num_threads(1)
    torch.zeros(1, device=args.device)


@functools.cache
def _bench() -> Bench:
    assert _ARGS is not None
    assert _FOLDER is not None
    tasks = torch.load(_FOLDER / "tasks.pt", map_location=_ARGS.device, weights_only=True)
    return Bench(_ARGS, [Task(**task) for task in tasks], _FOLDER)


def _ready(seconds: float) -> None:
    time.sleep(seconds)


def _pretrained(seed: int) -> Errors:
    return _bench().pretrained(seed)


def _fine_tuned(seed: int, fraction: float, arm: str) -> Errors:
    return _bench().fine_tuned(seed, fraction, arm)


def jobs_of(args: argparse.Namespace) -> list[tuple[int, float, str]]:
    """Seed, fraction and arm of every run, seed by seed, so that an early end leaves whole ones."""
    runs = [(fraction, arm) for fraction in sorted(args.fractions) for arm in args.arms]
    return [(seed, *run) for seed in range(args.seeds) for run in [(0.0, "none"), *runs]]


def fine_tuning(args: argparse.Namespace) -> dict[str, Any]:
    """The errors of all arms, fractions and seeds."""
    with tempfile.TemporaryDirectory() as folder:
        run = _in_processes if args.workers > 0 else _in_this_process
        return run(args, Path(folder), time.perf_counter())


def _in_this_process(args: argparse.Namespace, folder: Path, began: float) -> dict[str, Any]:
    bench = Bench(args, make_tasks(args), folder)
    before = [bench.pretrained(seed) for seed in range(args.seeds)]
    errors: dict[tuple[int, float, str], Errors] = {}
    for job in jobs_of(args):
        if args.budget is not None and time.perf_counter() - began > args.budget:
            break
        errors[job] = bench.fine_tuned(*job)
    return _result(args, before, errors, began)


def _in_processes(args: argparse.Namespace, folder: Path, began: float) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, _begin, (args, folder)) as pool:
        # A worker is started when there is a job and nobody idle: these start all of them.
        starting = [pool.submit(_ready, 1.0) for _ in range(args.workers)]
        tasks = make_tasks(args)
        torch.save([vars(task) for task in tasks], folder / "tasks.pt")
        for worker in starting:
            worker.result()
        _note(f"{args.workers} workers and {args.train} + {args.test} flows", began)
        first = [pool.submit(_pretrained, seed) for seed in range(args.seeds)]
        before = [future.result() for future in first]
        _note(f"{args.seeds} pre-trained models", began)
        waiting = {job: pool.submit(_fine_tuned, *job) for job in jobs_of(args)}
        errors = {}
        for job, future in waiting.items():
            late = args.budget is not None and time.perf_counter() - began > args.budget
            if not (late and future.cancel()):
                errors[job] = future.result()
    return _result(args, before, errors, began)


def _result(
    args: argparse.Namespace,
    before: list[Errors],
    errors: dict[tuple[int, float, str], Errors],
    began: float,
) -> dict[str, Any]:
    left_out = len(jobs_of(args)) - len(errors)
    _note(f"{len(errors)} runs, {left_out} not begun within the budget", began)
    runs = [
        {"seed": seed, "fraction": fraction, "arm": arm, "nrmse": one, "rollout": all_of_them}
        for (seed, fraction, arm), (one, all_of_them) in errors.items()
    ]
    seconds = time.perf_counter() - began
    kept = [{"nrmse": one, "rollout": all_of_them} for one, all_of_them in before]
    return {"pretrained": kept, "runs": runs, "left_out": left_out, "seconds": seconds}


def _note(what: str, began: float) -> None:
    print(f"{what}: {time.perf_counter() - began:.1f} s", flush=True)


def table(result: dict[str, Any], measure: str) -> list[str]:
    """Errors in hundredths with their standard deviation over seeds, and the change in them."""

    def of(fraction: float, arm: str) -> list[float]:
        runs = result["runs"]
        return [r[measure] for r in runs if r["fraction"] == fraction and r["arm"] == arm]

    what = {"nrmse": "one frame from true ones", "rollout": "all frames, each from predictions"}
    lines = [
        f"nRMSE of {what[measure]}, in 1e-2: mean ± standard deviation over seeds",
        f"pre-trained, at its own viscosity: {_spread([r[measure] for r in result['pretrained']])}",
        f"pre-trained, at the other:         {_spread(of(0.0, 'none'))}",
    ]
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in result["runs"])]
    head = " | ".join(f"{arm:>28}" for arm in arms)
    lines += [f"| {'data':>6} | {head} |", "|" + "|".join(["---:"] * (len(arms) + 1)) + "|"]
    for fraction in sorted({run["fraction"] for run in result["runs"] if run["arm"] != "none"}):
        plain = of(fraction, "baseline")
        cells = []
        for arm in arms:
            found = of(fraction, arm)
            text = _spread(found)
            # Of as many seeds: each seed's pre-trained model is the same in all arms.
            if arm != "baseline" and plain and len(plain) == len(found):
                text += f" ({100 * (statistics.fmean(found) / statistics.fmean(plain) - 1):+.2f} %)"
            cells.append(f"{text:>28}")
        lines.append(f"| {fraction:>4g} % | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.fmean(values):.4f} ± {100 * spread:.4f}"


def share_line(row: Mapping[str, Any], epoch: int) -> str:
    """What an analysis takes of an epoch of so many pairs, in words."""
    return (
        f"{row['model']}, {row['parameters'] / 1e6:.1f} M numbers, {row['layers']} layers, "
        f"{row['matrices']} matrices, {row['sampling']}: analysis "
        f"{1e3 * row['analysis_seconds']:.1f} ms, step {1e3 * row['step_seconds']:.1f} ms, "
        f"epoch of {epoch} pairs {row['epoch_seconds']:.1f} s: {100 * row['share']:.3f} %"
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs everything that is asked for, prints it, and returns the figures."""
    args = options(arguments)
    shown = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    machine = describe(torch.device(args.device))
    result: dict[str, Any] = {"options": shown, "machine": machine, "share": []}
    if not args.only_share:
        result.update(fine_tuning(args))
        for measure in ("rollout", "nrmse"):
            print("\n".join(table(result, measure)), flush=True)
    sizes = published_sizes()
    for name in args.share_models:
        torch.manual_seed(0)
        for row in share_of_time(args, name, sizes[name]()):
            result["share"].append(row)
            print(share_line(row, args.epoch), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
