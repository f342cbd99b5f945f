"""A model that sees the tokens it is to predict has no perplexity, and is told so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.evaluation import (
    check_causal,
    check_order,
    perplexity,
    with_another_end,
)
from farms_fast.adapters.pruning.sequential import prune_model
from farms_fast.cli import main as cli
from tests.support.language_models import (
    FAMILIES,
    VOCABULARY,
    bert_config,
    small_model,
    small_tokenizer,
    some_tokens,
    write_words,
)

MESSAGE = "model: expected a causal language model, got BertLMHeadModel: "


def bert(*, is_decoder: bool = False, std: float | None = None) -> Any:
    config = bert_config(num_hidden_layers=3, max_position_embeddings=64, is_decoder=is_decoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
        if std is not None:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(2, torch.float32), (3, torch.float32), (16, torch.float32), (150, torch.bfloat16)],
)
@pytest.mark.parametrize("batch_size", [1, None])
def test_refuses_attention_in_both_directions(
    dtype: torch.dtype, length: int, batch_size: int | None
) -> None:
    text = some_tokens(1, length, seed=2)[0]
    model = bert(std=0.3).to(dtype).train()
    with pytest.raises(ValueError, match=f"^{re.escape(MESSAGE)}.*no perplexity"):
        perplexity(model, text, seqlen=16, batch_size=batch_size)
    assert all(module.training for module in model.modules())
    decoder = bert(is_decoder=True, std=0.3).to(dtype)
    assert perplexity(decoder, text, seqlen=16, batch_size=batch_size) > 1


def test_refuses_an_encoder_that_nobody_has_trained() -> None:
    # Its logits hardly depend on anything yet.
    with pytest.raises(ValueError, match=re.escape(MESSAGE)):
        check_causal(bert())
    check_causal(bert(is_decoder=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_causal_models(family: str, dtype: torch.dtype) -> None:
    model = small_model(family).to(dtype)
    check_causal(model)
    assert perplexity(model, some_tokens(1, 50)[0], seqlen=32) > 1


def test_takes_a_model_of_few_positions() -> None:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=8
    )
    check_causal(transformers.AutoModelForCausalLM.from_config(config))


def test_takes_a_mixture_of_experts() -> None:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
    )
    check_causal(transformers.AutoModelForCausalLM.from_config(config))


class Nearby(nn.Module):
    """Sees one token on either side, or only the one before."""

    def __init__(self, ahead: bool) -> None:
        super().__init__()
        self.embed, self.ahead = nn.Embedding(9, 9), ahead

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        before = torch.cat([x[:, :1], x[:, :-1]], dim=1)
        after = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        return x + before + (after if self.ahead else 0)


def test_what_one_sees_alone_is_no_proof() -> None:
    # Of a window's tokens only the last one of the first half sees another end.
    text = torch.arange(40) % 9
    assert perplexity(Nearby(ahead=False), text, seqlen=4) > 1
    with pytest.raises(ValueError, match="got Nearby: "):
        perplexity(Nearby(ahead=True), text, seqlen=4)


def test_an_encoder_with_a_decoder_is_told_at_once() -> None:
    model = nn.Sequential(nn.Embedding(9, 9))
    model.config = SimpleNamespace(is_encoder_decoder=True)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"got Sequential: .*encoder"):
        perplexity(model, torch.arange(8), seqlen=4)


def test_where_every_token_is_the_same() -> None:
    model = nn.Sequential(nn.Embedding(4, 4))
    for token in (0, 3):
        assert perplexity(model, torch.full((9,), token), seqlen=4) > 1


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30))
def test_the_other_end_is_another_one(ids: list[int]) -> None:
    pair = with_another_end(torch.tensor(ids)).tolist()
    half = (len(ids) + 1) // 2
    assert pair[0] == ids
    assert pair[1][:half] == ids[:half]
    assert set(pair[1]) <= {*ids, 0}
    if any(ids):
        assert all(a != b for a, b in zip(pair[1][half:], ids[half:], strict=True))


@pytest.mark.parametrize(
    ("dtype", "changes", "refused"),
    [
        (torch.float32, [0.0, 0.0, 0.0], False),
        (torch.float32, [1e-5, 1e-5, 1e-5], False),
        (torch.float32, [0.0, 0.0, 1e-3], True),
        (torch.bfloat16, [0.05, 0.05, 2.0], False),
        (torch.bfloat16, [0.0, 0.5, 0.5], True),
        (torch.float32, [math.nan, 0.0, 0.0], False),  # said elsewhere
    ],
)
def test_rounding_is_no_look_ahead(dtype: torch.dtype, changes: list[float], refused: bool) -> None:
    losses = torch.ones(2, 5, dtype=torch.float64)
    losses[1, :3] += torch.tensor(changes, dtype=torch.float64)
    # In the second half the tokens are others, and so are the likelihoods.
    losses[1, 3:] += 7
    model = nn.Linear(1, 1).to(dtype)
    if refused:
        with pytest.raises(ValueError, match="expected a causal language model, got Linear"):
            check_order(model, losses)
    else:
        check_order(model, losses)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 4), (2, 7, 9)])
def test_refuses_logits_of_another_shape(shape: tuple[int, ...]) -> None:
    class Other(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(shape)

    message = rf"model: expected logits \(n, 8, vocabulary\) .*7, got shape {re.escape(str(shape))}"
    with pytest.raises(TypeError, match=message):
        perplexity(Other(), torch.arange(8), seqlen=8)


# ----------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_encoders_are_pruned_in_python(method: str) -> None:
    model = bert(std=0.3)
    dense = [layer.matrix.clone() for layer in find_blocks(model).layers]
    report = prune_model(model, method, 0.5, some_tokens())
    assert [layer.name for layer in report.layers][:2] == [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
    ]
    for layer, found, before in zip(find_blocks(model).layers, report.layers, dense, strict=True):
        assert int((layer.matrix == 0).sum()) == found.zeros == before.numel() // 2


@pytest.mark.parametrize("evaluate", [True, False])
def test_the_command_refuses_encoders(tmp_path: Path, evaluate: bool) -> None:
    text = write_words(tmp_path / "text.txt", 100)
    for name, model in (("encoder", bert()), ("decoder", bert(is_decoder=True))):
        model.save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
        options = ["--sparsity", "0.5", "--method", "magnitude", "--allocation", "uniform"]
        more = ["--evaluate", str(text)] if evaluate else []
        arguments = [str(tmp_path / name), *options, *more, "--out", str(tmp_path / f"{name}.out")]
        result = CliRunner().invoke(cli.app, ["prune", *arguments])
        if name == "encoder":
            assert result.exit_code == 2
            assert result.stderr.splitlines()[-1].startswith(f"error: {MESSAGE}")
            assert not (tmp_path / "encoder.out").exists()
        else:
            assert result.exit_code == 0, result.output
