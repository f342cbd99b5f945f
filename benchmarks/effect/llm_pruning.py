"""Does a sparsity that goes by FARMS's alpha prune a language model better?

Trains small Llamas from several seeds on real text, prunes each with three methods at several
sparsities that are distributed uniformly, by the alpha of the whole matrices, by FARMS's alpha and
by OWL, and prints the perplexity of each on text that none of it has seen::

    python -m benchmarks.effect.llm_pruning --limit 450      # one GPU, about six minutes
    python -m benchmarks.effect.llm_pruning --quick          # a CPU, seconds: checks the harness

How far the ratios are spread (epsilon, and OWL's lambda) is chosen for every method, sparsity and
allocation by the mean log perplexity of all seeds on the validation text, for all allocations from
as many candidates; the test text is what is reported. Alphas are taken as in the paper: peak rule,
windows of half the hidden size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import farms_fast
from benchmarks.effect.pruning_table import METHODS, chosen, mean_and_spread, table
from benchmarks.effect.small_llama import Size, train
from benchmarks.effect.text import read_text, tokens_of
from benchmarks.machine import describe
from farms_fast.adapters.pruning.allocation import allocate_sparsity, uniform_sparsity
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.evaluation import perplexity
from farms_fast.adapters.pruning.owl import owl_sparsity
from farms_fast.adapters.pruning.sequential import owl_statistics, prune_model
from farms_fast.adapters.pruning.sparsities import Allocation


@dataclass(frozen=True)
class Settings:
    """One run, for every seed."""

    size: Size
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]
    epsilons: tuple[float, ...]
    lams: tuple[float, ...]
    seconds: float | None
    steps: int | None
    calibration: int
    evaluated: int
    window: int
    per_dim: int
    xmin: str
    text_bytes: int
    device: str


class Clock:
    """Adds up what each part of a run takes."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def run_seed(
    settings: Settings, seed: int, folder: str, deadline: float = math.inf
) -> dict[str, Any]:
    """Trains one model and measures every way to prune it.

    Args:
        settings: of the run.
        seed: of the weights, of what is trained on when, and of the calibration set.
        folder: where the tokens are.
        deadline: in seconds since the epoch; a sparsity that would probably not be done by then is
            not begun, and is listed in ``left_out``.
    """
    tokens = {
        split: torch.load(Path(folder) / f"{split}.pt") for split in ("train", "validation", "test")
    }
    clock = Clock(settings.device)
    with clock("start"):
        model = settings.size.model(seed).to(settings.device)
    with clock("training"):
        training = train(
            model,
            settings.size,
            tokens["train"],
            seed=seed,
            seconds=settings.seconds,
            steps=settings.steps,
        )
    _say(f"seed {seed}: {training.steps} steps, loss {training.loss:.3f}, {training.seconds:.0f} s")
    if settings.device == "cuda":
        # What is measured from here on is in float32 with TF32 products, as inference would be;
        # the pruners take their statistics at full precision whatever is set here.
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    generator = torch.Generator().manual_seed(seed)
    text, seqlen = tokens["train"], settings.size.seqlen
    starts = torch.randint(len(text) - seqlen, (settings.calibration, 1), generator=generator)
    calibration = text[starts + torch.arange(seqlen)]
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {layer.name: math.prod(layer.shape) for layer in find_blocks(model).layers}

    def measure(split: str) -> float:
        with clock("evaluation"):
            return perplexity(
                model,
                tokens[split][: settings.evaluated],
                seqlen=seqlen,
                batch_size=settings.size.batch,
            )

    found: dict[str, Any] = {
        "seed": seed,
        "training": asdict(training),
        "dense": {split: measure(split) for split in ("validation", "test")},
        "alphas": {},
        "pruned": [],
    }
    analyses = _analyses(settings, model, list(modules), clock)
    found["alphas"] = {
        name: {layer.name: layer.alpha for layer in analysis} for name, analysis in analyses.items()
    }
    with clock("OWL's outliers"):
        outliers = owl_statistics(
            model, calibration, batch_size=settings.size.batch, progress=False
        )
    found["outliers"] = outliers

    found["left_out"] = []
    longest = 0.0
    for sparsity in settings.sparsities:
        begun = time.time()
        if begun + longest > deadline:
            found["left_out"].append(sparsity)
            continue
        for allocation, spread, ratios in _allocations(
            settings, sparsity, modules, analyses, outliers
        ):
            for method in METHODS:
                model.load_state_dict(dense)
                with clock(f"pruning by {method}"):
                    report = prune_model(
                        model,
                        method,
                        ratios.ratios,
                        None if method == "magnitude" else calibration,
                        batch_size=settings.size.batch,
                        progress=False,
                    )
                found["pruned"].append(
                    {
                        "method": method,
                        "sparsity": sparsity,
                        "allocation": allocation,
                        "spread": spread,
                        "reached": report.sparsity,
                        "validation": measure("validation"),
                        "test": measure("test"),
                        "block_ratios": list(ratios.block_ratios.values()),
                    }
                )
        longest = max(longest, time.time() - begun)
        _say(f"seed {seed}: sparsity {sparsity:g} done in {time.time() - begun:.0f} s")
    found["seconds"] = clock.seconds
    return found


