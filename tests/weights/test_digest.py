"""Digests: equal for equal content however it is stored, different for anything else."""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from farms_fast.weights import digest as digests
from farms_fast.weights.digest import layer_digest_of, tensor_digest
from farms_fast.weights.formats import dequantise
from farms_fast.weights.formats.complex import (
    ComplexPairs,
    FactorisedTensor,
    RealAndImaginary,
    TensorTrainCore,
)
from farms_fast.weights.formats.lora import ApplyLoraUpdates, LoraUpdate
from farms_fast.weights.formats.reparametrised import Masked, SpectralNorm, WeightNorm
from farms_fast.weights.recipes import (
    AsStored,
    Computed,
    HeadRows,
    LeadingPositions,
    MergedDims,
    Recipe,
    Rows,
    TrailingPositions,
    recipe_id,
)
from farms_fast.weights.sources import Source, open_source
from farms_fast.weights.stacks import LayerSpec

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def by_definition(tensor: torch.Tensor, piece: int) -> str:
    """The digest, written down plainly."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    whole = tensor.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    total = hashlib.blake2b(f"tensor {dtype} {tuple(tensor.shape)}".encode(), digest_size=20)
    for start in range(0, len(whole), piece):
        total.update(hashlib.blake2b(whole[start : start + piece], digest_size=20).digest())
    return total.hexdigest()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.arange(12.0).view(3, 4).to(dtype)
    assert tensor_digest(tensor) == by_definition(tensor, digests._PIECE)


def test_digest_of_a_known_tensor_never_changes() -> None:
    """A digest that was written to disk has to be found again by later versions."""
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert tensor_digest(tensor) == KNOWN_TENSOR
    ((spec,), _) = open_source({"fc.weight": tensor}).layers()
    assert layer_digest_of(spec, [tensor]) == KNOWN_LAYER


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.permutations(range(4)),
    st.integers(1, 40),
    st.data(),
)
def test_strides_do_not_matter(
    shape: list[int], order: list[int], piece: int, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    piece *= 16
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    axes = [axis for axis in order if axis < len(shape)]
    back = sorted(range(len(axes)), key=axes.__getitem__)
    stored = tensor.permute(axes).contiguous().permute(back) if shape else tensor
    wide = torch.stack([tensor, tensor], -1)[..., 0]
    old = digests._PIECE
    digests._PIECE = piece
    try:
        for seen in (tensor, stored, wide, tensor.clone(), nn.Parameter(tensor)):
            assert tensor_digest(seen) == by_definition(tensor, piece)
    finally:
        digests._PIECE = old


def test_lazily_conjugated_tensor_is_digested_by_its_values() -> None:
    tensor = torch.randn(3, 4, dtype=torch.complex64)
    assert tensor_digest(tensor.conj()) == tensor_digest(tensor.conj().resolve_conj())
    assert tensor_digest(tensor.conj()) != tensor_digest(tensor)


def test_what_makes_a_difference() -> None:
    tensor = torch.zeros(4, 6)
    other = tensor.clone()
    other[3, 5] = -0.0
    seen = [tensor, other, tensor.view(6, 4), tensor.view(24), tensor.half(), tensor.int()]
    assert len({tensor_digest(t) for t in seen}) == len(seen)


def test_no_more_than_pieces_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed matrix is gathered piece by piece, never as a whole."""
    monkeypatch.setattr(digests, "_PIECE", 4096)
    sizes: list[int] = []
    take = digests._bytes

    def watched(run: torch.Tensor) -> memoryview:
        sizes.append(run.numel() * run.element_size())
        return take(run)

    monkeypatch.setattr(digests, "_bytes", watched)
    tensor = torch.randn(300, 200).T
    assert tensor_digest(tensor) == by_definition(tensor, 4096)
    assert max(sizes) <= 4096
    assert sum(sizes) == 240_000


