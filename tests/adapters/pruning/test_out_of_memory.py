"""Out of memory halves the batch and goes on, with the results of a small batch from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning import sequential
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.evaluation import perplexity
from farms_fast.adapters.pruning.modules import move_module, place_model
from farms_fast.adapters.pruning.oom import is_out_of_memory
from farms_fast.adapters.pruning.sequential import owl_statistics, prune_model
from farms_fast.adapters.pruning.statistics import InputStatistics
from tests.support.fake_oom import MOST, Full, alike, equal, weights
from tests.support.language_models import VOCABULARY, small_model, some_tokens


class Wide(nn.Module):
    """Blocks that return a tuple, hidden states (seqlen, samples, hidden), and sum over seqlen."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + torch.tanh(self.down(torch.tanh(self.up(x.cumsum(0)))))
            # Means that have nothing to do with samples, but are as many.
            return x, x.mean((0, 1))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.gate = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(self.gate(tokens)).transpose(0, 1)
        for block in self.blocks:
            x, _ = block(x)
        y: Tensor = x.transpose(0, 1)
        return y


# ------------------------------------------------------------------------------------------ pruning


# Block 1 runs twice, to be known and once it is pruned, each time in two batches.
@pytest.mark.slow
@pytest.mark.parametrize("since", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("place", ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp"])
def test_prunes_as_in_small_batches(method: str, place: str, since: int) -> None:
    tokens = some_tokens(8)
    model, small = small_model().double(), small_model().double()
    full = Full(model.get_submodule(place), since)
    report = prune_model(model, method, 0.5, tokens, batch_size=4)
    expected = prune_model(small, method, 0.5, tokens, batch_size=MOST)
    assert full.too_large == since
    assert max(full.sizes[since:]) == MOST
    assert (report.batch_size, expected.batch_size) == (MOST, MOST)
    assert alike(model, small)
    assert report.layers == expected.layers


@pytest.mark.parametrize(
    "place", ["model.embed_tokens", "model.layers.0.mlp", "model.layers.2.mlp"]
)
def test_goes_on_wherever_memory_ends(place: str) -> None:
    model, small, tokens = small_model().double(), small_model().double(), some_tokens(8)
    # The probe of one sample has room.
    Full(model.get_submodule(place))
    assert prune_model(model, "sparsegpt", 0.5, tokens).batch_size == MOST
    prune_model(small, "sparsegpt", 0.5, tokens, batch_size=MOST)
    assert alike(model, small)
    if place != "model.layers.2.mlp":
        # Before the first block was done, so that nothing is left of the larger batch.
        assert equal(weights(model), weights(small))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_goes_on_where_statistics_have_no_room(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = some_tokens(8)
    add = InputStatistics.add
    seen: list[InputStatistics] = []

    def limited(self: InputStatistics, activations: Tensor) -> None:
        if len(activations) > MOST and self.layer.endswith("down_proj"):
            raise torch.OutOfMemoryError
        add(self, activations)

    def look(weight: Tensor, ratio: object, statistics: Any, *, n_m: object, layer: str) -> Tensor:
        seen.append(statistics)
        return pruner.prune_(weight, 0.5, statistics, layer=layer)

    pruner = sequential.pruner(method)
    monkeypatch.setattr(
        sequential, "pruner", lambda name: type(pruner)(name, True, pruner.needs_hessian, look)
    )
    small = small_model()
    prune_model(small, method, 0.5, tokens, batch_size=MOST)
    monkeypatch.setattr(InputStatistics, "add", limited)
    model = small_model()
    prune_model(model, method, 0.5, tokens)
    assert equal(weights(model), weights(small))
    # No sample counted twice, and none left out.
    assert {statistics.tokens for statistics in seen} == {tokens.numel()}


def test_cuts_nothing_that_is_no_batch() -> None:
    # As many samples at a time as tokens, and as values of the means: which dimension is which?
    torch.manual_seed(0)
    model, small = Wide().double(), Wide().double()
    small.load_state_dict(model.state_dict())
    tokens = some_tokens(8, 8)
    full = Full(model.gate, since=3)
    report = prune_model(model, "sparsegpt", 0.5, tokens, batch_size=8)
    assert report.batch_size == MOST
    assert full.sizes[:3] == [1, 8, 8]
    prune_model(small, "sparsegpt", 0.5, tokens, batch_size=MOST)
    assert alike(model, small)


@pytest.mark.parametrize("since", [1, 2])
def test_outliers_as_in_small_batches(since: int) -> None:
    model, tokens = small_model(), some_tokens(8)
    expected = owl_statistics(model, tokens, threshold=3.0, batch_size=MOST)
    before = weights(model)
    full = Full(model.model.layers[1].mlp, since)
    found = owl_statistics(model, tokens, threshold=3.0, batch_size=4)
    assert full.too_large == since
    assert found == expected
    assert equal(weights(model), before)


def test_what_is_no_shortage_is_not_repeated() -> None:
    model = small_model()
    calls: list[int] = []

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(len(args[0]))
        raise RuntimeError("of another kind")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of another kind"):
        prune_model(model, "wanda", 0.5, some_tokens(8), batch_size=4)
    assert calls == [4]


# ------------------------------------------------------------------------------- nothing is smaller


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("model.layers.1.mlp", r"block 'model\.layers\.1' with one sample"),
        ("model.embed_tokens", "what precedes the blocks with one sample"),
    ],
)
def test_says_where_one_sample_has_no_room(place: str, what: str) -> None:
    model = small_model().train()
    full = Full(model.get_submodule(place), most=0)
    message = rf"^memory: cpu .*{what} of 16 tokens \(no room for 1\)$"
    with pytest.raises(ValueError, match=message):
        prune_model(model, "wanda", 0.5, some_tokens(6), batch_size=5)
    assert full.too_large == (3 if place != "model.embed_tokens" else 1)
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_says_which_layer_has_no_room_to_be_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    before = weights(model)

    def factor(*args: object, **options: object) -> None:
        raise RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED")

    monkeypatch.setattr("farms_fast.adapters.pruning.sparsegpt.inverse_factor", factor)
    message = (
        r"memory: cpu has no room for pruning layer 'model\.layers\.0\.self_attn\.q_proj' of "
        r"\(32, 32\) by sparsegpt \(cusolver error"
    )
    with pytest.raises(ValueError, match=message):
        prune_model(model, "sparsegpt", 0.5, some_tokens(4))
    assert equal(weights(model), before)


def test_says_which_block_has_no_room_for_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sequential, "wanda_scores", scores)
    message = r"memory: cpu has no room for the scores of block 'model\.layers\.0'$"
    with pytest.raises(ValueError, match=message):
        owl_statistics(small_model(), some_tokens(4))


