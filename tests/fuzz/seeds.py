"""Sound files to damage, one line each: how it is made, what is done with it, and what is damaged.

A format that is not read is damaged all the same: that it is refused in one line holds for every
file.
"""

from __future__ import annotations

import json
import os
import sys
import types
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from farms_fast import FixedAspectSampling, analyze
from tests.fuzz import mutations as damage
from tests.fuzz.mutations import Mutation

ANALYZE = ("analyze", "{}", "--rows", "8", "--per-dim", "2", "--bootstrap", "2", "--device", "cpu")
PLAN = ("plan", "{}", "--device", "cpu")
REPORT = ("report", "{}", "-o", "page.html")
COMPARE = ("compare", "{}", "{}", "--csv", "differences.csv", "-o", "page.html")
EXPORT = ("export", "{}", "--csv", "a.csv", "--json", "a.json", "--npz", "a.npz")
RUNS = ("runs", "{}")
BYTES = (damage.any_bytes, damage.beginning)


@dataclass(frozen=True)
class Seed:
    """A kind of file.

    Attributes:
        name: of the kind.
        make: writes the files into a folder and gives the path for the command.
        commands: what may be done with it, `{}` for the path.
        mutations: what may happen to it.
        damaged: the file that is damaged where the path is a folder.
    """

    name: str
    make: Callable[[Path], Path]
    commands: tuple[tuple[str, ...], ...]
    mutations: tuple[Mutation, ...] = BYTES
    damaged: str = ""


def weights(rows: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (rows, 16), "b.weight": (16, rows), "conv.weight": (8, 8, 3, 3)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**made, "a.bias": torch.zeros(rows), "half": made["a.weight"].half()}


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.numpy() for name, tensor in weights().items()}


# ------------------------------------------------------------------------------------- checkpoints


def safetensors(folder: Path) -> Path:
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


