"""Layers from modules and from headers: which there are, and what their stacks hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from farms_fast.layers import (
    LayerSpec,
    Skipped,
    TensorHeader,
    layers_from_headers,
    layers_from_module,
    module_tensor,
)


def header(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorHeader:
    return TensorHeader(name, shape, dtype)


def by_header(*headers: TensorHeader, **patterns: object) -> dict[str, LayerSpec]:
    layers, _ = layers_from_headers(headers, **patterns)
    return {layer.name: layer for layer in layers}


def by_module(module: nn.Module, **patterns: object) -> dict[str, LayerSpec]:
    layers, _ = layers_from_module(module, **patterns)
    return {layer.name: layer for layer in layers}


def reasons(found: tuple[list[LayerSpec], list[Skipped]]) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in found[1]}


def stack_of(module: nn.Module, layer: LayerSpec) -> torch.Tensor:
    """The layer's stack, checked against what the plan promised and for aliasing."""
    tensors = [module_tensor(module, name) for name in layer.tensors]
    before = [tensor.clone() for tensor in tensors]
    stack = layer.to_stack(*tensors)
    assert stack.shape == layer.shape
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    return stack


def shares_memory(stack: torch.Tensor, tensor: torch.Tensor) -> bool:
    return stack.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


# --- modules, each against an explicit loop ---


def test_linear_is_a_view_of_the_weight() -> None:
    module = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    found = by_module(module)
    assert list(found) == ["0", "2"]
    assert found["0"] == LayerSpec(
        "0", "linear", ("0.weight",), (1, 3, 5), torch.float32, found["0"].to_stack
    )
    stack = stack_of(module, found["0"])
    assert torch.equal(stack[0], module[0].weight)
    assert shares_memory(stack, module[0].weight)


def test_root_module_without_a_name_is_named_after_its_tensor() -> None:
    assert list(by_module(nn.Linear(5, 3))) == ["weight"]


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("conv1d", nn.Conv1d(4, 6, 5)),
        ("conv2d", nn.Conv2d(4, 6, (3, 2))),
        ("conv3d", nn.Conv3d(4, 6, (3, 2, 4))),
    ],
)
def test_convolution_gives_one_out_by_in_view_for_each_position(
    kind: str, module: nn.Module
) -> None:
    (layer,) = by_module(module).values()
    positions = module.weight[0, 0].numel()
    assert (layer.kind, layer.shape) == (kind, (positions, 6, 4))
    stack = stack_of(module, layer)
    assert shares_memory(stack, module.weight)
    for s, position in enumerate(torch.cartesian_prod(*map(torch.arange, module.kernel_size))):
        place = tuple(torch.atleast_1d(position).tolist())
        for out in range(6):
            for inp in range(4):
                assert stack[s, out, inp] == module.weight[(out, inp, *place)]


def test_channels_last_convolution_is_a_view_with_the_same_values() -> None:
    module = nn.Conv2d(4, 6, 3)
    (layer,) = by_module(module).values()
    expected = stack_of(module, layer).clone()
    module.to(memory_format=torch.channels_last)
    stack = stack_of(module, layer)
    assert torch.equal(stack, expected)
    assert shares_memory(stack, module.weight)


