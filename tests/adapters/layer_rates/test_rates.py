from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from neuralop.models import FNO
from torch import nn
from torch.nn.utils import parametrizations

from farms_fast.adapters.layer_rates.norm_partners import norm_partners
from farms_fast.adapters.layer_rates.tuned_layers import tuned_layers
from farms_fast.adapters.training import LayerRates, RateWarning, TempBalance
from farms_fast.weights.layers import layers_from_module
from tests.support.rate_models import TinyResNet, batches, linears, median_alpha, small, whole


def names_of(model: nn.Module, group: dict[str, object]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}  # type: ignore[attr-defined]


def groups_by_name(model: nn.Module, rates: LayerRates, lr: float = 0.1) -> dict[str, set[str]]:
    groups = rates.param_groups(lr)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)
    return {group["name"]: names_of(model, group) for group in groups}


def assert_each_parameter_once(model: nn.Module, groups: Sequence[dict[str, object]]) -> None:
    held = [id(p) for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(held) == sorted(trained)


def sgd(rates: LayerRates, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(rates.param_groups(lr), momentum=0.9)


# Groups


def test_a_group_has_a_layer_with_bias_and_normalisation() -> None:
    model = TinyResNet()
    rates = small(model)
    assert groups_by_name(model, rates) == {
        "rest": {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"},
        "layer1.0.conv1": {"layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"},
        "layer1.0.conv2": {"layer1.0.conv2.weight", "layer1.0.bn2.weight", "layer1.0.bn2.bias"},
        "layer1.1.conv1": {"layer1.1.conv1.weight", "layer1.1.bn1.weight", "layer1.1.bn1.bias"},
        "layer1.1.conv2": {"layer1.1.conv2.weight", "layer1.1.bn2.weight", "layer1.1.bn2.bias"},
        "layer1.1.downsample.0": {
            "layer1.1.downsample.0.weight",
            "layer1.1.downsample.1.weight",
            "layer1.1.downsample.1.bias",
        },
    }


def test_without_partners_normalisations_stay_with_the_rest() -> None:
    model = TinyResNet()
    groups = groups_by_name(model, small(model, norm=None))
    assert groups["layer1.0.conv1"] == {"layer1.0.conv1.weight"}
    assert {"layer1.0.bn1.weight", "layer1.1.downsample.1.bias"} <= groups["rest"]


def test_first_and_last_layer_have_groups_if_they_are_not_skipped() -> None:
    model = TinyResNet()
    groups = groups_by_name(model, small(model, skip_first=False, skip_last=False))
    assert groups["conv1"] == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert groups["fc"] == {"fc.weight", "fc.bias"}
    assert groups["rest"] == set()


def test_groups_hold_each_trained_parameter_once_whatever_the_model() -> None:
    conv = nn.Conv2d(4, 4, 3)
    shared = nn.ModuleDict({"a": conv, "b": nn.ModuleList([conv, nn.Linear(8, 4)])})
    lstm = nn.Sequential(nn.LSTM(6, 5, num_layers=2), nn.Linear(5, 6))
    attention = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    odd = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.utils.spectral_norm(nn.Linear(8, 8)),
        nn.Bilinear(4, 4, 8),
        nn.ConvTranspose1d(4, 8, 3),
        nn.Embedding(10, 8),
        nn.PReLU(),
    )
    for model in (shared, lstm, attention, odd, TinyResNet()):
        for options in ({}, {"no_decay": "vectors", "weight_decay": 0.1}):
            rates = small(model, skip_first=False, skip_last=False, min_evals=0)
            assert_each_parameter_once(model, rates.param_groups(0.1, **options))


def test_parts_of_one_parameter_have_one_rate_from_their_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(16, 2), nn.LSTM(12, 12))
    rates = whole(model, skip_first=False, skip_last=False)
    groups = groups_by_name(model, rates)
    assert groups["0.in_proj"] == {"0.in_proj_weight", "0.in_proj_bias"}
    assert groups["1.weight_hh_l0"] == {"1.weight_hh_l0", "1.bias_hh_l0"}
    parts = model[0].in_proj_weight.chunk(3)
    expected = sum(median_alpha(part) for part in parts) / 3
    assert rates.last is not None
    assert rates.last["0.in_proj"].alpha == pytest.approx(expected, rel=1e-9)
    assert rates.last["0.in_proj"].n_evals == 48


def test_a_shared_module_is_tuned_once() -> None:
    conv = nn.Conv2d(4, 4, 3)
    model = nn.ModuleDict({"a": conv, "b": nn.ModuleList([conv]), "c": nn.Conv2d(4, 4, 3)})
    rates = small(model, skip_first=False, skip_last=False)
    assert groups_by_name(model, rates) == {
        "rest": set(),
        "a": {"a.weight", "a.bias"},
        "c": {"c.weight", "c.bias"},
    }


def test_layers_that_a_third_one_joins_have_one_rate() -> None:
    model = linears(3)
    specs, _ = layers_from_module(model)
    both = replace(specs[2], name="sum", tensors=("0.weight", "1.weight"))
    layers = tuned_layers(model, [specs[0], specs[1], specs[2], both])
    assert [[spec.name for spec in layer.specs] for layer in layers] == [["0", "1", "sum"], ["2"]]
    assert layers[0].parameters.keys() == {"0.weight", "1.weight", "0.bias", "1.bias"}


def test_a_weight_that_is_computed_is_tuned_by_what_it_is_computed_from() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)), nn.utils.spectral_norm(nn.Linear(8, 8))
    )
    groups = groups_by_name(model, small(model, skip_first=False, skip_last=False))
    assert groups["0"] == {
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
        "0.bias",
    }
    assert groups["1"] == {"1.weight_orig", "1.bias"}


