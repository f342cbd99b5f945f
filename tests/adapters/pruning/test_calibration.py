"""Blocks that run one after the other get what they get in a plain run, within the memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning import sequential
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.pruners import wanda_scores
from farms_fast.adapters.pruning.sequential import owl_statistics, prune_model
from farms_fast.adapters.pruning.statistics import InputStatistics
from farms_fast.adapters.pruning.tokens import check_tokens
from tests.support.language_models import FAMILIES, POSITIONS, VOCABULARY, small_model, some_tokens

Calls = dict[str, list[tuple[Any, ...]]]


class Custom(nn.Module):
    """Blocks that return tuples, and a model that does something between two of them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, *, shift: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            x = x + scale * torch.tanh(self.fc(x)) + shift
            return x, x.mean(-1)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.between = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, means = self.embed(tokens), torch.zeros(())
        for number, block in enumerate(self.blocks):
            x, last = block(x * self.between, shift=means.unsqueeze(-1), scale=number + 1.0)
            means = last
        logits: Tensor = self.head(x)
        return logits


def recorded(model: nn.Module, run: Callable[[], object]) -> Calls:
    """The arguments of every real call of a block's forward pass."""
    calls: Calls = {}
    blocks = find_blocks(model).blocks
    for block in blocks:

        def record(
            *args: Any, forward: Any = block.module.forward, name: str = block.name, **kwargs: Any
        ) -> Any:
            calls.setdefault(name, []).append((args, kwargs))
            return forward(*args, **kwargs)

        block.module.forward = record
    try:
        with torch.no_grad():
            run()
    finally:
        for block in blocks:
            del block.module.forward
    return calls


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    return bool(first == second)


def plain(model: nn.Module, tokens: Tensor, size: int) -> Callable[[], object]:
    options = {} if isinstance(model, Custom) else {"use_cache": False}
    return lambda: [model(batch, **options) for batch in tokens.split(size)]


def by_blocks(model: nn.Module, tokens: Tensor, size: int) -> Callable[[], list[Any]]:
    runner = BlockRunner(model, find_blocks(model), tokens, batch_size=size)

    def run() -> list[Any]:
        with runner:
            for _ in find_blocks(model).blocks:
                runner.run(keep=False)  # what is looked at is not kept
                runner.run(keep=True)
            return list(runner.outputs())

    return run


@pytest.mark.parametrize("family", [*FAMILIES, "custom"])
def test_every_argument_is_that_of_a_plain_run(family: str) -> None:
    torch.manual_seed(0)
    model = Custom() if family == "custom" else small_model(family)
    tokens = some_tokens(5)
    expected = recorded(model, plain(model, tokens, 2))
    found = recorded(model, by_blocks(model, tokens, 2))
    assert list(found) == list(expected)
    assert len(expected) == 3
    for name, calls in expected.items():
        assert len(calls) == 3
        assert calls[0][1], "blocks have keyword arguments"
        # Twice each: looked at, and kept.
        assert same(found[name], calls + calls)


@pytest.mark.parametrize("family", [*FAMILIES, "custom"])
def test_outputs_are_those_of_a_plain_run(family: str) -> None:
    torch.manual_seed(0)
    model = Custom() if family == "custom" else small_model(family)
    tokens = some_tokens(5)
    with torch.no_grad():
        expected = [getattr(out, "logits", out) for out in plain(model, tokens, 2)()]  # type: ignore[attr-defined]
        found = [getattr(out, "logits", out) for out in by_blocks(model, tokens, 2)()]
    assert same(found, expected)
    assert not same(expected[0][0], expected[0][1])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_ratio_of_zero_changes_no_bit(method: str) -> None:
    model, tokens = small_model("gemma2"), some_tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = prune_model(model, method, 0.0, tokens)
    assert same(dict(model.state_dict()), before)
    assert report.sparsity == 0
    assert {layer.pruned_by for layer in report.layers} == {""}


def test_later_blocks_see_the_pruned_ones_before_them() -> None:
    tokens = some_tokens()
    model = small_model()
    names = [layer.name for layer in find_blocks(model).layers]
    first = {name: 0.6 if ".layers.0." in name else 0.0 for name in names}
    prune_model(model, "wanda", first, tokens)
    # What prunes block 1 alone, on the model whose block 0 is pruned already.
    prune_model(model, "wanda", {n: 0.6 if ".layers.1." in n else 0.0 for n in names}, tokens)
    at_once = small_model()
    prune_model(at_once, "wanda", {n: 0.0 if ".layers.2." in n else 0.6 for n in names}, tokens)
    assert same(dict(model.state_dict()), dict(at_once.state_dict()))


