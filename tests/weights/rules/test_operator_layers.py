"""Weights of neural operators, against NumPy's complex SVD and what the modules compute."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from neuralop.layers.legacy_spectral_convolution import SpectralConv as QuadrantConv
from neuralop.layers.spectral_convolution import SpectralConv
from neuralop.models import FNO, SFNO, TFNO, UNO
from tltorch import FactorizedTensor
from torch import nn

from benchmarks.effect.operators import TOY, DenoisingOperator, FourierOperator
from farms_fast import FixedAspectSampling, FullMatrix, analyze
from farms_fast.live import LiveAnalysis
from farms_fast.weights.layers import layers_from_headers, layers_from_module
from farms_fast.weights.rules.operator_layers import factor_matrices
from farms_fast.weights.stacks import Skipped, TensorHeader
from tests.support.layer_tables import by_module, header, stack_of

C64, F32 = torch.complex64, torch.float32


def complex_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.complex128)


def reasons(skipped: Sequence[Skipped]) -> dict[str, str]:
    return {skip.name: skip.reason for skip in skipped}


def from_svd(matrices: np.ndarray) -> np.ndarray:
    """Ascending squared singular values of each of a stack of matrices."""
    return np.linalg.svd(matrices, compute_uv=False)[..., ::-1] ** 2


# ---------------------------------------------------------------------------- dense, against NumPy


@pytest.mark.parametrize("modes", [(9,), (4, 3), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("pairs", [False, True], ids=["complex", "pairs"])
def test_every_mode_is_a_complex_matrix_of_its_own(modes: tuple[int, ...], pairs: bool) -> None:
    weight = complex_normal(6, 4, *modes)
    stored = torch.view_as_real(weight) if pairs else weight
    (layer,) = analyze({"block.weights1": stored}, FullMatrix(), progress=False)
    assert (layer.name, layer.kind) == ("block.weights1", "spectral")
    matrices = np.moveaxis(weight.numpy().reshape(6, 4, -1), 2, 0)
    assert layer.shape == matrices.shape
    np.testing.assert_allclose(layer.window_evals, from_svd(matrices), rtol=1e-11)
    np.testing.assert_allclose(layer.evals, np.sort(from_svd(matrices).ravel()), rtol=1e-11)


def test_windows_of_all_modes_are_pooled() -> None:
    weight = complex_normal(7, 5, 3)
    sampling = FixedAspectSampling(rows=3, per_dim=2)
    (layer,) = analyze({"spectral": weight}, sampling, progress=False)
    grid = sampling.grid(7, 5)
    windows = [
        weight[r : r + 3, c : c + 3, mode].numpy()
        for mode in range(3)
        for r in grid.row_starts
        for c in grid.column_starts
    ]
    assert len(windows) == 3 * grid.count
    np.testing.assert_allclose(layer.evals, np.sort(from_svd(np.stack(windows)).ravel()), rtol=1e-9)


class PairedSpectralConv(nn.Module):
    """As in models from before torch had complex parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.view_as_real(complex_normal(4, 6, 5)).to(dtype))
        self.smooth = nn.Conv2d(4, 6, 2, bias=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32, torch.float64], ids=str)
def test_real_pairs_are_known_by_the_class_of_their_module(dtype: torch.dtype) -> None:
    module = PairedSpectralConv(dtype)
    layers = by_module(module)
    wide = torch.complex128 if dtype == torch.float64 else C64
    assert (layers["kernel"].shape, layers["kernel"].dtype) == ((5, 4, 6), wide)
    stack = stack_of(module, layers["kernel"])
    assert stack.dtype == wide
    for mode in range(5):
        assert torch.equal(stack[mode].real.to(dtype), module.kernel[:, :, mode, 0])
        assert torch.equal(stack[mode].imag.to(dtype), module.kernel[:, :, mode, 1])
    # A kernel of two points beside it is one.
    assert (layers["smooth"].kind, layers["smooth"].shape) == ("conv2d", (4, 6, 4))


