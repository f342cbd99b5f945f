"""Arrays of the kinds that users bring: NumPy, torch, CuPy and others that speak DLPack."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


def to_tensor(
    name: str, array: Any, *, real: bool = False
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The argument of that name as a tensor, and a function that gives a result in the same kind.

    The array is NumPy's, torch's, or anything with `__dlpack__` (CuPy, JAX, ...). Its memory is
    shared where possible and never written. The tensor is detached, its lazy conjugation resolved.
    """
    expected = "a real floating dtype" if real else "a floating or complex dtype"
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            layout = str(array.layout).removeprefix("torch.")
            raise TypeError(f"{name}: expected a dense tensor, got layout {layout}")
        if array.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected device cpu or cuda, got {array.device}")
        device = array.device
        tensor = array.detach().resolve_conj().resolve_neg()
        return _checked(name, tensor, expected, real), lambda result: result.to(device)
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array without a mask, got a MaskedArray")
        if array.dtype.kind not in ("f" if real else "fc") or array.dtype.char in "gG":
            raise TypeError(f"{name}: expected {expected}, got {array.dtype}")
        return from_numpy(array), lambda result: result.cpu().numpy()
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        # from_dlpack makes torch's current stream wait for the producer's, and the other way back.
        tensor = _checked(name, torch.utils.dlpack.from_dlpack(array), expected, real)
        device = tensor.device
        return tensor, lambda result: _namespace_of(name, array).from_dlpack(result.to(device))
    raise TypeError(
        f"{name}: expected a NumPy array, a torch tensor or an array with __dlpack__, "
        f"got {type(array).__name__}"
    )


@contextmanager
def on_stream_of(array: Any) -> Iterator[None]:
    """Work inside goes to CuPy's current stream where the array is CuPy's, else where it went.

    Streams are waited for as DLPack changes hands either way. But memory that one library frees
    while the other still reads it on another stream would be given out again too early; on one
    stream it cannot be, whichever library frees it.
    """
    if _library(array) != "cupy":
        yield
        return
    import cupy  # type: ignore[import-not-found,import-untyped,unused-ignore]

    index = int(array.device.id)
    with cupy.cuda.Device(index):
        pointer = int(cupy.cuda.get_current_stream().ptr)
    # 0 and 1 are names of the default stream.
    if pointer in (0, 1):
        stream = torch.cuda.default_stream(index)
    else:
        stream = torch.cuda.ExternalStream(pointer, device=index)
    with torch.cuda.stream(stream):
        yield


def _library(array: Any) -> str:
    """The top-level module that the array's type comes from."""
    return type(array).__module__.partition(".")[0]


def _checked(name: str, tensor: Tensor, expected: str, real: bool) -> Tensor:
    if tensor.dtype not in (FLOATING if real else FLOATING + COMPLEX):
        raise TypeError(
            f"{name}: expected {expected}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    return tensor


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """The array as a tensor of the same memory where torch allows it; not to be written."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch has no negative strides, and none that cut through elements, as fields of records do.
    strange = any(stride < 0 or stride % array.itemsize for stride in array.strides)
    if strange or not array.flags.aligned:
        array = array.copy()
    with warnings.catch_warnings():
        # torch warns that a read-only array could be written through the tensor; it never is here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _namespace_of(name: str, array: Any) -> Any:
    module = _library(array)
    if module == "cupy":
        import cupy

        return cupy
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    raise TypeError(f"{name}: expected an array whose library has from_dlpack, got {module}")