@pytest.mark.parametrize("kernel", [1, 3])
def test_grouped_convolution_gives_one_matrix_for_each_group_and_position(kernel: int) -> None:
    module = nn.Conv2d(6, 9, kernel, groups=3)
    (layer,) = by_module(module).values()
    assert layer.shape == (3 * kernel * kernel, 3, 2)
    stack = stack_of(module, layer)
    assert shares_memory(stack, module.weight) == (kernel == 1)  # else no stride fits
    s = 0
    for group in range(3):
        for y in range(kernel):
            for x in range(kernel):
                assert torch.equal(stack[s], module.weight[3 * group : 3 * group + 3, :, y, x])
                s += 1


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_gives_out_by_in(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    (layer,) = by_module(module).values()
    assert layer.kind == "conv_transpose2d"
    assert layer.shape == (6 * groups, 6 // groups, 4 // groups)
    stack = stack_of(module, layer)
    ins = 4 // groups
    for group in range(groups):
        for position in range(6):
            block = module.weight[group * ins : (group + 1) * ins, :, position // 3, position % 3]
            assert torch.equal(stack[group * 6 + position], block.T)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv1d(8, 8, 5, groups=8),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
        nn.Conv2d(1, 16, 3),
    ],
)
def test_depthwise_and_single_channel_kernels_are_skipped(module: nn.Module) -> None:
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert skipped[0].shape == tuple(module.weight.shape)
    assert "depthwise or single-channel" in skipped[0].reason


def test_one_row_matrix_is_skipped() -> None:
    layers, skipped = layers_from_module(nn.Sequential(nn.Linear(5, 1)))
    assert layers == []
    assert skipped[0].reason == "a 1 x 5 matrix has one singular value, no spectrum"


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: a linear layer with its weight stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def test_hugging_face_conv1d_is_a_transposed_view() -> None:
    module = nn.ModuleDict({"c_fc": Conv1D(12, 4)})
    layer = by_module(module)["c_fc"]
    assert (layer.kind, layer.shape) == ("linear", (1, 12, 4))
    stack = stack_of(module, layer)
    assert torch.equal(stack[0], module["c_fc"].weight.T)
    assert shares_memory(stack, module["c_fc"].weight)


def test_hugging_face_fused_attention_is_split_after_transposing() -> None:
    module = nn.ModuleDict({"c_attn": Conv1D(12, 4)})
    found = by_module(module)
    assert list(found) == ["c_attn.q", "c_attn.k", "c_attn.v"]
    for i, layer in enumerate(found.values()):
        stack = stack_of(module, layer)
        assert torch.equal(stack[0], module["c_attn"].weight.T[4 * i : 4 * i + 4])
        assert shares_memory(stack, module["c_attn"].weight)


def test_multihead_attention_is_split_in_q_k_and_v() -> None:
    module = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    found = by_module(module)
    assert list(found) == ["attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"]
    for i, name in enumerate(list(found)[:3]):
        assert found[name].kind == "attention"
        stack = stack_of(module, found[name])
        assert torch.equal(stack[0], module["attn"].in_proj_weight[8 * i : 8 * i + 8])
        assert shares_memory(stack, module["attn"].in_proj_weight)


def test_multihead_attention_with_separate_weights_has_the_same_names() -> None:
    module = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)})
    layers, skipped = layers_from_module(module)
    assert [(layer.name, layer.shape) for layer in layers] == [
        ("attn.in_proj.q", (1, 8, 8)),
        ("attn.in_proj.k", (1, 8, 4)),
        ("attn.in_proj.v", (1, 8, 6)),
        ("attn.out_proj", (1, 8, 8)),
    ]
    assert torch.equal(stack_of(module, layers[1])[0], module["attn"].k_proj_weight)
    assert "a bias" in reasons(([], skipped))["attn.bias_k"]


@pytest.mark.parametrize(
    ("make", "kind", "gates"),
    [(nn.LSTM, "lstm", "ifgo"), (nn.GRU, "gru", "rzn"), (nn.RNN, "rnn", "")],
)
def test_recurrent_weights_are_split_by_gate(make: type[nn.RNNBase], kind: str, gates: str) -> None:
    module = nn.ModuleDict({"cell": make(5, 3, num_layers=2, bidirectional=True)})
    found = by_module(module)
    for base in ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1_reverse"):
        weight = getattr(module["cell"], base)
        for i, gate in enumerate(gates or [""]):
            layer = found[f"cell.{base}.{gate}" if gate else f"cell.{base}"]
            assert layer.kind == kind
            stack = stack_of(module, layer)
            assert torch.equal(stack[0], weight[3 * i : 3 * i + 3])
            assert shares_memory(stack, weight)
    assert len(found) == 8 * max(1, len(gates))


def test_lstm_gates_do_what_their_names_say() -> None:
    """A forget gate shut and an input gate open keep only the candidate: c = tanh(g)."""
    cell = nn.LSTMCell(3, 2, bias=False)
    found = by_module(cell)
    with torch.no_grad():
        cell.weight_hh.zero_()
        # The stacks are views, so they are a way to set one gate (a caller would not do that).
        for gate, value in (("i", 50.0), ("f", -50.0), ("o", 50.0)):
            layer = found[f"weight_ih.{gate}"]
            layer.to_stack(module_tensor(cell, "weight_ih")).fill_(value)
    x = torch.ones(1, 3)
    _, c = cell(x, (torch.ones(1, 2), torch.full((1, 2), 7.0)))
    candidate = found["weight_ih.g"].to_stack(module_tensor(cell, "weight_ih"))[0]
    torch.testing.assert_close(c, torch.tanh(x @ candidate.T))


