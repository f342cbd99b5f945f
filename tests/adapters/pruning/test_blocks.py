"""Blocks are found by structure; what cannot be pruned is refused with a clear error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from farms_fast.adapters.pruning.blocks import find_blocks
from tests.support.language_models import CONTAINERS, FAMILIES, small_model


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def of_blocks(count: int = 3, **more: nn.Module) -> nn.Module:
    return nn.ModuleDict({"body": nn.ModuleList(Block() for _ in range(count)), **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_blocks_of_every_family(family: str) -> None:
    model = small_model(family)
    blocks = find_blocks(model)
    container = CONTAINERS.get(family, "model.layers")
    assert blocks.container == container
    assert [block.name for block in blocks.blocks] == [f"{container}.{n}" for n in range(3)]
    # Every matrix in the blocks is a linear layer's, and every other one is listed.
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1}
    pruned = {f"{layer.name}.weight" for layer in blocks.layers}
    assert pruned == {n for n in matrices if n.startswith(f"{container}.")}
    left = {f"{tensor.name}.weight" for tensor in blocks.skipped}
    assert left == matrices - pruned
    assert {tensor.reason for tensor in blocks.skipped} == {"outside of the repeated blocks"}
    for layer in blocks.layers:
        weight = model.get_parameter(f"{layer.name}.weight")
        assert layer.transposed == (family == "gpt2")
        assert layer.shape == tuple(weight.T.shape if layer.transposed else weight.shape)
        assert layer.matrix.data_ptr() == weight.data_ptr()


def test_takes_a_run_of_equal_modules_out_of_a_mixed_list() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), Block(), Block(), Block(), nn.Linear(8, 5))
    assert [block.name for block in find_blocks(model).blocks] == ["1", "2", "3"]


def test_takes_the_outer_list_of_nested_ones() -> None:
    experts = [nn.ModuleList(Block() for _ in range(6)) for _ in range(3)]
    body = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(8, 6), "experts": e}) for e in experts)
    found = find_blocks(nn.ModuleDict({"body": body}))
    assert found.container == "body"
    assert len(found.blocks) == 3
    assert len(found.layers) == 3 * (1 + 12)


def test_takes_the_list_with_most_of_the_weights() -> None:
    adapters = nn.ModuleList(nn.Sequential(nn.Linear(8, 2)) for _ in range(9))
    assert find_blocks(of_blocks(adapters=adapters)).container == "body"


def test_lists_matrices_of_blocks_that_are_no_linear_layers() -> None:
    model = of_blocks()
    for block in model["body"]:  # type: ignore[index]
        block.experts = nn.Parameter(torch.ones(4, 8, 8))
        block.attention = nn.MultiheadAttention(8, 2)
    skipped = {tensor.name: tensor.reason for tensor in find_blocks(model).skipped}
    assert skipped["body.0.experts"] == "3-D tensor, not the weight of a linear layer"
    assert "not the weight" in skipped["body.0.attention.in_proj_weight"]
    assert "calls" in skipped["body.0.attention.out_proj"]


def _shared_block() -> nn.Module:
    block = Block()
    return nn.ModuleList([block, block])


def _tied() -> nn.Module:
    model: Any = of_blocks()
    model.body[2].up.weight = model.body[0].up.weight
    return model  # type: ignore[no-any-return]


def _tied_to_embedding() -> nn.Module:
    model: Any = of_blocks(embed=nn.Embedding(16, 8))
    model.body[1].up.weight = model.embed.weight
    return model  # type: ignore[no-any-return]


def _quantised() -> nn.Module:
    model: Any = of_blocks()
    packed = torch.zeros(16, 8, dtype=torch.int8)
    model.body[1].up.weight = nn.Parameter(packed, requires_grad=False)
    return model  # type: ignore[no-any-return]


def _packed() -> nn.Module:
    model: Any = of_blocks()
    model.body[1].up = nn.Module()
    model.body[1].up.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
    return model  # type: ignore[no-any-return]


def _quantised_by_torch(make: Callable[[Any], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give its own formats up
        return make(of_blocks())


def _dynamic() -> nn.Module:
    # One layer of a block: the others would be pruned as if it were not there.
    quantise: Any = torch.ao.quantization.quantize_dynamic
    return _quantised_by_torch(lambda model: quantise(model, {"body.1.up"}))


def _static() -> nn.Module:
    def exchange(model: Any) -> nn.Module:
        model.body[1].up = torch.ao.nn.quantized.Linear(8, 16)
        return model  # type: ignore[no-any-return]

    return _quantised_by_torch(exchange)


def _meta() -> nn.Module:
    model: Any = of_blocks()
    model.body[1].to("meta")
    return model  # type: ignore[no-any-return]


def _parametrised() -> nn.Module:
    model: Any = of_blocks()
    parametrizations.weight_norm(model.body[1].up)
    return model  # type: ignore[no-any-return]


def _adapted() -> nn.Module:
    model: Any = of_blocks()
    model.body[1].up.lora_A = nn.ModuleDict()
    return model  # type: ignore[no-any-return]


def _sparse() -> nn.Module:
    model: Any = of_blocks()
    model.body[1].up.weight = nn.Parameter(torch.ones(16, 8).to_sparse())
    return model  # type: ignore[no-any-return]


def _encoder_with_decoder() -> nn.Module:
    model: Any = of_blocks()
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "repeated blocks"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "found none in Sequential"),
        (lambda: nn.Linear(4, 4), "found none in Linear"),
        (lambda: of_blocks(1), "repeated blocks"),
        (
            lambda: of_blocks(other=nn.ModuleList(Block() for _ in range(3))),
            "several with less than half each: body (768 weights), other (768 weights)",
        ),
        (_shared_block, "layer '0.up' shares its weight with '1.up.weight'"),
        (_tied, "layer 'body.0.up' shares its weight with 'body.2.up.weight'"),
        (_tied_to_embedding, "layer 'body.1.up' shares its weight with 'embed.weight'"),
        (_quantised, "layer 'body.1.up' is quantised (dtype int8)"),
        (_packed, "layer 'body.1.up' is quantised (it has 'qweight')"),
        (_dynamic, "layer 'body.1.up' is quantised (a Linear of torch.ao.nn.quantized.dynamic"),
        (_static, "layer 'body.1.up' is quantised (a Linear of torch.ao.nn.quantized.modules"),
        (_meta, "layer 'body.1.up' is on the meta device"),
        (_parametrised, "layer 'body.1.up' is computed from other tensors"),
        (_adapted, "layer 'body.1.up' has an adapter"),
        (_sparse, "layer 'body.1.up' has the layout sparse_coo"),
        (_encoder_with_decoder, "an encoder with a decoder"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(make())


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        find_blocks({})  # type: ignore[arg-type]