def sharded(folder: Path) -> Path:
    names = list(weights())
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: weights()[name] for name in part}, folder / f"model-{number}.safetensors")
    index = {name: f"model-{int(name not in names[:2])}.safetensors" for name in names}
    text = json.dumps({"metadata": {"total_size": 4}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def configured(folder: Path) -> Path:
    prefix = "model.layers.0.self_attn."
    q, scale = torch.randint(-9, 9, (32, 16), dtype=torch.int8), torch.rand(32, 1)
    tensors = {f"{prefix}qkv_proj.weight": torch.randn(48, 16), f"{prefix}o_proj.weight": q}
    tensors |= {f"{prefix}o_proj.weight_scale": scale, "lm_head.weight": torch.randn(20, 16)}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **{"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4},
        **{"num_hidden_layers": 1, "rope_scaling": {"factor": 2.0, "type": "linear"}},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
            "weight_block_size": [8, 8],
            "bits": 4,
            "group_size": 8,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path) -> Path:
    save_file({"q.weight": torch.randn(16, 12)}, folder / "base.safetensors")
    factors = {"A": torch.randn(2, 12), "B": torch.randn(16, 2)}
    save_file(
        {f"base_model.model.q.lora_{name}.weight": factor for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {
        **{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]},
        **{"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 4.0}, "use_rslora": False},
        **{"fan_in_fan_out": False, "base_model_name_or_path": str(folder / "base.safetensors")},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pickled(folder: Path) -> Path:
    torch.save(weights(), folder / "model.pt")
    return folder / "model.pt"


def legacy(folder: Path) -> Path:
    torch.save(weights(), folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def checkpoint(folder: Path) -> Path:
    """As training leaves it, with more in it than tensors."""
    state = {
        "state_dict": weights(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": Namespace(lr=0.1, path=Path("a/b")),
        "best": np.float64(0.5),
        "rng": np.random.default_rng(0).standard_normal(4),
    }
    torch.save(state, folder / "last.ckpt")
    return folder / "last.ckpt"


class _Taken:
    """Would make a folder if it were run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(MARKER),)


class _Compiled:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({str(MARKER)!r})",)


# Made by whatever of a file is run.
MARKER = Path("taken")


def hostile(folder: Path, legacy: bool = False) -> Path:
    content = {**weights(), "x": _Taken(), "y": [_Compiled()]}
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "model.pt"


def hostile_legacy(folder: Path) -> Path:
    return hostile(folder, legacy=True)


def own_class(folder: Path) -> Path:
    """A whole module, whose class is in no package here."""
    module = types.ModuleType("somebodys_model")
    exec("import torch\nclass Net(torch.nn.Linear): pass", vars(module))
    sys.modules[module.__name__] = module
    try:
        torch.save(module.Net(16, 12), folder / "model.pth")
    finally:
        del sys.modules[module.__name__]
    return folder / "model.pth"


def torchscript(folder: Path) -> Path:
    network = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Linear(12, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(folder / "model.pt"))
    return folder / "model.pt"


def npz(folder: Path) -> Path:
    np.savez(folder / "model.npz", **arrays())
    return folder / "model.npz"


def npz_compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "model.npz", **arrays())
    return folder / "model.npz"


def npy(folder: Path) -> Path:
    np.save(folder / "model.npy", arrays()["a.weight"])
    return folder / "model.npy"


def npy_pickled(folder: Path) -> Path:
    np.save(folder / "model.npy", np.array([_Taken()], dtype=object), allow_pickle=True)
    return folder / "model.npy"


def hdf5(folder: Path, name: str = "model.h5") -> Path:
    import h5py

    with h5py.File(folder / name, "w") as file:
        for layer, array in arrays().items():
            file.create_dataset(f"layers/{layer}/vars/0", data=array)
        file.create_dataset("packed", data=arrays()["a.weight"], chunks=(4, 16), compression="gzip")
        file.attrs["keras_version"] = "3.0"
    return folder / name


def keras(folder: Path) -> Path:
    hdf5(folder, "model.weights.h5")
    with zipfile.ZipFile(folder / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential"}))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.0"}))
        archive.write(folder / "model.weights.h5", "model.weights.h5")
    (folder / "model.weights.h5").unlink()
    return folder / "model.keras"


def gguf(folder: Path) -> Path:
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    path = folder / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_array("names", ["a", "b"])
    matrix = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    writer.add_tensor("blk.0.attn_q.weight", matrix)
    writer.add_tensor("blk.0.attn_norm.weight", matrix[0])
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        packed = quants.quantize(matrix, kind)
        writer.add_tensor(f"blk.0.{kind.name.lower()}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def onnx(folder: Path, external: bool = False) -> Path:
    from onnx import TensorProto, helper, numpy_helper, save

    tensors = [numpy_helper.from_array(array, name) for name, array in arrays().items()]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16]) for n in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    save(
        helper.make_model(graph),
        str(folder / "model.onnx"),
        save_as_external_data=external,
        location="model.data" if external else None,
        size_threshold=0,
    )
    return folder / "model.onnx"


def onnx_external(folder: Path) -> Path:
    return onnx(folder, external=True)


def msgpack(folder: Path) -> Path:
    """As Flax writes it: an array is an extension of type 1 with its shape, dtype and bytes."""
    import msgpack

    def extension(array: np.ndarray[Any, Any]) -> msgpack.ExtType:
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, packed)

    tree = {"params": {"dense": {"kernel": extension(arrays()["a.weight"])}}, "step": 3}
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree, use_bin_type=True))
    return folder / "flax_model.msgpack"


# ---------------------------------------------------------------------------------- saved analyses


def _analysis() -> Any:
    sampling = FixedAspectSampling(rows=8, per_dim=3)
    return analyze(weights(), sampling, bootstrap=5, device="cpu", progress=False)


def saved_json(folder: Path) -> Path:
    _analysis().to_json(folder / "analysis.json")
    return folder / "analysis.json"


def saved_spectra(folder: Path) -> Path:
    _analysis().to_json(folder / "analysis.json", spectra=True)
    return folder / "analysis.json"


def store(folder: Path) -> Path:
    sampling = FixedAspectSampling(rows=8, per_dim=3)
    path = folder / "run.sqlite"
    analyze(weights(), sampling, bootstrap=5, device="cpu", store=path, progress=False)
    return path


_JSON = (damage.json_values, damage.json_values, damage.json_values, damage.any_bytes)
_SAFETENSORS = (damage.safetensors_header, *BYTES)
_ZIP = (damage.zip_members, damage.any_bytes)
_SQLITE = (damage.sqlite_values, damage.sqlite_values, damage.any_bytes)

SEEDS = (
    Seed("safetensors", safetensors, (ANALYZE, PLAN), _SAFETENSORS),
    Seed("shards' index", sharded, (ANALYZE, PLAN), _JSON, "model.safetensors.index.json"),
    Seed("config.json", configured, (ANALYZE, PLAN), _JSON, "config.json"),
    Seed("weights with a config", configured, (ANALYZE,), _SAFETENSORS, "model.safetensors"),
    Seed("adapter's config", adapter, (ANALYZE, PLAN), _JSON, "adapter_config.json"),
    Seed("adapter", adapter, (ANALYZE,), _SAFETENSORS, "adapter_model.safetensors"),
    Seed("pickle", pickled, (ANALYZE, PLAN), _ZIP),
    Seed("old pickle", legacy, (ANALYZE, PLAN)),
    Seed("training checkpoint", checkpoint, (ANALYZE,), _ZIP),
    Seed("hostile pickle", hostile, (ANALYZE, PLAN), _ZIP),
    Seed("hostile old pickle", hostile_legacy, (ANALYZE,)),
    Seed("module of another's class", own_class, (ANALYZE,), _ZIP),
    Seed("TorchScript", torchscript, (ANALYZE,), _ZIP),
    Seed("npz", npz, (ANALYZE, PLAN), _ZIP),
    Seed("compressed npz", npz_compressed, (ANALYZE,), _ZIP),
    Seed("npy", npy, (ANALYZE, PLAN)),
    Seed("pickled npy", npy_pickled, (ANALYZE,)),
    Seed("HDF5", hdf5, (ANALYZE, PLAN)),
    Seed("Keras", keras, (ANALYZE,), _ZIP),
    Seed("GGUF", gguf, (ANALYZE, PLAN)),
    Seed("ONNX", onnx, (ANALYZE, PLAN)),
    Seed("ONNX with external data", onnx_external, (ANALYZE,)),
    Seed("Flax msgpack", msgpack, (ANALYZE, PLAN)),
    Seed("saved analysis", saved_json, (REPORT, COMPARE), _JSON),
    Seed("saved spectra", saved_spectra, (REPORT, COMPARE), _JSON),
    Seed("store", store, (RUNS, REPORT, COMPARE, EXPORT), _SQLITE),
)