def test_lstm_with_projection_is_split_by_its_hidden_size() -> None:
    module = nn.ModuleDict({"r": nn.LSTM(5, 4, proj_size=2)})
    found = by_module(module)
    assert found["r.weight_hh_l0.o"].shape == (1, 4, 2)
    assert found["r.weight_ih_l0.f"].shape == (1, 4, 5)
    assert found["r.weight_hr_l0"].shape == (1, 2, 4)


def test_bilinear_is_a_stack_of_its_outputs() -> None:
    module = nn.Bilinear(3, 4, 5)
    (layer,) = by_module(module).values()
    assert (layer.kind, layer.shape) == ("bilinear", (5, 3, 4))
    assert torch.equal(stack_of(module, layer), module.weight)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embedding_is_left_out_until_it_is_included(make: type[nn.Module]) -> None:
    module = nn.ModuleDict({"words": make(7, 4), "out": nn.Linear(4, 3)})
    layers, skipped = layers_from_module(module)
    assert [layer.name for layer in layers] == ["out"]
    assert skipped[0].name == "words"
    assert skipped[0].shape == (7, 4)
    assert "include='words'" in skipped[0].reason
    found = by_module(module, include="words")
    assert list(found) == ["words"]
    assert (found["words"].kind, found["words"].shape) == ("embedding", (1, 7, 4))
    assert torch.equal(stack_of(module, found["words"])[0], module["words"].weight)


def test_normalisations_and_buffers_are_not_analysed() -> None:
    module = nn.Sequential(nn.LayerNorm((4, 5, 6), bias=False), nn.BatchNorm2d(3))
    module.register_buffer("table", torch.randn(8, 8))
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert [s.name for s in skipped] == ["0", "1", "1.bias"]
    assert "normalisation" in skipped[0].reason


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 5))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 4))


def test_expert_parameters_are_a_stack_by_the_module_type() -> None:
    module = nn.ModuleDict({"mlp": MixtureOfExperts()})
    layers, skipped = layers_from_module(module)
    assert [(layer.name, layer.kind) for layer in layers] == [("mlp.gate_up_proj", "experts")]
    assert torch.equal(stack_of(module, layers[0]), module["mlp"].gate_up_proj)
    assert [s.name for s in skipped] == ["mlp.gate_up_proj_bias"]


class SpectralConv2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights1 = nn.Parameter(torch.randn(3, 4, 5, 6, dtype=torch.complex64))


