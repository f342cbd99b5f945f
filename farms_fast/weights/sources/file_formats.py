"""Which source reads which kind of file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.sources import recognise as kinds
from farms_fast.weights.sources.file_source import Files, FileSource
from farms_fast.weights.sources.gguf import GGUFSource
from farms_fast.weights.sources.hdf5 import HDF5Source
from farms_fast.weights.sources.msgpack import MsgpackSource
from farms_fast.weights.sources.numpy_files import NumpySource
from farms_fast.weights.sources.onnx import ONNXSource
from farms_fast.weights.sources.pickles import PickleSource
from farms_fast.weights.sources.recognise import FileKind, recognise
from farms_fast.weights.sources.safetensors import SafetensorsSource

_SOURCES: dict[FileKind, type[FileSource[Any]]] = {
    kinds.SAFETENSORS: SafetensorsSource,
    kinds.PICKLE: PickleSource,
    kinds.NPZ: NumpySource,
    kinds.NPY: NumpySource,
    kinds.GGUF: GGUFSource,
    kinds.HDF5: HDF5Source,
    kinds.KERAS: HDF5Source,
    kinds.ONNX: ONNXSource,
    kinds.MSGPACK: MsgpackSource,
}
_READ = "safetensors, a pickle of torch, .npz, .npy, GGUF, HDF5, ONNX or msgpack"


def is_read(path: Path) -> bool:
    """Whether a file is of a format that some source reads."""
    return recognise(path) in _SOURCES


def open_files(
    files: Files, description: str, config: ModelConfig | None = None, key: str | None = None
) -> FileSource[Any]:
    """The source of one file, or of shards, all of one format.

    Raises:
        ValueError: the format is another one, which the message names with the way out, or `key` is
            given for a format without mappings.
        ImportError: the package that reads the format is not installed.
    """
    first, *others = files
    kind = recognise(first)
    for path in others:
        if (other := recognise(path)) is not kind:
            raise ValueError(f"{path}: expected {kind.name}, as {first.name} is, got {other.name}")
    if kind not in _SOURCES:
        way_out = f": {kind.way_out}" if kind.way_out else ""
        raise ValueError(f"{first}: expected weights as {_READ}, got {kind.name}{way_out}")
    return _SOURCES[kind](files, description, config, key)