class Afno(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, 4, 8, 8))
        self.b1 = nn.Parameter(torch.zeros(2, 4, 8))
        self.w2 = nn.Parameter(torch.randn(2, 4, 8, 8))
        self.b2 = nn.Parameter(torch.zeros(2, 4, 8))


def test_complex_and_stacked_weights_have_rates() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"afno": Afno(), "spectral": nn.Module(), "conv": nn.Conv1d(4, 4, 1)})
    model["spectral"].weight = nn.Parameter(torch.randn(6, 6, 5, 5, dtype=torch.complex64))
    rates = small(model, skip_first=False, skip_last=False, min_evals=0)
    assert groups_by_name(model, rates) == {
        "rest": set(),
        "afno.w1": {"afno.w1", "afno.b1"},
        "afno.w2": {"afno.w2", "afno.b2"},
        "spectral": {"spectral.weight"},
        "conv": {"conv.weight", "conv.bias"},
    }
    assert rates.last is not None
    assert [row.status for row in rates.last] == ["ok"] * 4


def test_vectors_or_named_parameters_are_not_decayed() -> None:
    model = TinyResNet()
    rates = small(model)
    by_vectors = rates.param_groups(0.1, weight_decay=0.01, no_decay="vectors")
    for group in by_vectors:
        decay = 0.01 if all(p.dim() > 1 for p in group["params"]) else 0.0
        assert group["weight_decay"] == decay
        if group["layer"] != "rest":
            assert group["lr"] == 0.1 * rates.factors_by_layer[group["layer"]]
    plain = {frozenset(names_of(model, g)) for g in by_vectors if g["weight_decay"] == 0}
    by_name = rates.param_groups(0.1, weight_decay=0.01, no_decay=["*bn*", "*.1.bias", "*.1.wei*"])
    exempt = {n for g in by_name if g["weight_decay"] == 0 for n in names_of(model, g)}
    assert exempt == {n for names in plain for n in names} - {"fc.bias"}
    with pytest.raises(ValueError, match=r"no_decay: expected globs that match .* 'nothing'"):
        rates.param_groups(0.1, no_decay="nothing")
    with pytest.raises(TypeError, match="no_decay: expected None, 'vectors' or globs, got 3"):
        rates.param_groups(0.1, no_decay=3)  # type: ignore[arg-type]


def undecayed(model: nn.Module) -> set[str]:
    rates = small(model, skip_first=False, skip_last=False, min_evals=0)
    groups = rates.param_groups(0.1, weight_decay=0.01, no_decay="vectors")
    return {n for g in groups if g["weight_decay"] == 0 for n in names_of(model, g)}


class TrailingAfno(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 6, 12, 2))
        self.b1 = nn.Parameter(torch.zeros(4, 12, 1, 1, 2))