def test_spectral_convolution_gives_one_complex_in_by_out_matrix_for_each_mode() -> None:
    module = SpectralConv2d()
    layer = by_module(module)["weights1"]
    assert (layer.kind, layer.shape, layer.dtype) == ("spectral", (30, 3, 4), torch.complex64)
    stack = stack_of(module, layer)
    for s in range(30):
        assert torch.equal(stack[s], module.weights1[:, :, s // 6, s % 6])
    assert shares_memory(stack, module.weights1)


class AFNO2D(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, 4, 3, 6, dtype=dtype))
        self.b1 = nn.Parameter(torch.randn(2, 4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_afno_weight_gives_one_complex_matrix_for_each_block(dtype: torch.dtype) -> None:
    module = AFNO2D(dtype)
    layers, skipped = layers_from_module(module)
    assert [(layer.name, layer.kind) for layer in layers] == [("w1", "spectral")]
    stack = stack_of(module, layers[0])
    assert stack.is_complex()
    for block in range(4):
        assert torch.equal(stack[block].real.to(dtype), module.w1[0, block])
        assert torch.equal(stack[block].imag.to(dtype), module.w1[1, block])
    assert "AFNO" in skipped[0].reason


# --- tied, shared, parametrised and unusual modules ---


def test_tied_weight_is_analysed_once() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    found = layers_from_module(module)
    assert [layer.name for layer in found[0]] == ["a"]
    assert reasons(found)["b"] == "tied to a"


def test_shared_module_is_analysed_once_and_its_second_name_listed() -> None:
    block = nn.Linear(4, 4)
    found = layers_from_module(nn.Sequential(block, block))
    assert [layer.name for layer in found[0]] == ["0"]
    assert reasons(found)["1"] == "tied to 0"


def test_tied_fused_weight_is_analysed_once_for_each_part() -> None:
    module = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
    module["b"].in_proj_weight = module["a"].in_proj_weight
    found = layers_from_module(module)
    assert [layer.name for layer in found[0]][:3] == [f"a.in_proj.{r}" for r in "qkv"]
    assert [reasons(found)[f"b.in_proj.{r}"] for r in "qkv"] == [
        f"tied to a.in_proj.{r}" for r in "qkv"
    ]


def test_views_of_one_storage_that_differ_are_not_tied() -> None:
    memory = torch.randn(8, 4)
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    module["a"].weight = nn.Parameter(memory[:4])
    module["b"].weight = nn.Parameter(memory[4:])
    module["c"].weight = nn.Parameter(memory[:4].T)
    assert list(by_module(module)) == ["a", "b", "c"]


def test_output_layer_tied_to_an_embedding_is_analysed_as_the_output_layer() -> None:
    module = nn.ModuleDict({"wte": nn.Embedding(7, 4), "lm_head": nn.Linear(4, 7)})
    module["lm_head"].weight = module["wte"].weight
    assert list(by_module(module)) == ["lm_head"]
    found = layers_from_module(module, include=["wte", "lm_head"])
    assert [layer.name for layer in found[0]] == ["wte"]
    assert reasons(found)["lm_head"] == "tied to wte"


def test_weight_tied_to_an_excluded_layer_is_analysed() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    module["b"].weight = module["a"].weight
    assert list(by_module(module, exclude="a")) == ["b"]


def test_meta_modules_can_be_planned_but_not_loaded() -> None:
    module = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta"))
    assert list(by_module(module)) == ["0", "1"]
    with pytest.raises(ValueError, match=r"0.weight.*meta device"):
        module_tensor(module, "0.weight")


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weight_is_taken_as_used_and_the_module_unchanged(norm: object) -> None:
    module = nn.Sequential(norm(nn.Linear(5, 3)))  # type: ignore[operator]
    module.train()
    state = copy.deepcopy(module.state_dict())
    found = layers_from_module(module)
    assert [(layer.name, layer.shape) for layer in found[0]] == [("0", (1, 3, 5))]
    stack = stack_of(module, found[0][0])
    assert module.training
    assert module[0].parametrizations.weight.training
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert torch.allclose(stack[0], module.eval()[0].weight)
    originals = [s for s in found[1] if "original" in s.name]
    assert originals
    assert all("parametrised" in s.reason for s in originals)


def test_pruned_weight_is_taken_as_used() -> None:
    module = nn.Sequential(nn.Linear(6, 4))
    prune.l1_unstructured(module[0], "weight", amount=0.5)
    found = layers_from_module(module)
    assert [layer.name for layer in found[0]] == ["0"]
    assert (stack_of(module, found[0][0]) == 0).sum() == 12
    assert "part of weight" in reasons(found)["0.weight_orig"]


def test_uninitialised_parameters_are_skipped() -> None:
    layers, skipped = layers_from_module(nn.Sequential(nn.LazyLinear(4)))
    assert layers == []
    assert all("not initialised" in s.reason for s in skipped)
    assert len(skipped) == 2


def test_sparse_parameters_are_skipped() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.eye(4).to_sparse())
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert skipped == [Skipped("w", (4, 4), "layout sparse_coo: make it dense first")]


def test_module_and_its_state_dict_give_the_same_layers_in_the_same_order() -> None:
    module = nn.ModuleDict(
        {
            "z": nn.Conv2d(3, 4, 3),
            "embed": nn.Embedding(7, 4),
            "attn": nn.MultiheadAttention(8, 2),
            "norm": nn.LayerNorm(4),
            "lstm": nn.LSTM(5, 3, num_layers=2),
            "gru": nn.GRU(5, 3),
            "up": nn.ConvTranspose2d(4, 6, 2),
            "c_fc": Conv1D(12, 4),
            "qkv": nn.Linear(4, 12),
            "a": nn.Linear(4, 3),
        }
    )
    headers = [header(k, *v.shape) for k, v in module.state_dict().items()]
    assert layers_from_headers(headers) == layers_from_module(module)


def test_only_modules_are_accepted() -> None:
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module, got dict"):
        layers_from_module({})  # type: ignore[arg-type]


def test_unknown_tensor_name_is_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    for name in ("1.weight", "0.wait", "0.forward", "0"):
        with pytest.raises(
            ValueError, match=f"name: expected a tensor of Sequential, got '{name}'"
        ):
            module_tensor(module, name)


# --- headers ---


@pytest.mark.parametrize(
    ("name", "shape", "kind", "stack"),
    [
        ("fc.weight", (4, 5), "linear", (1, 4, 5)),
        ("c.weight", (4, 5, 3), "conv1d", (3, 4, 5)),
        ("c.weight", (4, 5, 3, 2), "conv2d", (6, 4, 5)),
        ("c.weight", (4, 5, 3, 2, 2), "conv3d", (12, 4, 5)),
        ("mlp.experts.down_proj", (8, 4, 5), "experts", (8, 4, 5)),
        ("mlp.experts.down_proj.weight", (8, 4, 5), "experts", (8, 4, 5)),
        ("experts.0.conv.weight", (8, 4, 5), "conv1d", (5, 8, 4)),
        ("patch_embed.proj.weight", (8, 3, 4, 4), "conv2d", (16, 8, 3)),
        ("embed_out.weight", (9, 4), "linear", (1, 9, 4)),
        ("time_embed.0.weight", (9, 4), "linear", (1, 9, 4)),
    ],
)
def test_shape_and_name_tell_the_kind(
    name: str, shape: tuple[int, ...], kind: str, stack: tuple[int, ...]
) -> None:
    (layer,) = by_header(header(name, *shape)).values()
    assert (layer.kind, layer.shape) == (kind, stack)
    assert layer.name == name.removesuffix(".weight")
    assert layer.tensors == (name,)
    assert layer.to_stack(torch.zeros(shape)).shape == stack


@pytest.mark.parametrize("leaf", ["qkv", "Wqkv", "qkv_proj", "to_qkv", "c_attn"])
def test_fused_projection_is_split_by_its_name(leaf: str) -> None:
    weight = torch.randn(12, 4)
    found = by_header(header(f"h.0.{leaf}.weight", 12, 4))
    assert list(found) == [f"h.0.{leaf}.{role}" for role in "qkv"]
    for i, layer in enumerate(found.values()):
        assert torch.equal(layer.to_stack(weight)[0], weight[4 * i : 4 * i + 4])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("attention.query_key_value.weight", (12, 4)),  # interleaved by head
        ("attn.qkv_proj.weight", (6, 4)),  # fewer key heads than query heads
        ("attn.qkv_proj.weight", (24, 4)),  # heads wider than the model
        ("attn.other.weight", (12, 4)),
    ],
)
def test_projection_that_cannot_be_split_safely_stays_whole(
    name: str, shape: tuple[int, int]
) -> None:
    (layer,) = by_header(header(name, *shape)).values()
    assert (layer.kind, layer.shape) == ("linear", (1, *shape))


