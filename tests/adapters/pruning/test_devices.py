"""Where a device runs out of memory: one block on it at a time, and nothing is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning import sequential
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.evaluation import perplexity
from farms_fast.adapters.pruning.modules import place_model
from farms_fast.adapters.pruning.sequential import prune_model
from tests.support.fake_oom import MOST, Full, alike, equal, weights
from tests.support.language_models import VOCABULARY, small_model, some_tokens

GPU = torch.device("cuda", 0)


class Pretended:
    """A device that takes blocks' weights and hidden states by name alone, and may be full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: dict[nn.Module, torch.device] = {}
        self.moved: list[tuple[nn.Module, str]] = []
        self.full = 0
        self.kept: list[str] = []
        there = "farms_fast.adapters.pruning.calibration."
        monkeypatch.setattr(f"{there}block_device", lambda device, home: GPU)
        monkeypatch.setattr(sequential, "block_device", lambda device, home: GPU)
        monkeypatch.setattr(f"{there}device_of", self._device_of)
        monkeypatch.setattr(f"{there}move_module", self._move)
        monkeypatch.setattr(f"{there}_moved", self._moved)
        monkeypatch.setattr(BlockRunner, "_inputs", lambda runner, at, place: runner._kept[at])

    def _device_of(self, module: nn.Module) -> torch.device:
        return self.places.get(module, torch.device("cpu"))

    def _move(self, module: nn.Module, device: torch.device) -> None:
        if self._device_of(module) == device:
            return
        if device == GPU and self.full:
            self.full -= 1
            raise torch.OutOfMemoryError("no room for weights")
        self.moved.append((module, device.type))
        self.places[module] = device

    def _moved(self, tree: Any, device: torch.device) -> Any:
        self.kept.append(device.type)
        return tree

    def blocks(self) -> list[nn.Module]:
        return [module for module, device in self.places.items() if device == GPU]


