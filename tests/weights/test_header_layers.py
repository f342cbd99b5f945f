"""Layers from names and shapes alone, and how they are chosen."""

from __future__ import annotations

import pickle
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farms_fast.weights.layers import layers_from_headers
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.stacks import LayerSpec, TensorHeader
from tests.support.layer_tables import by_header, header, reasons, shares_memory

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
        (header("a.weight", 4, 4, dtype=torch.float8_e8m0fnu), "float8_e8m0fnu is quantised"),
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
    with pytest.raises(ValueError, match="each name once, got 'a'"):
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


# --- fused weights, experts, and what a config adds ---


def configured(config: dict[str, object], *headers: TensorHeader) -> dict[str, LayerSpec]:
    layers, _ = layers_from_headers(headers, config=ModelConfig.of(config))
    return {layer.name: layer for layer in layers}


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12},
        {"n_heads": 4, "attn_config": {"kv_n_heads": 2}, "d_model": 12},
        {"text_config": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}},
    ],
)
@pytest.mark.parametrize("leaf", ["qkv_proj", "Wqkv"])
def test_fewer_key_heads_are_split_by_the_config(config: dict[str, object], leaf: str) -> None:
    weight = torch.randn(24, 10)
    found = configured(config, header(f"attn.{leaf}.weight", 24, 10))
    cuts = {"q": slice(0, 12), "k": slice(12, 18), "v": slice(18, 24)}
    assert list(found) == [f"attn.{leaf}.{role}" for role in cuts]
    for role, rows in cuts.items():
        layer = found[f"attn.{leaf}.{role}"]
        stack = layer.to_stack(weight)
        assert layer.kind == "attention"
        assert stack.shape == layer.shape
        assert torch.equal(stack[0], weight[rows])
        assert shares_memory(stack, weight)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 3},
        {"num_attention_heads": "4", "num_key_value_heads": 2, "head_dim": 3},
        {"num_attention_heads": True, "num_key_value_heads": 2, "head_dim": 3},
    ],
)
def test_config_that_does_not_fit_leaves_a_projection_whole(config: dict[str, object]) -> None:
    assert list(configured(config, header("qkv_proj.weight", 24, 10))) == ["qkv_proj"]


GROUPED = {
    "gpt_neox": ({"model_type": "gpt_neox"}, 4, 1),
    "bloom": ({"model_type": "bloom"}, 4, 1),
    "falcon_7b": ({"model_type": "falcon", "multi_query": True}, 1, 4),
    "falcon_rw": ({"model_type": "falcon", "multi_query": False}, 4, 1),
    "falcon_40b": (
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
        2,
        2,
    ),
    "internlm2": ({"model_type": "internlm2", "num_key_value_heads": 2}, 2, 2),
    "gpt_bigcode": ({"model_type": "gpt_bigcode", "multi_query": False}, 4, 1),
}
LEAVES = {"internlm2": "wqkv", "gpt_bigcode": "c_attn"}


@pytest.mark.parametrize("family", list(GROUPED))
def test_heads_that_stand_together_are_sorted_by_the_config(family: str) -> None:
    entries, groups, queries = GROUPED[family]
    leaf, size = LEAVES.get(family, "query_key_value"), 3
    config = {"num_attention_heads": 4, "hidden_size": 12, **entries}
    weight = torch.randn(groups * (queries + 2) * size, 12)
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    row = 0
    for _ in range(groups):
        for role in ["q"] * queries + ["k", "v"]:
            rows[role] += range(row, row + size)
            row += size
    found = configured(config, header(f"h.{leaf}.weight", *weight.shape))
    assert list(found) == [f"h.{leaf}.{role}" for role in "qkv"]
    for role, numbers in rows.items():
        layer = found[f"h.{leaf}.{role}"]
        stack = layer.to_stack(weight)
        assert stack.shape == layer.shape == (1, len(numbers), 12)
        assert torch.equal(stack[0], weight[numbers])


def test_one_key_head_is_split_by_the_config() -> None:
    config = {"model_type": "gpt_bigcode", "multi_query": True, "n_head": 4, "n_embd": 12}
    found = configured(config, header("c_attn.weight", 18, 12))
    assert [layer.shape[1] for layer in found.values()] == [12, 3, 3]


