"""HDF5 files as Keras writes them and as others do, and what in them is not read."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast.weights.sources import open_source
from tests.support.checkpoints import unimportable

h5py = pytest.importorskip("h5py")

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(12, 8)).astype(np.float32)
FILTERS = RNG.normal(size=(3, 3, 16, 32)).astype(np.float32)


def _write(path: Path, arrays: dict[str, Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
    return path


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    source = open_source(path)
    return {header.name: source.load(header.name) for header in source.headers}


def test_weights_of_keras_before_3(tmp_path: Path) -> None:
    arrays = {
        "model_weights/conv1/conv1/kernel:0": FILTERS,
        "model_weights/conv1/conv1/bias:0": np.zeros(32, np.float32),
        "model_weights/fc/fc/kernel:0": KERNEL,
        "model_weights/inner/dense/kernel:0": KERNEL + 1,
        "optimizer_weights/adam/fc/kernel/m:0": KERNEL,
    }
    path = _write(tmp_path / "m.h5", arrays)
    tensors = _tensors(path)
    assert list(tensors) == ["conv1.bias", "conv1.kernel", "fc.kernel", "inner.dense.kernel"]
    assert np.array_equal(tensors["conv1.kernel"].numpy(), FILTERS)
    assert np.array_equal(tensors["inner.dense.kernel"].numpy(), KERNEL + 1)
    assert ("the state of an optimiser", KERNEL.shape) in [
        (tensor.reason, tensor.shape) for tensor in open_source(path).skipped
    ]


KERAS_3 = {
    "layers/dense/vars/0": KERNEL,
    "layers/dense/vars/1": np.zeros(8, np.float32),
    "layers/conv2d_1/vars/0": FILTERS,
    "layers/embedding/vars/0": RNG.normal(size=(50, 8)).astype(np.float32),
    "layers/lstm/cell/vars/0": RNG.normal(size=(12, 32)).astype(np.float32),
    "layers/lstm/cell/vars/1": RNG.normal(size=(8, 32)).astype(np.float32),
    "layers/separable_conv2d/vars/0": RNG.normal(size=(3, 3, 4, 1)).astype(np.float32),
    "layers/multi_head_attention/query_dense/vars/0": RNG.normal(size=(8, 2, 4)),
    "layers/multi_head_attention/output_dense/vars/0": RNG.normal(size=(2, 4, 8)),
    "optimizer/vars/1": KERNEL,
}
NAMES = {
    "dense.kernel",
    "dense.bias",
    "conv2d_1.kernel",
    "embedding.embeddings",
    "lstm.cell.kernel",
    "lstm.cell.recurrent_kernel",
    "separable_conv2d.depthwise_kernel",
    "multi_head_attention.query.kernel",
    "multi_head_attention.attention_output.kernel",
}


def test_weights_of_keras_3_get_the_names_of_their_variables(tmp_path: Path) -> None:
    tensors = _tensors(_write(tmp_path / "m.weights.h5", KERAS_3))
    assert set(tensors) == NAMES
    assert np.array_equal(tensors["dense.kernel"].numpy(), KERNEL)


def _archive(folder: Path, arrays: dict[str, Any], compression: int, classes: object) -> Path:
    weights = _write(folder / "inner.h5", arrays)
    path = folder / "m.keras"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(classes))
        archive.write(weights, "model.weights.h5")
    weights.unlink()
    return path


def test_keras_archive(tmp_path: Path) -> None:
    layers = [{"class_name": "Embedding", "config": {"name": "tokens"}}]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    arrays = {"layers/tokens/vars/0": KERNEL, "layers/fc/vars/0": KERNEL + 1}
    path = _archive(tmp_path, arrays, zipfile.ZIP_STORED, config)
    tensors = _tensors(path)
    assert set(tensors) == {"tokens.embeddings", "fc.kernel"}
    assert np.array_equal(tensors["fc.kernel"].numpy(), KERNEL + 1)
    assert set(_tensors(tmp_path)) == set(tensors)


def test_compressed_keras_archive_is_one_error(tmp_path: Path) -> None:
    path = _archive(tmp_path, {"a/kernel": KERNEL}, zipfile.ZIP_DEFLATED, {})
    with pytest.raises(ValueError, match=r"m.keras: expected .* got it compressed: unzip"):
        open_source(path)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "c8", "i4"])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "chunks": (4, 8)}])
def test_arrays_of_others(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    array = KERNEL.astype(dtype)
    source = open_source(_write(tmp_path / "m.hdf5", {"net/fc.weight": array}, **options))
    assert [header.name for header in source.headers] == ["net.fc.weight"]
    loaded = source.load("net.fc.weight")
    assert loaded.dtype == source.headers[0].dtype
    assert np.array_equal(loaded.numpy(), array)


def test_what_is_no_tensor_is_listed(tmp_path: Path) -> None:
    other = _write(tmp_path / "other.h5", {"secret": KERNEL})
    (tmp_path / "raw.bin").write_bytes(KERNEL.tobytes())
    path = tmp_path / "m.h5"
    with h5py.File(path, "w") as file:
        file["a/weight"] = KERNEL
        file["text"] = "words"
        file["record"] = np.zeros(3, dtype=[("x", "f4")])
        file["nothing"] = h5py.Empty("f4")
        file["elsewhere"] = h5py.ExternalLink(other.name, "/secret")
        file["soft"] = h5py.SoftLink("/a/weight")
        file["tied/weight"] = file["a/weight"]
        file["loop"] = file["/"]
        outside = [(str(tmp_path / "raw.bin"), 0, KERNEL.nbytes)]
        file.create_dataset("outside", KERNEL.shape, "f4", external=outside)
        layout = h5py.VirtualLayout(KERNEL.shape, "f4")
        layout[:] = h5py.VirtualSource(other.name, "secret", KERNEL.shape)
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("holes", (4096, 4096), "f4", chunks=(64, 64))
        file.create_dataset("bomb", (2**20, 2**20), "f4", chunks=(64, 64), compression="gzip")
    layers, skipped = open_source(path).layers()
    assert [layer.name for layer in layers] == ["a"]
    reasons = {tensor.name: tensor.reason for tensor in skipped}
    assert reasons.pop("tied") == "tied to a"
    assert {name: reason.partition(":")[0] for name, reason in reasons.items()} == {
        "text": "not a tensor",
        "record": "not a tensor",
        "nothing": "an empty dataset",
        "elsewhere": "a link, which is not followed",
        "soft": "a link, which is not followed",
        "outside": "its data are in other files, which are not read",
        "virtual": "its data are in other files, which are not read",
        "holes": "only 0 of its 67,108,864 bytes are in the file",
        "bomb": "only 0 of its 4,398,046,511,104 bytes are in the file",
    }


@pytest.mark.parametrize("keep", [9, 60, 500, -100])
def test_cut_file_is_one_error(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path / "m.h5", KERAS_3)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m.h5: expected sound HDF5, got a broken one"):
        open_source(path)


def test_file_without_tensors_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"m.h5: expected tensors, got HDF5 without any"):
        open_source(_write(tmp_path / "m.h5", {"text": "words"}))


def test_nesting_is_bounded(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.h5", {"/".join("g" * 200) + "/w": KERNEL})
    with pytest.raises(ValueError, match="more groups and datasets than weights have"):
        open_source(path)


def test_file_that_changes_gives_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.h5", {"a.weight": KERNEL})
    source = open_source(path)
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(ValueError, match=r"m.h5: expected the file as it was"):
        source.load("a.weight")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "m.h5", {"a.weight": KERNEL})
    unimportable(monkeypatch, "h5py")
    with pytest.raises(ImportError, match=r"m.h5: HDF5: .*pip install 'farms-fast\[hdf5\]'"):
        open_source(path)