@pytest.mark.parametrize(
    ("place", "since"),
    # Embeddings run before each block and each batch, so four times before those of block 1.
    [*(("model.layers.1.mlp", since) for since in (1, 2, 3, 4)), ("model.embed_tokens", 5)],
)
def test_blocks_are_on_the_device_one_at_a_time_all_the_while(
    place: str, since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Pretended(monkeypatch)
    model, small, tokens = small_model().double(), small_model().double(), some_tokens(8)
    there: list[bool] = []
    for block in model.model.layers:
        # Inside of the block: what stands in for it has the block's own hooks.
        block.self_attn.register_forward_pre_hook(
            lambda *_, block=block: there.append(device.blocks() == [block]), with_kwargs=True
        )
    full = Full(model.get_submodule(place), since)
    report = prune_model(model, "sparsegpt", 0.5, tokens, device="cuda", memory=10**9, batch_size=4)
    assert full.too_large == since
    assert report.batch_size == MOST
    assert len(there) >= 19
    assert all(there)
    assert device.blocks() == []
    # The last block was there once, and the first one once more.
    layers = list(model.model.layers)
    counts = [sum(module is layer for module, _ in device.moved) for layer in layers]
    assert counts == [4, 4, 2]
    prune_model(small, "sparsegpt", 0.5, tokens, batch_size=MOST)
    assert alike(model, small)


def test_hidden_states_make_room_for_the_weights_of_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Pretended(monkeypatch)
    model, tokens = small_model(), some_tokens(8)
    blocks = find_blocks(model)
    runner = BlockRunner(model, blocks, tokens, device="cuda", memory=10**9, batch_size=2)
    with runner:
        with runner.on_device():
            runner.run(keep=True)
        assert runner.use.on_device
        device.full, device.kept = 1, []
        with runner.on_device():
            assert not runner.use.on_device
            assert device.kept == ["cpu"] * 4
            runner.run(keep=True)
        device.full = 1
        message = (
            r"memory: cuda:0 has no room for the weights of block 'model\.layers\.2' \(no room"
        )
        with pytest.raises(ValueError, match=message), runner.on_device():
            pass
    assert device.blocks() == []


def test_hidden_states_make_room_for_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended(monkeypatch)
    model, tokens = small_model(), some_tokens(3)
    runner = BlockRunner(
        model, find_blocks(model), tokens, device="cuda", memory=10**9, batch_size=1
    )
    calls: list[bool] = []

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(runner.use.on_device)
        if runner.use.on_device:
            raise torch.OutOfMemoryError

    model.model.layers[1].mlp.register_forward_pre_hook(check)
    with runner:
        for _ in range(2):
            with runner.on_device():
                runner.run(keep=True)
    assert calls == [True] + [False] * 3
    assert device.blocks() == []


# --------------------------------------------------------------------------------------------- CUDA


@contextmanager
def room(megabytes: int, *, exactly: bool = False) -> Iterator[None]:
    """No more memory of the device than that, beside what it holds.

    What earlier tests left of segments that they still use comes on top, unless it is `exactly`.
    """
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    held: list[Tensor] = []
    try:
        if exactly:
            torch.cuda.set_per_process_memory_fraction(reserved / total)
            for size in (64 << 20, 8 << 20, 2 << 20):
                with suppress(torch.OutOfMemoryError):
                    while True:
                        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        torch.cuda.set_per_process_memory_fraction((reserved + (megabytes << 20)) / total)
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


class Greedy(nn.Module):
    """Each block takes 256 MB for a sample."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            taken = x.new_empty(len(x), 64 << 20, dtype=torch.float32)
            y: Tensor = x + torch.tanh(self.fc(x)) + 0 * taken[:1, :16].zero_()
            return y

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def greedy(home: str) -> Greedy:
    torch.manual_seed(0)
    return Greedy().to(home)


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_prunes_where_the_device_runs_out(method: str, home: str) -> None:
    tokens = some_tokens(8)
    model, small = greedy(home), greedy(home)
    expected = prune_model(small, method, 0.5, tokens, device="cuda", batch_size=2)
    with room(800):
        report = prune_model(model, method, 0.5, tokens, device="cuda", batch_size=8)
    assert (report.batch_size, expected.batch_size) == (2, 2)
    assert alike(model, small)
    assert {parameter.device.type for parameter in model.parameters()} == {home}
    with room(200), pytest.raises(ValueError, match=r"memory: cuda:0 has no room for block"):
        prune_model(model, method, 0.7, tokens, device="cuda", batch_size=8)
    assert alike(model, small)
    assert {parameter.device.type for parameter in model.parameters()} == {home}


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_evaluates_where_the_device_runs_out(home: str) -> None:
    model, text = greedy(home), some_tokens(1, 150)[0]
    expected = perplexity(model, text, seqlen=16, batch_size=2, device="cuda")
    with room(800):
        found = perplexity(model, text, seqlen=16, batch_size=8, device="cuda")
    assert found == pytest.approx(expected, rel=1e-5)
    with room(200), pytest.raises(ValueError, match=r"memory: cuda:0 has no room for"):
        perplexity(model, text, seqlen=16, batch_size=8, device="cuda")
    assert perplexity(model, text, seqlen=16, device="cuda") == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
def test_says_which_layer_the_device_has_no_room_for() -> None:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(8192, 8), nn.Linear(8, 8192)) for _ in range(2))
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8192), *blocks).cuda()
    tokens, before = some_tokens(4), weights(model)
    # The Hessian takes 256 MB, and its factorisation at least three times as much beside it.
    message = r"memory: cuda:0 has no room for pruning layer '1\.0' of \(8, 8192\) by sparsegpt"
    with room(600, exactly=True), pytest.raises(ValueError, match=message):
        prune_model(model, "sparsegpt", 0.5, tokens)
    assert equal(weights(model), before)
    assert prune_model(model, "sparsegpt", 0.5, tokens).sparsity == 0.5


@pytest.mark.gpu
def test_a_model_that_the_device_has_no_room_for_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
    before = weights(model)
    with room(100):
        place_model(model, torch.device("cuda", 0))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert equal(weights(model), before)
    place_model(model, torch.device("cuda", 0))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
