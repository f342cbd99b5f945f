"""Reparametrised weights in files and state dicts, against what the module has in effect."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

from farms_fast import FullMatrix, analyze
from farms_fast.weights.digest import layer_digest_of
from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.sources import MappingSource, open_source
from tests.support.layer_tables import header, reasons, stack_of


def stacks(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks by layer of a state dict, which stays as it is."""
    before = copy.deepcopy(dict(tensors))
    source = MappingSource(tensors)
    found = {}
    for layer in source.layers()[0]:
        loaded = [source.load(name) for name in layer.tensors]
        found[layer.name] = layer.to_stack(*loaded)
        assert found[layer.name].shape == layer.shape
        assert found[layer.name].dtype == layer.dtype
        assert len(layer_digest_of(layer, loaded)) == 40
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    return found


def same_as_module(module: nn.Module, transposed: bool = False) -> None:
    """Whether the state dict gives the layers that the module has, within float32 rounding.

    A header does not say whether a square convolution is `transposed`.
    """
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {layer.name: stack_of(module, layer) for layer in layers_from_module(module)[0]}
    found = stacks(module.state_dict())
    assert list(found) == list(expected)
    for name, stack in expected.items():
        stored = found[name].mT if transposed else found[name]
        torch.testing.assert_close(stored, stack, rtol=4e-7, atol=0)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "square": lambda: nn.Linear(6, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
}


