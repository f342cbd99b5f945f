"""Initialisers of ONNX models, also those whose data lie in other files of the same folder.

The graph tells how a weight is used, and so its layout: the second factor of a MatMul is
`(in, out)`. Weights are given in torch's layout, `(out, in)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farms_fast.core.arrays import from_numpy
from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.file_source import Extent, FileSource, file_state
from farms_fast.weights.sources.protobuf import MessageReader
from farms_fast.weights.stacks import Skipped, TensorHeader

_GRAPH = 7  # of a model
_NODE, _INITIALISER, _SPARSE = 1, 5, 15  # of a graph
_ATTRIBUTE = 5  # of a node
_TENSOR_VALUE, _GRAPH_VALUE = 5, 6  # of an attribute
_RAW = 9  # of a tensor
_TYPED = frozenset({4, 5, 6, 7, 10, 11})
_MESSAGE_BYTES = 2**20
_DEEPEST = 8
_MOST_NODES = 2**22
_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "COMPLEX64": torch.complex64,
    "COMPLEX128": torch.complex128,
    "BOOL": torch.bool,
    "FLOAT8E4M3FN": torch.float8_e4m3fn,
    "FLOAT8E4M3FNUZ": torch.float8_e4m3fnuz,
    "FLOAT8E5M2": torch.float8_e5m2,
    "FLOAT8E5M2FNUZ": torch.float8_e5m2fnuz,
    **{f"{s.upper()}INT{b}": getattr(torch, f"{s}int{b}") for s in ("", "u") for b in (8, 16)},
    **{f"{s.upper()}INT{b}": getattr(torch, f"{s}int{b}") for s in ("", "u") for b in (32, 64)},
}
_ELEMENTWISE = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "PRelu", "Expand"),
        *("Where", "Equal", "Less", "Greater", "And", "Or"),
    }
)
# Gates of a recurrent node as ONNX orders them, by their positions in torch's order.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
# Names that an exporter makes up; the node that takes the weight has a better one.
_MADE_UP = re.compile(r"(onnx::.*|\d+|_v_\d+|val_\d+|Constant_.*|.*/Constant_output_0)")
_EMBEDDING = re.compile(r"emb|wte|wpe|shared", re.IGNORECASE)


@dataclass(frozen=True)
class _Use:
    """A node that takes a tensor, and as which of its inputs."""

    operator: str
    position: int
    node: str
    attributes: Mapping[str, int]


@dataclass(frozen=True)
class _Stored:
    """A tensor as a file has it: its bytes, or the message that has its values one by one."""

    path: Path
    extent: Extent
    typed: bool = False


@dataclass(frozen=True)
class _View:
    """What of a stored tensor is a weight."""

    stored: _Stored
    transposed: bool = False
    direction: int | None = None
    gates: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The weight."""
        if self.direction is not None:
            parts = tensor[self.direction].chunk(len(self.gates))
            return torch.cat([parts[gate] for gate in self.gates])
        return tensor.mT if self.transposed else tensor


@dataclass
class _Model:
    """Tensors of a graph and of those in it, and the nodes that take them."""

    tensors: dict[str, _Stored | Skipped] = field(default_factory=dict)
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    nodes: int = 0