def _analyses(
    settings: Settings, model: torch.nn.Module, layers: list[str], clock: Clock
) -> dict[str, farms_fast.Analysis]:
    """The alphas of the two ways; timed in a second pass, for the first loads libraries."""
    found = {}
    for name, sampling in (
        ("alpha", farms_fast.FullMatrix()),
        ("farms", farms_fast.FixedAspectSampling(settings.window, per_dim=settings.per_dim)),
    ):
        for part in ("first pass of alphas", f"alphas ({name})"):
            with clock(part):
                found[name] = farms_fast.analyze(
                    model,
                    sampling,
                    settings.xmin,
                    bootstrap=0,
                    include=layers,
                    progress=False,
                )
    return found


def _allocations(
    settings: Settings,
    sparsity: float,
    modules: Mapping[str, int],
    analyses: Mapping[str, farms_fast.Analysis],
    outliers: Mapping[str, float],
) -> Iterator[tuple[str, float, Allocation]]:
    yield "uniform", 0.0, uniform_sparsity(modules, sparsity)
    for name, analysis in analyses.items():
        for epsilon in settings.epsilons:
            allocation = allocate_sparsity(analysis, sparsity, epsilon)
            yield name, epsilon, allocation.for_modules(modules)
    layers = {
        block: {name: count for name, count in modules.items() if name.startswith(f"{block}.")}
        for block in outliers
    }
    for lam in settings.lams:
        yield "owl", lam, owl_sparsity(outliers, sparsity, lam, layers=layers)


