"""Layers from modules: which there are, and what their stacks hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.module_tensors import module_tensor
from farms_fast.weights.stacks import LayerSpec, Skipped
from tests.support.layer_tables import by_module, header, reasons, shares_memory, stack_of

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


def test_parametrised_weights_of_one_shape_are_not_taken_for_tied_ones() -> None:
    # Each is computed when it is looked at, often where the one before it lay.
    layers = [parametrizations.weight_norm(nn.Linear(20, 16)) for _ in range(8)]
    model = nn.Sequential(*layers, layers[0])
    specs, skipped = layers_from_module(model)
    assert [spec.name for spec in specs] == [str(number) for number in range(8)]
    assert Skipped("8", (16, 20), "tied to 0") in skipped


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
