"""Small models of every family: pruned, saved, reloaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from farms_fast.adapters.pruning.allocation import allocate_sparsity
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.saving import SETTINGS_FILE, new_folder, save_pruned
from farms_fast.adapters.pruning.sequential import PruningReport, prune_model
from farms_fast.run_analysis import analyze
from farms_fast.spectra.windows import FixedAspectSampling
from tests.support.language_models import (
    FAMILIES,
    small_model,
    small_tokenizer,
    some_tokens,
    write_words,
)

METHODS = ("magnitude", "wanda", "sparsegpt")


def uneven_ratios(model: nn.Module) -> dict[str, float]:
    names = [layer.name for layer in find_blocks(model).layers]
    return {name: 0.3 + 0.6 * number / len(names) for number, name in enumerate(names)}


def check_saved(model: Any, folder: Path, report: PruningReport) -> None:
    """What is read back has the same zeros and gives the same outputs."""
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer in report.layers:
        weight = again.get_parameter(f"{layer.name}.weight")
        assert int((weight == 0).sum()) == layer.zeros
        assert torch.equal(weight, model.get_parameter(f"{layer.name}.weight"))
    tokens = some_tokens(2, seed=5)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_saves_and_reloads(family: str, method: str, tmp_path: Path) -> None:
    model = small_model(family)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ratios = uneven_ratios(model)
    seen: list[tuple[int, int, str]] = []
    report = prune_model(
        model, method, ratios, some_tokens(), progress=lambda *step: seen.append(step)
    )
    count = len(ratios)
    assert seen == [(number + 1, count, name) for number, name in enumerate(ratios)]
    assert [layer.name for layer in report.layers] == list(ratios)
    assert report.method == method
    for layer in report.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        assert layer.target == ratios[layer.name]
        assert layer.zeros == int((weight == 0).sum()) == round(layer.target * weight.numel())
        assert layer.reached == layer.zeros / weight.numel()
        assert layer.name.startswith(layer.block + ".")
        assert (layer.zeros_before, layer.n_m, layer.pruned_by) == (0, None, method)
    # Nothing else has changed.
    pruned = {f"{name}.weight" for name in ratios}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dense[name]) == (name not in pruned)

    save_pruned(model, tmp_path / "out", report, settings={"seed": 3})
    check_saved(model, tmp_path / "out", report)
    document = json.loads((tmp_path / "out" / SETTINGS_FILE).read_text())
    assert document["settings"] == {"seed": 3}
    assert document["sparsity"] == report.sparsity
    assert document["batch_size"] == (0 if method == "magnitude" else 6)
    assert {layer["name"]: layer["ratio"] for layer in document["layers"]} == ratios
    assert {layer["name"]: layer["zeros"] for layer in document["layers"]} == {
        layer.name: layer.zeros for layer in report.layers
    }
    assert document["skipped"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prunes_to_patterns(family: str, method: str) -> None:
    model = small_model(family)
    names = [layer.name for layer in find_blocks(model).layers]
    patterns = {name: ((2, 4), (1, 4), (4, 4))[number % 3] for number, name in enumerate(names)}
    report = prune_model(model, method, 0.9, some_tokens(), n_m=patterns)
    for layer, found in zip(find_blocks(model).layers, report.layers, strict=True):
        kept, group = patterns[layer.name]
        nonzero = (layer.matrix != 0).reshape(layer.shape[0], -1, group).sum(-1)
        # Of inputs, not of outputs, however the weight is stored.
        assert bool((nonzero == kept).all())
        assert found.n_m == (kept, group)
        assert found.target == found.reached == 1 - kept / group
        assert found.pruned_by == ("" if kept == group else method)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_makes_a_difference(method: str) -> None:
    tokens = some_tokens(8)
    found = []
    for how in ("magnitude", method):
        model = small_model()
        with torch.no_grad():
            # Inputs of very different sizes, which magnitude knows nothing of.
            for layer in model.model.layers:
                layer.input_layernorm.weight.copy_(torch.logspace(-2, 1, 32))
                layer.post_attention_layernorm.weight.copy_(torch.logspace(1, -2, 32))
            expected = model(tokens).logits
            prune_model(model, how, 0.5, tokens)
            found.append(float((model(tokens).logits - expected).square().mean()))
    assert found[1] < 0.7 * found[0]


def test_ratios_of_an_analysis_reach_the_total(tmp_path: Path) -> None:
    model = small_model("gpt2")
    blocks = find_blocks(model)
    include = [f"{block.name}.*" for block in blocks.blocks]
    sampling = FixedAspectSampling(rows=12, per_dim=3)
    analysis = analyze(model, sampling, bootstrap=0, include=include, progress=False)
    # GPT-2's fused projection is analysed in its parts.
    assert "transformer.h.0.attn.c_attn.q" in {layer.name for layer in analysis}
    weights = {layer.name: math.prod(layer.shape) for layer in blocks.layers}
    allocation = allocate_sparsity(analysis, 0.7, 0.2).for_modules(weights)
    report = prune_model(model, "wanda", allocation, some_tokens())
    assert len({round(layer.target, 9) for layer in report.layers}) == 3
    assert report.sparsity == pytest.approx(0.7, abs=len(weights) / sum(weights.values()))


@pytest.mark.parametrize("method", METHODS)
def test_zeros_that_were_there_count(method: str) -> None:
    model = small_model()
    first = prune_model(model, method, 0.4, some_tokens())
    zeros = {n: p == 0 for n, p in model.named_parameters()}
    report = prune_model(model, method, 0.6, some_tokens())
    for layer, before in zip(report.layers, first.layers, strict=True):
        assert layer.zeros_before == before.zeros
        assert layer.zeros == round(0.6 * math.prod(layer.shape))
    for name, parameter in model.named_parameters():
        assert bool((parameter[zeros[name]] == 0).all())
    # More zeros than asked for stay as they are.
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = prune_model(model, method, 0.2, some_tokens())
    assert again.sparsity == report.sparsity
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_rows_with_too_many_zeros_stay_as_they_are() -> None:
    model = small_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[:6] = 0
    layer = prune_model(model, "wanda", 0.5, some_tokens()).layers[5]
    assert layer.name == "model.layers.0.mlp.up_proj"
    assert (layer.zeros_before, layer.zeros) == (6 * 32, 6 * 32 + 42 * 16)


def test_a_ratio_of_one_leaves_nothing() -> None:
    model = small_model()
    assert prune_model(model, "sparsegpt", 1.0, some_tokens()).sparsity == 1


@pytest.mark.parametrize("method", METHODS)
def test_prunes_bfloat16(method: str, tmp_path: Path) -> None:
    model = small_model()
    for parameter in model.parameters():  # and not its table of positions
        parameter.data = parameter.data.bfloat16()
    report = prune_model(model, method, 0.5, some_tokens())
    assert report.sparsity == 0.5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_pruned(model, tmp_path / "out", report)
    check_saved(model, tmp_path / "out", report)


def test_magnitude_needs_no_calibration_and_no_model_of_language() -> None:
    body = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)]
    report = prune_model(nn.Sequential(nn.Flatten(), *body), "magnitude", 0.25)
    assert report.sparsity == 0.25
    assert report.calibration_bytes == 0


# ------------------------------------------------------------------------------------- bad input


def _one_missing(names: list[str]) -> dict[str, float]:
    return dict.fromkeys(names[1:], 0.5)


def _one_more(names: list[str]) -> dict[str, float]:
    return dict.fromkeys([*names, "lm_head"], 0.5)


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (_one_missing, "nothing for 'model.layers.0.self_attn.q_proj' (1 missing, 0 unknown)"),
        (_one_more, "an unknown layer, 'lm_head' (0 missing, 1 unknown)"),
        (lambda names: dict.fromkeys(names, -0.1), "a number from 0 to 1, got -0.1"),
        (lambda names: 1.5, "a number from 0 to 1, got 1.5"),
        (lambda names: math.nan, "a number from 0 to 1, got nan"),
        (lambda names: "0.5", "a number from 0 to 1, got '0.5'"),
    ],
)
def test_refuses_ratios(ratios: Any, message: str) -> None:
    model = small_model()
    names = [layer.name for layer in find_blocks(model).layers]
    with pytest.raises(ValueError, match=re.escape(message)):
        prune_model(model, "magnitude", ratios(names))


@pytest.mark.parametrize("n_m", [(5, 4), (2, 5), "2:4"])
def test_refuses_patterns(n_m: Any) -> None:
    with pytest.raises(ValueError, match=r"n_m of layer 'model\.layers\.0\.self_attn\.q_proj'"):
        prune_model(small_model(), "magnitude", 0.5, n_m=n_m)


def test_refuses_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="method: expected one of magnitude, wanda, sparsegpt"):
        prune_model(small_model(), "random", 0.5)


def test_refuses_an_unknown_device() -> None:
    for method in METHODS:
        with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'tpu'"):
            prune_model(small_model(), method, 0.5, some_tokens(), device="tpu")


# ---------------------------------------------------------------------------------------- saving


def test_saves_beside_the_tokenizer(tmp_path: Path) -> None:
    model = small_model()
    report = prune_model(model, "magnitude", 0.5)
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    save_pruned(model, tmp_path / "out", report, tokenizer=small_tokenizer(), recipe="a: b\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w1 w99 x")["input_ids"] == [2, 100, 0]
    assert (tmp_path / "out" / "recipe.yaml").read_text() == "a: b\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    model = small_model()
    report = prune_model(model, "magnitude", 0.5)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "config.json").exists()
            raise error

    with pytest.raises(type(error)):
        save_pruned(model, tmp_path / "out", report, tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_never_writes_into_a_folder_with_something_in_it(tmp_path: Path) -> None:
    model = small_model()
    report = prune_model(model, "magnitude", 0.5)
    kept = write_words(tmp_path / "a.txt", 3)
    with pytest.raises(FileExistsError, match="out: expected a new or empty folder"):
        save_pruned(model, tmp_path, report)
    with pytest.raises(FileExistsError, match=r"out: expected a folder, got .* which is none"):
        save_pruned(model, kept, report)
    with pytest.raises(FileNotFoundError, match=r"out: the folder that .* is in does not exist"):
        save_pruned(model, tmp_path / "no" / "out", report)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = new_folder(tmp_path / "out")
    (folder.__enter__() / "ours").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    with pytest.raises(OSError, match="not empty"):
        folder.__exit__(None, None, None)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "theirs"]


def test_saves_models_of_transformers_only(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    report = prune_model(model, "magnitude", 0.5)
    with pytest.raises(TypeError, match="model: expected one with save_pretrained"):
        save_pruned(model, tmp_path / "out", report)
    assert list(tmp_path.iterdir()) == []
