"""Perplexity against a plain loop over the tokens, and the hook for lm_eval."""

from __future__ import annotations

import math
import random
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from farms_fast.adapters.pruning.evaluation import SEVEN_TASKS, perplexity, zero_shot
from farms_fast.adapters.pruning.tokens import longest_sequence
from tests.support.language_models import VOCABULARY, bert_config, small_model, some_tokens


def one_by_one(model: Any, text: Tensor, seqlen: int, stride: int) -> tuple[float, int]:
    """Perplexity and the number of tokens scored, with a run of the model for every window."""
    done, losses = 0, []
    for start in range(0, len(text), stride):
        window = text[start : start + seqlen]
        with torch.no_grad():
            scores = model(window[None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(window)):
            if start + place > done:
                losses.append(-float(scores[place - 1, window[place]]))
        done = start + len(window) - 1
        if done == len(text) - 1:
            break
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 32, 33, 50, 61])
@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
def test_scores_every_token_once(length: int, stride: int | None) -> None:
    model, text = small_model(), some_tokens(1, length)[0]
    expected, scored = one_by_one(model, text, 16, stride or 16)
    if stride in (1, 5, 15):
        assert scored == length - 1
    for size in (1, 3, None):
        found = perplexity(model, text, seqlen=16, stride=stride, batch_size=size)
        assert found == pytest.approx(expected, rel=1e-5)


def test_takes_models_that_return_tensors_or_tuples() -> None:
    class Tuple(nn.Sequential):
        def forward(self, tokens: Tensor) -> Any:
            return (super().forward(tokens), None)

    model = nn.Sequential(nn.Embedding(10, 10))
    text = torch.arange(10)
    assert perplexity(model, text[None], seqlen=5) == perplexity(Tuple(*model), text, seqlen=5)


def test_is_infinite_beyond_the_range() -> None:
    model = nn.Sequential(nn.Embedding(4, 4))
    nn.init.zeros_(model[0].weight)
    with torch.no_grad():
        model[0].weight[:, 0] = 1e4
    assert perplexity(model, torch.ones(8, dtype=torch.int64), seqlen=4) == math.inf


def test_leaves_the_model_as_it_was() -> None:
    model = small_model().train()
    perplexity(model, some_tokens(1, 40)[0], seqlen=16)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    message = "logits are NaN in the windows that start with token 0"
    with pytest.raises(ValueError, match=message) as caught:
        perplexity(model, some_tokens(1, 40)[0], seqlen=16)
    assert caught.value is not None
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.ones(1, dtype=torch.int64)}, ValueError, "at least two, got 1"),
        ({"tokens": torch.ones(0, dtype=torch.int64)}, ValueError, "at least two, got 0"),
        ({"tokens": torch.ones(2, 8, dtype=torch.int64)}, ValueError, "got (2, 8)"),
        ({"tokens": torch.ones(8)}, TypeError, "tokens: expected token ids as an int64 tensor"),
        ({"tokens": [1, 2]}, TypeError, "tokens: expected token ids as an int64 tensor"),
        ({"tokens": torch.full((8,), VOCABULARY)}, ValueError, f"got {VOCABULARY} to {VOCABULARY}"),
        (
            {"tokens": torch.tensor([0] * 30 + [VOCABULARY])},
            ValueError,
            f"from 0 to {VOCABULARY - 1}, got 0 to {VOCABULARY}",
        ),
        ({"seqlen": 1}, ValueError, "seqlen"),
        ({"seqlen": 65, "tokens": torch.zeros(99, dtype=torch.int64)}, ValueError, "64 positions"),
        ({"stride": 9}, ValueError, "stride: expected at most the seqlen of 8, got 9"),
        ({"stride": 0}, ValueError, "stride"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"device": "tpu"}, ValueError, "device"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"tokens": some_tokens(1, 20)[0], "seqlen": 8, **change}
    with pytest.raises(error, match=re.escape(message)):
        perplexity(small_model(), **arguments)