def test_biases_of_any_shape_are_vectors() -> None:
    assert undecayed(Afno()) == {"b1", "b2"}
    assert undecayed(TrailingAfno()) == {"b1"}
    attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)
    assert undecayed(attention) == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((4, 8)), nn.Linear(8, 1))
    assert undecayed(model) == {"0.bias", "1.weight", "1.bias", "2.bias"}
    operator = FNO(n_modes=(4, 4), in_channels=2, out_channels=2, hidden_channels=8, n_layers=1)
    biases = {name for name, _ in operator.named_parameters() if name.endswith("bias")}
    assert operator.fno_blocks.convs[0].bias.shape == (8, 1, 1)
    # The soft gate is a number for each channel.
    assert undecayed(operator) == biases | {"fno_blocks.channel_mlp_skips.0.weight"}


@pytest.mark.parametrize("name", ["params", "name", "layer"])
def test_what_a_group_is_made_of_cannot_be_overwritten(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected other entries of a group"):
        small(linears(5)).param_groups(0.1, **{name: "x"})


def test_options_go_into_every_group_and_the_optimizer_keeps_names() -> None:
    model = TinyResNet()
    optimizer = torch.optim.AdamW(small(model).param_groups(0.1, weight_decay=0.3, eps=1e-5))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    assert optimizer.param_groups[0]["name"] == "rest"
    assert {group["eps"] for group in optimizer.state_dict()["param_groups"]} == {1e-5}


def test_a_layer_called_rest_does_not_hide_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "rest": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    groups = groups_by_name(model, small(model))
    assert groups == {
        "rest_": {"a.weight", "a.bias", "b.weight", "b.bias"},
        "rest": {"rest.weight", "rest.bias"},
    }


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_an_empty_rest_carries_the_base_rate(kind: str) -> None:
    model = linears(3)
    rates = small(model, skip_first=False, skip_last=False)
    optimizer = getattr(torch.optim, kind)(rates.param_groups(0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        schedule.step()
        rates.step(optimizer)
        assert optimizer.param_groups[0]["params"] == []
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (epoch + 1)
    optimizer.load_state_dict(optimizer.state_dict())
    rates.step(optimizer)


# Partners of normalisations


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "conv2", "stem_conv", "out"):
            self.add_module(name, nn.Conv2d(4, 4, 3))
        self.fc1 = nn.Linear(4, 4)
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        for name in ("bn1", "conv2_bn", "stem_norm", "lonely"):
            self.add_module(name, nn.BatchNorm2d(4))
        self.norm1 = nn.GroupNorm(2, 4)
        self.ln1 = nn.LayerNorm(4)
        self.bns = nn.ModuleList([nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])


def test_partners_by_name() -> None:
    model = Named()
    owners = {name: name for name in ("conv1", "conv2", "stem_conv", "out", "fc1")}
    owners |= {"convs.0": "convs.0", "convs.1": "convs.1"}
    assert norm_partners(model, "name", owners) == {
        "bn1": "conv1",
        "conv2_bn": "conv2",
        "stem_norm": "stem_conv",
        "norm1": "conv1",
        "ln1": "conv1",
        "bns.0": "convs.0",
        "bns.1": "convs.1",
    }
    del owners["conv1"]
    assert norm_partners(model, "name", owners)["ln1"] == "fc1"


def test_partners_by_order_must_have_the_same_features() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),  # follows a normalisation, not a layer
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(8),  # of something else
        nn.Linear(6, 5),
        nn.LayerNorm(5),
        nn.ConvTranspose2d(5, 7, 3),
        nn.InstanceNorm2d(7, affine=True),
    )
    owners = {name: name for name in ("0", "4", "6", "8")}
    assert norm_partners(model, "order", owners) == {"2": "0", "7": "6", "9": "8"}
    assert norm_partners(model, None, owners) == {}
    with pytest.raises(ValueError, match="norm: expected 'name', 'order' or None, got 'both'"):
        norm_partners(model, "both", owners)


def test_normalisations_of_other_libraries_count_by_their_class() -> None:
    class SomeRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), SomeRMSNorm(), nn.Linear(8, 8))
    for rule in ("name", "order"):
        groups = groups_by_name(model, small(model, norm=rule))
        assert groups["1"] == {"1.weight", "1.bias", "2.weight"}


# Blocks


