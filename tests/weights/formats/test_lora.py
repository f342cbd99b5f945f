"""LoRA adapters as PEFT writes them, on bases of every kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from farms_fast.weights.formats.lora import Adapter
from farms_fast.weights.sources import AdapterSource, open_source
from farms_fast.weights.stacks import TensorHeader
from tests.support.layer_tables import reasons

ROOT = "base_model.model."
BASE = {
    "model.embed.weight": torch.randn(9, 6),
    "model.q.weight": torch.randn(6, 6),
    "model.up.weight": torch.randn(12, 6).bfloat16(),
    "model.conv.weight": torch.randn(5, 4, 3, 3),
    "score.weight": torch.randn(3, 6),
}


def pair(target: str, out: int, inputs: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{ROOT}{target}.lora_A.weight": torch.randn(rank, inputs),
        f"{ROOT}{target}.lora_B.weight": torch.randn(out, rank),
    }


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def stacks(source: AdapterSource, **patterns: object) -> dict[str, torch.Tensor]:
    layers, _ = source.layers(**patterns)
    found = {}
    for layer in layers:
        found[layer.name] = layer.to_stack(*map(source.load, layer.tensors))
        assert found[layer.name].shape == layer.shape
        assert found[layer.name].dtype == layer.dtype
    return found


def product(tensors: Mapping[str, torch.Tensor], target: str) -> torch.Tensor:
    a, b = (tensors[f"{ROOT}{target}.lora_{what}.weight"] for what in "AB")
    return b.double().flatten(1) @ a.double().flatten(1)


def nearly(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether it is what float64 gives, rounded once."""
    return torch.equal(found, expected.to(found.dtype))


