"""farms_fast.compat.weightwatcher against WeightWatcher itself, column by column."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from farms_fast.compat import weightwatcher
from farms_fast.compat.weightwatcher.marchenko_pastur import linear_kernel_density
from farms_fast.compat.weightwatcher.spectra import shuffled

# Numbers that are rounding noise by their formulas: differences of what is equal.
NOISE = {"rand_distance": 1e-7, "ww_maxdist": 1e-10, "bulk_min": 1e-12, "rand_bulk_min": 1e-12}


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    """WeightWatcher 0.7.7; what it warns about, logs and prints is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        yield importlib.import_module("weightwatcher")
        logging.disable(logging.NOTSET)


def theirs(package: Any, model: Any, base_model: Any = None, **options: Any) -> pd.DataFrame:
    # It writes its names into the modules.
    model, base_model = copy.deepcopy(model), copy.deepcopy(base_model)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        watcher = package.WeightWatcher(model=model, base_model=base_model)
        details: pd.DataFrame = watcher.analyze(**options)
    return details


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, rtol: float = 1e-8) -> None:
    assert list(found.columns) == list(expected.columns)
    assert len(found) == len(expected) > 0
    for name in expected.columns:
        numbers = pd.to_numeric(expected[name], errors="coerce")
        if numbers.isna().all() and expected[name].notna().any():
            assert found[name].tolist() == expected[name].tolist(), name
            continue
        np.testing.assert_allclose(
            found[name].to_numpy(float),
            numbers.to_numpy(float),
            rtol=rtol,
            atol=NOISE.get(name, 0.0),
            err_msg=name,
        )