@pytest.mark.parametrize("beside", [True, False])
def test_gate_and_up_are_split(beside: bool) -> None:
    weight = torch.randn(10, 4)
    headers = [header("mlp.gate_up_proj.weight", 10, 4)]
    headers += [header("mlp.down_proj.weight", 4, 5)] if beside else []
    found = by_header(*headers)
    assert list(found)[:2] == ["mlp.gate_up_proj.gate", "mlp.gate_up_proj.up"]
    for start, role in ((0, "gate"), (5, "up")):
        stack = found[f"mlp.gate_up_proj.{role}"].to_stack(weight)
        assert torch.equal(stack[0], weight[start : start + 5])
        assert shares_memory(stack, weight)


@pytest.mark.parametrize(("rows", "down"), [(9, None), (10, (4, 6))])
def test_gate_and_up_that_do_not_fit_stay_whole(rows: int, down: tuple[int, int] | None) -> None:
    headers = [header("mlp.gate_up_proj.weight", rows, 4)]
    headers += [header("mlp.down_proj.weight", *down)] if down else []
    assert "mlp.gate_up_proj" in by_header(*headers)


@pytest.mark.parametrize("in_by_out", [False, True])
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_with_gate_and_up(in_by_out: bool, alternate: bool, suffix: str) -> None:
    fused, down = torch.randn(3, 12, 5), torch.randn(3, 5, 6)  # as (experts, out, in)
    shapes = [t.mT.shape if in_by_out else t.shape for t in (fused, down)]
    headers = [
        header(f"mlp.experts.gate_up_proj{suffix}", *shapes[0]),
        header(f"mlp.experts.down_proj{suffix}", *shapes[1]),
    ]
    headers += [header("mlp.experts.gate_up_proj_bias", 3, 12)] if alternate and not suffix else []
    found = by_header(*headers)
    names = [
        f"mlp.experts.{leaf}" for leaf in ("gate_up_proj.gate", "gate_up_proj.up", "down_proj")
    ]
    assert list(found) == names
    stored = [t.mT.contiguous() if in_by_out else t for t in (fused, fused, down)]
    halves = (fused[:, :6], fused[:, 6:])
    if alternate and not suffix:
        halves = (fused[:, 0::2], fused[:, 1::2])
    for name, tensor, expected in zip(names, stored, (*halves, down), strict=True):
        stack = found[name].to_stack(tensor)
        assert (found[name].kind, found[name].shape) == ("experts", tuple(expected.shape))
        assert torch.equal(stack, expected)
        assert shares_memory(stack, tensor)


def test_experts_of_shapes_that_tell_nothing_are_as_stored() -> None:
    found = by_header(
        header("experts.gate_up_proj", 3, 12, 5), header("experts.down_proj", 3, 7, 6)
    )
    assert {name: layer.shape for name, layer in found.items()} == {
        "experts.gate_up_proj": (3, 12, 5),
        "experts.down_proj": (3, 7, 6),
    }


def test_experts_one_by_one_are_linear_layers() -> None:
    names = [f"block_sparse_moe.experts.{e}.w{i}" for e in range(2) for i in (1, 2, 3)]
    found = by_header(*(header(f"{name}.weight", 6, 4) for name in names))
    assert list(found) == names
    assert {layer.kind for layer in found.values()} == {"linear"}


@pytest.mark.parametrize("leaf", ["input_linear", "output_linear"])
def test_experts_that_only_their_block_is_named_for(leaf: str) -> None:
    (layer,) = by_header(header(f"0.block_sparse_moe.{leaf}.weight", 3, 6, 4)).values()
    assert (layer.kind, layer.shape) == ("experts", (3, 6, 4))


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
    with pytest.raises(ValueError, match=rf"{argument}: .*'{pattern[:3]}.*matches none of the 3"):
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


def test_many_names_and_patterns_take_time_in_proportion() -> None:
    count = 8_000
    headers = [header(f"experts.{i}.w1.weight", 4, 3) for i in range(count)]
    headers += [header(f"experts.{i}.w1.bias", 4) for i in range(count)]
    chosen = [f"experts.{i}.w1" for i in range(0, count, 2)]
    start = time.process_time()
    layers, skipped = layers_from_headers(headers, include=chosen, exclude=chosen[: count // 4])
    assert len(layers) == count // 4
    assert len(skipped) == 2 * count - len(layers)
    # Each pattern tried on each name would take minutes.
    assert time.process_time() - start < 10