def hooked(norm: Callable[..., nn.Module], layer: nn.Module, **options: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have the parametrisation
        return norm(layer, **options)


def run(layer: nn.Module, kind: str) -> None:
    """Runs the layer once: that is when a hook writes the weight."""
    positions = {"conv1d": 1, "conv2d": 2, "transposed": 2}.get(kind, 0)
    with torch.no_grad():
        layer(torch.zeros(1, 4 if positions else 6, *[5] * positions))


@pytest.mark.parametrize("norm", [hooked_weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("kind", ["linear", "square", "conv1d", "conv2d"])
def test_weight_norm(norm: Callable[..., nn.Module], dim: int | None, kind: str) -> None:
    layer = hooked(norm, LAYERS[kind](), dim=dim)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter *= torch.rand(parameter.shape) + 0.1
    run(layer.eval(), kind)
    same_as_module(nn.Sequential(layer))


@pytest.mark.parametrize("norm", [hooked_spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_spectral_norm(norm: Callable[..., nn.Module], kind: str) -> None:
    layer = hooked(norm, LAYERS[kind]())
    run(layer.train(), kind)
    run(layer.eval(), kind)
    same_as_module(nn.Sequential(layer), transposed=kind == "transposed")


def test_spectral_norm_under_the_name_of_early_implementations() -> None:
    weight, u, v = torch.randn(5, 6), torch.randn(5), torch.randn(6)
    found = stacks({"c.weight_bar": weight, "c.weight_u": u, "c.weight_v": v})
    torch.testing.assert_close(found["c"][0], weight / (u @ weight @ v))


def test_pruned_weights() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 6, 3))
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    prune.l1_unstructured(net[0], "bias", amount=0.5)
    prune.ln_structured(net[1], "weight", amount=0.5, n=2, dim=0)
    same_as_module(net)


@pytest.mark.parametrize("leaf", ["mask", "weight_mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_mask_beside_the_weight_that_it_masks(leaf: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    net[0].register_buffer(leaf, (torch.rand(6, 2, 3, 3) > 0.4).to(dtype))
    expected = net[0].weight * getattr(net[0], leaf)
    assert torch.equal(stacks(net.state_dict())["0"][0], expected[:, :, 0, 0])
    (layer,) = layers_from_module(net)[0]
    assert layer.shape == (18, 3, 2)
    assert torch.equal(stack_of(net, layer)[0], expected[:3, :, 0, 0])


def test_mask_of_other_numbers_is_that_layers_error() -> None:
    weights = {"a.weight": torch.randn(8, 6), "a.weight_mask": torch.rand(8, 6)}
    analysis = analyze({**weights, "b.weight": torch.randn(8, 6)}, FullMatrix(), progress=False)
    assert {layer.name: layer.status for layer in analysis} == {"a": "error", "b": "ok"}
    assert "expected zeros and ones" in analysis["a"].message


@pytest.mark.slow
def test_model_of_hugging_face_in_a_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_kernel=(4, 3),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        vocab_size=8,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    found = {layer.name: layer for layer in source.layers()[0]}
    expected = {layer.name: layer for layer in layers_from_module(model)[0]}
    assert set(found) == set(expected)
    name = "encoder.pos_conv_embed.conv"
    assert found[name].shape == (32, 4, 4)
    stack = found[name].to_stack(*map(source.load, found[name].tensors))
    torch.testing.assert_close(stack, stack_of(model, expected[name]), rtol=4e-7, atol=0)


def test_file_has_the_alpha_of_the_module(tmp_path: Path) -> None:
    layer = nn.Linear(40, 60, bias=False)
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0 *= torch.logspace(-2, 1, 60)[:, None]
    net = nn.Sequential(layer)
    right = analyze(net, FullMatrix(), progress=False)["0"].alpha
    torch.save(net.state_dict(), tmp_path / "a.pt")
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pt", "a.safetensors"):
        (read,) = analyze(tmp_path / file, FullMatrix(), progress=False)
        assert read.alpha == pytest.approx(right, rel=1e-6)


def test_lengths_of_many_rows_are_those_of_all_of_them() -> None:
    v, g = torch.randn(1300, 5), torch.rand(1, 5)
    found = stacks({"a.weight_v": v, "a.weight_g": g})["a"][0]
    expected = (g * v / v.double().norm(dim=0, keepdim=True)).float()
    torch.testing.assert_close(found, expected, rtol=4e-7, atol=0)
    u, w = torch.randn(1300), torch.randn(5)
    found = stacks({"a.weight_orig": v, "a.weight_u": u, "a.weight_v": w})["a"][0]
    sigma = u.double() @ v.double() @ w.double()
    torch.testing.assert_close(found, (v / sigma).float(), rtol=4e-7, atol=0)


P = "a.parametrizations.weight"


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"a.weight_v": (6, 4)}, "other parts are missing"),
        ({"a.weight_g": (6, 1)}, "other parts are missing"),
        ({"a.weight_orig": (6, 4)}, "other parts are missing"),
        ({"a.weight_orig": (6, 4), "a.weight_u": (6,)}, "other parts are missing"),
        ({"a.weight_g": (5, 1), "a.weight_v": (6, 4)}, "do not fit together: g (5, 1), v (6, 4)"),
        ({"a.weight_orig": (6, 4), "a.weight_mask": (4, 6)}, "do not fit together"),
        ({"a.weight_orig": (6, 4), "a.weight_u": (4,), "a.weight_v": (4,)}, "do not fit together"),
        ({"a.weight": (6, 4), "a.weight_g": (6, 1)}, "names do not tell"),
        ({f"{P}.original": (6, 4)}, "names do not tell"),
        ({f"{P}.original": (6, 4), f"{P}.0.base": (6, 4)}, "names do not tell"),
        ({f"{P}.original0": (6, 4), f"{P}.original1": (6, 4)}, "do not fit together"),
        ({f"{P}.original": (6, 4), f"{P}.0.p.parametrizations.weight.original": (6, 4)}, "names"),
    ],
)
def test_no_part_is_a_layer_by_itself(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    found = layers_from_headers([header(name, *shape) for name, shape in shapes.items()])
    assert found[0] == []
    told = reasons(found)
    assert len(told) == len(shapes)
    assert all(reason in why for why in told.values())


def test_weight_that_is_stored_beside_its_parts_is_taken_as_stored() -> None:
    shapes = {"a.weight": (6, 4), "a.weight_orig": (6, 4), "a.weight_u": (6,)}
    found = layers_from_headers([header(name, *shape) for name, shape in shapes.items()])
    assert [(layer.name, layer.tensors) for layer in found[0]] == [("a", ("a.weight",))]
    assert set(reasons(found).values()) == {"part of a.weight, which is stored as well"}


def test_names_that_only_resemble_parts_are_layers_of_their_own() -> None:
    names = ["w_u", "attn_v", "attn_g", "x_orig", "rkv.r_v"]
    layers, skipped = layers_from_headers([header(name, 6, 4) for name in names])
    assert [layer.name for layer in layers] == names
    assert skipped == []


def test_parts_that_are_quantised_are_not_read() -> None:
    v, g = header("a.weight_v", 6, 4, dtype=torch.float8_e4m3fn), header("a.weight_g", 6, 1)
    found = layers_from_headers([v, g])
    assert found[0] == []
    assert all("quantised as well" in why for why in reasons(found).values())


def test_complex_parts_are_refused() -> None:
    c64 = torch.complex64
    found = layers_from_headers(
        [header("a.weight_v", 6, 4, dtype=c64), header("a.weight_g", 6, 1, dtype=c64)]
    )
    assert found[0] == []


def test_parametrisation_that_fails_costs_no_other_layer() -> None:
    class Fails(nn.Module):
        broken = False

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise RuntimeError("out of order")
            return weight

    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(net[0], "weight", Fails())
    Fails.broken = True
    found = layers_from_module(net)
    assert [layer.name for layer in found[0]] == ["1"]
    assert "out of order" in reasons(found)["0"]