def test_in_proj_weight_is_split_by_its_name() -> None:
    found = by_header(header("a.in_proj_weight", 12, 4), header("a.in_proj_bias", 12))
    assert list(found) == ["a.in_proj.q", "a.in_proj.k", "a.in_proj.v"]


def test_bias_of_the_second_dimension_proves_storage_by_in_and_out() -> None:
    weight = torch.randn(4, 12)
    layer = by_header(header("mlp.c_fc.weight", 4, 12), header("mlp.c_fc.bias", 12))["mlp.c_fc"]
    assert torch.equal(layer.to_stack(weight)[0], weight.T)
    kernel = torch.randn(4, 6, 2, 2)
    up = by_header(header("up.weight", 4, 6, 2, 2), header("up.bias", 6))["up"]
    assert (up.kind, up.shape) == ("conv_transpose2d", (4, 6, 4))
    assert torch.equal(up.to_stack(kernel)[3], kernel[:, :, 1, 1].T)


def test_square_gpt2_weight_follows_the_layout_of_the_others() -> None:
    weight = torch.arange(16.0).reshape(4, 4)
    proj = header("h.0.attn.c_proj.weight", 4, 4)
    gpt2 = by_header(header("h.0.attn.c_attn.weight", 4, 12), proj)
    assert torch.equal(gpt2["h.0.attn.c_proj"].to_stack(weight)[0], weight.T)
    assert gpt2["h.0.attn.c_attn.k"].shape == (1, 4, 4)
    linear = by_header(header("h.0.attn.c_attn.weight", 12, 4), proj)
    assert torch.equal(linear["h.0.attn.c_proj"].to_stack(weight)[0], weight)


