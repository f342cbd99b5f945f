"""Quantised weights: the values of each format, against packers written from its definition."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources import MappingSource, open_source
from farms_fast.weights.stacks import LayerSpec, Skipped
from tests.support.layer_tables import reasons

F8 = torch.float8_e4m3fn


def opened(
    tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, object] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Stacks by layer, checked against what was promised of them, and the reasons of the rest."""
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    config = ModelConfig.of({"quantization_config": quantization or {}})
    source = MappingSource(tensors)
    layers, skipped = layers_from_headers(source.headers, config=config)
    stacks: dict[str, torch.Tensor] = {}
    for layer in layers:
        stacks[layer.name] = layer.to_stack(*map(source.load, layer.tensors))
        assert stacks[layer.name].shape == layer.shape
        assert stacks[layer.name].dtype == layer.dtype
    for name, tensor in tensors.items():
        bits, old = (t.flatten().view(torch.uint8) for t in (tensor, before[name]))
        assert torch.equal(bits, old)
    return stacks, reasons((layers, skipped + source.skipped))


def only(tensors: Mapping[str, torch.Tensor], **quantization: object) -> torch.Tensor:
    stacks, _ = opened(tensors, quantization)
    (stack,) = stacks.values()
    return stack


def words(numbers: np.ndarray, bits: int, axis: int, order: list[int]) -> torch.Tensor:
    """int32; each holds 32/bits neighbours along axis, that with order[i] at bit i*bits."""
    count = 32 // bits
    moved = np.moveaxis(numbers, axis, -1).astype(np.uint64)
    assert moved.shape[-1] % count == 0
    packed = np.zeros((*moved.shape[:-1], moved.shape[-1] // count), dtype=np.uint64)
    for place, source in enumerate(order):
        packed |= moved[..., source::count] << np.uint64(bits * place)
    return torch.from_numpy(np.moveaxis(packed, -1, axis).astype(np.uint32).view(np.int32).copy())


def in_order(bits: int) -> list[int]:
    return list(range(32 // bits))


# --- a number and a scale ---


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1), (4, 6), (2, 3), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_with_a_scale(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    scale = torch.rand(shape) + 0.5
    found = only({"fc.weight": weight, f"fc.{name}": scale})
    full = np.ones((4, 6))
    for i in range(4):
        for j in range(6):
            grid = scale.reshape(1, 1) if scale.numel() == 1 else scale
            grid = grid.reshape(4, 1) if grid.dim() == 1 else grid
            full[i, j] = grid[i * grid.shape[0] // 4, j * grid.shape[1] // 6]
    assert torch.equal(found[0], weight.float() * torch.from_numpy(full).float())


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_blocks_of_the_config(rows: int, cols: int, high: int, wide: int, bf16: bool) -> None:
    if min(rows, cols) < 2:
        return
    weight = torch.randn(rows, cols).to(F8)
    scale = torch.rand(-(-rows // high), -(-cols // wide)) + 0.5
    scale = scale.bfloat16() if bf16 else scale
    tensors = {"fc.weight": weight, "fc.weight_scale_inv": scale}
    found = only(tensors, quant_method="fp8", weight_block_size=[high, wide])
    for i in range(rows):
        for j in range(cols):
            row = 0 if len(scale) == 1 else i if len(scale) == rows else i // high
            column = 0 if scale.shape[1] == 1 else j if scale.shape[1] == cols else j // wide
            assert found[0, i, j] == weight[i, j].float() * scale[row, column].float()


def test_blocks_of_128_without_a_config() -> None:
    weight, scale = torch.randn(130, 300).to(F8), torch.rand(2, 3)
    found = only({"fc.weight": weight, "fc.weight_scale_inv": scale})
    assert torch.equal(found[0, :128, 128:256], weight[:128, 128:256].float() * scale[0, 1])
    assert torch.equal(found[0, 128:, 256:], weight[128:, 256:].float() * scale[1, 2])


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 1), (3, 4), (3,), (3, 2, 3)])
def test_experts_with_scales(shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(3, 4, 6).to(F8), torch.rand(shape) + 0.5
    tensors = {"mlp.experts.down_proj": weight, "mlp.experts.down_proj_scale": scale}
    found = only(tensors)
    grid = scale.reshape(*shape, *(1,) * (3 - len(shape)))
    for e in range(3):
        for i in range(4):
            for j in range(6):
                factor = grid[e, i * grid.shape[1] // 4, j * grid.shape[2] // 6]
                assert found[e, i, j] == weight[e, i, j].float() * factor


def test_scale_of_powers_of_two() -> None:
    weight = torch.randn(4, 6).to(F8)
    scale = torch.tensor([126, 128], dtype=torch.uint8).view(torch.float8_e8m0fnu).view(2, 1)
    found = only({"fc.weight": weight, "fc.weight_scale": scale})
    assert torch.equal(found[0], weight.float() * torch.tensor([0.5, 0.5, 2, 2]).unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_float8_without_a_scale_is_a_dtype_like_any_other(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    assert torch.equal(only({"fc.weight": weight})[0], weight.float())


def test_float8_that_lacks_the_scale_of_its_format_is_listed() -> None:
    stacks, why = opened({"fc.weight": torch.randn(4, 6).to(F8)}, {"quant_method": "fp8"})
    assert stacks == {}
    assert why == {"fc": "quantised weight without a scale beside it (quant_method 'fp8')"}


def test_scales_of_activations_are_listed_and_those_of_weights_are_not() -> None:
    tensors = {
        "fc.weight": torch.randn(4, 6).to(F8),
        "fc.weight_scale": torch.ones(()),
        "fc.input_scale": torch.ones(1, 2),
        "other.weight_scale": torch.ones(2, 2),
    }
    stacks, why = opened(tensors)
    assert list(stacks) == ["fc"]
    assert why == {
        "fc.input_scale": "a scale of activations, not a weight",
        "other.weight_scale": "the scale of a quantised weight, not a weight",
    }


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2, 2), (4, 4)])
def test_scale_that_does_not_fit_is_listed(shape: tuple[int, ...]) -> None:
    tensors = {"fc.weight": torch.randn(4, 6).to(F8), "fc.weight_scale": torch.ones(shape)}
    stacks, why = opened(tensors)
    assert stacks == {}
    assert "do not fit together" in why["fc"]
    assert str(shape) in why["fc"]


def test_blocks_that_the_config_contradicts_are_listed() -> None:
    tensors = {"fc.weight": torch.randn(8, 8).to(F8), "fc.weight_scale": torch.ones(2, 2)}
    assert opened(tensors)[0].keys() == {"fc"}
    stacks, why = opened(tensors, {"weight_block_size": [2, 2]})
    assert stacks == {}
    assert "(2, 2)" in why["fc"]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_int8_with_a_scale(zero_point: bool, groups: int) -> None:
    weight = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    scale = torch.rand(4, groups)
    tensors = {"fc.weight": weight, "fc.weight_scale": scale}
    zeros = torch.zeros(4, groups)
    if zero_point:
        tensors["fc.weight_zero_point"] = torch.randint(-9, 9, (4, groups), dtype=torch.int8)
        zeros = tensors["fc.weight_zero_point"].float()
    spread = torch.arange(6) // (6 // groups)
    expected = (weight.float() - zeros[:, spread]) * scale[:, spread]
    assert torch.equal(only(tensors)[0], expected)


def test_bitsandbytes_int8() -> None:
    true = torch.randn(4, 6)
    scb = true.abs().amax(1)
    weight = (true * 127 / scb.unsqueeze(1)).round().to(torch.int8)
    tensors = {"fc.weight": weight, "fc.SCB": scb, "fc.weight_format": torch.tensor(0)}
    found = only(tensors)
    assert torch.equal(found[0], weight.float() * (scb / 127).unsqueeze(1))
    assert (found[0] - true).abs().max() <= scb.max() / 127
    with pytest.raises(ValueError, match="weight_format: expected 0"):
        only({**tensors, "fc.weight_format": torch.tensor(2)})


def test_int8_without_a_scale_is_not_a_weight() -> None:
    stacks, why = opened({"fc.weight": torch.ones(4, 6, dtype=torch.int8)})
    assert stacks == {}
    assert "int8 is not floating point" in why["fc"]


# --- several numbers in a word ---


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("index", ["none", "in order", "shuffled"])
def test_gptq(bits: int, version: str, index: str) -> None:
    rng = np.random.default_rng(bits)
    inputs, out, size = 64, 32, 16
    numbers = rng.integers(0, 2**bits, (inputs, out))
    zeros = rng.integers(1, 2**bits, (inputs // size, out))
    scales = torch.from_numpy(rng.random((inputs // size, out))).half()
    group = np.arange(inputs) // size
    if index == "shuffled":
        rng.shuffle(group)
    tensors = {
        "fc.qweight": words(numbers, bits, 0, in_order(bits)),
        "fc.qzeros": words(zeros - (version == "gptq"), bits, 1, in_order(bits)),
        "fc.scales": scales,
        "fc.bias": torch.ones(out),
    }
    if index != "none":
        tensors["fc.g_idx"] = torch.from_numpy(group.astype(np.int32))
    stacks, why = opened(
        tensors, {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    )
    assert why == {"fc.bias": "vector, not a matrix"}
    expected = (numbers - zeros[group]) * scales.numpy().astype(np.float32)[group]
    assert stacks["fc"].shape == (1, out, inputs)
    np.testing.assert_array_equal(stacks["fc"][0].numpy(), expected.T.astype(np.float32))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_gptq_index_of_a_group_that_is_not_there(wrong: int) -> None:
    tensors = {
        "fc.qweight": words(np.zeros((16, 8), int), 4, 0, in_order(4)),
        "fc.qzeros": words(np.zeros((2, 8), int), 4, 1, in_order(4)),
        "fc.scales": torch.ones(2, 8).half(),
        "fc.g_idx": torch.tensor([0] * 8 + [1] * 7 + [wrong], dtype=torch.int32),
    }
    least, most = min(wrong, 0), max(wrong, 1)
    said = f"^GPTQ: expected g_idx .*2 groups.*, got {least} to {most}$"
    with pytest.raises(ValueError, match=said):
        only(tensors)


def test_gptq_bits_are_told_by_the_index_of_groups() -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (16, 8))
    tensors = {
        "fc.qweight": words(numbers, 8, 0, in_order(8)),
        "fc.qzeros": words(np.full((1, 8), 127), 8, 1, in_order(8)),
        "fc.scales": torch.ones(1, 8).half(),
        "fc.g_idx": torch.zeros(16, dtype=torch.int32),
    }
    np.testing.assert_array_equal(only(tensors)[0].numpy(), (numbers - 128).T)


def test_awq() -> None:
    rng = np.random.default_rng(1)
    inputs, out, size = 32, 24, 8
    numbers = rng.integers(0, 16, (inputs, out))
    zeros = rng.integers(0, 16, (inputs // size, out))
    scales = torch.from_numpy(rng.random((inputs // size, out))).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "fc.qweight": words(numbers, 4, 1, order),
        "fc.qzeros": words(zeros, 4, 1, order),
        "fc.scales": scales,
    }
    found = only(tensors, quant_method="awq", bits=4, group_size=size, version="gemm")
    group = np.arange(inputs) // size
    expected = (numbers - zeros[group]) * scales.numpy().astype(np.float32)[group]
    np.testing.assert_array_equal(found[0].numpy(), expected.T.astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_compressed_tensors_pack(bits: int, groups: int) -> None:
    numbers = np.random.default_rng(2).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 32))
    scale = torch.rand(6, groups)
    tensors = {
        "fc.weight_packed": words(numbers + 2 ** (bits - 1), bits, 1, in_order(bits)),
        "fc.weight_scale": scale,
        "fc.weight_shape": torch.tensor([6, 32]),
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": bits}}},
    }
    spread = torch.arange(32) // (32 // groups)
    expected = torch.from_numpy(numbers).float() * scale[:, spread]
    assert torch.equal(only(tensors, **quantization)[0], expected)
    tensors["fc.weight_shape"] = torch.tensor([6, 31])
    with pytest.raises(ValueError, match=r"weight_shape: expected \(6, 32\).*got \(6, 31\)"):
        only(tensors, **quantization)


def test_mxfp4_experts_as_gpt_oss_stores_them() -> None:
    rng = np.random.default_rng(3)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    hidden, inner, experts = 64, 32, 3
    tensors: dict[str, torch.Tensor] = {"mlp.experts.gate_up_proj_bias": torch.ones(3, 2 * inner)}
    true: dict[str, np.ndarray] = {}
    shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    for name, (rows, cols) in shapes.items():
        codes = rng.integers(0, 16, (experts, rows, cols))
        powers = rng.integers(120, 130, (experts, rows, cols // 32))
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"mlp.experts.{name}_blocks"] = torch.from_numpy(
            packed.reshape(experts, rows, cols // 32, 16).astype(np.uint8)
        )
        tensors[f"mlp.experts.{name}_scales"] = torch.from_numpy(powers.astype(np.uint8))
        true[name] = values[codes] * 2.0 ** (np.repeat(powers, 32, axis=2) - 127)
    stacks, _ = opened(tensors, {"quant_method": "mxfp4"})
    assert list(stacks) == [
        "mlp.experts.gate_up_proj.gate",
        "mlp.experts.gate_up_proj.up",
        "mlp.experts.down_proj",
    ]
    gate, up, down = (stack.numpy() for stack in stacks.values())
    np.testing.assert_array_equal(gate, true["gate_up_proj"][:, 0::2])
    np.testing.assert_array_equal(up, true["gate_up_proj"][:, 1::2])
    np.testing.assert_array_equal(down, true["down_proj"])


# --- what is not read ---


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "quantization", "what"),
    [
        (
            {
                "fc.weight": u8(12, 1),
                "fc.weight.absmax": torch.ones(3),
                "fc.weight.quant_map": torch.ones(16),
                "fc.weight.quant_state.bitsandbytes__nf4": u8(80),
            },
            {},
            "bitsandbytes nf4",
        ),
        ({"fc.weight": u8(4, 3), "fc.weight_scale_2": torch.ones(1)}, {}, "NVFP4"),
        ({"fc.weight_packed": u8(4, 3), "fc.weight_scale": torch.ones(4, 1)}, {}, "NVFP4"),
        ({"fc.weight_packed": i32(4, 1), "fc.weight_scale": torch.ones(4, 1)}, {}, "unknown bits"),
        (
            {"fc.qweight": i32(6, 64), "fc.qzeros": i32(1, 6), "fc.scales": torch.ones(1, 64)},
            {"bits": 3},
            "GPTQ, 3 bits",
        ),
        (
            {"fc.qweight": i32(32, 8), "fc.qzeros": i32(1, 8), "fc.scales": torch.ones(1, 64)},
            {"bits": 4, "version": "gemv"},
            "AWQ, version 'gemv'",
        ),
        (
            {"fc.qweight": i32(8, 64), "fc.qzeros": i32(2, 4), "fc.scales": torch.ones(1, 64)},
            {"bits": 4},
            "do not fit together as GPTQ: qweight (8, 64), qzeros (2, 4), scales (1, 64)",
        ),
        ({"fc.weight": u8(4, 3)}, {"quant_method": "hqq"}, "quant_method 'hqq', stored as uint8"),
        ({"fc.weight_qdata": i32(4, 3), "fc.weight_scale": torch.ones(4, 1)}, {}, "torchao"),
    ],
)
def test_formats_that_are_not_read_are_listed_by_name(
    tensors: dict[str, torch.Tensor], quantization: dict[str, object], what: str
) -> None:
    stacks, why = opened(tensors, quantization)
    assert stacks == {}
    assert what in why["fc"]
    assert len(why) == len(tensors)


# --- where they come from ---


def test_folder_with_a_config(tmp_path: Path) -> None:
    weight, scale = torch.randn(8, 10).to(F8), torch.rand(2, 3)
    save_file({"fc.weight": weight, "fc.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path)
    ((layer,), _) = source.layers()
    assert layer.tensors == ("fc.weight", "fc.weight_scale_inv")
    spread = scale[torch.arange(8) // 4][:, torch.arange(10) // 4]
    stack = layer.to_stack(*map(source.load, layer.tensors))
    assert torch.equal(stack[0], weight.float() * spread)


def test_gptq_folder_with_its_own_config(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (16, 8))
    tensors = {
        "fc.qweight": words(numbers, 8, 0, in_order(8)),
        "fc.qzeros": words(np.full((1, 8), 127), 8, 1, in_order(8)),
        "fc.scales": torch.ones(1, 8).half(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "quantize_config.json").write_text('{"bits": 8, "group_size": 16}')
    source = open_source(tmp_path)
    ((layer,), _) = source.layers()
    stack = layer.to_stack(*map(source.load, layer.tensors))
    np.testing.assert_array_equal(stack[0].numpy(), (numbers - 128).T)


def test_module_that_holds_its_weight_in_buffers() -> None:
    numbers = np.random.default_rng(0).integers(0, 16, (16, 8))
    module = nn.Module()
    module.fc = nn.Module()
    module.fc.register_buffer("qweight", words(numbers, 4, 0, in_order(4)))
    module.fc.register_buffer("qzeros", words(np.full((1, 8), 7), 4, 1, in_order(4)))
    module.fc.register_buffer("scales", torch.ones(1, 8).half())
    source = open_source(module)
    ((layer,), skipped) = source.layers()
    assert (layer.name, skipped) == ("fc", [])
    stack = layer.to_stack(*map(source.load, layer.tensors))
    np.testing.assert_array_equal(stack[0].numpy(), (numbers - 8).T)


class Halved(torch.Tensor):
    """Shows the shape and dtype of its values, which are half of what it holds."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Halved:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.bfloat16)
        made.held = held
        return made

    def dequantize(self) -> torch.Tensor:
        return (self.held / 2).to(torch.bfloat16)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(func)


def test_tensors_that_can_dequantise_themselves() -> None:
    module = nn.Sequential(nn.Linear(3, 4, bias=False))
    module[0].weight = nn.Parameter(Halved(torch.full((4, 3), 3.0)), requires_grad=False)
    for source in (open_source(module), open_source({"0.weight": module[0].weight})):
        ((layer,), _) = source.layers()
        stack = layer.to_stack(*map(source.load, layer.tensors))
        assert type(stack) is torch.Tensor
        assert stack.dtype == layer.dtype == torch.bfloat16
        assert torch.equal(stack, torch.full((1, 4, 3), 1.5, dtype=torch.bfloat16))


def test_float8_linear_of_a_module() -> None:
    module = nn.Sequential(nn.Linear(6, 4))
    weight = torch.randn(4, 6).to(F8)
    module[0].weight = nn.Parameter(weight, requires_grad=False)
    module[0].weight_scale_inv = nn.Parameter(torch.full((1, 1), 2.0))
    layers, skipped = layers_from_module(module)
    assert [(layer.name, layer.kind, layer.dtype) for layer in layers] == [
        ("0", "linear", torch.float32)
    ]
    assert skipped == [Skipped("0.bias", (4,), "vector, not a matrix")]
    source = open_source(module)
    spec: LayerSpec = layers[0]
    assert torch.equal(spec.to_stack(*map(source.load, spec.tensors))[0], 2 * weight.float())
