"""Weights from pickled state dicts, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from farms_fast.weights.sources import (
    PickleSource,
    open_source,
)
from tests.support.checkpoints import (
    WEIGHTS,
    assert_holds_weights,
    loaded,
    write_index,
)


class Spy:
    """Writes a file when a careless reader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_tensors_of_one_memory_are_analysed_once(tmp_path: Path) -> None:
    weight = torch.ones(3, 3)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    assert isinstance(source, PickleSource)
    layers, skipped = source.layers()
    assert [layer.name for layer in layers] == ["a", "c"]
    assert [(s.name, s.reason) for s in skipped] == [("b", "tied to a")]


def test_pickle_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "m.pt")
    source = open_source(tmp_path / "m.pt")
    source.load("a.weight")
    assert_holds_weights(pickle.loads(pickle.dumps(source)))


# --- pickles ---


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_state_dict(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    assert_holds_weights(source)
    assert [layer.name for layer in source.layers()[0]] == ["b", "a"]
    before = path.read_bytes()
    source.load("a.weight").zero_()
    assert path.read_bytes() == before


def test_wrapped_pickle(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"model": WEIGHTS}}, tmp_path / "m.ckpt")
    assert set(loaded(open_source(tmp_path / "m.ckpt"))) == {"a", "b"}


def test_folder_with_a_pickle(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save({"b.weight": WEIGHTS["b.weight"]}, tmp_path / "p-1.bin")
    torch.save({k: WEIGHTS[k] for k in ("a.weight", "a.bias")}, tmp_path / "p-2.bin")
    shards = {"b.weight": "p-1.bin", "a.weight": "p-2.bin", "a.bias": "p-2.bin"}
    write_index(tmp_path, shards, "pytorch_model.bin")
    assert_holds_weights(open_source(tmp_path))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", ["code", "module"])
def test_pickle_that_needs_code_is_refused(tmp_path: Path, what: str, zipped: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    thing = {"w": Spy(trace)} if what == "code" else nn.Linear(2, 2)
    torch.save(thing, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil.pt: expected .*plain tensors") as error:
        open_source(path)
    assert ("mkdir" if what == "code" else "torch.nn.modules.linear.Linear") in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert error.value.__suppress_context__
    assert not trace.exists()


DAMAGED = {
    "noise": bytes(range(256)),
    "zip_only": b"PK\x03\x04" + bytes(40),
    "plain": pickle.dumps({"a": 1}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(DAMAGED))
def test_damaged_pickle_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"bad.pt: expected .*plain tensors.*, got"):
        open_source(path)


def test_a_pickled_module_is_told_what_to_save_instead(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 3), tmp_path / "model.pt")
    said = r"got .*torch\.nn.*Linear.*state_dict\(\)"
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / "model.pt")


def test_arrays_of_numpy_are_opened_in_python(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez(path, **{"fc.weight": np.ones((4, 3))})
    with pytest.raises(
        ValueError, match=r"in Python, analyze\(dict\(numpy\.load\(path\)\)\) takes"
    ):
        open_source(path)
    ((layer,), _) = open_source(dict(np.load(path))).layers()
    assert (layer.name, layer.shape) == ("fc", (1, 4, 3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.99])
def test_truncated_pickle_is_one_error(tmp_path: Path, fraction: float, zipped: bool) -> None:
    path = tmp_path / "cut.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(ValueError, match=r"cut.pt: expected .*plain tensors.*, got"):
        open_source(path)


@pytest.mark.parametrize("thing", [[1, 2], torch.ones(3, 3), 7])
def test_pickle_that_is_no_mapping_is_an_error(tmp_path: Path, thing: object) -> None:
    torch.save(thing, tmp_path / "m.pt")
    kind = type(thing).__name__
    with pytest.raises(ValueError, match=rf"m.pt: expected a mapping .*, got {kind}"):
        open_source(tmp_path / "m.pt")
