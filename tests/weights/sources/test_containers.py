"""Which mapping of a checkpoint holds the weights, in memory and in files alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from farms_fast.weights.sources import open_source
from tests.support.checkpoints import WEIGHTS, assert_holds_weights, loaded

OTHER = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
MATRIX = torch.ones(6, 6)


def optimizer_state() -> dict[str, Any]:
    model = nn.Linear(6, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(6)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def skipped_of(model: Any, key: str | None = None) -> dict[str, str]:
    return {s.name: s.reason for s in open_source(model, key=key).layers()[1]}


WRAPPED = {
    "tutorial": {
        "epoch": 3,
        "model_state_dict": WEIGHTS,
        "optimizer_state_dict": optimizer_state(),
        "loss": torch.tensor(0.4),
    },
    "imagenet": {"epoch": 3, "arch": "mlp", "state_dict": WEIGHTS, "best": torch.tensor(9.0)},
    "lightning": {
        "state_dict": WEIGHTS,
        "optimizer_states": [optimizer_state()],
        "hyper_parameters": {"width": 3},
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "timm": {"state_dict": WEIGHTS, "state_dict_ema": OTHER, "optimizer": optimizer_state()},
    "super_resolution": {"params": WEIGHTS, "params_ema": OTHER},
    "only_averaged": {"params_ema": WEIGHTS},
    "tempbalance": {"net": WEIGHTS, "test_acc": 93.1, "train_loss": 0.2},
    "random_states": {"model": WEIGHTS, "rng": torch.get_rng_state(), "confusion": MATRIX},
    "unknown_name": {"my_weights_v2": WEIGHTS, "step": 3, "optim": optimizer_state()},
    "wrapped_twice": {"checkpoint": {"state_dict": {"model": WEIGHTS}, "epoch": 3}},
    "optimizer_by_structure": {"sd": WEIGHTS, "adam": optimizer_state()},
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_weights_are_found_in_a_checkpoint(name: str) -> None:
    assert set(loaded(open_source(WRAPPED[name]))) == {"a", "b"}
    stacks = loaded(open_source(WRAPPED[name]))
    assert torch.equal(stacks["a"][0], WEIGHTS["a.weight"])


def test_what_is_beside_the_weights_is_told_in_few_entries() -> None:
    skipped = skipped_of({**WRAPPED["timm"], **{f"setting_{i}": i for i in range(1000)}})
    beside = "beside 'state_dict', which holds the weights"
    assert skipped["optimizer"] == f"{beside}; key='optimizer' takes it"
    assert skipped["state_dict_ema"] == f"{beside}; key='state_dict_ema' takes it"
    assert skipped["setting_0"] == beside
    assert skipped["..."] == f"980 more entries {beside}"
    assert len(skipped) == 24  # 20 settings and their rest, two mappings, a bias


SEVERAL = {
    "gan": ({"generator": WEIGHTS, "discriminator": OTHER}, ["generator", "discriminator"]),
    "two_known": ({"model": WEIGHTS, "net": OTHER, "epoch": 3}, ["model", "net"]),
    "inside": (
        {"state_dict": {"teacher": WEIGHTS, "student": OTHER}},
        ["state_dict.teacher", "state_dict.student"],
    ),
}


@pytest.mark.parametrize("name", list(SEVERAL))
def test_several_candidates_are_told_with_the_key_that_chooses(name: str) -> None:
    model, paths = SEVERAL[name]
    with pytest.raises(ValueError, match="one mapping that holds the weights") as error:
        open_source(model)
    assert ", ".join(map(repr, paths)) in str(error.value)
    assert f"key={paths[0]!r} (--key {paths[0]})" in str(error.value)
    assert_holds_weights(open_source(model, key=paths[0]))
    other = loaded(open_source(model, key=paths[1]))
    assert torch.equal(other["a"][0], OTHER["a.weight"])


def test_key_takes_what_would_not_be_found(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(WRAPPED["timm"], path)
    for model in (WRAPPED["timm"], path):
        averaged = loaded(open_source(model, key="state_dict_ema"))
        assert torch.equal(averaged["a"][0], OTHER["a.weight"])
    dotted = {"a.b": {"c": {"state_dict": WEIGHTS}}, "d": OTHER}
    assert_holds_weights(open_source(dotted, key="a.b.c"))


@pytest.mark.parametrize("key", ["", "gone", "state_dict.gone", "state_dict.a.weight", "epoch"])
def test_key_that_leads_to_no_tensors_is_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=r"key: expected the path .*'epoch'.*got ") as error:
        open_source({"epoch": {"n": 3}, "state_dict": WEIGHTS}, key=key)
    assert repr(key) in str(error.value)


def test_key_is_refused_where_there_are_no_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key: expected None, because Linear .* got 'x'"):
        open_source(nn.Linear(3, 3), key="x")
    with pytest.raises(TypeError, match="key: expected None or a dotted path, got 3"):
        open_source(WEIGHTS, key=3)


# --- nested trees ---

KERNEL, BIAS = np.ones((4, 3), dtype=np.float32), np.ones(3, dtype=np.float32)
FLAX = {
    "encoder": {"Dense_0": {"kernel": KERNEL, "bias": BIAS}, "scale": BIAS},
    "head": {"kernel": KERNEL + 1, "bias": BIAS},
}
FLAX_NAMES = [
    *("encoder.Dense_0.kernel", "encoder.Dense_0.bias", "encoder.scale"),
    *("head.kernel", "head.bias"),
]


@pytest.mark.parametrize(
    "tree",
    [
        FLAX,
        {"params": FLAX},
        {"params": FLAX, "batch_stats": {"norm": {"mean": BIAS}}},
        {"step": 3, "params": FLAX, "opt_state": {"mu": FLAX, "nu": FLAX}},
        {"model": {"params": FLAX}},
    ],
)
def test_nested_trees_have_dotted_names(tree: dict[str, Any]) -> None:
    assert [header.name for header in open_source(tree).headers] == FLAX_NAMES


def test_parts_of_a_tree_are_no_candidates() -> None:
    """Modules may have the names of wrappers: a tree's own mappings have no dotted names."""
    tree = {"net": FLAX["head"], "model": FLAX["head"].copy(), "table": KERNEL}
    names = [header.name for header in open_source(tree).headers]
    assert names == ["net.kernel", "net.bias", "model.kernel", "model.bias", "table"]