def test_blocks_have_one_factor_from_the_mean_of_their_alphas() -> None:
    model = TinyResNet()
    rates = whole(model, per="block", assign="sqrt")
    rates.param_groups(0.1)
    assert rates.last is not None
    convs = {row.name: row for row in rates.last if row.status == "ok"}
    first = [median_alpha(model.get_submodule(n).weight) for n in convs if n.startswith("layer1.0")]
    second = [
        median_alpha(model.get_submodule(n).weight) for n in convs if n.startswith("layer1.1")
    ]
    scores = [sum(part) / len(part) for part in (first, second)]
    total = sum(math.sqrt(score) for score in scores)
    for row in convs.values():
        place = 0 if row.name.startswith("layer1.0") else 1
        assert row.block == f"layer1.{place}"
        assert row.score == pytest.approx(scores[place], rel=1e-9)
        assert row.factor == pytest.approx(2 * math.sqrt(scores[place]) / total, rel=1e-9)


def test_blocks_are_those_of_transformers_not_their_experts() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            self.experts = nn.ModuleList(
                nn.ModuleDict({"w1": nn.Linear(8, 8), "w2": nn.Linear(8, 8)}) for _ in range(2)
            )

    model = nn.ModuleDict(
        {
            "stem": nn.Linear(8, 8),
            "stages": nn.ModuleList(
                nn.ModuleDict({"blocks": nn.ModuleList(Layer() for _ in range(2))})
                for _ in range(2)
            ),
        }
    )
    rates = small(model, per="block", skip_first=False, skip_last=False)
    # The two layers of the MLP stand in a Sequential, but each is alone in its place.
    assert set(rates.blocks) == {"stem", *(f"stages.{s}.blocks.{b}" for s in "01" for b in "01")}
    by_hand = small(model, per=lambda name: name.split(".")[0])
    assert set(by_hand.blocks) == {"stem", "stages"}
    with pytest.raises(ValueError, match="per: expected 'layer', 'block' or a function, got 'row'"):
        small(model, per="row")
    with pytest.raises(TypeError, match="per: expected a function that returns a string, got 7"):
        small(model, per=lambda name: 7)


def test_small_layers_take_their_blocks_rate_and_failed_ones_do_not() -> None:
    model = nn.ModuleDict({name: linears(2, 16, seed) for seed, name in enumerate("abc")})
    model["a"].append(nn.Linear(16, 2))
    with torch.no_grad():
        model["b"][1].weight[0, 0] = math.nan
    rates = whole(model, per=lambda name: name[0], skip_first=False, skip_last=False, min_evals=5)
    with pytest.warns(RateWarning, match=r"b\.1 keeps the base rate: .*NaN"):
        rates.param_groups(0.1)
    assert rates.last is not None
    assert rates.last["a.2"].status == "too_few"
    assert rates.last["a.2"].factor == rates.last["a.0"].factor != 1
    assert rates.last["a.2"].message.endswith("which is 5: takes its block's rate")
    assert (rates.last["b.1"].status, rates.last["b.1"].factor) == ("nonfinite", 1.0)
    assert rates.last["b.0"].score == pytest.approx(median_alpha(model["b"][0].weight), rel=1e-9)


# What keeps the base rate


def test_equal_alphas_and_a_single_layer_keep_the_base_rate() -> None:
    equal = linears(4)
    equal.load_state_dict({k: equal.state_dict()[f"1.{k[2:]}"] for k in equal.state_dict()})
    for model in (equal, linears(3)):
        for assign in ("linear", "sqrt", "log2", "step"):
            rates = whole(model, assign=assign)
            assert {group["lr"] for group in rates.param_groups(0.1)} == {0.1}


def test_layers_with_few_eigenvalues_keep_the_base_rate() -> None:
    model = linears(5)
    model[2] = nn.Linear(16, 4)
    rates = whole(model, min_evals=5)
    groups = {group["name"]: group["lr"] for group in rates.param_groups(0.1)}
    assert groups["2"] == 0.1
    assert sorted(groups[name] for name in "13") == pytest.approx([0.05, 0.15])
    assert rates.last is not None
    assert rates.last["2"].status == "too_few"
    assert "4 eigenvalues" in rates.last["2"].message
    assert not rates.last.failed