# --------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("since", [1, 2, 3])
@pytest.mark.parametrize("place", ["model.layers.1.mlp", "lm_head"])
def test_perplexity_as_in_small_batches(place: str, since: int) -> None:
    text = some_tokens(1, 150)[0]
    model = small_model()
    expected = perplexity(model, text, seqlen=16, stride=10, batch_size=MOST)
    full = Full(model.get_submodule(place), since)
    found = perplexity(model, text, seqlen=16, stride=10, batch_size=5)
    # 13 windows of 16 tokens after the first one: three batches of at most 5.
    assert full.too_large == since
    assert found == pytest.approx(expected, rel=1e-6)


def test_perplexity_says_that_one_window_has_no_room() -> None:
    model = small_model().train()
    Full(model.lm_head, most=0)
    message = r"memory: cpu has no room for one window of 16 tokens \(no room for 1\)$"
    with pytest.raises(ValueError, match=message):
        perplexity(model, some_tokens(1, 150)[0], seqlen=16)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("place", ["lm_head", "make", "model.layers.2.mlp"])
@pytest.mark.parametrize("since", [1, 2, 3])
def test_outputs_go_on_where_they_were(place: str, since: int) -> None:
    model, tokens = small_model(), some_tokens(11)
    with torch.no_grad():
        expected = model(tokens).logits
    watched = nn.Identity()
    full = Full(watched if place == "make" else model.get_submodule(place), since)
    runner = BlockRunner(model, find_blocks(model), tokens, batch_size=4)
    with runner:
        for _ in find_blocks(model).blocks:
            runner.run(keep=True)
        found = list(runner.outputs(lambda out, first: (first, watched(out.logits))))
    sizes = [len(logits) for _, logits in found]
    assert [first for first, _ in found] == [sum(sizes[:n]) for n in range(len(sizes))]
    whole = 0 if place == "model.layers.2.mlp" else since - 1
    assert sizes[: whole + 1] == [4] * whole + [2]
    assert full.too_large == since
    torch.testing.assert_close(torch.cat([logits for _, logits in found]), expected)


# ------------------------------------------------------------------------------------------- pieces


def test_tells_a_shortage_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with ..."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))