def test_lists_of_arrays_are_named_by_position() -> None:
    source = open_source({"layers": [(KERNEL, BIAS), (KERNEL + 1, BIAS)], "sizes": [3, 4]})
    assert [header.name for header in source.headers] == [
        f"layers.{layer}.{part}" for layer in range(2) for part in range(2)
    ]
    assert ("sizes", "not a tensor: list") in [(s.name, s.reason) for s in source.skipped]


def test_mapping_beside_the_tensors_of_a_state_dict_is_told() -> None:
    state = {**WEIGHTS, "optimizer": optimizer_state(), "extra": {"table": MATRIX}}
    assert set(loaded(open_source(state))) == {"a", "b"}
    skipped = skipped_of(state)
    assert skipped["optimizer"] == "the state of an optimiser"
    assert "beside the tensors of a state dict; key='extra'" in skipped["extra"]
    assert [header.name for header in open_source(state, key="extra").headers] == ["table"]


def test_mapping_that_holds_itself_is_entered_once() -> None:
    tree: dict[str, Any] = {"fc": {"kernel": KERNEL}}
    tree["again"] = tree
    tree["fc"]["up"] = tree["fc"]
    assert [header.name for header in open_source(tree).headers] == ["fc.kernel"]
    assert skipped_of(tree) == {"again": "the same as what holds it", "fc.up": "the same as fc"}


def test_shared_mappings_are_entered_once() -> None:
    """Each level names the one below twice: 2^40 names."""
    tree: dict[str, Any] = {"kernel": KERNEL}
    for _ in range(40):
        tree = {"a": tree, "b": tree}
    (header,) = open_source(tree).headers
    assert header.name == ".".join("a" * 40) + ".kernel"


def test_mappings_nested_too_deeply_are_an_error() -> None:
    tree: Any = {"kernel": KERNEL}
    for _ in range(100_000):
        tree = {"a": tree}
    with pytest.raises(ValueError, match="expected mappings nested at most 64 deep"):
        open_source(tree)


def test_name_that_two_tensors_have_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected each name once, got 'x.a.b.kernel' twice"):
        open_source({"x": {"a.b": {"kernel": KERNEL}, "a": {"b": {"kernel": KERNEL}}}})


def test_keys_that_are_no_text() -> None:
    assert skipped_of({**WEIGHTS, 3: "three"})["3"] == "its key is no text"
    with pytest.raises(TypeError, match="expected names as keys, got 3"):
        open_source({"a": {"kernel": KERNEL, 3: {"kernel": KERNEL}}})


class Exporting:
    """An array of another library, such as JAX's."""

    def __init__(self, array: np.ndarray) -> None:
        self.shape = array.shape
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_arrays_of_other_libraries_are_read() -> None:
    source = open_source({"Dense_0": {"kernel": Exporting(KERNEL)}})
    assert torch.equal(source.load("Dense_0.kernel"), torch.from_numpy(KERNEL))


def test_array_that_cannot_be_exported_is_skipped() -> None:
    class Refusing(Exporting):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("not here")

    assert skipped_of({"w": Refusing(KERNEL), **WEIGHTS})["w"] == "not read: not here"


def test_module_in_a_mapping_is_its_state_dict() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    source = open_source({"epoch": 3, "model": module})
    assert [header.name for header in source.headers] == list(module.state_dict())
    with pytest.raises(ValueError, match="'generator', 'critic': say which"):
        open_source({"generator": module, "critic": module})


def test_objects_beside_the_weights_are_named_by_their_type() -> None:
    assert skipped_of({**WEIGHTS, "config": SimpleNamespace()})["config"] == (
        "not a tensor: SimpleNamespace"
    )