def test_statistics_are_those_of_a_plain_run() -> None:
    model, tokens = small_model("gpt2"), some_tokens()
    seen: dict[str, InputStatistics] = {}
    blocks = find_blocks(model)
    for layer in blocks.layers:
        seen[layer.name] = InputStatistics(layer.shape[1])
        layer.module.register_forward_pre_hook(
            lambda module, args, name=layer.name: seen[name].add(args[0])
        )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(batch)
    for layer in blocks.layers:
        layer.module._forward_pre_hooks.clear()
    expected = {}
    for block in blocks.blocks:
        scores = torch.cat([wanda_scores(x.matrix, seen[x.name]).flatten() for x in block.layers])
        expected[block.name] = 100 * float((scores > 3 * scores.double().mean()).double().mean())
    found = owl_statistics(model, tokens, threshold=3.0, batch_size=2)
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(value > 0 for value in found.values())


class Shared(nn.Module):
    """Blocks whose two layers get one tensor, or what ``differ`` makes of it at each call."""

    class Block(nn.Module):
        def __init__(self, differ: Callable[[int, Tensor], Tensor | None]) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.differ, self.calls = differ, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            other = self.differ((self.calls - 1) % 3, x)
            y: Tensor = x + torch.tanh(self.first(x))
            return y if other is None else y + torch.tanh(self.second(other))

    def __init__(self, differ: Callable[[int, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(self.Block(differ) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x  # type: ignore[no-any-return]


# What the second layer gets in each of the three batches, and how many statistics there are.
@pytest.mark.parametrize(
    ("differ", "kept"),
    [
        (lambda batch, x: x, 1),
        (lambda batch, x: x + 1, 2),
        (lambda batch, x: x if batch < 2 else x + 1, 2),
        (lambda batch, x: x if batch < 2 else None, 2),
        (lambda batch, x: x if batch > 0 else None, 2),
    ],
)
def test_layers_with_one_input_share_their_statistics(
    differ: Callable[[int, Tensor], Tensor | None], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, tokens = Shared(differ), some_tokens(6)
    expected: dict[str, InputStatistics] = {}
    hooks = []
    for layer in find_blocks(model).blocks[0].layers:
        statistics = expected[layer.name] = InputStatistics(8, hessian=True)
        hooks.append(
            layer.module.register_forward_pre_hook(
                lambda module, args, s=statistics: s.add(args[0])
            )
        )
    with torch.no_grad():
        for batch in tokens.split(2):
            model(batch)
    for hook in hooks:
        hook.remove()
    found: dict[str, InputStatistics] = {}

    def look(weight: Tensor, ratio: object, statistics: Any, *, n_m: object, layer: str) -> None:
        found[layer] = statistics

    pruner = sequential.pruner("sparsegpt")
    monkeypatch.setattr(sequential, "pruner", lambda name: dataclasses.replace(pruner, prune_=look))
    prune_model(model, "sparsegpt", 0.5, tokens, batch_size=2)
    for name, statistics in expected.items():
        assert found[name].tokens == statistics.tokens
        assert torch.equal(found[name].hessian, statistics.hessian)
    assert len({id(found[name]) for name in expected}) == kept


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(fails: bool) -> None:
    model, tokens = small_model().train(), some_tokens()
    model.model.layers[1].eval()
    if fails:
        model.model.layers[2].mlp.up_proj.weight.data[0, 0] = 1e38
        model.model.layers[2].mlp.gate_proj.weight.data[0] = 1e38
    training = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="infinity"):
            prune_model(model, "wanda", 0.5, tokens)
    else:
        prune_model(model, "wanda", 0.5, tokens)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks


def test_blocks_may_write_to_their_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x += torch.tanh(self.fc(x))
            return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), *(InPlace() for _ in range(3)))
    tokens = some_tokens(5)
    with torch.no_grad():
        expected = model(tokens)
    assert torch.equal(torch.cat(by_blocks(model, tokens, 2)()), expected)


# ------------------------------------------------------------------------------------- bad input


def _with_nan(place: str) -> Any:
    model = small_model()
    model.get_parameter(place).data.flatten()[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model.embed_tokens.weight", "activations of layer 'model.layers.0.self_attn.q_proj'"),
        (
            "model.layers.1.post_attention_layernorm.weight",
            "activations of layer 'model.layers.1.mlp.gate_proj'",
        ),
        ("model.layers.2.mlp.up_proj.weight", "weight of layer 'model.layers.2.mlp.up_proj'"),
    ],
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_names_the_layer_of_a_nan(place: str, message: str, method: str) -> None:
    model = _with_nan(place)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=re.escape(message)):
        prune_model(model, method, 0.5, tokens)


def test_names_the_block_that_returns_infinity() -> None:
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"block 'model\.layers\.0' returns NaN or infinite"):
        prune_model(model, "wanda", 0.0, some_tokens())


