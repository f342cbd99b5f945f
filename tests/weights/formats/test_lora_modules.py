"""LoRA layers in modules, told by their structure: made here as PEFT makes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from farms_fast.weights.layers import layers_from_module
from farms_fast.weights.sources import open_source
from tests.support.layer_tables import by_module, reasons


class Factors(nn.Module):
    """What all wrapped layers have."""

    def __init__(self, base_layer: nn.Module, *, fan_in_fan_out: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_variant: dict[str, object] = {}
        self.fan_in_fan_out = fan_in_fan_out
        self.merged = False
        self.disable_adapters = False
        self.active_adapters: list[str] = []

    def add(self, name: str, rank: int, scaling: float, *, dora: bool = False) -> None:
        base = self.base_layer
        if isinstance(base, nn.Embedding):
            self.lora_embedding_A[name] = nn.Parameter(torch.randn(rank, base.num_embeddings))
            self.lora_embedding_B[name] = nn.Parameter(torch.randn(base.embedding_dim, rank))
        elif isinstance(base, nn.Conv2d):
            self.lora_A[name] = nn.Conv2d(base.in_channels, rank, base.kernel_size, bias=False)
            self.lora_B[name] = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.lora_A[name] = nn.Linear(base.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, base.out_features, bias=False)
        if dora:
            self.lora_magnitude_vector[name] = nn.Linear(1, 1, bias=False)
            self.lora_magnitude_vector[name].weight = nn.Parameter(torch.rand(base.out_features))
            self.lora_variant[name] = object()
        self.scaling[name] = scaling
        self.use_dora[name] = dora
        self.active_adapters.append(name)

    def update(self, name: str) -> torch.Tensor:
        a, b = self.lora_A[name].weight.double(), self.lora_B[name].weight.double()
        return self.scaling[name] * b.flatten(1) @ a.flatten(1)


class Copies(nn.Module):
    """A module that is trained as a whole."""

    def __init__(self, original: nn.Module, **copies: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict(copies)
        self.active_adapter = "default"
        self.disable_adapters = False


class Parameters(Factors):
    """A wrapper of one parameter."""

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name


def model(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"block": nn.ModuleDict(layers)})


def wrapped(rank: int = 2, **options: bool) -> Factors:
    layer = Factors(nn.Linear(5, 7))
    layer.add("default", rank, 1.5, **options)
    return layer


def stack(module: nn.Module, name: str) -> torch.Tensor:
    source = open_source(module)
    ((layer,), _) = source.layers(include=name)
    found = layer.to_stack(*map(source.load, layer.tensors))
    assert found.shape == layer.shape
    assert found.dtype == layer.dtype
    return found


def nearly(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


def test_layer_is_named_and_shaped_as_if_it_were_not_wrapped() -> None:
    layer = wrapped()
    module = model(q=layer, o=nn.Linear(5, 7))
    found = layers_from_module(module)
    assert [(spec.name, spec.kind, spec.shape) for spec in found[0]] == [
        ("block.q", "linear", (1, 7, 5)),
        ("block.o", "linear", (1, 7, 5)),
    ]
    assert found[0][0].tensors == (
        "block.q.base_layer.weight",
        "block.q.lora_A.default.weight",
        "block.q.lora_B.default.weight",
    )
    assert reasons(found) == {
        "block.q.bias": "vector, not a matrix",
        "block.q.lora_A.default": "part of the LoRA update of block.q",
        "block.q.lora_B.default": "part of the LoRA update of block.q",
        "block.o.bias": "vector, not a matrix",
    }
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = layer.base_layer.weight + layer.update("default")
    assert nearly(stack(module, "block.q")[0], expected)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_wrapped_layer_alone() -> None:
    layer = wrapped()
    assert nearly(stack(layer, "weight")[0], layer.base_layer.weight + layer.update("default"))


def test_all_active_adapters_count_and_no_other() -> None:
    layer = wrapped()
    layer.add("two", 3, 0.5)
    module = model(q=layer)
    base = layer.base_layer.weight
    assert nearly(stack(module, "block.q")[0], base + layer.update("default") + layer.update("two"))
    layer.active_adapters = ["two", "of other layers"]
    assert nearly(stack(module, "block.q")[0], base + layer.update("two"))


@pytest.mark.parametrize("switch", ["merged", "disable_adapters"])
def test_merged_or_disabled_adapters_do_not_count(switch: str) -> None:
    layer = wrapped()
    setattr(layer, switch, True)
    assert torch.equal(stack(model(q=layer), "block.q")[0], layer.base_layer.weight)


def test_bfloat16_base_is_summed_in_float32() -> None:
    layer = Factors(nn.Linear(5, 7, dtype=torch.bfloat16))
    layer.add("default", 2, 1.5)
    found = stack(model(q=layer), "block.q")[0]
    assert found.dtype == torch.float32
    assert nearly(found, layer.base_layer.weight.double() + layer.update("default"))


def test_dora() -> None:
    layer = wrapped(dora=True)
    direction = (layer.base_layer.weight + layer.update("default")).double()
    length = layer.lora_magnitude_vector["default"].weight.double()
    expected = direction * (length / direction.norm(dim=1)).unsqueeze(1)
    assert nearly(stack(model(q=layer), "block.q")[0], expected)


def test_convolution_keeps_its_groups_and_kind() -> None:
    layer = Factors(nn.Conv2d(4, 6, 3))
    layer.add("default", 2, 1.5)
    module = model(c=layer)
    ((spec,), _) = layers_from_module(module)
    assert (spec.kind, spec.shape) == ("conv2d", (9, 6, 4))
    kernel = layer.base_layer.weight + layer.update("default").view(6, 4, 3, 3)
    assert nearly(stack(module, "block.c"), kernel.flatten(2).permute(2, 0, 1))


def test_update_of_a_grouped_convolution_is_listed() -> None:
    layer = Factors(nn.Conv2d(4, 6, 3, groups=2))
    layer.add("default", 2, 1.5)
    layers, skipped = layers_from_module(model(c=layer))
    assert layers == []
    assert "do not make a (6, 2, 3, 3)" in reasons((layers, skipped))["block.c"]


def test_embedding() -> None:
    layer = Factors(nn.Embedding(9, 4))
    layer.add("default", 2, 1.5)
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    expected = layer.base_layer.weight + 1.5 * (b @ a).T
    assert nearly(stack(model(e=layer), "block.e")[0], expected)
    assert "include='block.e'" in reasons(layers_from_module(model(e=layer)))["block.e"]


def test_fused_projection_is_split_after_the_update() -> None:
    layer = Factors(nn.Linear(4, 12))
    layer.add("default", 2, 1.5)
    expected = layer.base_layer.weight + layer.update("default")
    module = model(qkv=layer)
    for i, role in enumerate("qkv"):
        assert nearly(stack(module, f"block.qkv.{role}")[0], expected[4 * i : 4 * i + 4])


def test_variant_that_is_not_understood_is_listed() -> None:
    layer = wrapped()
    layer.lora_variant["default"] = nn.Identity()
    layers, skipped = layers_from_module(model(q=layer))
    assert layers == []
    assert "Identity is not understood" in reasons((layers, skipped))["block.q"]


def test_module_that_was_trained_as_a_whole() -> None:
    trained = nn.Linear(5, 7)
    copies = Copies(nn.Linear(5, 7), default=trained, other=nn.Linear(5, 7))
    module = model(head=copies)
    assert list(by_module(module)) == ["block.head"]
    assert torch.equal(stack(module, "block.head")[0], trained.weight)
    why = reasons(layers_from_module(module))
    used = "not in use: block.head.modules_to_save.default is"
    assert why["block.head.original_module"] == used
    assert why["block.head.modules_to_save.other"] == used
    copies.disable_adapters = True
    assert torch.equal(stack(module, "block.head")[0], copies.original_module.weight)


def test_updated_parameter_is_listed_and_the_others_analysed() -> None:
    experts = nn.Module()
    experts.w = nn.Parameter(torch.randn(3, 4, 4))
    experts.v = nn.Parameter(torch.randn(3, 4, 4))
    layer = Parameters(experts, "w")
    layer.lora_A["default"] = nn.Linear(4, 6, bias=False)
    layer.lora_B["default"] = nn.Linear(6, 4, bias=False)
    layer.active_adapters.append("default")
    layers, skipped = layers_from_module(model(experts=layer))
    assert [spec.name for spec in layers] == ["block.experts.v"]
    assert "parameter with a LoRA update" in reasons((layers, skipped))["block.experts.w"]


def test_model_whose_adapters_are_a_method_is_no_wrapper() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(5, 7)

        def active_adapters(self) -> list[str]:
            raise AssertionError

    assert list(by_module(Model())) == ["q"]


def test_config_of_a_model_splits_its_projections() -> None:
    class Config:
        def to_dict(self) -> dict[str, object]:
            return {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}

    module = model(qkv_proj=nn.Linear(10, 24))
    assert list(by_module(module)) == ["block.qkv_proj"]
    module.config = Config()  # type: ignore[assignment]
    assert [math.prod(spec.shape) for spec in by_module(module).values()] == [120, 60, 60]