@pytest.mark.parametrize(
    "name", ["conv0.weights1", "fourier_weight.0", "net.SpectralConv.weight", "spectral.w"]
)
def test_real_pairs_are_known_by_name_in_a_checkpoint(name: str) -> None:
    ((layer,), _) = layers_from_headers([header(name, 6, 4, 5, 3, 2)])
    assert (layer.kind, layer.shape, layer.dtype) == ("spectral", (15, 6, 4), C64)


@pytest.mark.parametrize(
    "headers",
    [
        [header("down.weight", 8, 4, 2, 2)],
        [header("fourier.conv.weight", 8, 4, 2, 2), header("fourier.conv.bias", 8)],
        [header("weights1", 8, 4, 2)],
    ],
    ids=["no name", "a convolution's bias", "no modes"],
)
def test_kernels_of_two_points_stay_kernels(headers: list[TensorHeader]) -> None:
    layers, _ = layers_from_headers(headers)
    assert [layer.kind for layer in layers] == [f"conv{len(headers[0].shape) - 2}d"]
    assert layers[0].dtype == F32


# ---------------------------------------------------------------------------- factorised weights


def tucker(parts: list[np.ndarray]) -> np.ndarray:
    return np.einsum("abcd,ia,jb,kc,ld->ijkl", *parts, optimize=True)


def cp(parts: list[np.ndarray]) -> np.ndarray:
    return np.einsum("a,ia,ja,ka,la->ijkl", *parts, optimize=True)


def tensor_train(parts: list[np.ndarray]) -> np.ndarray:
    return np.einsum("zia,ajb,bkc,cly->ijkl", *parts, optimize=True)


KINDS = {"tucker": tucker, "cp": cp, "tt": tensor_train}


