"""The recipes for llm-compressor, parsed as YAML and held to what its modifiers take."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from farms_fast.adapters.pruning.allocation import allocate_sparsity, uniform_sparsity
from farms_fast.adapters.pruning.recipe import to_recipe
from farms_fast.adapters.pruning.sparsities import Allocation

NAMES = [
    f"model.layers.{block}.{leaf}" for block in range(3) for leaf in ("self_attn.q_proj", "mlp.up")
]
# The fields of the modifiers in llm-compressor 0.14 that a recipe of ours sets, and their types.
FIELDS: dict[str, dict[str, type]] = {
    "SparseGPTModifier": {
        "sparsity": float,
        "mask_structure": str,
        "block_size": int,
        "dampening_frac": float,
        "targets": list,
    },
    "WandaPruningModifier": {"sparsity": float, "mask_structure": str, "targets": list},
    "MagnitudePruningModifier": {
        "start": int,
        "end": int,
        "init_sparsity": float,
        "final_sparsity": float,
        "targets": list,
    },
}


def allocation(level: str = "block", sparsity: float = 0.7, epsilon: float = 0.2) -> Allocation:
    alphas = dict(zip(NAMES, [2.0, 3.0, 3.0, 4.0, 4.5, 6.0], strict=True))
    return allocate_sparsity(
        alphas,
        sparsity,
        epsilon,
        level,
        params=[10, 20] * 3,  # type: ignore[arg-type]
    )


def modifiers(text: str) -> list[tuple[str, dict[str, Any]]]:
    recipe = yaml.safe_load(text)
    assert list(recipe) == ["sparsity_stage"]
    groups = recipe["sparsity_stage"]
    assert all(name.endswith("_modifiers") for name in groups)
    # YAML forgets all but the last of equal keys.
    assert len(groups) == text.count("Modifier:")
    found = [item for group in groups.values() for item in group.items()]
    for kind, settings in found:
        assert {name: type(value) for name, value in settings.items()} == FIELDS[kind]
    return found


@pytest.mark.parametrize("level", ["block", "layer"])
@pytest.mark.parametrize(
    ("method", "kind", "field"),
    [
        ("sparsegpt", "SparseGPTModifier", "sparsity"),
        ("wanda", "WandaPruningModifier", "sparsity"),
        ("magnitude", "MagnitudePruningModifier", "final_sparsity"),
    ],
)
def test_every_layer_gets_its_ratio(level: str, method: str, kind: str, field: str) -> None:
    given = allocation(level)
    found = modifiers(to_recipe(method, given))
    assert {name for name, _ in found} == {kind}
    assert len(found) == (3 if level == "block" else len(set(given.ratios.values())))
    by_layer = [(layer, settings[field]) for _, settings in found for layer in settings["targets"]]
    assert len(by_layer) == len(NAMES)
    assert dict(by_layer) == given.ratios


def test_settings_of_sparsegpt() -> None:
    text = to_recipe("sparsegpt", allocation(), block=64, damping=1e-5)
    for _, settings in modifiers(text):
        assert settings["block_size"] == 64
        assert settings["dampening_frac"] == 1e-5
        assert settings["mask_structure"] == "0:0"


def test_groups_are_named_after_blocks_and_never_alike() -> None:
    groups = yaml.safe_load(to_recipe("wanda", allocation()))["sparsity_stage"]
    assert list(groups) == [f"model_layers_{block}_modifiers" for block in range(3)]
    clashing = {"a.b": 0.5, "a_b": 0.6, "0": 0.7, "é": 0.8, "": 0.9}
    found = modifiers(to_recipe("wanda", clashing))
    assert [s["targets"][0] for _, s in found] == list(clashing)


def test_names_survive_yaml() -> None:
    odd = {'l.0."q': 0.5, "l.1.: #no": 0.5, "l.2.\n'x\u2028": 0.5, "yes": 0.5, "1.0": 0.5}
    ((_, settings),) = modifiers(to_recipe("wanda", odd))
    assert settings["targets"] == list(odd)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_n_of_m_counts_what_goes(method: str) -> None:
    given = allocation()
    patterns = given.n_m(8)
    found = modifiers(to_recipe(method, given, n_m=patterns))
    by_layer = {layer: s["mask_structure"] for _, s in found for layer in s["targets"]}
    assert by_layer == {name: f"{m - n}:{m}" for name, (n, m) in patterns.items()}
    assert len(set(by_layer.values())) > 1


def test_layers_that_keep_all_of_m_are_left_out() -> None:
    # "0:8" would be no pattern to llm-compressor, and the ratio would be pruned without one.
    patterns = {"a": (8, 8), "b": (3, 8), "c": (0, 8)}
    found = modifiers(to_recipe("wanda", {"a": 0.06, "b": 0.0, "c": 1.0}, n_m=patterns))
    assert [(s["targets"], s["mask_structure"]) for _, s in found] == [
        (["b"], "5:8"),
        (["c"], "8:8"),
    ]
    # Nor does a ratio that the pattern is not of say anything.
    assert [s["sparsity"] for _, s in found] == [0.625, 1.0]
    for ratios, n_m in (({"a": 0.5}, {"a": (4, 4)}), ({"a": 0.0}, None)):
        with pytest.raises(ValueError, match="ratios: expected a layer to prune, got 1 that stay"):
            to_recipe("wanda", ratios, n_m=n_m)


@pytest.mark.parametrize(("m", "block"), [(8, 128), (3, 126), (200, 200)])
def test_blocks_of_columns_are_whole_groups(m: int, block: int) -> None:
    ((_, settings),) = modifiers(to_recipe("sparsegpt", {"a": 0.5}, n_m={"a": (1, m)}))
    assert settings["block_size"] == block


def test_uniform_is_one_modifier() -> None:
    given = uniform_sparsity(dict.fromkeys(NAMES, 5), 0.5)
    ((_, settings),) = modifiers(to_recipe("wanda", given))
    assert settings["targets"] == NAMES


@pytest.mark.parametrize(("method", "largest"), [("sparsegpt", 0.99999), ("wanda", 1.0)])
def test_ratios_at_the_ends(method: str, largest: float) -> None:
    found = modifiers(to_recipe(method, {"a": 1.0, "b": 0.0, "c": 1e-7}))
    # What is not to be pruned is no target.
    assert [settings["sparsity"] for _, settings in found] == [largest, 1e-7]
    assert [settings["targets"] for _, settings in found] == [["a"], ["c"]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="method: expected one of"):
        to_recipe("obs", {"a": 0.5})
    with pytest.raises(ValueError, match="ratios: expected at least one layer"):
        to_recipe("wanda", {})
    with pytest.raises(ValueError, match=r"ratios: expected numbers from 0 to 1, got 1.5 for 'a'"):
        to_recipe("wanda", {"a": 1.5})
    with pytest.raises(ValueError, match="n_m: llm-compressor has no N:M by magnitude"):
        to_recipe("magnitude", {"a": 0.5}, n_m={"a": (2, 4)})
    with pytest.raises(ValueError, match="n_m: expected the 1 layers of the ratios"):
        to_recipe("wanda", {"a": 0.5}, n_m={"b": (2, 4)})
