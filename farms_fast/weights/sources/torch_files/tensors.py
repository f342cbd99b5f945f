"""What pickles of torch and NumPy name to rebuild tensors, in functions that only take notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from farms_fast.weights.sources.stored_tensors import (
    MOST_DIMENSIONS,
    BrokenContent,
    FileBytes,
    Location,
    StoredTensor,
    dense_strides,
    dtype_of_numpy,
)
from farms_fast.weights.sources.torch_files.machine import Buildable, Global, StandIn

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


@dataclass(eq=False)
class Storage:
    """A storage of torch: `size` bytes, of which `location` is known once the pickle is read.

    A storage that is a part of another begins at `begin` of it.
    """

    dtype: torch.dtype
    size: int
    location: Location | None = None
    root: Storage | None = None
    begin: int = 0


@dataclass(eq=False)
class TorchTensor:
    """A tensor of torch before the locations of storages are known."""

    storage: Storage | None
    offset: Any
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    metadata: Mapping[Any, Any] | None = None
    reason: str = ""

    def stored(self, swapped: bool) -> StoredTensor:
        """The tensor, with its storage's location; `swapped` where the file's numbers are."""
        metadata = self.metadata or {}
        storage, offset = self.storage or Storage(self.dtype, 0), self.offset
        root = storage.root or storage
        if storage.begin and type(offset) is int:
            offset += storage.begin // self.dtype.itemsize
        return StoredTensor(
            location=root.location,
            size=root.size,
            shape=self.shape,
            stride=self.stride,
            dtype=self.dtype,
            offset=offset,
            swapped=swapped,
            conjugated=bool(metadata.get("conj")),
            negated=bool(metadata.get("neg")),
            reason=self.reason,
        )


@dataclass(eq=False)
class NumpyDtype(Buildable):
    """A dtype of NumPy by its name, with the order of its bytes."""

    name: str

    def build(self, state: Any) -> int:
        """Takes the order of bytes."""
        if state[1] in ("<", ">"):
            self.name = state[1] + self.name.lstrip("<>=|")
        return 0


@dataclass(eq=False)
class NumpyArray(Buildable):
    """An array of NumPy."""

    shape: tuple[Any, ...] = ()
    dtype: NumpyDtype | None = None
    fortran: bool = False
    content: Any = None

    def build(self, state: Any) -> int:
        """Takes shape, dtype, order of elements and content."""
        _, shape, dtype, fortran, content = state
        return self.take(shape, dtype, bool(fortran), content)

    def take(self, shape: Any, dtype: Any, fortran: bool, content: Any) -> int:
        """Takes the parts of the state; the text of Python 2 becomes bytes."""
        if not _are_sizes(shape) or not isinstance(dtype, NumpyDtype):
            raise BrokenContent("it has an array without a shape and a dtype")
        self.shape, self.dtype, self.fortran = shape, dtype, fortran
        is_text = isinstance(content, str)
        self.content = content.encode("latin-1") if is_text else content
        return len(self.content) if is_text else 0

    def stored(self) -> StoredTensor:
        """The array as a tensor."""
        name = "none" if self.dtype is None else self.dtype.name
        dtype, swapped = dtype_of_numpy(name)
        if dtype is None:  # of ml_dtypes, such as bfloat16
            dtype, swapped = _DTYPES.get(f"torch.{name.lstrip('<>')}"), name.startswith(">")
        reason = ""
        if dtype is None:
            dtype, reason = torch.uint8, f"dtype {name} is none of torch's"
        elif not isinstance(self.content, (bytes, FileBytes)):
            reason = "an array without numbers"
        return StoredTensor(
            location=self.content if isinstance(self.content, (bytes, FileBytes)) else None,
            size=math.prod(self.shape) * dtype.itemsize,
            shape=self.shape,
            stride=dense_strides(self.shape, self.fortran),
            dtype=dtype,
            swapped=swapped,
            reason=reason,
        )


def _are_sizes(values: Any) -> bool:
    """Whether it is a shape, or strides."""
    if not isinstance(values, tuple) or len(values) > MOST_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def storage_of(
    persistent_id: Any, storages: dict[Any, Storage], load: Callable[[Any], Location | None]
) -> Any:
    """The storage that a persistent id of torch names, or the class that it names instead.

    `load` gives the location of a new storage by its key; `storages` gets it.
    """
    if not isinstance(persistent_id, tuple) or not 1 < len(persistent_id) <= 8:
        raise BrokenContent("it has an object that is elsewhere")
    kind, *fields = persistent_id
    if kind == "module":
        return fields[0]
    made, key, _, count, *views = fields
    dtype = _STORAGES.get(made.name.rpartition(".")[2]) if isinstance(made, Global) else None
    if kind != "storage" or dtype is None or type(count) is not int or count < 0:
        raise BrokenContent("it has a storage of an unknown kind")
    if not isinstance(key, (str, int)):
        raise BrokenContent("it has a storage without a name")
    if key not in storages:
        storages[key] = Storage(dtype, count * dtype.itemsize, load(key))
    root = storages[key]
    if views and views[0] is not None:
        # Of torch before 0.4: a storage that is a part of another.
        _, begin, size = views[0]
        if type(begin) is not int or type(size) is not int or begin < 0 or size < 0:
            raise BrokenContent("it has a view of a storage that is none")
        item = dtype.itemsize
        if (begin + size) * item > root.size:
            raise BrokenContent("it has a view of a storage beyond its end")
        return Storage(dtype, size * item, root=root, begin=begin * item)
    return root if root.dtype == dtype else Storage(dtype, root.size, root=root)


# --- the functions that pickles name ---


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    metadata: Any = None,
) -> TorchTensor:
    if not isinstance(storage, Storage):
        raise BrokenContent("it has a tensor without a storage")
    return _typed_tensor(storage, offset, size, stride, None, None, storage.dtype, metadata)


def _typed_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> TorchTensor:
    known = _dtype_of(dtype)
    if not isinstance(storage, Storage) or not isinstance(size, tuple):
        raise BrokenContent("it has a tensor without a storage and a shape")
    if not isinstance(stride, tuple):
        raise BrokenContent("it has a tensor without strides")
    # Checked once the tensor is wanted.
    return TorchTensor(
        storage, offset, size, stride, known, metadata if isinstance(metadata, dict) else None
    )


def _dtype_of(dtype: Any) -> torch.dtype:
    if isinstance(dtype, Global):
        dtype = _DTYPES.get(dtype.name)
    if not isinstance(dtype, torch.dtype):
        raise BrokenContent("it has a tensor without a dtype")
    return dtype


def _without_values(shape: Any, dtype: torch.dtype, reason: str) -> TorchTensor:
    sizes = shape if _are_sizes(shape) else ()
    return TorchTensor(None, 0, sizes, dense_strides(sizes), dtype, reason=reason)


def _quantised(
    storage: Any, offset: Any, size: Any, stride: Any, parameters: Any, *_: Any
) -> TorchTensor:
    dtype = storage.dtype if isinstance(storage, Storage) else torch.qint8
    name = str(dtype).removeprefix("torch.")
    return _without_values(size, dtype, f"dtype {name} is torch's quantisation, which is not read")


def _sparse(layout: Any, data: Any) -> TorchTensor:
    parts = data[:4] if isinstance(data, tuple) else ()
    shape = next((part for part in parts if isinstance(part, tuple)), ())
    # Indices come first, values after them.
    dtypes = [part.dtype for part in parts if isinstance(part, TorchTensor)]
    name = layout.removeprefix("torch.") if isinstance(layout, str) else "sparse"
    reason = f"layout {name[:20]}: make it dense first"
    return _without_values(shape, dtypes[-1] if dtypes else torch.float32, reason)


def _nested(*_: Any) -> TorchTensor:
    return _without_values((), torch.float32, "a nested tensor, which is no matrix")


def _on_meta(dtype: Any, size: Any, *_: Any) -> TorchTensor:
    return _without_values(size, _dtype_of(dtype), "on the meta device: it has no values")


def _wrapper(kind: Any, dtype: Any, size: Any, *_: Any) -> TorchTensor:
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else "unknown"
    return _without_values(size, _dtype_of(dtype), f"a {name}, which only its own code reads")


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    made = _OF_TYPES.get(function.name) if isinstance(function, Global) else None
    if not isinstance(arguments, tuple) or len(arguments) > 16:
        raise BrokenContent("it has a tensor without arguments")
    if made is None:
        return StandIn(kind.name if isinstance(kind, Global) else "an object", arguments)
    return made(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _array(*_: Any) -> NumpyArray:
    return NumpyArray()


def _filled(state: Any) -> NumpyArray:
    array = NumpyArray()
    if array.build(state):
        raise BrokenContent("it has an array in text")
    return array


def _array_from_buffer(content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> NumpyArray:
    return _filled((0, shape, dtype, order == "F", content))


def _array_of_jax(function: Any, arguments: Any, state: Any, *_: Any) -> NumpyArray:
    return _filled(state)


def _dtype(name: Any, *_: Any) -> NumpyDtype:
    if isinstance(name, Global):  # a type of another package, such as ml_dtypes.bfloat16
        return NumpyDtype(name.name.rpartition(".")[2])
    return NumpyDtype(name if isinstance(name, str) and len(name) < 16 else "unknown")


def _encoded(text: Any, encoding: Any = "latin1") -> Any:
    if encoding not in ("latin1", "latin-1"):
        raise BrokenContent("it has text in an unknown encoding")
    return text if isinstance(text, FileBytes) else text.encode("latin-1")


def _bytes(content: Any = b"", *_: Any) -> Any:
    return content if isinstance(content, (bytes, FileBytes)) else StandIn("builtins.bytes")


def _mapping(*arguments: Any) -> Any:
    values = arguments[-1] if arguments else ()
    if isinstance(values, dict):
        return values
    entries = {}
    if isinstance(values, list):
        for key, value in values:
            if not isinstance(key, str):
                raise BrokenContent("it has a mapping whose keys are no text")
            entries[key] = value
        values.clear()  # the same list again and again would fill the memory
    return entries


_TENSORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _on_meta,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
}
_PARAMETERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
}
# Not the functions that rebuild by type themselves: they could go on for ever.
_OF_TYPES = _TENSORS | _PARAMETERS
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_JIT_LISTS = ("int", "tensor", "double", "bool")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_OF_TYPES,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.serialization._get_layout": _first,
    "torch.Size": _first,
    **{f"{module}._reconstruct": _array for module in _MULTIARRAY},
    **{f"{module}._frombuffer": _array_from_buffer for module in _NUMERIC},
    "numpy.ndarray": _array,
    "numpy.dtype": _dtype,
    "jax._src.array._reconstruct_array": _array_of_jax,
    "_codecs.encode": _encoded,
    **{f"builtins.{kind}": _bytes for kind in ("bytes", "bytearray")},
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *arguments: _mapping(*arguments[1:]),
    "collections.Counter": _mapping,
    "flax.core.frozen_dict.FrozenDict": _mapping,
    **{
        f"torch.jit._pickle.build_{kind}list": _first
        for kind in ("int", "tensor", "double", "bool")
    },
    "torch.jit._pickle.restore_type_tag": _first,
}
"""By the names in pickles: what is called in their stead. All of it runs with any arguments."""


def as_stored(value: Any, swapped: bool) -> StoredTensor | None:
    """The tensor or array that a value of a pickle is, None for any other."""
    if isinstance(value, StoredTensor):
        return value
    if isinstance(value, TorchTensor):
        return value.stored(swapped)
    return value.stored() if isinstance(value, NumpyArray) else None