@pytest.mark.parametrize(
    ("rows", "kind", "names"),
    [(4, "lstm", "ifgo"), (3, "gru", "rzn"), (1, "rnn", ""), (2, "linear", ""), (5, "linear", "")],
)
def test_hidden_weight_tells_the_gates(rows: int, kind: str, names: str) -> None:
    found = by_header(header("r.weight_ih_l0", 6 * rows, 5), header("r.weight_hh_l0", 6 * rows, 6))
    assert {layer.kind for layer in found.values()} == {kind}
    suffixes = [f".{gate}" for gate in names] or [""]
    assert list(found) == [f"r.weight_{w}_l0{s}" for w in ("ih", "hh") for s in suffixes]


def test_input_weight_without_its_hidden_weight_stays_whole() -> None:
    assert by_header(header("r.weight_ih_l0", 24, 5))["r.weight_ih_l0"].kind == "linear"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wte.weight", (9, 4)),
        ("transformer.wpe.weight", (9, 4)),
        ("model.embed_tokens.weight", (9, 4)),
        ("tok_embeddings.weight", (9, 4)),
        ("tok_emb.weight", (9, 4)),
        ("shared.weight", (9, 4)),
        ("pos_embed", (1, 9, 4)),
        ("layer.0.relative_attention_bias.weight", (9, 4)),
    ],
)
def test_embeddings_by_name_need_an_include(name: str, shape: tuple[int, ...]) -> None:
    layer_name = name.removesuffix(".weight")
    found = layers_from_headers([header(name, *shape)])
    assert found[0] == []
    assert f"include={layer_name!r}" in reasons(found)[layer_name]
    layer = by_header(header(name, *shape), include=layer_name)[layer_name]
    assert (layer.kind, layer.shape) == ("embedding", (1, 9, 4))
    assert layer.to_stack(torch.zeros(shape)).shape == (1, 9, 4)


def test_projection_with_a_bias_is_no_embedding() -> None:
    found = by_header(header("x_embedder.weight", 9, 4), header("x_embedder.bias", 9))
    assert found["x_embedder"].kind == "linear"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (header("a.bias", 4), "vector"),
        (header("temperature"), "scalar"),
        (header("a.weight", 0, 4), "empty"),
        (header("a.weight", 4, 4, dtype=torch.int8), "int8"),
        (header("a.weight", 4, 4, dtype=torch.int64), "int64"),
        (header("a.mask", 4, 4, dtype=torch.bool), "bool"),
        (header("a.weight", 4, 4, dtype=torch.float8_e4m3fn), "float8_e4m3fn is quantised"),
        (header("a.weight", 4, 4, dtype=torch.float8_e5m2), "float8_e5m2 is quantised"),
        (header("dw.weight", 32, 1, 3, 3), "depthwise"),
        (header("dw.weight", 32, 1, 3), "depthwise"),
        (header("attn.bias", 1, 1, 8, 8), "a bias"),
        (header("relative_position_bias_table", 9, 4), "a bias"),
        (header("blocks.0.attn_mask", 4, 9, 9), "a mask"),
        (header("rope.cos_cached", 16, 8), "rotary"),
        (header("a.weight_scale_inv", 4, 4), "scale of a quantised"),
        (header("a.scales", 4, 4), "scale of a quantised"),
        (header("a.weight", 2, 2, 2, 2, 2, 2), "6-D tensor"),
    ],
)
def test_what_has_no_spectrum_is_skipped_with_its_reason(tensor: TensorHeader, reason: str) -> None:
    layers, (skipped,) = layers_from_headers([tensor])
    assert layers == []
    assert skipped.name == tensor.name.removesuffix(".weight")
    assert skipped.shape == tensor.shape
    assert reason in skipped.reason


