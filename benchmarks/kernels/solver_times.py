"""Times the solvers on Gaussian windows, to compare one build with another.

`python -m benchmarks.kernels.solver_times --json before.json`, then with the other build on
PYTHONPATH `... --json after.json --against before.json`. Times are medians of CUDA events around
single calls, inputs rotated past the cache; µs per matrix. `--bits` saves what every kernel gives
on seeded inputs, `--bits-against` compares it with another build's, to the bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.inputs import sets_past_cache
from benchmarks.kernels.cases import cases, full_windows, normal, use_ops

Pair = tuple[int, int]
DEFAULT_PAIRS: tuple[Pair, ...] = (
    (32, 4096),
    (64, 2048),
    (100, 10_000),
    (128, 2048),
    (256, 512),
    (512, 512),
    (512, 9),
    (1000, 100),
    (2000, 225),
    (4096, 16),
)
# The windows' way with its Gram matrices, ready matrices, and the Gram matrices alone.
OPS = ("window_eigvalsh", "eigvalsh", "window_gram")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
FEWEST_ROUNDS, MOST_ROUNDS = 7, 60


def pair(text: str) -> Pair:
    """`512:9` or `512(9)`: order and batch."""
    found = re.fullmatch(r"(\d+)(?::(\d+)|\((\d+)\))", text)
    if found is None or int(found[1]) == 0 or int(found[2] or found[3]) == 0:
        raise argparse.ArgumentTypeError(f"expected ORDER:BATCH, got {text!r}")
    return int(found[1]), int(found[2] or found[3])


def key_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("op", "order", "batch", "dtype", "solver"))


def event_times(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Milliseconds of calls in turn, one after the other without a wait of the host."""

    def timed(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        return start, end

    for call in calls[:2]:
        call()
    start, end = timed(calls[0])
    end.synchronize()
    each = max(start.elapsed_time(end), 1e-3)
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, math.ceil(1000 * seconds / each)))
    events = [timed(call) for call in itertools.islice(itertools.cycle(calls), rounds)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def calls_of(
    op: str, order: int, batch: int, dtype: torch.dtype, solver: str
) -> list[Callable[[], Tensor]]:
    """One call for each set of inputs, as many as leave no set in the cache."""
    device = torch.device("cuda")
    ops = torch.ops.farms_fast
    table = full_windows(batch, order, order)
    gram_precision = torch.float64

    def call(seed: int) -> Callable[[], Tensor]:
        weight = normal((batch, order, order), torch.float64, seed) / math.sqrt(order)
        if op == "eigvalsh":
            gram = ops.window_gram([weight], table, order, gram_precision)
            return lambda: ops.eigvalsh(gram, solver, 0)
        typed = weight.to(dtype)
        if op == "window_gram":
            return lambda: ops.window_gram([typed], table, order, gram_precision)
        return lambda: ops.window_eigvalsh([typed], table, order, gram_precision, solver, 0)

    itemsize = 8 if op == "eigvalsh" else dtype.itemsize
    return [call(seed) for seed in range(sets_past_cache(batch * order**2 * itemsize, device))]


def measure(op: str, order: int, batch: int, dtype: str, solver: str, seconds: float) -> Any:
    times = event_times(calls_of(op, order, batch, DTYPES[dtype], solver), seconds)
    torch.cuda.empty_cache()
    lower, median, upper = statistics.quantiles([1000 * t / batch for t in times], n=4)
    return {
        "op": op,
        "order": order,
        "batch": batch,
        "dtype": dtype,
        "solver": solver,
        "us": median,
        "quartiles": [lower, upper],
        "rounds": len(times),
    }


def line_of(result: Mapping[str, Any], others: Mapping[tuple[Any, ...], float]) -> str:
    """A result as a row of the table, with its ratio to another build's where that has one."""
    lower, upper = result["quartiles"]
    size = f"{result['order']} ({result['batch']})"
    row = f"{result['op']:<16} {size:>14} {result['us']:>10.4g} µs  {lower:.4g} to {upper:.4g}"
    other = others.get(key_of(result))
    return row if other is None else f"{row}   {result['us'] / other:.3f} of {other:.4g}"


def saved_times(path: Path) -> dict[tuple[Any, ...], float]:
    return {key_of(result): result["us"] for result in json.loads(path.read_text())["results"]}


def bits_of_cases() -> dict[str, NDArray[Any]]:
    """What every kernel gives, by case and number of the output."""
    results: dict[str, NDArray[Any]] = {}
    for case in cases():
        for i, tensor in enumerate(case.run()):
            results[f"{case.name} [{i}]"] = tensor.cpu().numpy()
    return results


def differing(results: Mapping[str, NDArray[Any]], others: Mapping[str, NDArray[Any]]) -> list[str]:
    """The names whose bits differ, or that only one of both has."""
    differ = [name for name in others if name not in results]
    for name, values in results.items():
        other = others.get(name)
        same = other is not None and (values.dtype, values.shape) == (other.dtype, other.shape)
        if not same or other is None or values.tobytes() != other.tobytes():
            differ.append(name)
    return differ


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.kernels.solver_times")
    made.add_argument("pairs", nargs="*", type=pair, metavar="ORDER:BATCH", help="e.g. 512:9")
    made.add_argument("--op", action="append", choices=OPS, help="several; the first two without")
    made.add_argument("--solver", default="auto")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="float64", help="of the weights")
    made.add_argument("--seconds", type=float, default=0.5, help="of timed calls a row")
    made.add_argument("--json", type=Path, help="where the times go")
    made.add_argument("--against", type=Path, metavar="OTHER.json", help="print ratios to these")
    made.add_argument("--bits", type=Path, metavar="OUT.npz", help="save results, time nothing")
    made.add_argument("--bits-against", type=Path, metavar="OTHER.npz", help="compare results")
    made.add_argument("--list", action="store_true", help="print what would be timed")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    pairs, ops = given.pairs or DEFAULT_PAIRS, given.op or OPS[:2]
    if given.list:
        for op, (order, batch) in itertools.product(ops, pairs):
            print(f"{op} {order} ({batch})")
        return 0
    use_ops()
    if given.bits or given.bits_against:
        return compare_bits(given.bits, given.bits_against)
    others = saved_times(given.against) if given.against else {}
    results = []
    for op, (order, batch) in itertools.product(ops, pairs):
        results.append(measure(op, order, batch, given.dtype, given.solver, given.seconds))
        print(line_of(results[-1], others), flush=True)
    if given.json:
        facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        given.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    return 0


def compare_bits(save: Path | None, against: Path | None) -> int:
    results = bits_of_cases()
    if save:
        np.savez_compressed(save, **results)  # type: ignore[arg-type]
    if against is None:
        return 0
    with np.load(against) as others:
        differ = differing(results, {name: others[name] for name in others.files})
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(results)} results, {len(differ)} differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
