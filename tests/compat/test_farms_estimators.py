"""farms_fast.compat: signatures, columns, windows, odd layers and bad arguments."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from farms_fast.compat import (
    FitWarning,
    modelbalancing,
    net_esd_estimator,
    net_esd_estimator_farms,
)
from farms_fast.compat.farms import spectra
from farms_fast.compat.farms.published_windows import (
    block_windows,
    sampled_windows,
    stepped_windows,
)
from farms_fast.engine import solve
from tests.support import published_farms as published
from tests.support.purity import left_as_it_was

ESTIMATORS = (net_esd_estimator, net_esd_estimator_farms, modelbalancing.net_esd_estimator)


def linear(weight: Any, name: str = "layer") -> nn.Module:
    tensor = torch.as_tensor(weight)
    layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
    layer.weight = nn.Parameter(tensor)
    return nn.ModuleDict({name: layer})


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------ names, defaults, columns


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    given = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in given if p.name != "net"}


PLAIN = {"EVALS_THRESH": 1e-5, "bins": 100, "fix_fingers": None, "xmin_pos": 2, "conv_norm": 0.5}


def test_names_defaults_and_order_are_the_published_ones() -> None:
    assert list(defaults(net_esd_estimator).items()) == [
        *PLAIN.items(),
        ("filter_zeros", False),
        ("memory", None),
    ]
    assert list(defaults(net_esd_estimator_farms).items()) == [
        *{**PLAIN, "fix_fingers": "xmin_mid"}.items(),
        ("eigs_num_thresh", 5),
        ("filter_zeros", False),
        ("use_sliding_window", True),
        ("num_row_samples", 100),
        ("Q_ratio", 2.0),
        ("step_size", 10),
        ("sampling_ops_per_dim", 10),
        ("waived_layers", ()),
        ("variant", "llm"),
        ("memory", None),
    ]
    assert list(defaults(modelbalancing.net_esd_estimator).items()) == [
        *PLAIN.items(),
        ("eigs_num_thresh", 50),
        ("filter_zeros", False),
        ("init_stable_rank", None),
        ("sr_mid_pos", None),
        ("memory", None),
    ]
    for function in ESTIMATORS:
        assert next(iter(inspect.signature(function).parameters)) == "net"


FARMS_KEYS = "alpha spectral_norm D longname eigs norm alpha_hat stable_rank norm_stable_rank"
CV_KEYS = FARMS_KEYS.replace("norm alpha_hat", "eigs_num norm alpha_hat")


@pytest.mark.parametrize(
    ("function", "settings", "keys"),
    [
        (net_esd_estimator, {}, "alpha spectral_norm D longname eigs norm alphahat"),
        (net_esd_estimator_farms, {}, FARMS_KEYS),
        (
            net_esd_estimator_farms,
            {"variant": "cv"},
            CV_KEYS,
        ),
        (
            modelbalancing.net_esd_estimator,
            {"eigs_num_thresh": 5},
            "alpha spectral_norm D longname eigs norm stable_rank norm_stable_rank "
            "init_norm_stable_rank eig_ratio",
        ),
    ],
)
def test_columns_and_types(
    function: Callable[..., Any], settings: dict[str, Any], keys: str
) -> None:
    net = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(8, 20, 3), nn.Linear(30, 60))
    found = function(net, **settings)
    assert list(found) == keys.split()
    for key, column in found.items():
        assert len(column) == 3, key
        for value in column:
            if key == "eigs":
                assert value.dtype == np.float32
                assert value.ndim == 1
            elif key == "longname":
                assert isinstance(value, str)
            elif key in ("eigs_num", "init_norm_stable_rank"):
                assert type(value) is int
            else:
                assert type(value) is float
    if "eigs_num" in found:
        assert found["eigs_num"] == [len(eigs) for eigs in found["eigs"]]


class Wrapped(nn.Linear):
    """Subclasses count."""


def test_layers_come_in_the_order_of_named_modules() -> None:
    shared = nn.Linear(20, 20)
    net = nn.ModuleDict(
        {
            "last_by_name": nn.Linear(24, 12),
            "a": nn.ModuleDict({"z": nn.Conv2d(6, 8, 3), "b": Wrapped(16, 32)}),
            "skipped": nn.ModuleList([nn.Conv1d(6, 8, 3), nn.Embedding(20, 20), nn.LayerNorm(9)]),
            "transposed": nn.ConvTranspose2d(6, 8, 3),
            "once": shared,
            "twice": shared,
        }
    )
    expected = ["last_by_name", "a.z", "a.b", "once"]
    for function in ESTIMATORS[:2]:
        assert function(net)["longname"] == expected
    waived = net_esd_estimator_farms(net, waived_layers=["a.z", "once"])
    assert waived["longname"] == ["last_by_name", "a.b"]
    # A container's name waives the container only.
    assert net_esd_estimator_farms(net, waived_layers={"a"})["longname"] == expected


def test_a_net_that_is_a_layer_has_the_empty_name() -> None:
    assert net_esd_estimator(nn.Linear(20, 30))["longname"] == [""]
    assert net_esd_estimator_farms(nn.Conv2d(8, 8, 3))["longname"] == [""]


@pytest.mark.parametrize("function", ESTIMATORS)
def test_a_net_without_layers_gives_empty_lists(function: Callable[..., Any]) -> None:
    assert all(column == [] for column in function(nn.ReLU()).values())


def test_small_layers_have_no_entry() -> None:
    net = nn.ModuleDict(
        {"small": nn.Linear(50, 3), "conv": nn.Conv2d(4, 4, 1), "large": nn.Linear(9, 9)}
    )
    settings = {"num_row_samples": 20, "Q_ratio": 1.0, "sampling_ops_per_dim": 1}
    found = net_esd_estimator_farms(net, **settings)
    # Four eigenvalues of one block; blocks have no least number.
    assert found["longname"] == ["conv", "large"]
    found = net_esd_estimator_farms(net, use_sliding_window=False)
    assert found["longname"] == ["large"]
    found = net_esd_estimator_farms(net, eigs_num_thresh=3, **settings)
    assert found["longname"] == ["small", "conv", "large"]
    found = modelbalancing.net_esd_estimator(net, eigs_num_thresh=9)
    assert found["longname"] == ["large"]
    assert len(net_esd_estimator(net)["longname"]) == 3


# ------------------------------------------------------------------------------------- the windows


def slices(windows: Any, matrix: torch.Tensor) -> list[torch.Tensor]:
    cut = windows.table(0, 1)[:, 2:].tolist()
    return [matrix[r : r + m, c : c + n] for r, c, m, n in cut]


SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (30, 20), (20, 30), (40, 13), (13, 40), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [0.3, 0.5, 1.0, 1.5, 2.0, 3.7])
def test_windows_are_the_published_slices(shape: tuple[int, int], q: float) -> None:
    """The same values, cut by Python's own slices, negative starts and all."""
    matrix = torch.arange(math.prod(shape)).reshape(shape)
    for m in (1, 3, 8, 16, 25):
        for ops in (2, 3, 10):
            for clamped in (True, False):
                expected = list(published.linear_windows(matrix, m, q, ops, 0, clamped))
                found = slices(sampled_windows(*shape, m, q, ops, clamped=clamped), matrix)
                assert_same(found, expected)
        for step in (1, 4, 100):
            expected = list(published.linear_windows(matrix, m, q, None, step, True))
            assert_same(slices(stepped_windows(*shape, m, q, step), matrix), expected)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    # A slice without elements has no eigenvalues.
    expected = [part for part in expected if part.numel()]
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(6, 6, 3, 3), (13, 4, 1, 1), (4, 13, 2, 1), (9, 1, 3, 3)])
@pytest.mark.parametrize("q", [0.3, 0.5, 1.0, 1.5, 2.0, 7.0])
def test_blocks_are_the_published_slices(shape: tuple[int, ...], q: float) -> None:
    weight = torch.arange(math.prod(shape)).reshape(shape)
    expected = published.conv_blocks(weight, q)
    tall = spectra.kernel_positions(weight)
    tall = tall if shape[0] >= shape[1] else tall.mT
    windows = block_windows(*tall.shape[1:], q)
    assert windows.spectra == len(expected)
    cut = [
        tall[s, r : r + m, c : c + n] for _, s, r, c, m, n in windows.table(0, len(tall)).tolist()
    ]
    assert_same(cut, [part for block in expected for part in block])