@pytest.mark.parametrize("complex_class", [False, True], ids=["complex", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_factorised_weights_are_analysed_as_the_whole(kind: str, complex_class: bool) -> None:
    torch.manual_seed(1)
    name = f"Complex{kind}" if complex_class else kind
    module = nn.Module()
    module.weight = FactorizedTensor.new((6, 5, 4, 3), 0.6, name, dtype=torch.complex128)
    module.weight.normal_(0, 1)
    (spec,) = by_module(module).values()
    assert (spec.name, spec.kind, spec.shape) == ("weight", "spectral", (12, 6, 5))
    stored = {key: value.detach() for key, value in module.named_parameters()}
    assert set(spec.tensors) == set(stored)
    parts = [stored[tensor] for tensor in spec.tensors]
    if complex_class:
        assert all(part.dtype == torch.float64 and part.shape[-1] == 2 for part in parts)
        parts = [torch.view_as_complex(part) for part in parts]
    whole = KINDS[kind]([part.numpy() for part in parts])
    matrices = np.moveaxis(whole.reshape(6, 5, 12), 2, 0)
    np.testing.assert_allclose(stack_of(module, spec).numpy(), matrices, rtol=1e-12, atol=1e-14)
    # The library's own reconstruction is the same, and so is a state dict's.
    torch.testing.assert_close(module.weight.to_tensor(), torch.from_numpy(whole))
    (layer,) = analyze(module, FullMatrix(), progress=False)
    (again,) = analyze(dict(module.state_dict()), FullMatrix(), progress=False)
    assert (again.name, again.evals.tobytes()) == (layer.name, layer.evals.tobytes())
    expected = from_svd(matrices)
    np.testing.assert_allclose(layer.window_evals, expected, rtol=1e-8, atol=1e-12 * expected.max())


@pytest.mark.parametrize("complex_class", [False, True], ids=["complex", "pairs"])
def test_factors_are_matrices_where_they_are_asked_for(complex_class: bool) -> None:
    expected = {
        "tucker": {
            "weight.core": (4, 3, 3),
            "weight.factors.factor_0": (1, 6, 3),
            "weight.factors.factor_1": (1, 5, 3),
            "weight.factors.factor_2": (1, 4, 2),
            "weight.factors.factor_3": (1, 3, 2),
        },
        "cp": {f"weight.factors.factor_{n}": (1, s, 7) for n, s in enumerate((6, 5, 4, 3))},
        "tt": {
            "weight.factors.factor_0": (1, 6, 4),
            "weight.factors.factor_1": (1, 20, 3),
            "weight.factors.factor_2": (1, 12, 2),
            "weight.factors.factor_3": (1, 2, 3),
        },
    }
    ranks: dict[str, object] = {"tucker": (3, 3, 2, 2), "cp": 7, "tt": (1, 4, 3, 2, 1)}
    for kind, shapes in expected.items():
        name = f"Complex{kind}" if complex_class else kind
        module = nn.Module()
        module.weight = FactorizedTensor.new((6, 5, 4, 3), ranks[kind], name, dtype=C64)
        module.weight.normal_(0, 1)
        layers = by_module(module, change=factor_matrices)
        assert {n: spec.shape for n, spec in layers.items()} == shapes
        for spec in layers.values():
            stack = stack_of(module, spec)
            assert (tuple(stack.shape), stack.dtype) == (spec.shape, C64)
        stack = stack_of(module, layers["weight.factors.factor_1"])
        factor = list(module.weight.factors)[1].detach()
        assert torch.equal(stack[0].flatten(), factor.flatten())


def test_factors_that_do_not_fit_together_are_reported() -> None:
    parts = [header("w.core", 2, 2), header("w.factors.factor_0", 6, 2)]
    parts.append(header("w.factors.factor_1", 5, 3))
    layers, skipped = layers_from_headers(parts)
    assert layers == []
    assert "do not fit together: (2, 2), (6, 2), (5, 3)" in reasons(skipped)["w.core"]
    assert len(skipped) == 3


def test_tensorised_matrices_are_reported() -> None:
    from tltorch import FactorizedLinear

    module = FactorizedLinear((4, 4), (4, 4), rank=0.5, factorization="tucker")
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert "tensorised matrix, which is not read" in reasons(skipped)["weight.core"]


def test_tied_factorised_weights_count_once_and_layers_survive_pickling() -> None:
    first, second = nn.Module(), nn.Module()
    first.weight = FactorizedTensor.new((6, 5, 4), 0.5, "Tucker", dtype=C64)
    first.weight.normal_(0, 1)
    second.weight = first.weight
    module = nn.ModuleDict({"a": first, "b": second})
    (spec,), skipped = layers_from_module(module)
    assert spec.name == "a"
    assert reasons(skipped)["b"] == "tied to a"
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    assert torch.equal(stack_of(module, again), stack_of(module, spec))


# ---------------------------------------------------------------------------- neuraloperator


@pytest.mark.parametrize("factorization", [None, "Tucker", "CP", "TT"])
def test_matrices_are_those_that_the_convolution_applies(factorization: str | None) -> None:
    torch.manual_seed(2)
    module = SpectralConv(5, 4, (6, 6), bias=False, factorization=factorization, rank=0.7)
    (spec,) = by_module(module).values()
    # (in, out, x modes, y modes), the frequencies along x from the lowest to the highest.
    stack = stack_of(module, spec).reshape(6, 4, 5, 4).detach()
    n = 16
    impulses = torch.zeros(5, 5, n, n)
    impulses[range(5), range(5), 0, 0] = 1
    with torch.no_grad():
        answer = torch.fft.rfft2(module(impulses))  # an impulse has every frequency once
    for x, frequency in enumerate(range(-3, 3)):
        for y in range(1, 4):  # of frequency 0 a real field keeps the Hermitian part alone
            torch.testing.assert_close(answer[:, :, frequency, y], stack[x, y], rtol=0, atol=1e-5)


def small(kind: type[nn.Module], **options: object) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"n_modes": (8, 6), "in_channels": 2, "out_channels": 3, "hidden_channels": 8}
    model: nn.Module = kind(**sizes, n_layers=2, **options)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("factorization", [None, "Tucker", "CP", "TT"])
def test_every_weight_of_an_fno_is_a_layer_of_its_module_name(factorization: str | None) -> None:
    model = small(TFNO if factorization else FNO, **({"rank": 0.5} if factorization else {}))
    layers = by_module(model)
    for number in range(2):
        assert layers[f"fno_blocks.convs.{number}"].shape == (8 * 4, 8, 8)
        assert layers[f"fno_blocks.fno_skips.{number}.conv"].kind == "conv1d"
        assert layers[f"fno_blocks.channel_mlp.{number}.fcs.0"].shape == (1, 4, 8)
    spectral = [name for name, spec in layers.items() if spec.kind == "spectral"]
    assert spectral == ["fno_blocks.convs.0", "fno_blocks.convs.1"]
    for layer in analyze(model, FullMatrix(), progress=False):
        assert layer.message == "" or layer.status != "error", layer.message


@pytest.mark.parametrize("factorization", [None, "tucker", "cp", "tt"])
def test_spherical_operators_keep_one_matrix_for_each_degree(factorization: str | None) -> None:
    model = small(SFNO, factorization=factorization, rank=0.5)
    spec = by_module(model)["fno_blocks.convs.0"]
    assert (spec.kind, spec.shape, spec.dtype) == ("spectral", (8, 8, 8), C64)
    whole = model.fno_blocks.convs[0].weight.to_tensor().detach()
    torch.testing.assert_close(stack_of(model, spec), whole.permute(2, 0, 1))


def test_u_shaped_operators() -> None:
    model = UNO(
        in_channels=2, out_channels=1, hidden_channels=8, uno_out_channels=[8, 8, 8],
        uno_n_modes=[[4, 4], [4, 4], [4, 4]], uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]],
        n_layers=3, channel_mlp_skip="linear", horizontal_skips_map={2: 0},
    )  # fmt: skip
    layers = by_module(model)
    assert layers["fno_blocks.0.convs.0"].shape == (4 * 3, 8, 8)
    assert layers["fno_blocks.2.convs.0"].shape == (4 * 3, 16, 8)  # with the skipped channels