class ONNXSource(FileSource[_View]):
    """Initialisers and constants of ONNX models, in torch's layout."""

    _layout = "torch"

    def _load(self, name: str, stored: Path) -> Tensor:
        view = self._located[stored, name]
        tensor = view.stored
        if not tensor.typed:
            return view.of(self._read_tensor(tensor.path, tensor.extent))
        onnx = _onnx(stored)
        message = onnx.TensorProto()
        content = self._read(tensor.path, tensor.extent.offset, tensor.extent.bytes)
        try:
            message.ParseFromString(content.numpy().tobytes())
            array = onnx.numpy_helper.to_array(message)
        except Exception as error:  # protobuf's own types, and NumPy's for too few values
            reason = " ".join(str(error).split())
            raise ValueError(f"{stored}: expected sound values of {name!r}: {reason}") from None
        return view.of(from_numpy(_native(array, tensor.extent.dtype)).view(tensor.extent.dtype))

    def _read_headers(self, path: Path) -> Mapping[str, TensorHeader | Skipped]:
        onnx = _onnx(path)
        model = _Model()
        with open_regular(path) as file:
            reader = MessageReader(file, path, self._size(path), "ONNX")
            graphs = [f for f in reader.fields(0, reader.size) if f.number == _GRAPH]
            if len(graphs) != 1:
                raise reader.broken(f"{len(graphs)} graphs")
            self._read_graph(onnx, reader, path, graphs[0].start, graphs[0].end, model, 0)
        stored: dict[str, TensorHeader | Skipped] = {}
        for name, tensor in model.tensors.items():
            if isinstance(tensor, Skipped):
                stored[name] = tensor
                continue
            for own, view, shape, reason in _weights(name, tensor, model.uses.get(name, [])):
                unique = own if own not in stored else name
                if reason or unique in stored:
                    stored[unique] = Skipped(unique, shape, reason or "of a name given twice")
                    continue
                identity = (str(tensor.path), tensor.extent, view)
                stored[unique] = TensorHeader(unique, shape, tensor.extent.dtype, identity)
                self._located[path, unique] = view
        return stored

    def _read_graph(
        self,
        onnx: Any,
        reader: MessageReader,
        path: Path,
        start: int,
        end: int,
        model: _Model,
        depth: int,
    ) -> None:
        """Adds the tensors of a graph, and its nodes as their users."""
        if depth > _DEEPEST:
            raise reader.broken("graphs in graphs without end")
        for part in reader.fields(start, end):
            if part.number == _INITIALISER:
                self._add_tensor(onnx, reader, path, part.start, part.end, model)
            elif part.number == _SPARSE:
                name = f"sparse_initializer_{part.start}"
                model.tensors[name] = Skipped(name, (), "sparse: make it dense first")
            elif part.number == _NODE:
                node = onnx.NodeProto()
                others = reader.parsed(node, part.start, part.end, {_ATTRIBUTE}, _MESSAGE_BYTES)
                numbers: dict[str, int] = {}
                for other in others:
                    attribute = onnx.AttributeProto()
                    values = reader.parsed(
                        attribute, other.start, other.end, {_TENSOR_VALUE, _GRAPH_VALUE}, 2**26
                    )
                    numbers[_text(attribute.name)] = attribute.i
                    for value in values:
                        if value.number == _GRAPH_VALUE:
                            inner = (value.start, value.end, model, depth + 1)
                            self._read_graph(onnx, reader, path, *inner)
                        elif _text(node.op_type) == "Constant" and node.output:
                            span = (value.start, value.end, model, _text(node.output[0]))
                            self._add_tensor(onnx, reader, path, *span)
                model.nodes += 1
                if model.nodes > _MOST_NODES:
                    raise reader.broken("more nodes than models have")
                for position, name in enumerate(node.input):
                    use = _Use(_text(node.op_type), position, _text(node.name), numbers)
                    model.uses.setdefault(_text(name), []).append(use)

    def _add_tensor(
        self,
        onnx: Any,
        reader: MessageReader,
        path: Path,
        start: int,
        end: int,
        model: _Model,
        output: str = "",
    ) -> None:
        message = onnx.TensorProto()
        data = reader.parsed(message, start, end, {_RAW, *_TYPED}, _MESSAGE_BYTES)
        name, shape = output or _text(message.name), tuple(message.dims)
        if not name or name in model.tensors:
            name = f"{name or 'initializer'}_{start}"
        if len(shape) > 64 or any(size < 0 for size in shape):
            raise reader.broken(f"shape {shape[:8]} of {name!r}")
        kinds = onnx.TensorProto.DataType
        known = message.data_type in kinds.values()
        kind = kinds.Name(message.data_type) if known else str(message.data_type)
        dtype = _DTYPES.get(kind)
        if dtype is None:
            model.tensors[name] = Skipped(name, shape, f"not a tensor that is read: dtype {kind}")
            return
        size = math.prod(shape) * dtype.itemsize
        stored = _Stored(path, Extent(start, end - start, shape, dtype), typed=True)
        if message.data_location == onnx.TensorProto.EXTERNAL:
            entries = {_text(entry.key): _text(entry.value) for entry in message.external_data}
            stored = self._external(path, name, entries, Extent(0, size, shape, dtype))
        elif any(part.number == _RAW for part in data):
            raw = data[-1]
            stored = _Stored(path, Extent(raw.start, raw.end - raw.start, shape, dtype))
        elif size and not data:
            model.tensors[name] = Skipped(name, shape, "without data")
            return
        if not stored.typed and stored.extent.bytes != size:
            raise reader.broken(f"{stored.extent.bytes:,} bytes for {name!r}, of {size:,}")
        model.tensors[name] = stored

    def _external(
        self, path: Path, name: str, entries: Mapping[str, str], wanted: Extent
    ) -> _Stored:
        """A tensor whose data another file has, which has to be in the model's folder."""
        location = entries.get("location", "")
        parts = location.split("/")
        if re.search(r"[\\:\0]", location) or any(part in ("", ".", "..") for part in parts):
            raise ValueError(
                f"{path}: expected the path of a file in the same folder for {name!r}, "
                f"got {location!r}"
            )
        other = path.parent.joinpath(*parts)
        if other not in self._states:
            with open_regular(other) as file:
                self._states[other] = file_state(file.fileno())
        try:
            offset = int(entries.get("offset") or "0")
            length = int(entries.get("length") or wanted.bytes)
        except ValueError:
            offset, length = -1, 0
        if offset < 0 or length != wanted.bytes or offset + length > self._size(other):
            raise ValueError(
                f"{other}: expected {wanted.bytes:,} bytes for {name!r}, got {length:,} from byte"
                f" {offset:,} of {self._size(other):,}"
            )
        return _Stored(other, Extent(offset, length, wanted.shape, wanted.dtype))