def test_ten_columns_at_three_tenths_are_two() -> None:
    """10 // (1 / 0.3), not 0.3 * 10."""
    assert block_windows(10, 10, 0.3).columns == 2


def test_a_kernel_larger_than_its_channels_is_the_matrix() -> None:
    weight = gaussian(4, 1, 7, 7)
    net = nn.Conv2d(1, 4, 7, bias=False)
    net.weight = nn.Parameter(weight)
    found = net_esd_estimator_farms(net, Q_ratio=1.0, conv_norm=1.0)
    assert len(found["eigs"][0]) == 4 * 7
    expected = np.linalg.svd(weight[:, 0].double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(found["eigs"][0], np.sort(expected.ravel()), rtol=1e-5)
    # The published code stops at a kernel that is not square; here it stands upright.
    oblong = nn.Conv2d(1, 2, (2, 9), bias=False)
    found = net_esd_estimator_farms(oblong, Q_ratio=1.0)
    assert len(found["eigs"][0]) == 4 * 2 * 2


def test_a_convolution_is_the_mean_over_its_blocks() -> None:
    """Against NumPy, by hand: 20 x 8 slices are two blocks of 8 x 8."""
    weight = gaussian(20, 8, 3, 3)
    net = nn.Conv2d(8, 20, 3, bias=False)
    net.weight = nn.Parameter(weight)
    found = net_esd_estimator_farms(net, Q_ratio=1.0, conv_norm=0.25)
    positions = weight.double().numpy().reshape(20, 8, 9)
    alphas, sums, largest, pooled = [], [], [], []
    for block in (0, 1):
        cut = positions[8 * block : 8 * block + 8].transpose(2, 0, 1) * 0.5
        evals = np.sort((np.linalg.svd(cut, compute_uv=False) ** 2).ravel())
        tail = evals[36:]
        alphas.append(1 + 36 / np.log(tail / tail[0]).sum())
        sums.append(evals.sum())
        largest.append(evals[-1])
        pooled.append(evals)
    assert found["alpha"][0] == pytest.approx(np.mean(alphas), rel=1e-10)
    assert found["norm"][0] == pytest.approx(np.mean(sums), rel=1e-12)
    assert found["spectral_norm"][0] == pytest.approx(np.mean(largest), rel=1e-12)
    ranks = np.mean([s / top for s, top in zip(sums, largest, strict=True)])
    assert found["stable_rank"][0] == pytest.approx(ranks, rel=1e-12)
    hats = np.mean([a * np.log10(top) for a, top in zip(alphas, largest, strict=True)])
    assert found["alpha_hat"][0] == pytest.approx(hats, rel=1e-10)
    # Block after block, each ascending.
    np.testing.assert_allclose(found["eigs"][0], np.concatenate(pooled), rtol=1e-5)


def test_channels_last_and_grouped_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(8, 12, 3))
    plain = net_esd_estimator_farms(net)
    last = net_esd_estimator_farms(net.to(memory_format=torch.channels_last))
    for a, b in zip(plain["eigs"], last["eigs"], strict=True):
        np.testing.assert_array_equal(a, b)
    # Groups are not told apart: 9 positions of 12 x 4, three blocks of 2 rows.
    assert len(plain["eigs"][0]) == 9 * 3 * 2