def test_quadrants_of_the_older_convolution_are_layers() -> None:
    module = QuadrantConv(4, 6, (8, 8))
    layers = by_module(module)
    assert {name: spec.shape for name, spec in layers.items()} == {
        "weight.0": (16, 4, 6),
        "weight.1": (16, 4, 6),
    }
    joint = QuadrantConv(4, 6, (8, 8), n_layers=2, joint_factorization=True, factorization="tucker")
    (spec,) = by_module(joint).values()
    assert (spec.name, spec.shape) == ("weight", (4 * 16, 4, 6))
    whole = joint.weight.to_tensor().detach()  # (layers and quadrants, in, out, x, y)
    torch.testing.assert_close(stack_of(joint, spec)[17], whole[1, :, :, 0, 1])


@pytest.mark.parametrize("factorization", [None, "tucker"])
def test_separable_convolutions_have_no_matrices(factorization: str | None) -> None:
    module = SpectralConv(6, 6, (8, 8), separable=True, factorization=factorization)
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert all("separable" in s.reason for s in skipped if s.name != "bias")


# ---------------------------------------------------------------------------- other operators


def test_dpot_shaped_model() -> None:
    torch.manual_seed(4)
    model = DenoisingOperator(4, 3, TOY)
    layers = by_module(model)
    expected = {
        "time_agg.w": ("stacked", (3, 16, 16)),
        "patch_embed.0": ("conv2d", (16, 8, 6)),
        "blocks.1.filter.w1": ("spectral", (2, 8, 8)),
        "blocks.1.mlp.0": ("conv2d", (1, 16, 16)),
        "out.0": ("conv_transpose2d", (16, 8, 16)),
    }
    assert {name: (layers[name].kind, layers[name].shape) for name in expected} == expected
    analysis = analyze(model, FullMatrix(), progress=False)
    w = model.time_agg.w.detach().double().numpy()
    np.testing.assert_allclose(analysis["time_agg.w"].window_evals, from_svd(w), rtol=1e-9)
    real, imaginary = model.blocks[1].filter.w1.detach().double().numpy()
    np.testing.assert_allclose(
        analysis["blocks.1.filter.w1"].window_evals, from_svd(real + 1j * imaginary), rtol=1e-9
    )