def _onnx(path: Path) -> Any:
    with optional_import("onnx", extra="onnx", needed_for=f"{path}: ONNX"):
        import onnx
        import onnx.numpy_helper
    return onnx


def _text(value: str | bytes) -> str:
    """A text of a message, which the library gives as bytes where it is no UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def _native(values: Any, dtype: torch.dtype) -> Any:
    """An array whose bytes torch can hold: NumPy's own types, else unsigned integers."""
    array = np.ascontiguousarray(values)
    return array if array.dtype.kind in "biufc" else array.view(f"u{dtype.itemsize}")


def _weights(
    name: str, stored: _Stored, uses: list[_Use]
) -> Iterator[tuple[str, _View, tuple[int, ...], str]]:
    """What a tensor is by its uses: name, view, shape, and the reason to skip it, or none."""
    shape = stored.extent.shape
    operators = {use.operator for use in uses}
    own = _name_of(name, uses)
    if len(shape) == 3 and len(uses) == 1 and uses[0].operator in _GATES:
        yield from _recurrent(stored, uses[0], own)
    elif len(shape) > 1 and operators and operators <= _ELEMENTWISE:
        yield own, _View(stored), shape, f"a constant of {min(operators)}, no weight of a map"
    elif len(shape) > 2 and "MatMul" in operators:
        yield own, _View(stored), shape, "a stack of factors of MatMul: no rule makes layers of it"
    elif len(shape) == 2 and uses and all(map(_takes_in_out, uses)):
        yield own, _View(stored, transposed=True), shape[::-1], ""
    elif len(shape) == 2 and any(use.operator == "Gather" and not use.position for use in uses):
        base = own.removesuffix(".weight")
        yield (own if _EMBEDDING.search(own) else f"{base}.embedding"), _View(stored), shape, ""
    else:
        yield own, _View(stored), shape, ""


def _takes_in_out(use: _Use) -> bool:
    """Whether a node takes the weight as `(in, out)`."""
    if use.operator == "MatMul":
        return use.position == 1
    return use.operator == "Gemm" and use.position == 1 and not use.attributes.get("transB")


def _name_of(name: str, uses: list[_Use]) -> str:
    """The tensor's name, or that of the module whose node takes it where an exporter made it up."""
    if not _MADE_UP.fullmatch(name) or len(uses) != 1 or not uses[0].node:
        return name
    parts = [part for part in uses[0].node.split("/") if part]
    if len(parts) > 1 and re.fullmatch(rf"{re.escape(uses[0].operator)}(_\d+)?", parts[-1]):
        parts = parts[:-1]
    leaf = {1: "weight", 2: "bias"}.get(uses[0].position, f"input_{uses[0].position}")
    return ".".join([*parts, leaf])


def _recurrent(
    stored: _Stored, use: _Use, own: str
) -> Iterator[tuple[str, _View, tuple[int, ...], str]]:
    """The weights of each direction, with gates in torch's order and names as torch has them."""
    directions, rows, columns = stored.extent.shape
    gates = _GATES[use.operator]
    leaf = {1: "weight_ih", 2: "weight_hh"}.get(use.position)
    if leaf is None or directions > 2 or rows % len(gates):
        yield own, _View(stored), stored.extent.shape, f"no weight of {use.operator}"
        return
    node = ".".join(part for part in use.node.split("/") if part) or own
    for direction in range(directions):
        name = f"{node}.{leaf}_l0" + ("_reverse" if direction else "")
        view = _View(stored, direction=direction, gates=gates)
        yield name, view, (rows, columns), ""