# ------------------------------------------------------------------------------ devices and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_devices(device: torch.device, dtype: torch.dtype) -> None:
    weight = gaussian(60, 40).to(dtype)
    net = linear(weight).to(device)
    with left_as_it_was(net["layer"].weight):
        found = net_esd_estimator(net)
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(found["eigs"][0], expected, rtol=1e-6, atol=1e-6)
    assert found["norm"][0] == pytest.approx(expected.sum(), rel=1e-12)


def test_one_call_solves_what_belongs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of one order meet in one call, whatever layers they come from."""
    calls = []
    right = solve.window_eigenvalues

    def counted(stacks: Any, table: Any, *rest: Any) -> Any:
        calls.append((len(stacks), len(table)))
        return right(stacks, table, *rest)

    monkeypatch.setattr(solve, "window_eigenvalues", counted)
    net = nn.Sequential(*(nn.Linear(40, rows) for rows in (40, 60, 80)))
    settings = {"num_row_samples": 20, "Q_ratio": 1.0, "sampling_ops_per_dim": 3}
    found = net_esd_estimator_farms(net, **settings)
    assert calls == [(3, 27)]
    # In parts, where there are too many eigenvalues for one.
    monkeypatch.setattr(spectra, "_VALUES_PER_BATCH", 400)
    parts = net_esd_estimator_farms(net, **settings)
    assert calls[1:] == [(2, 18), (1, 9)]
    assert parts["alpha"] == found["alpha"]


def test_layers_of_several_dtypes_and_shapes_keep_their_places() -> None:
    net = nn.ModuleList(
        linear(gaussian(rows, columns).to(dtype))["layer"]
        for rows, columns, dtype in (
            (30, 50, torch.float32),
            (50, 20, torch.float64),
            (20, 30, torch.float32),
            (30, 30, torch.float32),
            (20, 50, torch.float16),
        )
    )
    found = net_esd_estimator(net)
    for layer, eigs, alpha in zip(net, found["eigs"], found["alpha"], strict=True):
        expected = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False) ** 2
        np.testing.assert_allclose(eigs, expected[::-1], rtol=1e-5, atol=1e-5)
        # Alone, another solver may have been chosen.
        assert net_esd_estimator(layer)["alpha"] == pytest.approx([alpha], rel=1e-9)


# ------------------------------------------------------------------ what the published code cannot


def quietly(function: Callable[..., Any], net: nn.Module, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        return function(net, **settings)


@pytest.mark.parametrize("rule", ["xmin_mid", "xmin_peak", None])
@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.full((20, 20), math.nan), "nonfinite"),
        (gaussian(20, 20).index_fill(0, torch.tensor(3), math.inf), "nonfinite"),
        (torch.zeros(20, 20), "too_few"),
        (torch.ones(20, 1), "too_few"),
        (torch.eye(20), "degenerate_tail"),
    ],
)
def test_layers_without_a_fit_are_named_and_the_others_go_on(
    weight: torch.Tensor, why: str, rule: str | None
) -> None:
    net = nn.ModuleDict({"good": nn.Linear(20, 30), "bad": linear(weight)["layer"]})
    with pytest.warns(FitWarning, match=rf"^layer 'bad': .*\({why}\)$"):
        found = net_esd_estimator(net, fix_fingers=rule)
    assert found["longname"] == ["good", "bad"]
    assert math.isfinite(found["alpha"][0])
    for key in ("alpha", "D", "alphahat"):
        assert math.isnan(found[key][1])
    assert len(found["eigs"][1]) == min(weight.shape)


def with_eigenvalues(evals: list[float]) -> nn.Module:
    return linear(torch.diag(torch.tensor(evals, dtype=torch.float64).sqrt()))


def test_zeros_below_the_median_count_and_those_above_do_not() -> None:
    few = [0.0, 0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
    found = net_esd_estimator(with_eigenvalues(few), fix_fingers="xmin_mid")
    tail = np.array(few[4:])
    assert found["alpha"][0] == pytest.approx(1 + 4 / np.log(tail / tail[0]).sum(), rel=1e-12)
    many = [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 5.0, 8.0]
    found = net_esd_estimator(with_eigenvalues(many), fix_fingers="xmin_mid")
    tail = np.array([5.0, 8.0])
    assert found["alpha"][0] == pytest.approx(1 + 2 / np.log(tail / tail[0]).sum(), rel=1e-12)


@pytest.mark.parametrize("rule", ["xmin_mid", None, "xmin_peak"])
def test_filtered_eigenvalues_do_not_enter(rule: str | None) -> None:
    evals = [1e-9, 1e-8, *np.logspace(0, 1, 15).tolist()]
    settings = {"fix_fingers": rule, "EVALS_THRESH": 1e-5}
    found = net_esd_estimator(with_eigenvalues(evals), filter_zeros=True, **settings)
    expected = net_esd_estimator(with_eigenvalues(evals[2:]), **settings)
    assert found["alpha"] == pytest.approx(expected["alpha"], rel=1e-9)
    assert found["D"] == pytest.approx(expected["D"], rel=1e-9)
    assert len(found["eigs"][0]) == len(evals)
    windows = {"use_sliding_window": False, "filter_zeros": True, **settings}
    assert len(net_esd_estimator_farms(with_eigenvalues(evals), **windows)["eigs"][0]) == 15
    # Nothing is filtered where nothing would be left.
    above = {"EVALS_THRESH": 100.0, "fix_fingers": rule}
    found = net_esd_estimator(with_eigenvalues(evals), filter_zeros=True, **above)
    assert found["alpha"] == net_esd_estimator(with_eigenvalues(evals), **above)["alpha"]


def test_no_candidate_gives_what_the_published_scan_ends_with() -> None:
    # The fuller of two bins begins at 1, and nothing is near 1.
    evals = [1e-3, 1e3, 1.1e3, 1.2e3]
    with pytest.warns(FitWarning, match=r"no_candidate"):
        found = net_esd_estimator(with_eigenvalues(evals), fix_fingers="xmin_peak", bins=2)
    assert (found["alpha"], found["D"]) == ([0.0], [1.0])
    evals32 = torch.tensor(evals).sort().values
    assert published.fit(evals32, "xmin_peak", 2, 2) == (0.0, 1.0)


def test_a_block_without_a_fit_leaves_the_mean_of_the_others() -> None:
    weight = gaussian(16, 8, 3, 3)
    weight[8:] = 0
    net = nn.Conv2d(8, 16, 3, bias=False)
    net.weight = nn.Parameter(weight)
    with pytest.warns(FitWarning, match=r"^layer '': .*1 of 2 blocks"):
        found = net_esd_estimator_farms(net, Q_ratio=1.0)
    half = nn.Conv2d(8, 8, 3, bias=False)
    half.weight = nn.Parameter(weight[:8])
    assert found["alpha"] == net_esd_estimator_farms(half, Q_ratio=1.0)["alpha"]


def test_one_window_in_each_dimension_is_the_first() -> None:
    net = linear(gaussian(50, 60))
    found = net_esd_estimator_farms(net, num_row_samples=20, Q_ratio=1.0, sampling_ops_per_dim=1)
    corner = net["layer"].weight.detach()[:20, :20].double().numpy()
    expected = np.linalg.svd(corner, compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(found["eigs"][0], expected, rtol=1e-5, atol=1e-6)


def test_windows_without_columns() -> None:
    net = linear(gaussian(50, 60))
    settings = {"num_row_samples": 1, "Q_ratio": 0.5}
    assert net_esd_estimator_farms(net, **settings)["longname"] == []
    with pytest.warns(FitWarning, match="too_few"):
        found = net_esd_estimator_farms(net, eigs_num_thresh=0, **settings)
    assert len(found["eigs"][0]) == 0
    del found["longname"], found["eigs"]
    assert all(math.isnan(column[0]) for column in found.values())


# ---------------------------------------------------------------------------------- ModelBalancing


def test_stable_ranks_of_modelbalancing() -> None:
    evals = np.array([1e-7, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    net = with_eigenvalues(evals.tolist())
    estimate = modelbalancing.net_esd_estimator
    settings: dict[str, Any] = {"fix_fingers": "xmin_mid", "eigs_num_thresh": 1}

    def ranks(taken: np.ndarray) -> list[float]:
        return [taken.sum() / 13, taken.mean(), 13 / taken[len(taken) // 2]]

    def found(**more: Any) -> list[float]:
        got = estimate(net, **settings, **more)
        return [got[key][0] for key in ("stable_rank", "norm_stable_rank", "eig_ratio")]

    assert found() == pytest.approx(ranks(evals), rel=1e-12)
    assert found(filter_zeros=True) == pytest.approx(ranks(evals[1:]), rel=1e-12)
    assert found(sr_mid_pos=2) == pytest.approx(ranks(evals[3:]), rel=1e-12)
    assert found(sr_mid_pos=3, filter_zeros=True) == pytest.approx(ranks(evals[3:]), rel=1e-12)
    again = estimate(net, **settings, init_stable_rank=[2.0])
    assert again["init_norm_stable_rank"] == pytest.approx([evals.mean() / 2])
    assert again["alpha"] == net_esd_estimator(net, fix_fingers="xmin_mid")["alpha"]


# ----------------------------------------------------------------------------------- bad arguments

NET = nn.ModuleDict({"attention": nn.Linear(20, 20), "mlp": nn.Linear(20, 20)})
RULE_CHOICES = (
    "fix_fingers: expected one of None, 'median', 'xmin_mid', 'ks', 'goodness-of-fit', 'peak', "
    "'xmin_peak', 'fix-finger'; got 'xmin_top'"
)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"fix_fingers": "xmin_top"}, ValueError, RULE_CHOICES),
        ({"bins": 0}, ValueError, "bins: expected an integer of at least 1, got 0"),
        ({"xmin_pos": 1}, ValueError, "xmin_pos: expected a finite number above 1, got 1"),
        ({"EVALS_THRESH": "0"}, TypeError, "EVALS_THRESH: expected a number, got '0'"),
        ({"conv_norm": 0}, ValueError, "conv_norm: expected a positive finite number, got 0"),
        ({"conv_norm": None}, TypeError, "conv_norm: expected a number, got None"),
        ({"eigs_num_thresh": -1}, ValueError, "eigs_num_thresh: expected an integer of at least 0"),
        ({"num_row_samples": 0}, ValueError, "num_row_samples: expected an integer of at least 1"),
        ({"num_row_samples": 9.5}, TypeError, "num_row_samples: expected an integer, got float"),
        ({"Q_ratio": -1.0}, ValueError, "Q_ratio: expected a positive finite number, got -1.0"),
        ({"Q_ratio": math.inf}, ValueError, "Q_ratio: expected a positive finite number, got inf"),
        ({"sampling_ops_per_dim": 0}, ValueError, "sampling_ops_per_dim: expected an integer"),
        (
            {"sampling_ops_per_dim": None, "step_size": 0},
            ValueError,
            "step_size: expected an integer of at least 1, got 0",
        ),
        ({"variant": "nlp"}, ValueError, "variant: expected .*'llm'.*'cv'.*got 'nlp'"),
        (
            {"waived_layers": "mlp"},
            TypeError,
            "waived_layers: expected a list of module names, got 'mlp'",
        ),
        (
            {"waived_layers": ["atention"]},
            ValueError,
            "waived_layers: expected names of modules, such as 'attention'; got 'atention'",
        ),
    ],
)
def test_bad_arguments(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}") as raised:
        net_esd_estimator_farms(NET, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("function", ESTIMATORS)
def test_bad_arguments_of_every_function(function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^fix_fingers: expected one of None, 'median'"):
        function(NET, fix_fingers="mid")
    with pytest.raises(TypeError, match=r"^net: expected a torch.nn.Module, got dict"):
        function({"weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"^net: a.weight is not initialised"):
        function(nn.ModuleDict({"a": nn.LazyLinear(5)}))
    with pytest.raises(TypeError, match=r"^net: expected layer.weight .*real.*, got c"):
        function(linear(torch.zeros(3, 3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"^weight: .*meta device"):
        function(nn.Linear(30, 30, device="meta"))
    with pytest.raises(ValueError, match=r"^memory: expected an integer of at least 1, got 0"):
        function(NET, memory=0)
    with pytest.raises(ValueError, match=r"^memory: "):
        function(nn.Linear(60, 60), memory=100)


def test_bad_arguments_of_modelbalancing() -> None:
    with pytest.raises(ValueError, match=r"^init_stable_rank: expected a number for each of 2"):
        modelbalancing.net_esd_estimator(NET, eigs_num_thresh=1, init_stable_rank=[1.0])
    with pytest.raises(ValueError, match=r"^sr_mid_pos: expected None or a number above 1, got 1"):
        modelbalancing.net_esd_estimator(NET, sr_mid_pos=1)


def test_names_of_every_package_mean_the_same_rules() -> None:
    net = linear(gaussian(40, 50))
    for names in (
        ("xmin_mid", "median"),
        ("xmin_peak", "fix-finger", "peak"),
        (None, "goodness-of-fit", "ks"),
    ):
        alphas = {net_esd_estimator(net, fix_fingers=name)["alpha"][0] for name in names}
        assert len(alphas) == 1


def test_the_caller_and_the_printed_output(capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(30, 30))
    with left_as_it_was(*net.parameters()):
        for function in ESTIMATORS:
            quietly(function, net)
    assert capsys.readouterr() == ("", "")