def test_conv1d_of_width_one_and_unet_convolutions() -> None:
    torch.manual_seed(5)
    model = nn.ModuleDict(
        {
            "pointwise": nn.Conv1d(6, 4, 1),
            "down": nn.Conv2d(6, 8, 3, stride=2),
            "up": nn.ConvTranspose2d(8, 6, 2, stride=2),
            "volume": nn.Conv3d(3, 4, 2),
        }
    )
    analysis = analyze(model, FullMatrix(), progress=False)
    kernels = {
        "pointwise": (0, 1),
        "down": (0, 1),
        "up": (1, 0),
        "volume": (0, 1),
    }
    for name, (out, into) in kernels.items():
        weight = model[name].weight.detach().double().numpy()
        weight = np.moveaxis(weight, (out, into), (-2, -1))
        matrices = weight.reshape(-1, *weight.shape[-2:])
        np.testing.assert_allclose(analysis[name].window_evals, from_svd(matrices), rtol=1e-9)


class BlockLinear(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


class CausalConv(BlockLinear):
    pass


def test_a_three_dimensional_weight_is_stacked_along_its_shorter_end() -> None:
    module = nn.ModuleList([BlockLinear(3, 6, 5), BlockLinear(6, 5, 3), CausalConv(3, 6, 5)])
    found = [(spec.kind, spec.shape) for spec in by_module(module).values()]
    assert found == [("stacked", (3, 6, 5)), ("conv1d", (3, 6, 5)), ("conv1d", (5, 3, 6))]


# ---------------------------------------------------------------------------- degenerate weights


def test_no_modes_is_an_empty_tensor_with_its_reason() -> None:
    module = nn.Module()
    module.weights1 = nn.Parameter(torch.empty(6, 4, 0, 3, dtype=C64))
    module.weights2 = nn.Parameter(torch.empty(6, 4, 0, 2))
    layers, skipped = layers_from_module(module)
    assert layers == []
    assert reasons(skipped) == dict.fromkeys(("weights1", "weights2"), "empty tensor")


def test_modes_that_are_zero_add_no_value_to_a_fit() -> None:
    weight = complex_normal(6, 6, 8)
    padded = torch.cat((weight, torch.zeros(6, 6, 40)), dim=2)
    part, whole = analyze(
        {"spectral.a": weight, "spectral.b": padded}, FullMatrix(), progress=False
    )
    assert (whole.num_evals, part.num_evals) == (288, 48)
    assert (whole.alpha, whole.D, whole.xmin) == (part.alpha, part.D, part.xmin)
    (zero,) = analyze({"spectral": torch.zeros(6, 6, 8, dtype=C64)}, FullMatrix(), progress=False)
    assert zero.status == "too_few"
    assert np.isnan(zero.alpha)


def test_of_rank_one_modes_the_live_analysis_keeps_one_value_each() -> None:
    one, two = complex_normal(8, 1, 12), complex_normal(1, 8, 12, seed=1)
    module = nn.Module()
    module.weights1 = nn.Parameter(one * two)
    sizes = (one.abs() ** 2).sum(0)[0] * (two.abs() ** 2).sum(1)[0]
    (layer,) = LiveAnalysis(module, FullMatrix(), evals_threshold=1e-5, min_evals=12)()
    assert (layer.status, layer.n_evals) == ("ok", 12)
    tail = sizes.sort().values[6:].log()  # the median rule
    assert layer.alpha == pytest.approx(1 + 6 / float((tail - tail[0]).sum()), rel=1e-9)
    (few,) = LiveAnalysis(module, FullMatrix(), evals_threshold=1e-5, min_evals=13)()
    assert few.status == "too_few"


def test_equal_modes_are_a_degenerate_tail() -> None:
    module = nn.Module()
    module.weights1 = nn.Parameter(torch.eye(6, dtype=C64)[:, :, None].repeat(1, 1, 4))
    (layer,) = LiveAnalysis(module, FullMatrix())()
    assert layer.status == "degenerate_tail"
    assert np.isnan(layer.alpha)


def test_live_analysis_reads_the_factors_anew() -> None:
    torch.manual_seed(6)
    operators = [small(SFNO, factorization="tucker", rank=0.5), FourierOperator(4, 2, 8, (6, 4))]
    module = nn.ModuleList(operators)
    live = LiveAnalysis(module, FullMatrix(), evals_threshold=1e-9, include=["*conv*", "*.spec*"])
    first = {layer.name: layer for layer in live()}
    assert {layer.status for layer in first.values()} == {"ok"}
    with torch.no_grad():
        operators[0].fno_blocks.convs[0].weight._parameters["core"].mul_(3.0)
    second = {layer.name: layer for layer in live()}
    changed = "0.fno_blocks.convs.0"
    assert second[changed].xmin == pytest.approx(9 * first[changed].xmin, rel=1e-5)
    assert {name for name in first if second[name] != first[name]} == {changed}


def test_a_store_sees_that_a_factor_has_changed(tmp_path: Path) -> None:
    model = small(TFNO, rank=0.5)

    def smallest_of_tails() -> list[float]:
        analysis = analyze(
            model, FullMatrix(), store=tmp_path / "r.db", include="*convs*", progress=False
        )
        return [layer.xmin for layer in analysis]

    first, again = smallest_of_tails(), smallest_of_tails()
    assert again == first
    with torch.no_grad():
        list(model.fno_blocks.convs[1].weight.factors)[3].mul_(2)
    changed = smallest_of_tails()
    assert changed[0] == first[0]
    assert changed[1] == pytest.approx(4 * first[1], rel=1e-6)


def test_alphas_are_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(10)
    for model in (
        small(TFNO, rank=0.5),
        FourierOperator(4, 2, 16, (6, 4)),
        DenoisingOperator(4, 3, TOY),
    ):
        sampling = FixedAspectSampling(rows=8, per_dim=2)
        expected = LiveAnalysis(model, sampling, evals_threshold=1e-7)()
        found = LiveAnalysis(model.to(device), sampling, evals_threshold=1e-7)()
        assert [layer.status for layer in found] == [layer.status for layer in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.alpha == pytest.approx(other.alpha, rel=1e-6, nan_ok=True)


# ---------------------------------------------------------------------------- AFNO blocks


class TrailingAFNO(nn.Module):
    """Blocks of complex matrices as ``(blocks, in, out, 2)``."""

    def __init__(self, bias: tuple[int, ...] | None, blocks: int = 4, dtype: torch.dtype = F32):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        for number, (inputs, outputs) in enumerate([(6, 12), (12, 6)], start=1):
            weight = torch.randn((blocks, inputs, outputs, 2), generator=draw)
            setattr(self, f"w{number}", nn.Parameter(weight.to(dtype)))
            if bias == (1,):
                shape: tuple[int, ...] = (1, blocks * 6, 1, 1)
            elif bias is not None:
                shape = (blocks, outputs, *bias)
            if bias is not None:
                setattr(self, f"b{number}", nn.Parameter(torch.zeros(shape, dtype=dtype)))


BIASES = [None, (2,), (1, 1, 2), (1,)]


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=str)
def test_afno_weights_with_parts_last_are_complex_matrices(
    bias: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    module = nn.ModuleDict({"filter": TrailingAFNO(bias, dtype=dtype)})
    analysis = analyze(module, FullMatrix(), bootstrap=0, progress=False)
    assert [(x.name, x.kind, x.shape) for x in analysis] == [
        ("filter.w1", "spectral", (4, 6, 12)),
        ("filter.w2", "spectral", (4, 12, 6)),
    ]
    for layer, leaf in zip(analysis, ("w1", "w2"), strict=True):
        stored = getattr(module["filter"], leaf).detach().double().numpy()
        expected = np.sort(from_svd(stored[..., 0] + 1j * stored[..., 1]).ravel())
        np.testing.assert_allclose(layer.evals, expected, rtol=1e-9 if dtype == F32 else 1e-5)
    assert reasons(analysis.skipped) == (
        {}
        if bias is None
        else dict.fromkeys(("filter.b1", "filter.b2"), "a bias (of an AFNO block), not a weight")
    )


@pytest.mark.parametrize("bias", BIASES[1:], ids=str)
def test_afno_layouts_are_told_by_the_biases_of_a_checkpoint(bias: tuple[int, ...]) -> None:
    state = {f"blocks.0.{k}": v.detach() for k, v in TrailingAFNO(bias).state_dict().items()}
    headers = [header(name, *tensor.shape) for name, tensor in state.items()]
    layers, skipped = layers_from_headers(headers)
    assert [(x.name, x.kind, x.shape, x.dtype) for x in layers] == [
        ("blocks.0.w1", "spectral", (4, 6, 12), C64),
        ("blocks.0.w2", "spectral", (4, 12, 6), C64),
    ]
    assert {skip.name for skip in skipped} == {"blocks.0.b1", "blocks.0.b2"}


@pytest.mark.parametrize(
    ("first", "second", "biases", "shapes"),
    [
        # Two channels to a block at one end: only real parts first make a network of the two.
        ((2, 4, 8, 2), (2, 4, 2, 8), ((2, 4, 2), (2, 4, 8)), [(4, 8, 2), (4, 2, 8)]),
        ((2, 4, 4, 2), (2, 4, 2, 4), ((2, 4, 2), (2, 4, 4)), [(4, 4, 2), (4, 2, 4)]),
        # Two blocks: parts last, though the bias fits both ways.
        ((2, 4, 4, 2), (2, 4, 4, 2), ((2, 4, 2), (2, 4, 2)), [(2, 4, 4), (2, 4, 4)]),
    ],
)
def test_afno_shapes_that_fit_both_layouts(
    first: tuple[int, ...],
    second: tuple[int, ...],
    biases: tuple[tuple[int, ...], tuple[int, ...]],
    shapes: list[tuple[int, ...]],
) -> None:
    headers = [
        header("w1", *first), header("b1", *biases[0]),
        header("w2", *second), header("b2", *biases[1]),
    ]  # fmt: skip
    assert [x.shape for x in layers_from_headers(headers)[0]] == shapes


def test_afno_weights_without_a_bias_count_where_the_class_says_so() -> None:
    class AFNO2D(nn.Module):
        def __init__(self, *shape: int, dtype: torch.dtype = F32) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(shape, dtype=dtype))

    class Other(AFNO2D):
        pass

    for shape, dtype in (((2, 4, 6, 6), F32), ((4, 6, 6, 2), F32), ((4, 6, 6), C64)):
        layers = by_module(AFNO2D(*shape, dtype=dtype))
        assert (layers["w1"].kind, layers["w1"].shape) == ("spectral", (4, 6, 6))
    assert by_module(Other(4, 6, 6, 2))["w1"].kind == "conv2d"


class GlobalFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(14, 8, 12, 2))


class SpectralGating(GlobalFilter):
    pass


class SpectralConv1d(GlobalFilter):
    pass


def test_a_global_filter_is_no_matrix() -> None:
    for module in (GlobalFilter(), SpectralGating()):
        layers, skipped = layers_from_module(module)
        assert not layers
        assert "a global filter" in reasons(skipped)["complex_weight"]
    layers, skipped = layers_from_headers([header("blocks.0.filter.complex_weight", 14, 8, 12, 2)])
    assert (layers, len(skipped)) == ([], 1)
    assert by_module(SpectralConv1d())["complex_weight"].shape == (12, 14, 8)
