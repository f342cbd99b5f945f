"""TB_Sigmoid: rates against hand computation, on plain models and on neural operators."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from neuralop.models import FNO, SFNO, TFNO
from torch import nn

from benchmarks.effect.operators import TOY, DenoisingOperator, FourierOperator
from farms_fast import FixedAspectSampling, FullMatrix, fit_power_law
from farms_fast.adapters.sciml import TBSigmoid
from farms_fast.adapters.training import LayerRates, RateWarning, TempBalance


def by_hand(alpha: float, mean: float, s_low: float, s_high: float, tau: float) -> float:
    s = s_high if alpha > mean else s_low
    phi = s * (1 / (1 + math.exp(-tau * (alpha - mean))) - 0.5)
    return 10**phi


def with_spectrum(values: list[float], scale: float = 1.0) -> nn.Linear:
    """A layer of these eigenvalues."""
    layer = nn.Linear(len(values), len(values), bias=False, dtype=torch.float64)
    draw = torch.Generator().manual_seed(len(values))
    left, right = (
        torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
        for _ in range(2)
    )
    singular = torch.tensor(values, dtype=torch.float64).sqrt()
    with torch.no_grad():
        layer.weight.copy_(scale**0.5 * left.Q @ singular.diag() @ right.Q.T)
    return layer


# With the median rule the tail is the upper half: for four values {b, b·e^x} alpha is 1 + 2/x.
def two_point(x: float, scale: float = 1.0) -> nn.Linear:
    return with_spectrum([0.5, 0.5, 1.0, math.exp(x)], scale)


ALPHAS = [2.0, 2.2, 2.9]


def three_layers() -> nn.Sequential:
    return nn.Sequential(*(two_point(2 / (alpha - 1)) for alpha in ALPHAS))


@pytest.mark.parametrize("scale", [(1.0, 2.0), (0.5, 0.25), (0.0, 1.5), 0.75], ids=str)
@pytest.mark.parametrize("tau", [10.0, 1.0, 400.0])
def test_rates_are_those_computed_by_hand(scale: float | tuple[float, float], tau: float) -> None:
    rates = TBSigmoid(three_layers(), FullMatrix(), scale=scale, tau=tau, min_evals=0)
    groups = rates.param_groups(lr=0.01)
    low, high = scale if isinstance(scale, tuple) else (scale, scale)
    mean = (2.0 + 2.2 + 2.9) / 3
    expected = [0.01 * by_hand(alpha, mean, low, high, tau) for alpha in ALPHAS]
    assert [group["name"] for group in groups] == ["rest", "0", "1", "2"]
    assert [group["lr"] for group in groups[1:]] == pytest.approx(expected, rel=1e-9)
    assert [row.alpha for row in rates.last] == pytest.approx(ALPHAS, rel=1e-9)
    assert rates.last["0"].lr <= 0.01 <= rates.last["2"].lr


def test_the_largest_scale_has_finite_factors() -> None:
    low, high = TBSigmoid(three_layers(), scale=600, tau=1e9).factors([2.0, 4.0])
    assert (low, high) == pytest.approx((1e-300, 1e300))


def test_the_defaults_are_those_of_the_rule() -> None:
    rates = TBSigmoid(three_layers())
    assert (rates.scale, rates.tau) == ((1.0, 2.0), 10.0)
    # So far from the mean the sigmoid is at its ends: a decade up, half a decade down.
    assert rates.factors([1.0, 2000.0]) == pytest.approx([10**-0.5, 10.0], rel=1e-12)
    assert rates.factors([3.0, 3.0]) == [1.0, 1.0]


def test_the_mean_over_blocks_gives_each_block_the_same_weight() -> None:
    class Block(nn.Module):
        def __init__(self, *alphas: float) -> None:
            super().__init__()
            layers = [two_point(2 / (alpha - 1)) for alpha in alphas]
            for name, layer in zip(("q", "k", "up"), layers, strict=False):
                setattr(self, name, layer)

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(2.0, 2.2, 2.4), Block(2.5, 3.1)])})
    rates = TBSigmoid(model, FullMatrix(), per="block", min_evals=0)
    rates.param_groups(lr=1.0)
    means = [2.2, 2.8]
    expected = [by_hand(mean, 2.5, 1.0, 2.0, 10.0) for mean in means]
    assert [row.factor for row in rates.last] == pytest.approx(
        [expected[0]] * 3 + [expected[1]] * 2, rel=1e-9
    )
    by_layer = TBSigmoid(model, FullMatrix(), min_evals=0)
    by_layer.param_groups(lr=1.0)
    assert len({row.factor for row in by_layer.last}) == 5


def test_zeros_are_filtered_by_their_size() -> None:
    # At this scale the two smaller eigenvalues are below the published limit.
    model = nn.Sequential(two_point(2.0), two_point(1.0, scale=1.5e-5), two_point(0.5))
    rates = TBSigmoid(model, FullMatrix(), min_evals=3)
    rates.param_groups(lr=1.0)
    assert [row.n_evals for row in rates.last] == [4, 2, 4]
    assert rates.last["1"].status == "too_few"
    assert rates.last["1"].factor == 1.0
    mean = (2.0 + 5.0) / 2  # without the layer that has no fit
    assert rates.last["0"].factor == pytest.approx(by_hand(2.0, mean, 1, 2, 10), rel=1e-9)
    for unfiltered in (None, 0.0):
        rates = TBSigmoid(model, FullMatrix(), min_evals=3, filter_zeros=unfiltered)
        rates.param_groups(lr=1.0)
        assert [row.n_evals for row in rates.last] == [4, 4, 4]


def test_spectral_layers_of_rank_one_count_only_what_is_there() -> None:
    model = nn.Module()
    one = torch.randn(8, 1, 12, dtype=torch.complex128)
    model.weights1 = nn.Parameter(one * torch.randn(1, 8, 12, dtype=torch.complex128))
    model.other = nn.Parameter(torch.randn(8, 8, 3, dtype=torch.complex128))
    rates = TBSigmoid(model, FullMatrix())
    rates.param_groups(lr=1.0)
    assert rates.last["weights1"].n_evals == 12
    assert rates.last["weights1"].status == "ok"
    lone = TBSigmoid(model, FullMatrix(), min_evals=13)
    lone.param_groups(lr=1.0)
    assert lone.last["weights1"].status == "too_few"
    assert [row.factor for row in lone.last] == [1.0, 1.0]  # one alone has nothing to differ from


def test_a_layer_that_is_not_finite_keeps_the_base_rate_and_warns() -> None:
    model = three_layers()
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    rates = TBSigmoid(model, FullMatrix(), min_evals=0)
    with pytest.warns(RateWarning, match="1 keeps the base rate"):
        rates.param_groups(lr=1.0)
    assert rates.last["1"].factor == 1.0
    assert rates.last["0"].factor == pytest.approx(by_hand(2.0, 2.45, 1, 2, 10), rel=1e-9)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "FNO": lambda: FNO((8, 6), 2, 3, 8, n_layers=2),
    "TFNO": lambda: TFNO((8, 6), 2, 3, 8, n_layers=2, rank=0.4),
    "CP": lambda: FNO((8, 6), 2, 3, 8, n_layers=2, factorization="cp", rank=0.4),
    "SFNO": lambda: SFNO((8, 6), 2, 3, 8, n_layers=2, factorization="tt", rank=0.4),
    "plain FNO": lambda: FourierOperator(2, 2, 8, (6, 4), 2),
    "plain DPOT": lambda: DenoisingOperator(2, 2, TOY),
}


@pytest.mark.parametrize("factorised", ["reconstructed", "factors"])
@pytest.mark.parametrize("name", MODELS)
def test_operators_train_at_rates_of_their_layers(name: str, factorised: str) -> None:
    torch.manual_seed(7)
    model = MODELS[name]()
    rates = TBSigmoid(
        model, FixedAspectSampling(rows=4), min_evals=2, per="layer", factorised=factorised
    )
    groups = rates.param_groups(lr=1e-3)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    factored = name in ("TFNO", "CP", "SFNO") and factorised == "factors"
    spectral = [n for n in rates.factors_by_layer if ".factor" in n]
    assert bool(spectral) == factored
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    shape = (2, 2, 2, 16, 16) if name.startswith("plain") else (2, 2, 16, 16)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model(torch.randn(shape)).square().mean().backward()
    optimizer.step()
    schedule.step()
    table = rates.step(optimizer)
    changed = sum(bool((p != before[key]).any()) for key, p in model.named_parameters())
    assert changed > 0.7 * len(before)
    tuned = [row for row in table if row.status == "ok"]
    assert len({row.factor for row in tuned}) > len(tuned) // 2
    mean = math.fsum(row.alpha for row in tuned) / len(tuned)
    for row in tuned:
        assert row.factor == pytest.approx(by_hand(row.alpha, mean, 1, 2, 10), rel=1e-9)
        assert row.lr == pytest.approx(5e-4 * row.factor, rel=1e-12)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for layer in rates.layers:
        assert {rate[id(p)] for p in layer.parameters.values()} == {table[layer.name].lr}


def test_alphas_of_an_operator_are_those_of_its_pooled_spectrum() -> None:
    torch.manual_seed(8)
    model = TFNO((8, 6), 2, 3, 8, n_layers=2, rank=0.4)
    rates = TBSigmoid(model, FullMatrix())
    rates.param_groups(lr=1.0)
    whole = model.fno_blocks.convs[1].weight.to_tensor().detach().to(torch.complex128)
    evals = torch.linalg.svdvals(whole.flatten(2).permute(2, 0, 1)).square().flatten()
    kept = evals[evals > 1e-5]
    row = rates.last["fno_blocks.convs.1"]
    assert row.n_evals == len(kept)
    assert row.alpha == pytest.approx(fit_power_law(kept.numpy()).alpha, rel=1e-6)


def test_a_run_resumes_with_the_same_rates() -> None:
    torch.manual_seed(9)
    model = FourierOperator(2, 2, 8, (6, 4), 2)
    rates = TBSigmoid(model, FullMatrix())
    optimizer = torch.optim.Adam(rates.param_groups(lr=1e-3))
    rates.step(optimizer)
    again = TBSigmoid(model, FullMatrix(), initial=False)
    again.load_state_dict(rates.state_dict())
    assert [g["lr"] for g in again.param_groups(lr=1e-3)] == [
        g["lr"] for g in optimizer.param_groups
    ]
    with pytest.raises(ValueError, match="expected the layers of this model"):
        TBSigmoid(three_layers()).load_state_dict(rates.state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1.0}, ValueError, "scale: expected a finite number that is not negative"),
        ({"scale": (1.0, math.inf)}, ValueError, "scale: expected a finite number"),
        ({"scale": (1.0,)}, TypeError, r"scale: expected a number or a pair \(s_low, s_high\)"),
        ({"scale": 601}, ValueError, "scale: expected at most 600, got 601"),
        ({"assign": "sqrt"}, TypeError, "assign: no argument of TBSigmoid, which takes bins, "),
        ({"scale": "1"}, TypeError, "scale: expected a number or a pair"),
        ({"scale": (True, 1.0)}, TypeError, "scale: expected a number, got True"),
        ({"tau": 0}, ValueError, "tau: expected a positive number"),
        ({"tau": -1.0}, ValueError, "tau: expected a finite number that is not negative"),
        ({"tau": None}, TypeError, "tau: expected a number, got None"),
        ({"filter_zeros": -1e-5}, ValueError, "filter_zeros: expected a finite number"),
        ({"filter_zeros": "1e-5"}, TypeError, "filter_zeros: expected a number"),
        ({"evals_threshold": 0.0}, TypeError, "evals_threshold: expected its name here, filter_z"),
        ({"factorised": "factor"}, ValueError, "factorised: expected 'reconstructed' or 'factors'"),
        ({"per": "head"}, ValueError, "per: expected 'layer', 'block' or a function, got 'head'"),
        ({"xmin": "mean"}, ValueError, "mean"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TBSigmoid(three_layers(), **options)  # type: ignore[arg-type]


def test_a_model_without_a_layer_is_an_error_that_says_why() -> None:
    model = nn.Module()
    model.filter = nn.Parameter(torch.randn(12))
    model.weights1 = nn.Parameter(torch.empty(4, 4, 0, dtype=torch.complex64))
    with pytest.raises(ValueError, match="model: expected at least one layer to tune, got none"):
        TBSigmoid(model)


# Documentation


@pytest.mark.parametrize(
    ("rule", "page", "left_out"),
    [(TempBalance, "training.md", set()), (TBSigmoid, "sciml.md", {"evals_threshold"})],
)
def test_the_documented_defaults_are_those_of_the_signatures(
    rule: type[LayerRates], page: str, left_out: set[str]
) -> None:
    own = inspect.signature(rule).parameters
    base = inspect.signature(LayerRates).parameters
    defaults = {name: p.default for name, p in {**base, **own}.items()}
    for name in {"model", "options", *left_out}:
        del defaults[name]
    text = (Path(__file__).parents[3] / "docs" / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, flags=re.MULTILINE))
    shown = {name: repr(value).replace("'", '"') for name, value in defaults.items()}
    shown["sampling"] = shown["sampling"].replace(", compat=None", "")
    assert rows == shown
    # And help() names what goes through **options, with the same defaults.
    said = dict(re.findall(r"`(\w+)=([^`]+)`", inspect.getdoc(rule) or ""))
    handed_on = defaults.keys() - own.keys()
    assert {name: said.get(name) for name in handed_on} == {name: rows[name] for name in handed_on}
