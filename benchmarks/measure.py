"""How a case is timed: checked first, warmed, synchronised, inputs rotated, memory watched."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

# Seconds of timed rounds, the same for the contender and every peer.
SECONDS = {"cpu": 1.5, "cuda": 0.25}
# A peer without batches is measured on so many matrices as take so long.
SAMPLE_SECONDS = {"cpu": 1.5, "cuda": 0.3}
# A peer with batches is measured on all of them, unless that takes longer than this.
BATCH_SECONDS = {"cpu": 6.0, "cuda": 2.5}
MOST_ROUNDS = 30


class Bench:
    """Times one contender or peer on one case.

    Args:
        benchmark: pytest-benchmark's fixture.
        device: where the case runs.
        quick: one round and no sampling, to check the harness.
        solver: the contender's.
    """

    def __init__(self, benchmark: Any, device: torch.device, quick: bool, solver: str) -> None:
        self.device = device
        self.quick = quick
        self.solver = solver
        self._benchmark = benchmark

    def require(self, peer: Any) -> None:
        """Skips, with the reason, where a peer cannot run."""
        if self.device.type not in peer.devices:
            pytest.skip(f"not on {self.device.type}")
        if reason := peer.missing():
            pytest.skip(reason)

    def sample(
        self, time_of: Callable[[int], Callable[[], object]], batch: int, one_by_one: bool
    ) -> int:
        """How many matrices of a batch to measure, so that no case takes minutes.

        Args:
            time_of: a number of matrices to a call that solves so many.
            batch: all of them.
            one_by_one: time goes with the number.
        """
        if self.quick:
            return batch
        each = self._clock(time_of(1))
        if each < 1:
            # The first call may have loaded a library.
            each = min(each, self._clock(time_of(1)))
        limit = BATCH_SECONDS[self.device.type]
        if each > 3 * limit:
            pytest.skip(f"one matrix takes more than {3 * limit:.0f} s")
        if one_by_one:
            return max(1, min(batch, int(SAMPLE_SECONDS[self.device.type] / each)))
        count = max(1, min(batch, 8, int(limit / each)))
        while True:
            took = self._clock(time_of(count))
            if took * batch / count <= limit:
                return batch
            if 2 * took > limit or 2 * count > batch:
                return count
            count *= 2

    def measure(
        self,
        *,
        family: str,
        case: str,
        peer: str,
        run: Callable[[Any], Any],
        inputs: Sequence[Any],
        check: Callable[[Any, int], float | None],
        fresh: Callable[[Any], Any] = lambda given: given,
        scale: float = 1.0,
        budget_bytes: int | None = None,
        **info: object,
    ) -> None:
        """Checks `run`'s result on the first input, then times it on all of them in turn.

        Args:
            family: what kind of case it is.
            case: its name, the group in pytest-benchmark's tables.
            peer: who runs.
            run: what is timed, up to the end of the device's work.
            inputs: rotated; more than the cache holds.
            check: (result, number of the input) to the error as a fraction of the accepted one;
                asserts that it is accepted.
            fresh: input to what `run` is given, untimed.
            scale: the whole case over what is run of it; times are multiplied by it.
            budget_bytes: of device memory.
            info: more for the JSON.
        """
        benchmark = self._benchmark
        benchmark.group = f"{family}: {case}"
        given = fresh(inputs[0])
        began = time.perf_counter()
        result = self._synchronised(run, given)
        first = time.perf_counter() - began
        error = check(result, 0)
        del result, given
        rounds = 1 if self.quick else self._rounds(first, run, fresh, inputs[0])
        rotation = itertools.cycle(range(len(inputs)))
        last = 0
        # pytest-benchmark would hold the last result while the next is computed.
        results: list[Any] = []

        def timed(given: Any) -> None:
            results.append(self._synchronised(run, given))

        def setup() -> tuple[tuple[Any], dict[str, Any]]:
            nonlocal last
            results.clear()
            last = next(rotation)
            given = fresh(inputs[last])
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return (given,), {}

        if not self.quick:
            gc.collect()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        benchmark.pedantic(timed, setup=setup, rounds=rounds)
        if self.device.type == "cuda":
            # Beyond the inputs, and only what torch allocates; CuPy and workspaces of libraries
            # have their own allocators.
            info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            info["budget_bytes"] = budget_bytes
        # What was timed is right too.
        check(results.pop(), last)
        if benchmark.stats is not None and scale != 1.0:
            durations = benchmark.stats.stats.data
            durations[:] = [duration * scale for duration in durations]
        benchmark.extra_info.update(
            family=family,
            case=case,
            peer=peer,
            device=self.device.type,
            scale=scale,
            error=error,
            input_sets=len(inputs),
            **info,
        )

    def _rounds(
        self,
        first: float,
        run: Callable[[Any], Any],
        fresh: Callable[[Any], Any],
        given: Any,
    ) -> int:
        seconds = SECONDS[self.device.type]
        once = first
        if first < seconds:
            ready = fresh(given)
            once = self._clock(lambda: run(ready))
        fitting = math.ceil(seconds / max(once, 1e-7))
        least = 3 if once < seconds else 1
        return max(least, min(MOST_ROUNDS, fitting))

    def _synchronised(self, run: Callable[[Any], Any], given: Any) -> Any:
        result = run(given)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return result

    def _clock(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