def network() -> nn.Module:
    """Every kind of layer that counts, and one that does not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 32, 2),
        nn.Conv2d(32, 16, 2),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(2, 1, 5),
        nn.Linear(64, 10),
        nn.Linear(40, 40),
        nn.Embedding(30, 12),
        nn.Linear(200, 150),
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"pool": False},
    {"conv2d_norm": False},
    {"glorot_fix": True},
    {"detX": True},
    {"ERG": True, "pool": False},
    {"min_evals": 30},
    {"min_evals": 12, "pool": False, "max_evals": 30},
    {"max_N": 39, "max_evals": 39},
    {"tolerance": 1e-2, "start_ids": 1, "svd_method": "accurate"},
    {"layers": [3, 8]},
    {"layers": [-3, -8]},
    {"layers": ["conv2d"]},
    {"layers": ["7", "9"]},
    {"layers": ["-7"]},
    {"fix_fingers": "clip_xmax"},
    {"fix_fingers": "clip_xmax", "finger_thresh": 0.05, "max_fingers": 40},
    {"xmax": -3},
    {"xmax": 2, "pool": False},
    {"pl_package": "powerlaw"},
    {"pl_package": "powerlaw", "fix_fingers": "xmin_peak"},
    {"pl_package": "powerlaw", "fix_fingers": "xmin_peak", "xmin_max": 0.5},
    {"pl_package": "powerlaw", "fix_fingers": "clip_xmax"},
    {"pl_package": "powerlaw", "xmax": "force", "layers": [3, 8, 10]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_on_a_network(package: Any, options: dict[str, Any]) -> None:
    model = network()
    assert_same(weightwatcher(model, **options), theirs(package, model, **options))


def test_marchenko_pastur_fit(package: Any) -> None:
    # Pooled matrices, a wide one, a square one, and one with more columns than rows by its count.
    options = {"mp_fit": True, "layers": [1, 4, 7, 8]}
    model = network()
    assert_same(weightwatcher(model, **options), theirs(package, model, **options))


@pytest.mark.parametrize("pool", [True, False])
def test_randomized_by_the_same_shuffles(
    package: Any, monkeypatch: pytest.MonkeyPatch, pool: bool
) -> None:
    seed = 5
    options: dict[str, Any] = {"randomize": True, "layers": [4, 8], "pool": pool}
    model = network()
    found = weightwatcher(model, seed=seed, **options)
    # WeightWatcher asks for one shuffle after the other: replicas, one for the distance, for which
    # the first replica stands here, matrices, layers.
    keys = iter(
        (seed, row.layer_id, getattr(row, "slice_id", 0), draw, position)
        for row in found.itertuples()
        for draw in (*range(5 if row.M * row.rf < 100 else 1), 0)
        for position in range(row.rf if pool else 1)
    )

    def shuffle(values: np.ndarray[Any, Any]) -> None:
        values[:] = shuffled(torch.from_numpy(values), next(keys)).numpy()

    monkeypatch.setattr(np.random, "shuffle", shuffle)
    assert_same(found, theirs(package, model, **options))
    assert next(keys, None) is None


def test_state_dict(package: Any) -> None:
    weights = network().state_dict()
    expected = theirs(package, weights)
    assert_same(weightwatcher(weights), expected)
    assert_same(weightwatcher({"state_dict": weights}), expected)
    arrays = {name: value.numpy() for name, value in weights.items()}
    assert_same(weightwatcher(arrays), expected)


@pytest.mark.parametrize("pool", [True, False])
def test_differences_from_a_base_model(package: Any, pool: bool) -> None:
    base = network()
    model = copy.deepcopy(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    expected = theirs(package, model, base, pool=pool)
    assert_same(weightwatcher(model, base_model=base, pool=pool), expected)


def test_no_difference_from_a_base_model(package: Any) -> None:
    model = network()
    found = weightwatcher(model, base_model=copy.deepcopy(model))
    assert_same(found, theirs(package, model, copy.deepcopy(model)))
    assert set(found.status) == {"failed"}


class Adapted(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})


@pytest.mark.parametrize("peft", [True, "with_base"])
def test_adapters(package: Any, peft: bool | str) -> None:
    torch.manual_seed(0)
    sizes = {"q": (64, 48, 10), "v": (40, 80, 10), "s": (50, 50, 24)}
    model = nn.ModuleDict({name: Adapted(*size) for name, size in sizes.items()})
    model["head"] = nn.Linear(30, 30)
    found = weightwatcher(model, peft=peft)
    # Products of float32 matrices, in whatever order their terms are added.
    assert_same(found, theirs(package, model, peft=peft), rtol=1e-5)
    assert len(found) == (3 if peft is True else 10)


def test_rank_deficient_weights(package: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Conv2d(24, 24, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(30, 9).double() @ torch.randn(9, 40).double())
        model[1].weight[12:] = 0
        model[0].weight[::2] = 0
    found, expected = weightwatcher(model), theirs(package, model)
    assert found.matrix_rank.tolist() == expected.matrix_rank.tolist()
    assert found.rank_loss.tolist() == expected.rank_loss.tolist() == [15, 108]
    assert_same(found.drop(columns="sv_min"), expected.drop(columns="sv_min"))


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1, 5, 6, 9, 11, 52]},
        {"layers": [7, 19], "detX": True, "fix_fingers": "clip_xmax"},
        {"layers": [29], "pl_package": "powerlaw"},
    ],
    ids=str,
)
def test_minilm(package: Any, checkpoint: Path, options: dict[str, Any]) -> None:
    expected = theirs(package, str(checkpoint), **options)
    found = weightwatcher(checkpoint, **options)
    # The smallest singular value of a square weight is known to fewer digits from its Gram matrix.
    assert_same(found.drop(columns="sv_min"), expected.drop(columns="sv_min"))
    np.testing.assert_allclose(found.sv_min, expected.sv_min, atol=1e-7 * expected.sv_max.max())


def test_minilm_with_marchenko_pastur_fit(package: Any, checkpoint: Path) -> None:
    options: dict[str, Any] = {"mp_fit": True, "layers": [6, 19]}
    expected = theirs(package, str(checkpoint), **options)
    assert_same(weightwatcher(checkpoint, **options), expected, rtol=1e-7)


def test_truncated_power_law(package: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 40))
    options: dict[str, Any] = {"fit": "TPL", "pl_package": "powerlaw"}
    found, expected = weightwatcher(model, **options), theirs(package, model, **options)
    assert list(found.columns) == list(expected.columns)
    # powerlaw searches with a tolerance of 1e-4 in the likelihood, flat as it is.
    for name in ("alpha", "Lambda", "D", "xmin"):
        assert found[name][0] == pytest.approx(expected[name][0], rel=5e-3), name
    assert found.sigma.isna().all()
    assert expected.sigma.isna().all()
    extended = weightwatcher(model, fit="E_TPL", pl_package="powerlaw")
    assert "Lambda" in extended


def _numpy_state() -> bytes:
    # The global generator, which WeightWatcher draws from.
    return np.random.mtrand._rand.get_state()[1].tobytes()  # type: ignore[attr-defined]


def test_seed_decides_the_shuffles() -> None:
    model = nn.Sequential(nn.Linear(50, 40))
    larger = nn.Sequential(model[0], nn.Linear(9, 9))
    state, numpy_state = torch.get_rng_state(), _numpy_state()
    first, again, other = (weightwatcher(model, randomize=True, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert first.max_rand_eval[0] != other.max_rand_eval[0]
    # A layer's shuffle does not depend on which others are analysed.
    wider = weightwatcher(larger, randomize=True, seed=1)
    assert wider.max_rand_eval[0] == first.max_rand_eval[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert _numpy_state() == numpy_state


def test_large_shuffles_are_permutations() -> None:
    values = torch.arange(3_000_001, dtype=torch.float64)
    first, other = shuffled(values, (1, 2)), shuffled(values, (1, 3))
    assert torch.equal(first.sort().values, values)
    assert not torch.equal(first, other)
    assert torch.equal(shuffled(values.float(), (1, 2)).double(), first)
    # Where a value goes says nothing of where it was.
    correlation = np.corrcoef(np.stack([first.numpy(), other.numpy(), values.numpy()]))
    assert np.abs(correlation - np.eye(3)).max() < 0.01


def test_the_model_is_left_alone() -> None:
    model = network().double()
    before = copy.deepcopy(model.state_dict())
    weightwatcher(model, pool=False, randomize=True, layers=[1, 4])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(module, "longname") for module in model)


def test_weights_that_are_not_finite() -> None:
    model = network()
    with torch.no_grad():
        model[6].weight[3, 3] = torch.nan
    clean = weightwatcher(network(), mp_fit=True, randomize=True, detX=True)
    found = weightwatcher(model, mp_fit=True, randomize=True, detX=True)
    bad = found.layer_id == 7
    assert found.status[bad].tolist() == ["failed"]
    assert found.alpha[bad].tolist() == [-1]
    assert found.norm[bad].isna().all()
    pd.testing.assert_frame_equal(found[~bad], clean[~bad], check_dtype=False)


def test_what_is_left_out_has_a_reason() -> None:
    found = weightwatcher(network(), min_evals=30, layers=["-9"])
    assert found.attrs["skipped"] == {
        "0": "27 eigenvalues, fewer than min_evals=30",
        "1": "not a linear, convolution or embedding class",
        "4": "9 eigenvalues, fewer than min_evals=30",
        "6": "10 eigenvalues, fewer than min_evals=30",
        "8": "12 eigenvalues, fewer than min_evals=30",
        "9": "left out by layers",
    }
    assert weightwatcher(nn.Sequential(nn.ReLU())).empty


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": True}, "vectors: WeightWatcher's option vectors=True is not supported"),
        ({"plot": True}, r"plot: .* not supported: nothing is drawn; .*\.plot_esd\(\) draws$"),
        ({"savefig": "images"}, "savefig: .* not supported"),
        ({"intra": True}, "intra: .* not supported"),
        ({"conv2d_fft": True}, "conv2d_fft: .* not supported"),
        ({"channels": "first"}, "channels: .* not supported"),
        ({"inverse": True}, "inverse: .* not supported"),
        ({"fit": "LN"}, "fit: expected one of 'PL'"),
        ({"fit": "TPL"}, "fit: 'TPL' needs pl_package='powerlaw'"),
        ({"fix_fingers": "xmin_peak"}, "fix_fingers: 'xmin_peak' needs pl_package='powerlaw'"),
        ({"fix_fingers": "peak"}, "fix_fingers: expected one of False, 'xmin_peak', 'clip_xmax'"),
        ({"fix_fingers": "clip_xmax", "xmax": 2}, "xmax: expected None with fix_fingers"),
        ({"xmax": "force"}, "xmax: 'force' needs pl_package"),
        ({"xmax": 0}, "xmax: expected None, 'force' or an integer"),
        ({"pl_package": "plfit"}, "pl_package: expected one of 'ww', 'powerlaw'"),
        ({"svd_method": "truncated"}, "svd_method: expected one of 'fast', 'accurate'"),
        ({"peft": "only"}, "peft: expected False, True or 'with_base'"),
        ({"min_evals": 50, "max_evals": 20}, "min_evals: expected less than max_evals=20"),
        ({"max_N": 100}, "max_N: expected at least"),
        ({"layers": ["x"]}, "layers: expected some of '0', '2'.*; got 'x'"),
        ({"layers": [2]}, "layers: expected ids of layers with weights"),
        ({"layers": [1, -3]}, "layers: expected ids to keep or negative ids"),
        ({"layers": ["7", "-9"]}, "layers: expected names to keep or names to drop"),
        ({"device": "gpu"}, "device: expected cpu"),
        ({"seed": -1}, "seed: expected an integer"),
    ],
    ids=str,
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weightwatcher(network(), **options)


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="pools: no such option; expected one of layers, "):
        weightwatcher(network(), pools=True)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        weightwatcher(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pool: expected True or False, got 1"):
        weightwatcher(network(), pool=1)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weightwatcher("nowhere")


def test_base_models_that_do_not_fit() -> None:
    small, large = nn.Sequential(nn.Linear(20, 20)), nn.Sequential(nn.Linear(20, 30))
    with pytest.raises(ValueError, match=r"base_model: expected '0' of shape .* got"):
        weightwatcher(small, base_model=large)
    longer = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with pytest.warns(UserWarning, match="base_model: .*: 1"):
        found = weightwatcher(longer, base_model=small)
    assert len(found) == 2
    with pytest.raises(ValueError, match="peft: expected False with a base_model"):
        weightwatcher(small, base_model=small, peft=True)


def test_density_is_the_sum_of_kernels() -> None:
    rng = np.random.default_rng(0)
    values, at = rng.exponential(1, 57), np.linspace(0, 6, 100)
    distance = np.abs(at[:, None] - values)
    expected = np.maximum(0, 1 - distance / 0.3).sum(axis=1) / (57 * 0.3)
    np.testing.assert_allclose(linear_kernel_density(values, at, 0.3), expected, atol=1e-13)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu() -> None:
    options: dict[str, Any] = {"mp_fit": True, "detX": True}
    found, expected = (
        weightwatcher(network(), device=device, **options) for device in ("cuda", "cpu")
    )
    assert_same(found, expected)
    # Shuffled otherwise, but alike.
    shuffled, elsewhere = (
        weightwatcher(network(), randomize=True, layers=[4, 8], device=device).rand_sigma_mp
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(shuffled, elsewhere, rtol=0.1)


def test_weights_that_are_not_initialised_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(30, 30), nn.LazyLinear(8))
    assert list(weightwatcher(net).longname) == ["0"]


def test_script_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Linear(30, 30))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module of Python code"):
        weightwatcher(scripted)


def test_weights_on_the_meta_device_are_told_of() -> None:
    on_meta = nn.Sequential(nn.Linear(30, 30, device="meta"), nn.Linear(30, 30, device="meta"))
    with pytest.raises(ValueError, match=r"model: .*'0', '1'.*meta device"):
        weightwatcher(on_meta)
    with pytest.warns(UserWarning, match="model: .*'0'.*meta device"):
        found = weightwatcher(nn.Sequential(on_meta[0], nn.Linear(30, 30)))
    assert found["name"].tolist() == ["1"]


def test_a_table_without_rows_has_its_first_columns() -> None:
    found = weightwatcher(nn.Sequential(nn.Linear(3, 3)))
    assert (len(found), list(found.columns)) == (0, ["layer_id", "name"])