def test_a_model_of_small_layers_is_trained_at_the_base_rate() -> None:
    rates = whole(linears(5), min_evals=17)
    optimizer = sgd(rates)
    table = rates.step(optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert [row.status for row in table] == ["skipped", *["too_few"] * 3, "skipped"]


def test_a_threshold_leaves_small_eigenvalues_out() -> None:
    model = linears(4)
    with torch.no_grad():
        model[1].weight[8:] = 0  # rank 8: as many eigenvalues are zero
    rates = whole(model, evals_threshold=1e-8)
    rates.param_groups(0.1)
    assert rates.last is not None
    assert [row.n_evals for row in rates.last] == [16, 8, 16, 16]


def test_weights_that_turn_nan_in_training_keep_the_base_rate_and_are_reported_once() -> None:
    model = linears(5)
    rates = whole(model)
    optimizer = sgd(rates)
    rates.step(optimizer)
    assert optimizer.param_groups[2]["lr"] != 0.1
    with torch.no_grad():
        model[2].weight[3, 3] = math.inf
    with pytest.warns(RateWarning, match="2 keeps the base rate: .*NaN"):
        table = rates.step(optimizer)
    assert (table["2"].status, table["2"].factor) == ("nonfinite", 1.0)
    assert optimizer.param_groups[2]["lr"] == 0.1
    assert {table["1"].factor, table["3"].factor} == {0.5, 1.5}  # the others go on
    assert [row.name for row in table.failed] == ["2"]
    rates.step(optimizer)  # warned of already: a second warning would be an error here
    with torch.no_grad():
        model[2].weight.copy_(linears(5)[2].weight)
    assert rates.step(optimizer)["2"].factor != 1


def test_a_layer_that_collapses_in_training_is_reported_once() -> None:
    model = linears(6)
    model[3] = nn.Linear(16, 4)  # always small
    rates = whole(model, per=lambda name: "small" if name == "3" else "large")
    optimizer = sgd(rates)
    rates.step(optimizer)
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.warns(RateWarning, match="^2 keeps the base rate: too few positive .* enough bef"):
        table = rates.step(optimizer)
    row = table["2"]
    assert (row.status, row.factor, row.n_evals) == ("collapsed", 1.0, 0)
    assert [row.name for row in table.failed] == ["2"]
    assert table["3"].status == "too_few"
    assert rates.step(optimizer)["2"].status == "collapsed"  # a second warning would be an error
    with torch.no_grad():
        model[2].weight.copy_(linears(5)[2].weight)
    assert rates.step(optimizer)["2"].status == "ok"


def test_a_layer_of_zeros_from_the_start_is_small() -> None:
    model = linears(5)
    with torch.no_grad():
        model[2].weight.zero_()
    rates = whole(model)
    table = rates.step(sgd(rates))
    assert (table["2"].status, table["2"].n_evals, table.failed) == ("too_few", 0, [])


def test_rates_that_are_not_asked_for_at_the_start_are_equal() -> None:
    rates = whole(linears(5), initial=False)
    optimizer = sgd(rates)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    rates.step(optimizer)
    assert len({group["lr"] for group in optimizer.param_groups}) == 4


# Frozen parameters


def test_frozen_layers_are_not_analysed_and_not_in_a_group() -> None:
    model = linears(6)
    model[2].requires_grad_(False)
    model[3].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    rates = whole(model)
    groups = groups_by_name(model, rates)
    assert groups == {
        "rest": {"0.weight", "0.bias", "3.bias", "5.weight", "5.bias"},
        "1": {"1.weight", "1.bias"},
        "4": {"4.weight"},
    }
    assert rates.frozen == ["2.weight", "2.bias", "3.weight", "4.bias"]
    assert rates.last is not None
    assert [row.status for row in rates.last] == [
        "skipped", "ok", "frozen", "frozen", "ok", "skipped",
    ]  # fmt: skip
    assert math.isnan(rates.last["2"].alpha)
    assert sorted(row.factor for row in rates.last) == [0.5, 1, 1, 1, 1, 1.5]


def test_a_layer_that_is_frozen_later_no_longer_counts() -> None:
    model = linears(5)
    rates = whole(model)
    optimizer = sgd(rates)
    before = rates.step(optimizer)
    largest = max(before, key=lambda row: row.factor).name
    model.get_submodule(largest).requires_grad_(False)
    after = rates.step(optimizer)
    assert (after[largest].status, after[largest].factor) == ("frozen", 1.0)
    assert sorted(row.factor for row in after if row.status == "ok") == [0.5, 1.5]


def test_what_is_unfrozen_later_must_be_in_the_optimizer() -> None:
    model = linears(5)
    model[2].requires_grad_(False)
    rates = whole(model)
    optimizer = sgd(rates)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: '2\.weight' .*frozen"):
        rates.step(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.7})
    rates.step(optimizer)
    assert optimizer.param_groups[-1]["lr"] == 0.7  # not ours: left alone


