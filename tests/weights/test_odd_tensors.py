"""Tensors and modules that cannot be analysed: each is listed with its reason, the rest goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from farms_fast import FullMatrix, analyze
from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources import MappingSource, open_source
from farms_fast.weights.sources.safetensors import _natural_order
from farms_fast.weights.stacks import TensorHeader
from tests.support.layer_tables import header, reasons


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is a prototype
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])


def test_half_complex_numbers_cost_no_other_layer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the dtype is experimental
        half = torch.ones(8, 8, dtype=torch.complex64).to(torch.complex32)
    weights = {"a.weight": half, "b.weight": torch.randn(8, 8)}
    analysis = analyze(weights, FullMatrix(), progress=False, bootstrap=0)
    assert [layer.name for layer in analysis] == ["b"]
    assert "complex32 has no arithmetic" in analysis.skipped[0].reason


def test_nested_tensors_are_skipped() -> None:
    source = MappingSource({"a": nested(), "fc.weight": torch.randn(3, 4)})
    layers, skipped = source.layers()
    assert [layer.name for layer in layers] == ["fc"]
    assert [(skip.name, skip.shape) for skip in skipped] == [("a", ())]
    assert "nested" in skipped[0].reason
    module = nn.Linear(4, 3)
    module.odd = nn.Parameter(nested())
    found = layers_from_module(module)
    assert [layer.name for layer in found[0]] == ["weight"]
    assert "nested" in reasons(found)["odd"]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([["a", "b"]]), "dtype <U1 is none that torch can hold"),
        (np.array([[1, None]], dtype=object), "dtype object"),
        (np.ones((4, 4), np.longdouble), "none that torch can hold"),
        (np.zeros((4, 4), dtype=[("a", "f4")]), "none that torch can hold"),
        (np.ma.MaskedArray(np.ones((4, 4)), np.eye(4)), "with a mask"),
    ],
)
def test_arrays_that_are_no_plain_numbers_are_skipped(
    array: np.ndarray[Any, Any], reason: str
) -> None:
    found = MappingSource({"a": array, "fc.weight": np.ones((3, 4))}).layers()
    assert [layer.name for layer in found[0]] == ["fc"]
    assert reason in reasons(found)["a"]


def test_tensors_without_numbers_of_their_own_cost_no_other_layer() -> None:
    with FakeTensorMode():
        fake = torch.randn(8, 8)
    weights = {"a.weight": fake, "b.weight": torch.randn(8, 8)}
    analysis = analyze(weights, FullMatrix(), progress=False, bootstrap=0)
    assert {layer.name: layer.status for layer in analysis} == {"a": "error", "b": "ok"}
    assert "a.weight: expected a plain tensor" in analysis["a"].message


def test_packed_weights_are_listed() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.Conv2d(4, 6, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        packed = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        packed[3] = torch.ao.nn.quantized.Conv2d(4, 6, 3)
    found = layers_from_module(packed)
    assert found[0] == []
    names = ["0._packed_params._packed_params", "2._packed_params._packed_params"]
    assert list(reasons(found)) == [*names, "3._packed_params"]
    assert all("analyse the model as it was before" in why for why in reasons(found).values())


def test_packed_state_dict_lists_its_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = torch.ao.nn.quantized.Conv2d(4, 6, 3)
        _, skipped = MappingSource(conv.state_dict()).layers()
    assert "qint8" in {skip.name: skip.reason for skip in skipped}["weight"]


def test_script_modules_are_refused_by_name_and_skipped_within_others() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module of Python code.*state_dict"):
        layers_from_module(scripted)
    found = layers_from_module(nn.Sequential(scripted, nn.Linear(4, 3)))
    assert [layer.name for layer in found[0]] == ["1"]
    assert "ScriptModule" in reasons(found)["0"]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_does_not_matter(default: str, tmp_path: Path) -> None:
    weights = {
        "fc.weight": torch.randn(20, 12),
        "q.weight": torch.randn(8, 8).to(torch.float8_e5m2),
    }
    weights["n.weight_g"], weights["n.weight_v"] = torch.ones(8, 1), torch.randn(8, 6)
    torch.save(weights, tmp_path / "w.pt")
    module = nn.Linear(12, 20)
    try:
        torch.set_default_device(default)
        for model in (weights, tmp_path / "w.pt", module):
            analysis = analyze(model, FullMatrix(), progress=False, device="cpu")
            assert {layer.status for layer in analysis} == {"ok"}
    finally:
        torch.set_default_device(None)


PARTS = [
    *("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "scale", "SCB"),
    *("weight_packed", "weight_shape", "qweight", "qzeros", "scales", "g_idx", "w_blocks"),
    *("w_scales", "weight_g", "weight_v", "weight_u", "weight_orig", "weight_mask", "bias"),
    *("parametrizations.weight.original0", "parametrizations.weight.original1"),
    *("parametrizations.weight.original", "parametrizations.weight.0._u"),
    *("kernel", "recurrent_kernel", "depthwise_kernel"),
]
DTYPES = [
    *(torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.float32, torch.float16),
    *(torch.complex64, torch.complex32, torch.bool, torch.float8_e8m0fnu),
]


@given(
    st.dictionaries(
        st.sampled_from(PARTS),
        st.tuples(
            st.lists(st.sampled_from([0, 1, 2, 4, 8, 16]), max_size=4), st.sampled_from(DTYPES)
        ),
        max_size=6,
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "quant_method": st.sampled_from(["gptq", "awq", 3, None]),
            "bits": st.sampled_from([0, 4, 8, "4", -1, None, [4]]),
            "group_size": st.sampled_from([0, -1, 4, 128, "x", None]),
            "weight_block_size": st.sampled_from([[0, 0], [4, 4], [128], "x", [1, None]]),
            "version": st.sampled_from(["gemm", 1, None]),
        },
    ),
)
def test_no_combination_of_parts_raises_and_every_name_is_told(
    parts: dict[str, tuple[list[int], torch.dtype]], quantization: dict[str, object]
) -> None:
    headers = [
        TensorHeader(f"m.{name}", tuple(shape), dtype) for name, (shape, dtype) in parts.items()
    ]
    config = ModelConfig.of({"quantization_config": quantization})
    layers, skipped = layers_from_headers([*headers, header("fc.weight", 4, 4)], config=config)
    assert "fc" in [layer.name for layer in layers]
    read = {tensor for layer in layers for tensor in layer.tensors}
    told = {skip.name for skip in skipped}
    for stored in headers:
        base = stored.name.removesuffix(".weight")
        whole = base.rpartition(".")[0]
        assert stored.name in read or told & {stored.name, base, whole, f"{whole}.w"}


def test_scale_of_complex_numbers_is_refused() -> None:
    tensors = [
        header("q.weight", 4, 4, dtype=torch.int8),
        header("q.weight_scale", 4, 1, dtype=torch.complex64),
    ]
    found = layers_from_headers(tensors)
    assert found[0] == []
    assert reasons(found)["q"] == "quantised weight whose weight_scale holds complex numbers"


def test_name_of_many_digits_is_a_name() -> None:
    names = ["l.10.weight", "l.9.weight", f"l.{'9' * 5000}.weight", "l.010.weight"]
    assert sorted(names, key=_natural_order) == [names[1], names[0], names[3], names[2]]


def test_open_source_of_a_script_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 3))
    source = open_source(dict(scripted.state_dict()))
    assert [layer.name for layer in source.layers()[0]] == ["weight"]


@pytest.mark.parametrize("other", [torch.ones(4, 8), torch.ones(8, 8, dtype=torch.complex64)])
def test_tensor_that_is_not_as_its_header_said_costs_no_other_layer(
    other: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = MappingSource.load

    def changed(source: MappingSource, name: str) -> torch.Tensor:
        return other if name == "a.weight" else load(source, name)

    monkeypatch.setattr(MappingSource, "load", changed)
    weights = {f"{name}.weight": torch.randn(8, 8) for name in "ab"}
    analysis = analyze(weights, FullMatrix(), progress=False, bootstrap=0)
    assert {layer.name: layer.status for layer in analysis} == {"a": "error", "b": "ok"}
    assert "expected a real stack of shape (1, 8, 8)" in analysis["a"].message