@pytest.mark.parametrize("tensor", [torch.ones(3, 3, device="meta"), torch.eye(3).to_sparse()])
def test_tensor_without_plain_data_is_an_error(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tensor: expected .*dense"):
        tensor_digest(tensor)


# --- layers ---


def specs(model: object) -> tuple[Source, list[LayerSpec]]:
    source = open_source(model)  # type: ignore[arg-type]
    return source, source.layers()[0]


def layer_digest(source: Source, spec: LayerSpec) -> str:
    return layer_digest_of(spec, [source.load(name) for name in spec.tensors])


def test_layer_has_one_digest_wherever_it_is(tmp_path: Path) -> None:
    module = nn.ModuleDict({"fc": nn.Linear(4, 12), "qkv": nn.Linear(4, 12)})
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    torch.save(module.state_dict(), tmp_path / "m.pt")
    transposed = {
        name: t.mT.contiguous().mT if t.dim() == 2 else t for name, t in module.state_dict().items()
    }
    found = []
    files = (tmp_path / "m.safetensors", tmp_path / "m.pt")
    for place in (module, module.state_dict(), transposed, *files):
        source, layers = specs(place)
        found.append({layer.name: layer_digest(source, layer) for layer in layers})
        again = [pickle.loads(pickle.dumps(layer)) for layer in layers]
        for layer in again:
            loaded = [source.load(name) for name in layer.tensors]
            assert layer_digest_of(layer, loaded) == found[-1][layer.name]
    assert found[0] == found[1] == found[2] == found[3] == found[4]
    assert len(set(found[0].values())) == 4


def test_layer_of_another_name_or_making_has_another_digest() -> None:
    weight = torch.ones(4, 4, 3, 3)
    models = [
        {"a.weight": weight},
        {"b.weight": weight},
        nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, bias=False)}),
        nn.ModuleDict({"a": nn.ConvTranspose2d(4, 4, 3, bias=False)}),
        nn.ModuleDict({"a": nn.Conv2d(8, 4, 3, groups=2, bias=False)}),
    ]
    found = []
    for model in models:
        if isinstance(model, nn.Module):
            model.a.weight = nn.Parameter(weight)
        source, (layer,) = specs(model)
        found.append(layer_digest(source, layer))
    assert found[0] == found[2]
    assert len(set(found)) == 4


def test_part_of_a_fused_weight_depends_on_its_own_rows_alone() -> None:
    weight = torch.randn(12, 4)
    source, layers = specs({"qkv.weight": weight})
    before = [layer_digest(source, layer) for layer in layers]
    weight[5, 2] += 1
    after = [layer_digest(source, layer) for layer in layers]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_each_byte_of_a_fused_weight_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    take = digests._bytes

    def watched(run: torch.Tensor) -> memoryview:
        nonlocal count
        count += run.numel() * run.element_size()
        return take(run)

    monkeypatch.setattr(digests, "_bytes", watched)
    source, layers = specs({"a.qkv.weight": torch.randn(12, 4), "experts.w": torch.randn(3, 4, 4)})
    for layer in layers:
        layer_digest(source, layer)
    assert count == (48 + 48) * 4


def test_scale_of_a_quantised_weight_is_part_of_its_digest() -> None:
    weight, found = torch.randn(4, 6).to(torch.float8_e4m3fn), []
    for scale in (1.0, 2.0):
        tensors = {"fc.weight": weight, "fc.weight_scale": torch.tensor(scale)}
        source, (layer,) = specs(tensors)
        found.append(layer_digest(source, layer))
    assert found[0] != found[1]


def test_number_of_tensors_has_to_be_the_layers() -> None:
    _, (layer,) = specs({"fc.weight": torch.ones(4, 3)})
    with pytest.raises(ValueError, match="tensors: expected 1 for layer 'fc', got 2"):
        layer_digest_of(layer, [torch.ones(4, 3)] * 2)


# --- recipes ---

