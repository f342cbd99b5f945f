"""Arguments of another kind: one error that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farms_fast.adapters.pruning import (
    PRUNERS,
    Allocation,
    InputStatistics,
    allocate_sparsity,
    calibration_tokens,
    epsilon_preset,
    find_blocks,
    outlier_ratio,
    owl_sparsity,
    owl_statistics,
    perplexity,
    prune_model,
    pruner,
    save_pruned,
    text_tokens,
    to_recipe,
    uniform_sparsity,
)
from farms_fast.adapters.pruning.allocation import group_by_block
from farms_fast.adapters.pruning.pruners import wanda_prune_, wanda_scores
from farms_fast.adapters.pruning.saving import report_as_dict
from farms_fast.adapters.pruning.sparsegpt import inverse_factor, sparsegpt_prune_
from tests.support.language_models import small_model, some_tokens

Call = tuple[Callable[..., Any], dict[str, Any]]


def letters(text: str, **options: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def statistics() -> InputStatistics:
    found = InputStatistics(4, hessian=True, layer="up")
    found.add(torch.randn(9, 4))
    return found


def allocation() -> Allocation:
    return allocate_sparsity({"l.0.q": 2.0, "l.1.q": 3.0}, 0.5, 0.2, params=4)


def good(name: str) -> Call:
    """A call with arguments that are right."""
    text: dict[str, Any] = {"tokenizer": letters, "source": __file__}
    weight: dict[str, Any] = {"weight": torch.ones(2, 4), "ratio": 0.5, "layer": "up"}
    whole: dict[str, Any] = {"calibration": some_tokens(), "progress": False}
    calls: dict[str, Callable[[], Call]] = {
        "allocate_sparsity": lambda: (
            allocate_sparsity,
            {
                "analysis_or_alphas": [2.0, 3.0],
                "sparsity": 0.5,
                "epsilon": 0.2,
                "params": 10,
                "block_size": 1,
            },
        ),
        "uniform_sparsity": lambda: (uniform_sparsity, {"params": {"up": 4}, "sparsity": 0.5}),
        "for_modules": lambda: (allocation().for_modules, {"modules": {"l.0.q": 4}}),
        "n_m": lambda: (allocation().n_m, {"m": 8}),
        "epsilon_preset": lambda: (
            epsilon_preset,
            {"model": "llama-7b", "method": "wanda", "sparsity": 0.7},
        ),
        "outlier_ratio": lambda: (outlier_ratio, {"scores": [torch.ones(3)], "threshold": 5}),
        "owl_sparsity": lambda: (owl_sparsity, {"outliers": [1.0, 2.0], "sparsity": 0.5}),
        "owl_statistics": lambda: (owl_statistics, {"model": small_model(), **whole}),
        "prune_model": lambda: (
            prune_model,
            {"model": small_model(), "method": "wanda", "ratios": 0.5, **whole},
        ),
        "perplexity": lambda: (
            perplexity,
            {"model": small_model(), "tokens": some_tokens(1, 30)[0], "seqlen": 8},
        ),
        "find_blocks": lambda: (find_blocks, {"model": small_model()}),
        "group_by_block": lambda: (group_by_block, {"names": ["l.0.q", "l.1.q"]}),
        "pruner": lambda: (pruner, {"name": "wanda"}),
        "statistics": lambda: (PRUNERS["wanda"].statistics, {"columns": 4}),
        "InputStatistics": lambda: (InputStatistics, {"columns": 4}),
        "add": lambda: (statistics().add, {"activations": torch.ones(2, 4)}),
        "magnitude": lambda: (PRUNERS["magnitude"].prune_, weight),
        "wanda": lambda: (wanda_prune_, {**weight, "statistics": statistics()}),
        "sparsegpt": lambda: (sparsegpt_prune_, {**weight, "statistics": statistics()}),
        "wanda_scores": lambda: (
            wanda_scores,
            {"weight": torch.ones(2, 4), "statistics": statistics()},
        ),
        "inverse_factor": lambda: (inverse_factor, {"hessian": torch.eye(4)}),
        "calibration_tokens": lambda: (calibration_tokens, {**text, "samples": 2, "seqlen": 4}),
        "text_tokens": lambda: (text_tokens, text),
        "to_recipe": lambda: (to_recipe, {"method": "sparsegpt", "ratios": {"up": 0.5}}),
    }
    return calls[name]()


NUMBERS = "expected numbers of weights by name, got"


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message"),
    [
        (
            "allocate_sparsity",
            "analysis_or_alphas",
            "x",
            TypeError,
            "analysis_or_alphas: expected an Analysis, or alphas in a sequence or by name, got str",
        ),
        (
            "allocate_sparsity",
            "analysis_or_alphas",
            [2.0, None],
            TypeError,
            "alphas: expected numbers, got None for '1.0'",
        ),
        (
            "allocate_sparsity",
            "analysis_or_alphas",
            [2.0, "3"],
            TypeError,
            "alphas: expected numbers, got '3' for '1.0'",
        ),
        (
            "allocate_sparsity",
            "analysis_or_alphas",
            [2.0, torch.ones(2)],
            TypeError,
            "alphas: expected numbers, got tensor([1., 1.]) for '1.0'",
        ),
        ("allocate_sparsity", "sparsity", "0.5", ValueError, "sparsity: expected a number"),
        ("allocate_sparsity", "epsilon", None, ValueError, "epsilon: expected a number from 0 to"),
        ("allocate_sparsity", "params", 2.5, TypeError, "params: expected an integer, got float"),
        ("allocate_sparsity", "block_size", "1", TypeError, "block_size: expected an integer"),
        ("uniform_sparsity", "params", 3, TypeError, f"params: {NUMBERS} int"),
        ("uniform_sparsity", "params", ["up"], TypeError, f"params: {NUMBERS} list"),
        ("uniform_sparsity", "params", {}, ValueError, "params: expected at least one, got none"),
        ("uniform_sparsity", "params", {1: 3}, TypeError, "params: expected names, got 1 for one"),
        (
            "uniform_sparsity",
            "params",
            {"up": "3"},
            TypeError,
            "params['up']: expected an integer, got str",
        ),
        ("uniform_sparsity", "sparsity", "0.5", ValueError, "sparsity: expected a number between"),
        ("for_modules", "modules", ["l.0.q"], TypeError, f"modules: {NUMBERS} list"),
        ("for_modules", "modules", torch.ones(2), TypeError, f"modules: {NUMBERS} Tensor"),
        ("n_m", "m", 2.0, TypeError, "m: expected an integer, got float"),
        ("epsilon_preset", "model", None, ValueError, "model: expected one of llama-7b"),
        ("epsilon_preset", "method", ["wanda"], ValueError, "method: expected one of magnitude"),
        ("epsilon_preset", "sparsity", "0.7", ValueError, "sparsity: expected one of 0.7, 0.75"),
        ("outlier_ratio", "scores", 3, TypeError, "scores: expected tensors, got int"),
        ("outlier_ratio", "scores", [1.0], TypeError, "scores: expected tensors, got float for"),
        ("outlier_ratio", "threshold", "5", ValueError, "threshold: expected a number above 0"),
        ("owl_sparsity", "outliers", "x", TypeError, "outliers: expected numbers by block or in"),
        ("owl_sparsity", "outliers", 3, TypeError, "outliers: expected numbers by block or in or"),
        (
            "owl_sparsity",
            "outliers",
            {"a": None},
            TypeError,
            "outliers: expected numbers, got None for 'a'",
        ),
        ("owl_sparsity", "lam", None, ValueError, "lam: expected a number of at least 0, got None"),
        (
            "owl_sparsity",
            "layers",
            3,
            ValueError,
            "layers: expected those of the 2 blocks of outliers, got int",
        ),
        (
            "owl_sparsity",
            "layers",
            {"0": 3, "1": 3},
            TypeError,
            f"layers['0']: {NUMBERS} int",
        ),
        (
            "owl_sparsity",
            "layers",
            {"0": {}, "1": {"up": 3}},
            ValueError,
            "layers['0']: expected at least one, got none",
        ),
        ("owl_statistics", "threshold", "5", ValueError, "threshold: expected a number above 0"),
        ("owl_statistics", "calibration", "x", TypeError, "calibration: expected token ids as an"),
        ("owl_statistics", "batch_size", 2.5, TypeError, "batch_size: expected an integer"),
        ("owl_statistics", "model", {}, TypeError, "model: expected a torch.nn.Module, got dict"),
        ("prune_model", "model", "x", TypeError, "model: expected a torch.nn.Module, got str"),
        ("prune_model", "method", ["x"], ValueError, "method: expected one of magnitude, wanda"),
        (
            "prune_model",
            "ratios",
            "0.5",
            ValueError,
            "ratio of layer 'model.layers.0.self_attn.q_proj': expected a number from 0 to 1, got "
            "'0.5'",
        ),
        (
            "prune_model",
            "ratios",
            True,
            ValueError,
            "ratio of layer 'model.layers.0.self_attn.q_proj': expected a number from 0 to 1, got "
            "True",
        ),
        (
            "prune_model",
            "n_m",
            ("2", 4),
            TypeError,
            "n_m[0] of layer 'model.layers.0.self_attn.q_proj': expected an integer, got str",
        ),
        ("prune_model", "memory", "1GB", TypeError, "memory: expected an integer, got str"),
        ("prune_model", "batch_size", "2", TypeError, "batch_size: expected an integer, got str"),
        ("prune_model", "device", 2.5, ValueError, "device: expected cpu, cuda or cuda:N"),
        ("perplexity", "model", "x", TypeError, "model: expected a torch.nn.Module, got str"),
        ("perplexity", "seqlen", "8", TypeError, "seqlen: expected an integer, got str"),
        ("perplexity", "memory", "x", TypeError, "memory: expected an integer, got str"),
        ("find_blocks", "model", None, TypeError, "model: expected a torch.nn.Module, got None"),
        ("group_by_block", "names", "l.0.q", TypeError, "names: expected names of layers, got str"),
        ("group_by_block", "names", [1], TypeError, "names: expected names of layers, got 1 for"),
        ("pruner", "name", {}, ValueError, "method: expected one of magnitude, wanda, sparsegpt"),
        ("statistics", "columns", "4", TypeError, "columns: expected an integer, got str"),
        ("statistics", "device", "x", ValueError, "device: expected cpu, cuda or cuda:N, got 'x'"),
        ("InputStatistics", "dtype", "float32", ValueError, "dtype: expected torch.float64 or"),
        ("InputStatistics", "dtype", torch.float16, ValueError, "dtype: expected torch.float64 or"),
        (
            "add",
            "activations",
            [[1.0]],
            TypeError,
            "activations of layer 'up': expected a torch.Tensor, got list",
        ),
        ("magnitude", "weight", None, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ("magnitude", "ratio", True, ValueError, "ratio of layer 'up': expected a number from 0"),
        (
            "wanda",
            "statistics",
            torch.ones(4),
            TypeError,
            "statistics of layer 'up': expected InputStatistics of its inputs, got Tensor",
        ),
        (
            "sparsegpt",
            "statistics",
            {},
            TypeError,
            "statistics of layer 'up': expected InputStatistics of its inputs, got dict",
        ),
        ("sparsegpt", "damping", "0.01", ValueError, "damping: expected a number above 0, got '0"),
        ("sparsegpt", "block", 2.5, TypeError, "block: expected an integer, got float"),
        ("wanda_scores", "weight", [1], TypeError, "weight: expected a torch.Tensor, got list"),
        ("wanda_scores", "statistics", None, TypeError, "statistics of layer '': expected Input"),
        ("inverse_factor", "hessian", [1], TypeError, "hessian: expected a torch.Tensor, got list"),
        (
            "inverse_factor",
            "hessian",
            torch.ones(2, 3),
            ValueError,
            "hessian: expected a square matrix (n, n), got shape (2, 3)",
        ),
        ("inverse_factor", "damping", None, ValueError, "damping: expected a number above 0, got"),
        ("calibration_tokens", "tokenizer", "x", TypeError, "tokenizer: expected one that is call"),
        (
            "calibration_tokens",
            "source",
            None,
            TypeError,
            "source: expected 'wikitext2', 'c4' or the path of a text file, got NoneType",
        ),
        ("text_tokens", "tokenizer", None, TypeError, "tokenizer: expected one that is called"),
        ("text_tokens", "source", ["a.txt"], TypeError, "source: expected 'wikitext2', 'c4' or"),
        ("to_recipe", "method", ["wanda"], ValueError, "method: expected one of magnitude, wanda"),
        ("to_recipe", "ratios", None, TypeError, "ratios: expected a value for each layer by name"),
        ("to_recipe", "ratios", {"up": "x"}, ValueError, "ratios: expected numbers from 0 to 1"),
        ("to_recipe", "ratios", {"up": math.nan}, ValueError, "ratios: expected numbers from 0"),
        ("to_recipe", "n_m", (2, 4), TypeError, "n_m: expected a value for each layer by name"),
        (
            "to_recipe",
            "n_m",
            {"up": None},
            ValueError,
            "n_m of layer 'up': expected (n, m), n kept of every m, got None",
        ),
        ("to_recipe", "block", "128", TypeError, "block: expected an integer, got str"),
        ("to_recipe", "damping", None, ValueError, "damping: expected a number above 0, got None"),
    ],
)
def test_names_the_argument(
    name: str, argument: str, value: object, error: type[Exception], message: str
) -> None:
    function, arguments = good(name)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        function(**{**arguments, argument: value})
    # It was the value, and nothing else.
    function, arguments = good(name)
    function(**arguments)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruners_without_statistics(method: str) -> None:
    weight = torch.ones(2, 4)
    message = "statistics of layer 'up': expected InputStatistics of its inputs, got None"
    with pytest.raises(TypeError, match=message):
        pruner(method).prune_(weight, 0.5, layer="up")
    assert bool((weight == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "x"}, TypeError, "model: expected one with save_pretrained"),
        ({"out": None}, TypeError, "out: expected the path of a folder, got NoneType"),
        ({"out": 3}, TypeError, "out: expected the path of a folder, got int"),
        ({"report": {}}, TypeError, "report: expected a PruningReport, got dict"),
        ({"tokenizer": "x"}, TypeError, "tokenizer: expected one with save_pretrained"),
        ({"settings": ["x"]}, TypeError, "settings: expected values by name, got list"),
        ({"recipe": b"x"}, TypeError, "recipe: expected a text, got bytes"),
    ],
)
def test_nothing_is_saved_with_an_argument_of_another_kind(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = small_model()
    report = prune_model(model, "magnitude", 0.5, progress=False)
    saved: list[object] = []
    model.save_pretrained = saved.append
    arguments = {"model": model, "out": tmp_path / "out", "report": report, **change}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        save_pruned(**arguments)
    assert saved == []
    assert list(tmp_path.iterdir()) == []
    assert report_as_dict(report)["method"] == "magnitude"