def test_a_model_with_nothing_to_tune_is_an_error() -> None:
    frozen = linears(4)
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"at least one layer to tune, got 4 layers, 4 .*frozen"):
        whole(frozen)
    with pytest.raises(ValueError, match=r"got 2 layers, 0 .*frozen, 1: the last layer"):
        whole(linears(2))
    with pytest.raises(ValueError, match=r"got none that can be analysed \(2 tensors are no layer"):
        whole(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"got none that can be analysed \(0 tensors"):
        whole(nn.Sequential(nn.ReLU()))


# Wrong optimizers and changed models


def test_an_optimizer_of_other_groups_is_an_error() -> None:
    model = linears(5)
    rates = whole(model)
    with pytest.raises(ValueError, match=r"optimizer: .* param_groups\(\), which was not called"):
        rates.step(torch.optim.SGD(model.parameters(), lr=0.1))
    rates.param_groups(0.1)
    with pytest.raises(ValueError, match="the parameters of 4 of them"):
        rates.step(torch.optim.SGD(model.parameters(), lr=0.1))
    some = torch.optim.SGD([g for g in rates.param_groups(0.1) if g["name"] != "2"])
    with pytest.raises(ValueError, match=r"got none with 2 of their parameters \(the first is 2\."):
        rates.step(some)
    with pytest.raises(ValueError, match="got none with 10 of their parameters"):
        rates.step(torch.optim.SGD(whole(linears(5)).param_groups(0.1)))
    with pytest.raises(TypeError, match="optimizer: expected a torch optimizer, got Sequential"):
        rates.step(model)  # type: ignore[arg-type]


def test_without_its_group_the_base_rate_has_to_be_given() -> None:
    model = linears(3)
    rates = whole(model, skip_first=False, skip_last=False)
    groups = [group for group in rates.param_groups(0.1) if group["params"]]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(ValueError, match=r"optimizer: expected the group 'rest' .* lr="):
        rates.step(optimizer)
    table = rates.step(optimizer, lr=0.2)
    assert table.base_lr == 0.2
    assert [g["lr"] for g in optimizer.param_groups] == [0.2 * row.factor for row in table]


def test_a_given_base_rate_holds_for_the_rest_too() -> None:
    rates = whole(linears(5))
    optimizer = sgd(rates)
    table = rates.step(optimizer, lr=0.03)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert [g["lr"] for g in optimizer.param_groups[1:]] == [
        0.03 * row.factor for row in table if row.status == "ok"
    ]
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr: expected a rate that is not negative"):
            rates.step(optimizer, lr=wrong)
        with pytest.raises(ValueError, match="lr: expected a rate that is not negative"):
            rates.param_groups(wrong)


def test_a_model_that_has_changed_is_an_error_that_names_what() -> None:
    def added(model: nn.Sequential) -> None:
        model.append(nn.Linear(16, 16))

    def removed(model: nn.Sequential) -> None:
        del model[2]

    def replaced(model: nn.Sequential) -> None:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())

    def reshaped(model: nn.Sequential) -> None:
        model[2].weight.data = torch.zeros(4, 16)

    for change, message in (
        (added, r"'5\.weight' has come"),
        (removed, r"'4\.weight' has gone"),
        (replaced, r"'2\.weight' is another parameter now"),
        (reshaped, r"'2\.weight' had the shape \(16, 16\) when its layers were found, now \(4, 16"),
    ):
        model = linears(5)
        rates = whole(model)
        optimizer = sgd(rates)
        rates.step(optimizer)
        change(model)
        with pytest.raises(ValueError, match=message):
            rates.step(optimizer)


def test_a_model_may_move_and_change_its_precision() -> None:
    model = linears(5)
    rates = whole(model)
    optimizer = sgd(rates)
    model.double()
    table = rates.step(optimizer)
    assert table["2"].alpha == pytest.approx(median_alpha(model[2].weight), rel=1e-9)