def test_scale_with_a_bias_of_its_shape_is_skipped() -> None:
    found = layers_from_headers([header("ln.weight", 3, 4, 5), header("ln.bias", 3, 4, 5)])
    assert found[0] == []
    assert "elementwise" in reasons(found)["ln"]


def test_complex_headers() -> None:
    c64 = torch.complex64
    found = by_header(header("a.w", 3, 4, 5, dtype=c64), header("b.weight", 3, 4, dtype=c64))
    assert (found["a.w"].kind, found["a.w"].shape) == ("spectral", (5, 3, 4))
    assert (found["b"].kind, found["b"].dtype) == ("linear", c64)


def test_layers_keep_the_order_of_the_headers() -> None:
    names = ["z.weight", "a.weight", "m.10.weight", "m.2.weight"]
    layers, _ = layers_from_headers([header(name, 3, 4) for name in names])
    assert [layer.name for layer in layers] == ["z", "a", "m.10", "m.2"]


def test_names_that_would_collide_stay_apart() -> None:
    assert list(by_header(header("a", 3, 4), header("a.weight", 3, 4))) == ["a", "a.weight"]


def test_repeated_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="each name once, got 'a' more than once"):
        layers_from_headers([header("a", 3, 4), header("a", 3, 4)])


def test_no_headers_no_layers() -> None:
    assert layers_from_headers([]) == ([], [])


def test_layers_survive_pickling() -> None:
    kernel = torch.randn(4, 6, 2, 2)
    (layer,) = by_header(header("c.weight", 4, 6, 2, 2)).values()
    again = pickle.loads(pickle.dumps(layer))
    assert again == layer
    assert torch.equal(again.to_stack(kernel), layer.to_stack(kernel))


@given(st.lists(st.integers(0, 6), max_size=6), st.sampled_from(["w", "a.weight", "experts.w"]))
def test_every_tensor_is_a_layer_or_skipped(shape: list[int], name: str) -> None:
    layers, skipped = layers_from_headers([header(name, *shape)])
    assert len(layers) + len(skipped) == 1
    for layer in layers:
        weight = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        stack = layer.to_stack(weight)
        assert stack.shape == layer.shape
        assert torch.equal(stack.flatten().sort().values, weight.flatten())
        assert shares_memory(stack, weight)


# --- include and exclude ---

THREE = (header("enc.0.weight", 3, 4), header("enc.1.weight", 3, 4), header("dec.0.weight", 3, 4))


def test_include_takes_only_what_matches() -> None:
    found = layers_from_headers(THREE, include="enc.*")
    assert [layer.name for layer in found[0]] == ["enc.0", "enc.1"]
    assert reasons(found) == {"dec.0": "not matched by include"}


def test_exclude_has_the_last_word() -> None:
    found = layers_from_headers(THREE, include=["enc.*", "dec.*"], exclude=["*.0"])
    assert [layer.name for layer in found[0]] == ["enc.1"]
    assert reasons(found) == {"enc.0": "excluded by '*.0'", "dec.0": "excluded by '*.0'"}


def test_one_part_of_a_fused_weight_can_be_included() -> None:
    assert list(by_header(header("qkv.weight", 12, 4), include="qkv.k")) == ["qkv.k"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["Enc.*", "enc", "enc.0.weight"])
def test_pattern_without_a_match_is_an_error(argument: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: .*got '{pattern[:3]}.*matches none of 3"):
        layers_from_headers(THREE, **{argument: ["dec.*", pattern]})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, [3], b"x", {"a": 1}])
def test_pattern_of_another_type_is_an_error(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{argument}: expected None, a glob"):
        layers_from_headers(THREE, **{argument: value})


def test_empty_include_is_an_error_and_empty_exclude_is_none() -> None:
    with pytest.raises(ValueError, match="include: expected None or at least one glob"):
        layers_from_headers(THREE, include=[])
    assert len(by_header(*THREE, exclude=[])) == 3
