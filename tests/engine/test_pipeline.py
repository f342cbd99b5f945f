"""The stages of a run: their order, what runs beside what, and what happens when memory ends."""

from __future__ import annotations

import threading

import pytest
import torch

from farms_fast import FullMatrix
from farms_fast.engine.pipeline import run
from farms_fast.engine.plan import Batch, plan
from farms_fast.weights.layers import layers_from_headers
from farms_fast.weights.stacks import TensorHeader

CPU = torch.device("cpu")


def batches(*sizes: int) -> list[Batch]:
    """Batches of so many layers; the layers of all of them are called 0, 1, 2, ..."""
    made: list[Batch] = []
    first = 0
    for size in sizes:
        headers = [TensorHeader(str(first + i), (4, 4), torch.float32) for i in range(size)]
        specs, _ = layers_from_headers(headers)
        made += plan(specs, FullMatrix()).batches
        first += size
    return made


def names(batch: Batch) -> list[str]:
    return [layer.spec.name for layer in batch.layers]


class Recorder:
    """Stages that pass names on; the memory holds so many layers at a time."""

    def __init__(self, fits: int = 100, fails: dict[str, str] | None = None) -> None:
        self.fits = fits
        self.fails = fails or {}
        self.calls: list[tuple[str, list[str]]] = []
        self.finished: list[str] = []
        self.given_up: list[tuple[str, str]] = []
        self.readers: set[int] = set()

    def stage(self, stage: str, layers: list[str]) -> None:
        self.calls.append((stage, layers))
        for name in layers:
            if self.fails.get(name) == stage:
                raise KeyError(f"{stage} {name}")
            if self.fails.get(name) == f"{stage}, memory":
                raise torch.OutOfMemoryError(f"{stage} of {name} is too much")
        if len(layers) > self.fits and self.fails.get("stage", stage) == stage:
            raise torch.OutOfMemoryError(f"{stage} of {len(layers)} layers")

    def read(self, batch: Batch) -> list[str]:
        self.readers.add(threading.get_ident())
        self.stage("read", names(batch))
        return names(batch)

    def solve(self, loaded: list[str]) -> list[str]:
        self.stage("solve", loaded)
        return loaded

    def finish(self, solved: list[str]) -> None:
        self.stage("finish", solved)
        self.finished += solved

    def give_up(self, batch: Batch, error: str) -> None:
        (name,) = names(batch)
        self.given_up.append((name, error))


def test_every_batch_passes_every_stage_in_order() -> None:
    stages = Recorder()
    run(batches(1, 2, 3), stages, CPU)
    assert stages.finished == [str(i) for i in range(6)]
    for stage in ("read", "solve", "finish"):
        assert [layers for name, layers in stages.calls if name == stage] == [
            ["0"],
            ["1", "2"],
            ["3", "4", "5"],
        ]


def test_nothing_to_do() -> None:
    stages = Recorder()
    run([], stages, CPU)
    assert stages.calls == []


def test_the_next_batch_is_read_while_one_is_solved() -> None:
    ahead = threading.Event()

    class Ahead(Recorder):
        def read(self, batch: Batch) -> list[str]:
            if names(batch) == ["1"]:
                ahead.set()
            return super().read(batch)

        def solve(self, loaded: list[str]) -> list[str]:
            if loaded == ["0"]:
                assert ahead.wait(60), "batch 1 is only read after batch 0 is solved"
            return super().solve(loaded)

    stages = Ahead()
    run(batches(1, 1, 1), stages, CPU)
    assert stages.finished == ["0", "1", "2"]
    assert threading.get_ident() not in stages.readers


@pytest.mark.parametrize("stage", ["read", "solve", "finish"])
def test_what_is_too_much_at_once_is_halved(stage: str) -> None:
    stages = Recorder(fits=2, fails={"stage": stage})
    run(batches(1, 7, 1, 3), stages, CPU)
    assert stages.finished == [str(i) for i in range(12)]
    assert stages.given_up == []
    tried = [len(layers) for name, layers in stages.calls if name == stage]
    # Each too large batch once as planned, once with nothing beside it, and then in halves.
    assert tried.count(7) == 2
    assert max(size for size in tried if size not in (7, 3, 4)) == 2


@pytest.mark.parametrize("stage", ["read", "solve", "finish"])
def test_a_layer_that_is_too_much_alone_is_given_up_and_the_rest_go_on(stage: str) -> None:
    stages = Recorder(fails={"4": f"{stage}, memory"})
    run(batches(2, 4, 2), stages, CPU)
    assert sorted(stages.finished, key=int) == ["0", "1", "2", "3", "5", "6", "7"]
    assert stages.given_up == [("4", f"{stage} of 4 is too much")]


def test_an_error_of_memory_without_a_message_is_one_too() -> None:
    class Wordless(Recorder):
        def solve(self, loaded: list[str]) -> list[str]:
            if "1" in loaded:
                raise torch.OutOfMemoryError
            return super().solve(loaded)

    stages = Wordless()
    run(batches(3), stages, CPU)
    assert stages.finished == ["0", "2"]
    assert stages.given_up == [("1", "")]


@pytest.mark.parametrize("stage", ["read", "solve", "finish"])
def test_another_error_ends_the_run_after_the_batches_before(stage: str) -> None:
    stages = Recorder(fails={"2": stage})
    with pytest.raises(KeyError, match=f"{stage} 2"):
        run(batches(1, 1, 1, 1), stages, CPU)
    assert stages.finished[:1] == ["0"]
    assert "3" not in stages.finished
    threads = [thread.name for thread in threading.enumerate()]
    assert threads == ["MainThread"] or not any("ThreadPool" in name for name in threads)


def test_an_interruption_leaves_no_thread_and_no_half_finished_batch() -> None:
    class Interrupted(Recorder):
        def solve(self, loaded: list[str]) -> list[str]:
            if loaded == ["2"]:
                raise KeyboardInterrupt
            return super().solve(loaded)

    stages = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(batches(1, 1, 1, 1), stages, CPU)
    assert stages.finished == ["0", "1"]
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())