def test_lazy_modules_have_to_be_run_first() -> None:
    model = nn.Sequential(*linears(3), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"model: '3\.weight' is not initialised"):
        whole(model)


def test_sharded_parameters_are_refused() -> None:
    model = linears(3)
    model[1].weight.placements = ("Shard(0)",)  # as DTensor has it
    with pytest.raises(ValueError, match=r"expected .*parameters, got .*sharded.* '1\.weight'"):
        whole(model)


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected an integer of at least 1, got 0"),
        ({"every": "epoch"}, TypeError, "every: expected an integer, got str"),
        ({"unit": "batch"}, ValueError, "unit: expected 'epoch' or 'step', got 'batch'"),
        ({"norm": "guess"}, ValueError, "norm: expected 'name', 'order' or None, got 'guess'"),
        ({"xmin": "mean"}, ValueError, "xmin: expected one of .* got 'mean'"),
        ({"sampling": 3}, TypeError, "sampling: expected FixedAspectSampling"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected torch.float64"),
        ({"solver": "magic"}, ValueError, "solver: expected one of"),
        ({"min_evals": -1}, ValueError, "min_evals: expected an integer of at least 0"),
        ({"evals_threshold": -1.0}, ValueError, "evals_threshold: expected"),
        ({"include": "none*"}, ValueError, "include: expected patterns that match"),
        ({"exclude": "none*"}, ValueError, "exclude: expected patterns that match"),
        ({"process_group": "all"}, ValueError, "process_group: expected 'default', None or a gr"),
        ({"process_group": 3}, TypeError, "process_group: expected 'default', None or a gr"),
        ({"skip_first": "no"}, TypeError, "skip_first: expected True or False, got 'no'"),
        ({"skip_last": 1}, TypeError, "skip_last: expected True or False, got 1"),
        ({"overlap": "no"}, TypeError, "overlap: expected True or False, got 'no'"),
        ({"initial": None}, TypeError, "initial: expected True or False, got None"),
        ({"log": b"x"}, TypeError, "log: expected functions of a table or the path of a CSV"),
        ({"log": 3}, TypeError, "log: expected functions of a table or the path of a CSV, got 3"),
        ({"log": [3]}, TypeError, "log: expected functions of a table or the path of a CSV, got 3"),
    ],
)
def test_wrong_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(linears(5), **options)


def test_the_base_rate_must_be_a_number() -> None:
    rates = small(linears(5))
    with pytest.raises(TypeError, match=r"lr: expected a number, got '0\.1'"):
        rates.param_groups("0.1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lr: expected a number, got True"):
        rates.param_groups(True)
    with pytest.raises(TypeError, match=r"lr: expected a number, got tensor\(\[0\.1"):
        rates.param_groups(torch.tensor([0.1, 0.2]))
    optimizer = torch.optim.SGD(rates.param_groups(0.1))
    with pytest.raises(TypeError, match="lr: expected a number, got 'x'"):
        rates.step(optimizer, lr="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr: expected a rate that is not negative, got nan"):
        rates.step(optimizer, lr=math.nan)


def test_the_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        TempBalance({})  # type: ignore[arg-type]


def test_layers_are_chosen_by_name() -> None:
    rates = whole(linears(6), include=["[0-4]"], exclude="2")
    rates.param_groups(0.1)
    assert rates.last is not None
    assert [(row.name, row.status) for row in rates.last] == [
        ("0", "skipped"), ("1", "ok"), ("3", "ok"), ("4", "skipped"),
    ]  # fmt: skip


@pytest.mark.parametrize("made", [[1.0], [1.0, 0.0, 2.0], [1.0, math.nan, 2.0], [-1.0, 1.0, 2.0]])
def test_a_rule_that_gives_no_positive_factors_is_an_error(made: list[float]) -> None:
    class Rule(LayerRates):
        def factors(self, scores: Sequence[float]) -> Sequence[float]:
            return made

    with pytest.raises(ValueError, match="factors: expected"):
        Rule(linears(3)).param_groups(0.1)


def test_analysing_leaves_model_and_random_numbers_as_they_were() -> None:
    model = TinyResNet()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rates = small(model)
    optimizer = sgd(rates)
    rates.step(optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert batches(0)[0][0].shape == (8, 3, 8, 8)