def test_refuses_outputs_without_logits() -> None:
    class Silent(nn.Module):
        def forward(self, tokens: Tensor) -> Any:
            return {"hidden": tokens}

    with pytest.raises(TypeError, match="model: expected logits"):
        perplexity(Silent(), torch.arange(4), seqlen=4)


@pytest.mark.gpu
def test_blocks_can_run_on_the_device() -> None:
    model, text = small_model("gpt2"), some_tokens(1, 50)[0]
    expected = perplexity(model, text, seqlen=16, stride=5)
    found = perplexity(model, text, seqlen=16, stride=5, device="cuda")
    assert found == pytest.approx(expected, rel=1e-3)
    assert not any(parameter.is_cuda for parameter in model.parameters())


# ---------------------------------------------------------------------------------------- lm_eval


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for lm_eval with the calls that are made of it."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> Any:
        seen["evaluate"] = options
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        return {
            "results": {
                task: {"acc,none": number / 10, "acc_norm,none": 0.9, "alias": task}
                if task != "wikitext"
                else {"word_perplexity,none": 20.0, "alias": task}
                for number, task in enumerate(options["tasks"])
            }
        }

    def wrap(**options: Any) -> str:
        seen["model"] = options
        seen["training"] = options["pretrained"].training
        return "wrapped"

    package = ModuleType("lm_eval")
    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    monkeypatch.setitem(
        sys.modules,
        "lm_eval.models.huggingface",
        SimpleNamespace(HFLM=wrap),  # type: ignore[arg-type]
    )
    return seen


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002
    return [int(word) for word in state[1]]


def test_asks_for_the_seven_tasks(harness: dict[str, Any]) -> None:
    model = small_model().train()
    states = torch.get_rng_state(), random.getstate(), numpy_state()
    found = zero_shot(model, "tokenizer", limit=3)
    assert found == {task: number / 10 for number, task in enumerate(SEVEN_TASKS)}
    assert harness["model"]["pretrained"] is model
    assert harness["model"]["tokenizer"] == "tokenizer"
    assert harness["training"] is False
    assert model.training
    assert harness["evaluate"]["model"] == "wrapped"
    assert harness["evaluate"]["num_fewshot"] == 0
    assert harness["evaluate"]["limit"] == 3
    # The harness seeds every generator; the caller's are as they were.
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy_state() == states[2]


def test_refuses_no_tasks(harness: dict[str, Any]) -> None:
    for tasks in ((), "boolq"):
        with pytest.raises(ValueError, match="tasks: expected a sequence of names"):
            zero_shot(small_model(), None, tasks)


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("llama", {}, TypeError, r"model: expected a torch\.nn\.Module, got str"),
        (None, {"tasks": [1]}, ValueError, r"tasks: expected a sequence .*, got \[1\]"),
        (None, {"tasks": 3}, ValueError, "tasks: expected a sequence of names of tasks, got 3"),
        (None, {"limit": "all"}, TypeError, "limit: expected an integer, got str"),
    ],
)
def test_zero_shot_refuses(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        zero_shot(model or small_model(), None, **options)


@pytest.mark.usefixtures("harness")
def test_zero_shot_refuses_what_is_not_causal() -> None:
    model = transformers.AutoModelForCausalLM.from_config(bert_config())
    with pytest.raises(ValueError, match="expected a causal language model, got BertLMHeadModel"):
        zero_shot(model, None)


@pytest.mark.usefixtures("harness")
def test_refuses_tasks_without_an_accuracy() -> None:
    with pytest.raises(ValueError, match=r"tasks: expected tasks with an accuracy, got wikitext$"):
        zero_shot(small_model(), None, ["boolq", "wikitext"])


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[lm-eval\]'"):
        zero_shot(small_model(), None)


@pytest.mark.parametrize(("positions", "longest"), [(64, 64), (-1, None), (None, None)])
def test_longest_sequence_is_what_a_config_tells(
    positions: int | None, longest: int | None
) -> None:
    model = nn.Linear(2, 2)
    assert longest_sequence(model) is None
    model.config = SimpleNamespace(max_position_embeddings=positions)
    assert longest_sequence(model) == longest