@pytest.mark.parametrize("hessian", [True, False])
def test_statistics_that_had_no_room_are_as_before(
    hessian: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    found, expected = (InputStatistics(4, hessian=hessian) for _ in range(2))
    x = torch.randn(10, 4)
    found.add(x[:5])
    with monkeypatch.context() as patch:
        patch.setattr("farms_fast.adapters.pruning.statistics.full_float32", no_room)
        patch.setattr(torch.linalg, "vector_norm", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            found.add(x[5:])
    found.add(x[5:])
    expected.add(x[:5])
    expected.add(x[5:])
    assert found.tokens == 10
    assert torch.equal(found.mean_squares, expected.mean_squares)


class Stuck(nn.Linear):
    """Cannot be moved to CUDA, and keeps what it was asked."""

    error: type[Exception] = torch.OutOfMemoryError

    def to(self, device: torch.device) -> Stuck:  # type: ignore[override]
        self.asked = [*getattr(self, "asked", []), device.type]
        if device.type == "cuda":
            raise self.error
        return self


def test_a_module_is_moved_as_a_whole_or_not_at_all() -> None:
    module = Stuck(2, 2)
    with pytest.raises(torch.OutOfMemoryError):
        move_module(module, torch.device("cuda", 0))
    assert module.asked == ["cuda", "cpu"]


def test_a_model_that_does_not_fit_stays() -> None:
    module = Stuck(2, 2)
    place_model(module, torch.device("cuda", 0), memory=47)
    assert not hasattr(module, "asked")  # 48 bytes are twice its weights
    place_model(module, torch.device("cuda", 0), memory=48)
    assert module.asked == ["cuda", "cpu"]
    module.error = AssertionError
    with pytest.raises(AssertionError):
        place_model(module, torch.device("cuda", 0), memory=48)


class Movable(nn.Linear):
    def to(self, device: torch.device) -> Movable:  # type: ignore[override]
        return self


def test_a_model_on_the_device_counts() -> None:
    module = Movable(2, 2)
    module.register_buffer("table", torch.zeros(4))
    gpu = torch.device("cuda", 0)
    assert place_model(module, gpu, memory=100) == 100 - 4 * 6 - 4 * 4
    assert place_model(module, gpu, memory=79) == 79  # where it does not go
    assert place_model(Stuck(2, 2), gpu, memory=100) == 100
    assert place_model(module, torch.device("cpu"), memory=100) == 100


# --------------------------------------------------------------------------------------------- plan


def test_batches_shrink_to_fit_the_memory() -> None:
    model, tokens = small_model(), some_tokens(16)
    blocks = find_blocks(model)
    whole = BlockRunner(model, blocks, tokens, statistics=lambda block: 1000)
    assert whole.batch_size == 16
    use = whole.use
    assert use.hidden_states == 16 * 16 * 32 * 4
    assert use.statistics == 1000
    assert use.block == 0
    # A token in a block: twice the hidden state, what goes in and out of q, k, v, o, gate, up and
    # down, and the widest input in float32.
    widths = 2 * 32 + (32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3
    assert use.batch == 16 * 16 * (4 * widths + 4 * 48)
    assert use.device == use.hidden_states + use.statistics + use.batch
    half = BlockRunner(
        model, blocks, tokens, statistics=lambda block: 1000, memory=use.device - use.batch // 2
    )
    assert half.batch_size == 8
    least = use.hidden_states + use.statistics + use.batch // 16
    one = BlockRunner(model, blocks, tokens, statistics=lambda block: 1000, memory=least)
    assert one.batch_size == 1
    with pytest.raises(ValueError, match=f"memory: expected at least {least} bytes on cpu for 1"):
        BlockRunner(model, blocks, tokens, statistics=lambda block: 1000, memory=least - 1)


def test_a_given_batch_size_is_kept_or_refused() -> None:
    model, tokens = small_model(), some_tokens(16)
    blocks = find_blocks(model)
    assert BlockRunner(model, blocks, tokens, batch_size=5).batch_size == 5
    with pytest.raises(ValueError, match="for 5 samples of 16 tokens at a time"):
        BlockRunner(model, blocks, tokens, batch_size=5, memory=40_000)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_batch_size_changes_what_is_pruned(method: str) -> None:
    tokens = some_tokens(6)
    masks = []
    for size in (1, 4, 6):
        model = small_model().double()
        prune_model(model, method, 0.5, tokens, batch_size=size)
        masks.append([parameter == 0 for parameter in model.parameters()])
    assert equal(masks[0], masks[1])
    assert equal(masks[0], masks[2])