def test_checks_everything_before_the_first_weight_changes() -> None:
    model = _with_nan("model.layers.2.mlp.up_proj.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="NaN"):
        prune_model(model, "magnitude", 0.5)
    assert torch.equal(
        model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (None, TypeError, "calibration: wanda needs token ids (samples, seqlen), got None"),
        ([[1, 2]], TypeError, "got list"),
        (torch.ones(2, 4), TypeError, "got torch.float32"),
        (torch.ones(4, dtype=torch.int64), ValueError, "got shape (4,)"),
        (torch.ones(0, 4, dtype=torch.int64), ValueError, "got shape (0, 4)"),
        (torch.ones(2, 1, dtype=torch.int64), ValueError, "got shape (2, 1)"),
        (
            torch.ones(1, POSITIONS + 1, dtype=torch.int64),
            ValueError,
            f"at most the {POSITIONS} positions of the model, got a seqlen of {POSITIONS + 1}",
        ),
        (
            torch.full((1, 4), VOCABULARY),
            ValueError,
            f"token ids from 0 to {VOCABULARY - 1}, got {VOCABULARY} to {VOCABULARY}",
        ),
        (torch.full((1, 4), -1), ValueError, "got -1 to -1"),
    ],
)
def test_refuses_tokens(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        prune_model(small_model(), "wanda", 0.5, tokens)


def test_takes_tokens_of_int32() -> None:
    assert check_tokens(nn.Module(), torch.ones(1, 2, dtype=torch.int32)).dtype == torch.int64


def test_refuses_a_model_that_does_not_call_its_blocks() -> None:
    model = small_model()
    model.forward = lambda tokens: tokens
    with pytest.raises(ValueError, match=r"never called block 'model\.layers\.0'"):
        prune_model(model, "wanda", 0.5, some_tokens())


def test_names_a_layer_that_no_token_reaches() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    model = nn.Sequential(nn.Embedding(9, 4), Unused(), Unused())
    with pytest.raises(ValueError, match=r"'1\.unused': no calibration activations reached it"):
        prune_model(model, "wanda", 0.5, torch.ones(2, 3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "custom"])
@pytest.mark.parametrize("room", ["device", "host"])
def test_blocks_go_to_the_device_one_at_a_time(family: str, room: str) -> None:
    torch.manual_seed(0)
    model = Custom() if family == "custom" else small_model(family)
    tokens = some_tokens(8)
    blocks = find_blocks(model)
    use = BlockRunner(model, blocks, tokens, device="cuda", batch_size=2).use
    assert use.on_device
    assert use.block > 0
    memory = None if room == "device" else use.device - 1
    with torch.no_grad():
        expected = torch.cat([getattr(model(t), "logits", model(t)) for t in tokens.split(2)])
    runner = BlockRunner(model, blocks, tokens, device="cuda", batch_size=2, memory=memory)
    assert runner.use.on_device == (room == "device")
    with runner:
        for number, block in enumerate(blocks.blocks):
            with runner.on_device():
                assert all(p.is_cuda for p in block.module.parameters())
                others = [b for n, b in enumerate(blocks.blocks) if n != number]
                assert not any(p.is_cuda for b in others for p in b.module.parameters())
                runner.run(keep=True)
        found = torch.cat([getattr(out, "logits", out) for out in runner.outputs()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not any(p.is_cuda for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prunes_on_the_device(method: str) -> None:
    model, tokens = small_model(), some_tokens(8)
    report = prune_model(model, method, 0.5, tokens, device="cuda")
    assert not any(p.is_cuda for p in model.parameters())
    for layer in report.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        assert int((weight == 0).sum()) == layer.zeros == weight.numel() // 2
    there = small_model().cuda()
    prune_model(there, method, 0.5, tokens)
    agree = [
        float(((a == 0) == (b.cpu() == 0)).double().mean())
        for a, b in zip(model.parameters(), there.parameters(), strict=True)
    ]
    # Tables of rotary positions differ in their last bits where they are made by another device.
    assert min(agree) >= (1.0 if method == "magnitude" else 0.98)