LAYOUT = dequantise.ScaleLayout((4, 1), (1, 8))
IDS = {
    Rows(0, 768): '{"count":768,"recipe":"rows/1","start":0,"step":1,"transposed":false}',
    Rows(1, 8, 2, True): '{"count":8,"recipe":"rows/1","start":1,"step":2,"transposed":true}',
    HeadRows("k", 2, 4): '{"groups":2,"queries":4,"recipe":"head-rows/1","role":"k"}',
    TrailingPositions(): '{"groups":1,"recipe":"trailing-positions/1","transposed":false}',
    AsStored(): '{"recipe":"as-stored/1"}',
    LeadingPositions(): '{"recipe":"leading-positions/1"}',
    MergedDims(2): '{"recipe":"merged-dims/1","rows":2}',
    WeightNorm(None): '{"dim":null,"recipe":"weight-norm/1"}',
    SpectralNorm((0, 1)): '{"dims":[0,1],"recipe":"spectral-norm/1"}',
    Masked(): '{"recipe":"masked/1"}',
    RealAndImaginary(): '{"recipe":"real-and-imaginary/1"}',
    ComplexPairs(joint=True): '{"joint":true,"recipe":"complex-pairs/1"}',
    FactorisedTensor("cp", ((1,), (3, 1), (4, 1))): (
        '{"joint":false,"kind":"cp","pairs":false,"recipe":"factorised-tensor/1",'
        '"shapes":[[1],[3,1],[4,1]]}'
    ),
    TensorTrainCore(): '{"pairs":false,"recipe":"tensor-train-core/1"}',
    dequantise.Scaled(): '{"layout":null,"recipe":"scaled/1"}',
    dequantise.Scaled(LAYOUT): '{"layout":{"blocks":[1,8],"view":[4,1]},"recipe":"scaled/1"}',
    dequantise.BitsAndBytesInt8(): '{"recipe":"bitsandbytes-int8/1"}',
    dequantise.GroupQuantised(4, 128, awq=False, zero_offset=1): (
        '{"awq":false,"bits":4,"group_size":128,"recipe":"group-quantised/1","zero_offset":1}'
    ),
    dequantise.Packed(8, LAYOUT): (
        '{"bits":8,"layout":{"blocks":[1,8],"view":[4,1]},"recipe":"packed/1"}'
    ),
    dequantise.Mxfp4(): '{"recipe":"mxfp4/1"}',
    ApplyLoraUpdates(dequantise.Mxfp4(), 2, (LoraUpdate(0.5), LoraUpdate(2.0, dora=True))): (
        '{"base":{"recipe":"mxfp4/1"},"base_tensors":2,"recipe":"lora/1","updates":['
        '{"dora":false,"scaling":0.5,"transposed":false},'
        '{"dora":true,"scaling":2.0,"transposed":false}]}'
    ),
    Computed(dequantise.Scaled(), Rows(0, 4)): (
        '{"recipe":"computed/1","stack":{"count":4,"recipe":"rows/1","start":0,"step":1,'
        '"transposed":false},"weight":{"layout":null,"recipe":"scaled/1"}}'
    ),
}


@pytest.mark.parametrize("recipe", IDS)
def test_recipe_ids_never_change(recipe: Recipe) -> None:
    """Another id computes every layer of a store anew: give the recipe's name a new number then."""
    assert recipe_id(recipe) == IDS[recipe]


def test_every_recipe_has_a_name_of_its_own() -> None:
    names = [recipe.recipe_name for recipe in Recipe.__subclasses__()]
    assert len(set(names)) == len(names)
    assert {recipe.recipe_name for recipe in IDS} == set(names)


def test_renamed_recipe_keeps_its_digests() -> None:
    class Lines(Rows, name=Rows.recipe_name):
        pass

    tensor = torch.randn(12, 4)
    layers = [plain_layer(recipe(4, 4)) for recipe in (Rows, Lines)]
    assert repr(layers[0].to_stack) != repr(layers[1].to_stack)
    assert layer_digest_of(layers[0], [tensor]) == layer_digest_of(layers[1], [tensor])


def plain_layer(to_stack: Callable[..., torch.Tensor]) -> LayerSpec:
    return LayerSpec("fc", "linear", ("fc",), (1, 4, 3), torch.float32, to_stack)


def test_making_that_is_a_plain_function_is_known_by_its_name() -> None:
    def as_stack(weight: torch.Tensor) -> torch.Tensor:
        return weight.unsqueeze(0)

    def another(weight: torch.Tensor) -> torch.Tensor:
        return weight.unsqueeze(0)

    ways = (as_stack, another, Computed(as_stack, AsStored()), Computed(another, AsStored()))
    found = {layer_digest_of(plain_layer(way), [torch.ones(4, 3)]) for way in ways}
    assert len(found) == len(ways)
    assert recipe_id(as_stack) == (
        f'{{"function":"{__name__}.test_making_that_is_a_plain_function_is_known_by_its_name'
        '.<locals>.as_stack"}'
    )


def test_callable_that_cannot_be_told_from_others_is_an_error() -> None:
    way = functools.partial(torch.unsqueeze, dim=0)
    with pytest.raises(TypeError, match="to_stack: expected a Recipe or a plain function"):
        layer_digest_of(plain_layer(way), [torch.ones(4, 3)])


KNOWN_TENSOR = "f3e71a1d64fbe45ded039c6b1abb985880f86d4f"
KNOWN_LAYER = "38a17166a531fe2037117b75fff248a98c47bbe5"
