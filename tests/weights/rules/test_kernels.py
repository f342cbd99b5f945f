"""Kernels of Keras, Flax and TensorFlow: which layout they have, and the matrices they give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.stacks import LayerSpec, TensorHeader
from tests.support.layer_tables import by_header, header, reasons, shares_memory


def only(*headers: TensorHeader, **options: object) -> LayerSpec:
    (layer,) = by_header(*headers, **options).values()
    return layer


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("block/conv2d/kernel", (3, 3, 64, 128), "conv2d"),
        ("block/conv2d/kernel:0", (3, 3, 64, 128), "conv2d"),
        ("params.Conv_0.kernel", (7, 7, 3, 64), "conv2d"),
        ("mixed/conv/kernel", (1, 7, 192, 160), "conv2d"),
        ("separable/pointwise_kernel", (1, 1, 32, 64), "conv2d"),
        ("net/conv2_d/w", (5, 5, 8, 16), "conv2d"),
        ("block/conv1d/kernel", (5, 32, 150), "conv1d"),
        ("scan/dense/kernel", (4, 8, 16), "stacked"),
        ("conv3d/kernel", (3, 3, 3, 8, 16), "conv3d"),
    ],
)
def test_kernel_is_a_matrix_for_each_position(name: str, shape: tuple[int, ...], kind: str) -> None:
    layer = only(header(name, *shape))
    weight = torch.randn(shape)
    stack = layer.to_stack(weight)
    assert layer.kind == kind
    assert stack.shape == layer.shape == (weight[..., 0, 0].numel(), *shape[-2:])
    assert torch.equal(stack, weight.reshape(-1, *shape[-2:]))
    assert shares_memory(stack, weight)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 4, 4, 4), (3, 3, 3), (64, 12, 8)])
def test_kernel_that_may_be_either_is_skipped_until_the_caller_says(shape: tuple[int, ...]) -> None:
    kernel = header("conv/kernel", *shape)
    found = layers_from_headers([kernel])
    assert found[0] == []
    assert "layout='channels_last' says which" in reasons(found)["conv/kernel"]
    weight = torch.randn(shape)
    last = only(kernel, layout="channels_last")
    assert torch.equal(last.to_stack(weight), weight.flatten(0, -3))
    torch_layer = only(kernel, layout="torch")
    assert torch.equal(torch_layer.to_stack(weight)[0], weight.flatten(2)[..., 0])


def test_the_other_kernels_or_the_bias_tell_the_layout() -> None:
    small = header("a/kernel", 3, 3, 3, 3)
    found = by_header(small, header("b/kernel", 3, 3, 8, 16))
    assert found["a/kernel"].shape == (9, 3, 3)
    weight = torch.randn(3, 3, 3, 3)
    assert torch.equal(found["a/kernel"].to_stack(weight), weight.flatten(0, 1))
    found = by_header(small, header("b.kernel", 16, 8, 3, 3), header("b.bias", 16))
    assert torch.equal(found["a/kernel"].to_stack(weight)[0], weight[..., 0, 0])
    assert found["b.kernel"].shape == (9, 16, 8)
    mixed = layers_from_headers([small, header("b.kernel", 16, 8, 3, 3), header("c.w", 3, 3, 8, 9)])
    assert "a/kernel" in reasons(mixed)
    biased = only(header("a/kernel", 4, 4, 4, 3), header("a/bias", 3))
    assert biased.shape == (16, 4, 3)


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        ([f"MultiHead_0.{r}.kernel" for r in ("query", "key", "value", "out")], (12, 4, 3)),
        ([f"mha/{r}/kernel:0" for r in ("query", "key", "value", "attention_output")], (12, 2, 6)),
    ],
)
def test_attention_kernels_are_one_matrix_each(
    names: list[str], shapes: tuple[int, int, int]
) -> None:
    embed, heads, size = shapes
    stored = [*(header(name, *shapes) for name in names[:3]), header(names[3], heads, size, embed)]
    found = by_header(*stored)
    assert list(found) == names
    for name in names[:3]:
        weight = torch.randn(shapes)
        assert (found[name].kind, found[name].shape) == ("attention", (1, embed, heads * size))
        assert torch.equal(found[name].to_stack(weight)[0], weight.reshape(embed, -1))
    weight = torch.randn(heads, size, embed)
    assert found[names[3]].shape == (1, heads * size, embed)
    assert torch.equal(found[names[3]].to_stack(weight)[0], weight.reshape(-1, embed))


def test_convolution_named_like_a_projection_is_a_convolution() -> None:
    assert only(header("out/kernel", 3, 8, 16)).shape == (3, 8, 16)


def test_fused_attention_kernel_is_not_guessed() -> None:
    found = layers_from_headers([header("attn/qkv/kernel", 48, 3, 4, 12)])
    assert found[0] == []
    assert "no rule makes matrices" in reasons(found)["attn/qkv/kernel"]


@pytest.mark.parametrize(
    "headers",
    [
        [header("depthwise_conv2d/depthwise_kernel", 3, 3, 32, 2)],
        [header("depthwise_conv2d/kernel", 3, 3, 32, 2)],
        [header("c/kernel", 3, 3, 32, 2), header("c/bias", 64)],
    ],
)
def test_depthwise_kernels_have_no_matrices(headers: list[TensorHeader]) -> None:
    found = layers_from_headers(headers)
    assert found[0] == []
    assert "depthwise" in reasons(found)[headers[0].name]


@pytest.mark.parametrize(
    ("gates", "kind", "roles"), [(4, "lstm", "ifgo"), (3, "gru", "zrn"), (1, "rnn", "")]
)
def test_recurrent_kernels_are_cut_by_gate(gates: int, kind: str, roles: str) -> None:
    found = by_header(
        header("cell/kernel", 5, 6 * gates), header("cell/recurrent_kernel", 6, 6 * gates)
    )
    weight = torch.randn(5, 6 * gates)
    names = [f"cell/kernel.{role}" for role in roles] or ["cell/kernel"]
    assert list(found)[:gates] == names
    for number, name in enumerate(names):
        assert (found[name].kind, found[name].shape) == (kind, (1, 6, 5))
        expected = weight[:, 6 * number : 6 * (number + 1)].T
        assert torch.equal(found[name].to_stack(weight)[0], expected)


def test_dense_kernel_is_a_matrix() -> None:
    layer = only(header("dense/kernel", 5, 6), header("dense/bias", 6))
    assert (layer.kind, layer.shape) == ("linear", (1, 5, 6))


def test_weight_that_cannot_be_torchs_is_skipped_until_the_caller_says() -> None:
    weight = header("conv.weight", 3, 3, 64, 128)
    found = layers_from_headers([weight])
    assert "says which" in reasons(found)["conv"]
    assert only(weight, layout="channels_last").shape == (9, 64, 128)
    assert only(weight, layout="torch").shape == (64 * 128, 3, 3)
    assert only(weight, header("conv.bias", 128)).shape == (9, 64, 128)
    assert only(weight, header("conv.bias", 3)).shape == (64 * 128, 3, 3)


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (192, 3, 16, 16), (6, 2, 28, 28), (8, 4, 64)])
def test_weights_of_torch_stay_torchs(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    layer = only(header("conv.weight", *shape))
    assert torch.equal(layer.to_stack(weight)[0], weight.flatten(2)[..., 0])


def test_module_that_is_a_convolution_has_torchs_layout_whatever_the_caller_says() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 5))
    (layer,) = layers_from_module(net, layout="channels_last")[0]
    assert layer.shape == (25, 3, 3)


@pytest.mark.parametrize("layout", ["last", None, 3])
def test_unknown_layout_is_an_error(layout: object) -> None:
    with pytest.raises(ValueError, match="layout: expected one of auto, torch, channels_last, got"):
        layers_from_headers([header("a.weight", 3, 4)], layout=layout)


@given(
    st.sampled_from(["kernel", "w", "weight", "depthwise_kernel", "query/kernel"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from(["auto", "torch", "channels_last"]),
    st.integers(1, 40),
)
def test_every_kernel_is_a_layer_or_skipped(
    leaf: str, shape: list[int], layout: str, bias: int
) -> None:
    stored = [header(f"a/{leaf}", *shape), header("a/bias", bias)]
    layers, skipped = layers_from_headers(stored, layout=layout)
    assert len(layers) + len(skipped) == 2
    for layer in layers:
        stack = layer.to_stack(torch.zeros(1).expand(shape))
        assert stack.shape == layer.shape