@pytest.fixture(params=["mapping", "module", "folder", "pickle", "config"])
def opened(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Opens an adapter on BASE, given in several ways."""

    def open_on_base(tensors: Mapping[str, torch.Tensor], **config: object) -> AdapterSource:
        base: object = BASE
        if request.param == "module":
            base = nn.Module()
            base.model = nn.Module()
            base.score = nn.Linear(6, 3, bias=False)
            base.model.embed = nn.Embedding(9, 6)
            base.model.q = nn.Linear(6, 6, bias=False)
            base.model.up = nn.Linear(6, 12, bias=False, dtype=torch.bfloat16)
            base.model.conv = nn.Conv2d(4, 5, 3, bias=False)
            base.load_state_dict(BASE)
        elif request.param in ("folder", "config"):
            base = tmp_path / "base"
            base.mkdir()
            save_file(BASE, base / "model.safetensors")
        elif request.param == "pickle":
            base = tmp_path / "base.bin"
            torch.save(BASE, base)
        if request.param == "config":
            adapter = write(tmp_path / "a", tensors, **config, base_model_name_or_path=str(base))
            source = open_source(adapter)
        else:
            source = open_source(write(tmp_path / "a", tensors, **config), base=base)
        assert isinstance(source, AdapterSource)
        return source

    return open_on_base


# --- values ---


def test_weights_are_those_in_effect(opened) -> None:  # type: ignore[no-untyped-def]
    tensors = {**pair("model.q", 6, 6), **pair("model.up", 12, 6)}
    before = {name: tensor.clone() for name, tensor in BASE.items()}
    source = opened(tensors)
    found = stacks(source)
    assert set(found) == {"model.q", "model.up", "model.conv", "score"}
    for target in ("model.q", "model.up"):
        expected = BASE[f"{target}.weight"].double() + 8 / 2 * product(tensors, target)
        assert nearly(found[target][0], expected)
        assert found[target].dtype == torch.float32
    assert torch.equal(found["score"][0], BASE["score.weight"])
    assert all(torch.equal(BASE[name], before[name]) for name in BASE)


def test_float64_base_stays_float64(tmp_path: Path) -> None:
    tensors = pair("q", 6, 6)
    base = {"q.weight": torch.randn(6, 6, dtype=torch.float64)}
    found = stacks(open_source(write(tmp_path, tensors), base=base))["q"]
    assert found.dtype == torch.float64
    assert torch.allclose(found[0], base["q.weight"] + 4 * product(tensors, "q"), rtol=1e-14)


def test_large_weight_is_updated_in_all_its_rows(tmp_path: Path) -> None:
    tensors = pair("q", 1100, 6)
    base = {"q.weight": torch.randn(1100, 6)}
    found = stacks(open_source(write(tmp_path, tensors), base=base))["q"][0]
    assert torch.allclose(found.double(), base["q.weight"] + 4 * product(tensors, "q"), atol=1e-5)


def test_rank_stabilised_scaling(opened) -> None:  # type: ignore[no-untyped-def]
    tensors = pair("model.q", 6, 6)
    found = stacks(opened(tensors, use_rslora=True))["model.q"][0]
    assert nearly(found, BASE["model.q.weight"] + 8 / math.sqrt(2) * product(tensors, "model.q"))


def test_ranks_and_alphas_by_pattern(opened) -> None:  # type: ignore[no-untyped-def]
    tensors = {**pair("model.q", 6, 6), **pair("model.up", 12, 6, rank=3)}
    found = stacks(opened(tensors, rank_pattern={"up": 3}, alpha_pattern={"mod.*q": 5, "q": 6}))
    assert nearly(found["model.q"][0], BASE["model.q.weight"] + 5 / 2 * product(tensors, "model.q"))
    assert nearly(
        found["model.up"][0],
        BASE["model.up.weight"].double() + 8 / 3 * product(tensors, "model.up"),
    )


def test_convolution(opened) -> None:  # type: ignore[no-untyped-def]
    a, b = torch.randn(2, 4, 3, 3), torch.randn(5, 2, 1, 1)
    tensors = {f"{ROOT}model.conv.lora_A.weight": a, f"{ROOT}model.conv.lora_B.weight": b}
    found = stacks(opened(tensors))["model.conv"]
    delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0].double(), a.double())
    kernel = BASE["model.conv.weight"] + 4 * delta
    for position in range(9):
        assert torch.allclose(
            found[position].double(), kernel[:, :, position // 3, position % 3], atol=1e-5
        )


def test_embedding(opened) -> None:  # type: ignore[no-untyped-def]
    a, b = torch.randn(2, 9), torch.randn(6, 2)
    tensors = {f"{ROOT}model.embed.lora_embedding_{k}": v for k, v in (("A", a), ("B", b))}
    found = stacks(opened(tensors), include="model.embed")["model.embed"][0]
    assert nearly(found, BASE["model.embed.weight"] + 4 * (b.double() @ a.double()).T)


@pytest.mark.parametrize("stored_in_by_out", [False, True])
def test_dora_gives_each_row_its_length(tmp_path: Path, stored_in_by_out: bool) -> None:
    tensors = pair("q", 6, 6)
    tensors[f"{ROOT}q.lora_magnitude_vector"] = torch.rand(6) + 0.5
    base = {"q.weight": torch.randn(6, 6)}
    adapter = write(tmp_path, tensors, use_dora=True, fan_in_fan_out=stored_in_by_out)
    found = stacks(open_source(adapter, base=base))["q"][0]
    weight = base["q.weight"].T if stored_in_by_out else base["q.weight"]
    direction = weight.double() + 4 * product(tensors, "q")
    length = tensors[f"{ROOT}q.lora_magnitude_vector"].double()
    expected = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
    found = found.T if stored_in_by_out else found
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert torch.allclose(found.double().norm(dim=1), length)


def test_dora_of_a_large_weight(tmp_path: Path) -> None:
    tensors = pair("q", 1100, 6)
    tensors[f"{ROOT}q.lora_magnitude_vector"] = torch.rand(1100) + 0.5
    base = {"q.weight": torch.randn(1100, 6)}
    found = stacks(open_source(write(tmp_path, tensors, use_dora=True), base=base))["q"][0]
    assert torch.allclose(found.norm(dim=1), tensors[f"{ROOT}q.lora_magnitude_vector"])


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_weight_stored_in_by_out(tmp_path: Path, fan_in_fan_out: bool) -> None:
    """A square weight goes by the config, another one by its shape."""
    tensors = {**pair("c_attn", 12, 4), **pair("c_proj", 4, 4)}
    base = {"c_attn.weight": torch.randn(4, 12), "c_proj.weight": torch.randn(4, 4)}
    source = open_source(write(tmp_path, tensors, fan_in_fan_out=fan_in_fan_out), base=base)
    found = stacks(source)
    fused = base["c_attn.weight"].T + 4 * product(tensors, "c_attn")
    assert nearly(torch.cat([found[f"c_attn.{role}"][0] for role in "qkv"]), fused)
    update = 4 * product(tensors, "c_proj")
    proj = base["c_proj.weight"] + (update.T if fan_in_fan_out else update)
    assert nearly(found["c_proj"][0], proj.T)  # c_attn shows that the model stores (in, out)


def test_quantised_base(tmp_path: Path) -> None:
    tensors = pair("q", 6, 6)
    weight = torch.randn(6, 6).to(torch.float8_e4m3fn)
    base = {"q.weight": weight, "q.weight_scale": torch.tensor(0.5)}
    found = stacks(open_source(write(tmp_path, tensors), base=base))["q"][0]
    assert nearly(found, weight.double() / 2 + 4 * product(tensors, "q"))


def test_modules_to_save_take_the_place_of_the_base(opened) -> None:  # type: ignore[no-untyped-def]
    saved = torch.randn(3, 6)
    tensors = {**pair("model.q", 6, 6), f"{ROOT}score.weight": saved}
    assert torch.equal(stacks(opened(tensors))["score"][0], saved)


def test_modules_to_save_may_be_new_or_larger(opened) -> None:  # type: ignore[no-untyped-def]
    tensors = {
        **pair("model.q", 6, 6),
        f"{ROOT}model.embed.base_layer.weight": torch.randn(11, 6),
        f"{ROOT}classifier.weight": torch.randn(4, 6),
        f"{ROOT}classifier.bias": torch.randn(4),
    }
    source = opened(tensors)
    found = stacks(source, include=["model.embed", "classifier"])
    assert torch.equal(found["model.embed"][0], tensors[f"{ROOT}model.embed.base_layer.weight"])
    assert torch.equal(found["classifier"][0], tensors[f"{ROOT}classifier.weight"])
    assert reasons(source.layers())["classifier.bias"] == "vector, not a matrix"


def test_names_of_the_base_may_lack_a_prefix_or_have_one_more(tmp_path: Path) -> None:
    tensors = pair("transformer.h.0.q", 6, 6)
    adapter = write(tmp_path, tensors)
    weight = torch.randn(6, 6)
    for name in ("h.0.q", "model.transformer.h.0.q"):
        found = stacks(open_source(adapter, base={f"{name}.weight": weight, "o.weight": weight}))
        assert nearly(found[name][0], weight + 4 * product(tensors, "transformer.h.0.q"))
        assert torch.equal(found["o"][0], weight)


def test_tensors_of_a_named_adapter_in_a_pickle(tmp_path: Path) -> None:
    tensors = pair("q", 6, 6)
    named = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    write(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(named, tmp_path / "adapter_model.bin")
    base = {"q.weight": torch.randn(6, 6)}
    found = stacks(open_source(tmp_path, base=base))["q"][0]
    assert nearly(found, base["q.weight"] + 4 * product(tensors, "q"))


def test_adapter_by_the_path_of_its_file_is_its_factors(tmp_path: Path) -> None:
    tensors = pair("q", 6, 5)
    write(tmp_path, tensors)
    layers, _ = open_source(tmp_path / "adapter_model.safetensors").layers()
    assert [(layer.name, layer.shape) for layer in layers] == [
        (f"{ROOT}q.lora_A", (1, 2, 5)),
        (f"{ROOT}q.lora_B", (1, 6, 2)),
    ]


# --- what cannot be applied ---


def test_target_that_the_base_lacks_is_listed(opened) -> None:  # type: ignore[no-untyped-def]
    source = opened({**pair("model.q", 6, 6), **pair("model.gone", 6, 6)})
    why = reasons(source.layers())
    assert why["model.gone"] == "LoRA update of a weight that the base does not have"
    assert "model.q" in stacks(source)


def test_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, pair("gone", 6, 6)), base=BASE)
    with pytest.raises(ValueError, match=r"got none among 1 .*'gone.weight'"):
        source.layers()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({f"{ROOT}q.lora_B.weight": torch.ones(7, 2)}, r"B (7, 2) do not make a (6, 6)"),
        ({f"{ROOT}q.lora_B.weight": None}, "it has no lora_B"),
        ({f"{ROOT}q.lora_magnitude_vector": torch.ones(5)}, "a magnitude of shape (5,) for 6 rows"),
        ({f"{ROOT}q.lora_E": torch.ones(2, 1)}, "lora_E is not understood"),
        ({f"{ROOT}q.lora_B.weight": torch.ones(6, 2, dtype=torch.complex64)}, "complex numbers"),
    ],
)
def test_update_that_does_not_fit_is_listed_and_its_weight_not_analysed(
    tmp_path: Path, change: dict[str, torch.Tensor | None], what: str
) -> None:
    tensors = {k: v for k, v in {**pair("q", 6, 6), **change}.items() if v is not None}
    base = {"q.weight": torch.ones(6, 6), "o.weight": torch.ones(6, 6)}
    source = open_source(write(tmp_path, tensors), base=base)
    assert set(stacks(source)) == {"o"}
    assert what in reasons(source.layers())["q"]


def test_update_of_a_weight_that_is_not_read_is_listed_with_that_reason(tmp_path: Path) -> None:
    base = {
        "q.weight": torch.zeros(18, 1, dtype=torch.uint8),
        "q.weight.absmax": torch.ones(1),
        "q.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }
    source = open_source(write(tmp_path, pair("q", 6, 6)), base=base)
    assert stacks(source) == {}
    assert "bitsandbytes nf4" in reasons(source.layers())["q"]


def test_dora_of_an_embedding_is_listed(tmp_path: Path) -> None:
    tensors = {
        f"{ROOT}e.lora_embedding_A": torch.ones(2, 9),
        f"{ROOT}e.lora_embedding_B": torch.ones(6, 2),
        f"{ROOT}e.lora_magnitude_vector": torch.ones(6),
    }
    source = open_source(write(tmp_path, tensors), base={"e.weight": torch.ones(9, 6)})
    assert "DoRA of an embedding" in reasons(source.layers())["e"]


def test_parameters_with_an_update_are_listed(tmp_path: Path) -> None:
    tensors = {**pair("q", 6, 6), **pair("mlp.experts", 12, 6)}
    base = {"q.weight": torch.ones(6, 6), "mlp.experts.w": torch.ones(3, 6, 6)}
    adapter = write(tmp_path, tensors, target_parameters=["experts.w"])
    source = open_source(adapter, base=base)
    assert set(stacks(source)) == {"q"}
    assert "parameter with a LoRA update" in reasons(source.layers())["mlp.experts.w"]


def test_biases_of_an_adapter_are_listed(tmp_path: Path) -> None:
    tensors = {**pair("q", 6, 6), f"{ROOT}q.lora_B.bias": torch.ones(6)}
    source = open_source(write(tmp_path, tensors), base={"q.weight": torch.ones(6, 6)})
    assert reasons(source.layers()) == {f"{ROOT}q.lora_B.bias": "vector, not a matrix"}


# --- errors ---


@pytest.mark.parametrize("named", [None, "", "org/model", 7])
def test_adapter_without_a_base_is_an_error(tmp_path: Path, named: object) -> None:
    adapter = write(tmp_path, pair("q", 6, 6), base_model_name_or_path=named)
    with pytest.raises(ValueError, match="expected the base of this adapter"):
        open_source(adapter)


def test_base_that_is_an_adapter_is_an_error(tmp_path: Path) -> None:
    adapter = write(tmp_path, pair("q", 6, 6))
    with pytest.raises(ValueError, match=r"base: expected a model, got .*adapter"):
        open_source(adapter, base=adapter)


@pytest.mark.parametrize("base", [3, [], "gone", ""])
def test_base_that_is_no_model_is_an_error(tmp_path: Path, base: object) -> None:
    adapter = write(tmp_path, pair("q", 6, 6))
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match="base: expected a"):
        open_source(adapter, base=base)


@pytest.mark.parametrize("model", [BASE, nn.Linear(3, 3)])
def test_base_for_what_is_no_adapter_is_an_error(model: object) -> None:
    with pytest.raises(ValueError, match="base: expected None"):
        open_source(model, base=BASE)


def test_folder_with_a_config_alone_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors or adapter_model.bin"):
        open_source(tmp_path, base=BASE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "expected an adapter of peft_type 'LORA', got 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "which has changed its base"),
        ({"init_lora_weights": "olora"}, "which has changed its base"),
        ({"layer_replication": [[0, 4]]}, "expected no layer_replication"),
        ({"lora_alpha": "8"}, "expected a number as lora_alpha, got '8'"),
        ({"r": 4}, r"lora_A.weight: expected rank 4 as in the config, got shape \(2, 6\)"),
        ({"alpha_pattern": {"(": 3}}, r"expected a regular expression in alpha_pattern, got '\('"),
    ],
)
def test_config_that_cannot_be_followed_is_an_error(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    adapter = write(tmp_path, pair("q", 6, 6), **config)
    with pytest.raises(ValueError, match=message):
        open_source(adapter, base={"q.weight": torch.ones(6, 6)}).layers()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 2, "r": 3}'])
def test_broken_config_is_an_error(tmp_path: Path, text: str) -> None:
    write(tmp_path, pair("q", 6, 6))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json: expected (a JSON|each name once)"):
        open_source(tmp_path, base=BASE)


def test_two_adapters_in_one_file_are_an_error() -> None:
    headers = [
        TensorHeader(f"q.lora_A.{name}.weight", (2, 6), torch.float32) for name in ("one", "two")
    ]
    with pytest.raises(ValueError, match=r"expected .*one adapter, got 2: one, two"):
        Adapter({"r": 2, "lora_alpha": 8}, headers, "here")
