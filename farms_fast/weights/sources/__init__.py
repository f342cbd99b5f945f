"""Where weights come from: a module, a mapping of tensors, or a checkpoint on disk.

A source tells its layers from headers alone and loads one tensor at a time; it writes nowhere, and
nothing in a file is ever executed.
"""

from __future__ import annotations

from farms_fast.weights.sources.adapter import AdapterSource
from farms_fast.weights.sources.file_source import FileSource
from farms_fast.weights.sources.folder import checkpoint_holds
from farms_fast.weights.sources.memory import MappingSource, ModuleSource, Source
from farms_fast.weights.sources.numpy_files import NumpySource
from farms_fast.weights.sources.opening import checkpoints_of, open_source
from farms_fast.weights.sources.pickles import PickleSource
from farms_fast.weights.sources.safetensors import SafetensorsSource

__all__ = [
    "AdapterSource",
    "FileSource",
    "MappingSource",
    "ModuleSource",
    "NumpySource",
    "PickleSource",
    "SafetensorsSource",
    "Source",
    "checkpoint_holds",
    "checkpoints_of",
    "open_source",
]