def parse(arguments: Sequence[str] | None) -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, seconds on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--sparsities", type=float, nargs="+")
    parser.add_argument("--epsilons", type=float, nargs="+", help="candidates of alpha and FARMS")
    parser.add_argument("--lams", type=float, nargs="+", help="candidates of OWL")
    parser.add_argument("--seconds", type=float, help="of training, for all seeds at once")
    parser.add_argument("--steps", type=int, help="of training, instead of seconds")
    parser.add_argument("--limit", type=float, help="seconds after which no sparsity is begun")
    parser.add_argument("--hidden", type=int, help="a multiple of 64")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--text-bytes", type=int)
    parser.add_argument("--xmin", default="peak", choices=["peak", "median", "ks"])
    parser.add_argument("--window", type=int, help="rows of FARMS's windows")
    parser.add_argument("--per-dim", type=int)
    parser.add_argument("--processes", type=int, help="seeds at a time")
    parser.add_argument("--out", type=Path, help="a JSON file for everything that was measured")
    given = parser.parse_args(arguments)
    quick = given.quick
    device = given.device or ("cuda" if torch.cuda.is_available() and not quick else "cpu")

    def or_else(value: Any, fast: Any, full: Any) -> Any:
        if value is not None:
            return value
        return fast if quick else full

    hidden = or_else(given.hidden, 64, 512)
    layers = or_else(given.layers, 3, 8)
    size = Size(
        vocabulary=512 if quick else 4096,
        hidden=hidden,
        # As in Llama: 8/3 of the hidden size, a multiple of 32.
        inner=-(-hidden * 8 // 3 // 32) * 32,
        layers=layers,
        heads=max(2, hidden // 64),
        seqlen=64 if quick else 512,
        batch=8 if quick else 64,
        peak_rate=3e-3 if quick else 1e-3,
    )
    steps = given.steps
    if steps is None and given.seconds is None and quick:
        steps = 40
    settings = Settings(
        size=size,
        seeds=tuple(or_else(given.seeds, [0, 1], [0, 1, 2])),
        sparsities=tuple(or_else(given.sparsities, [0.5, 0.7], [0.7, 0.8, 0.6, 0.5])),
        epsilons=tuple(or_else(given.epsilons, [0.2], [0.1, 0.2, 0.3])),
        lams=tuple(or_else(given.lams, [0.08], [0.04, 0.08, 0.12])),
        seconds=None if steps else or_else(given.seconds, None, 120.0),
        steps=steps,
        calibration=8 if quick else 128,
        evaluated=2_000 if quick else 65_536,
        window=given.window or hidden // 2,
        per_dim=or_else(given.per_dim, 3, 15),
        xmin=given.xmin,
        text_bytes=or_else(given.text_bytes, 400_000, 32_000_000),
        device=device,
    )
    return settings, given


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs everything, prints the tables, and returns what ``--out`` gets."""
    settings, given = parse(arguments)
    start = time.perf_counter()
    deadline = time.time() + given.limit if given.limit else math.inf
    text = read_text(settings.text_bytes)
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokens_of(text, settings.size.vocabulary)
        for split, values in tokens.items():
            torch.save(values, Path(folder) / f"{split}.pt")
        _say(
            f"text {text.digest}: "
            + ", ".join(f"{len(values)} tokens for {split}" for split, values in tokens.items())
            + f", {time.perf_counter() - start:.0f} s"
        )
        processes = given.processes or (len(settings.seeds) if settings.device == "cuda" else 1)
        if processes > 1:
            # Each process launches its kernels by itself: most of a small model's time.
            with ProcessPoolExecutor(
                processes, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
            ) as pool:
                jobs = [
                    pool.submit(run_seed, settings, seed, folder, deadline)
                    for seed in settings.seeds
                ]
                runs = [job.result() for job in jobs]
        else:
            runs = [run_seed(settings, seed, folder, deadline) for seed in settings.seeds]
    rows = chosen(runs)
    result = {
        "settings": asdict(settings),
        "machine": describe(torch.device(settings.device)),
        "text": {"digest": text.digest, "bytes": text.bytes},
        "tokens": {split: len(values) for split, values in tokens.items()},
        "rows": rows,
        "runs": runs,
        "seconds": time.perf_counter() - start,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print("\n".join(report_lines(result)))
    return result


def report_lines(result: Mapping[str, Any]) -> list[str]:
    """What was found, as Markdown."""
    size, runs = Size(**result["settings"]["size"]), result["runs"]
    weights = size.layers * (4 * size.hidden**2 + 3 * size.hidden * size.inner)
    dense = [run["dense"]["test"] for run in runs]
    lines = [
        f"Llama with {size.layers} blocks of hidden size {size.hidden} ({weights / 1e6:.1f} M "
        f"weights to prune), {len(runs)} seeds, {runs[0]['training']['tokens'] / 1e6:.1f} M tokens "
        f"each, text {result['text']['digest']}.",
        f"Perplexity of the test text, dense: {mean_and_spread(dense)}",
        "",
        table(result["rows"]),
    ]
    if missing := sorted({sparsity for run in runs for sparsity in run["left_out"]}):
        lines += ["", f"Not measured for lack of time: {', '.join(f'{s:g}' for s in missing)}"]
    lines += [
        "",
        "Mean ± standard deviation over the seeds; in brackets the change against uniform ratios "
        "of the same seed, and the epsilon (OWL: lambda) chosen on the validation text.",
        "",
        "| part, per seed | seconds | share |",
        "|---|---:|---:|",
    ]
    parts = sorted({part for run in runs for part in run["seconds"]})
    means = {p: statistics.fmean(run["seconds"].get(p, 0.0) for run in runs) for p in parts}
    whole = sum(means.values())
    for part, seconds in sorted(means.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {seconds:.2f} | {100 * seconds / whole:.1f} % |")
    return [*lines, "", f"{result['seconds']:.0f} s in total"]


def _one_thread() -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
