"""When a device's memory does not suffice: how to tell, what to give back, and what to say."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

__all__ = ["is_out_of_memory", "no_room", "release", "whole"]

# Libraries that allocate past torch's allocator have no class of their own for it.
_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
        True
        >>> is_out_of_memory(RuntimeError("shapes do not fit"))
        False
    """
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    )


def release() -> None:
    """Gives devices back what torch holds of their memory without a tensor in it.

    Call it beyond the handler of an error, whose frames hold the tensors of what failed.
    """
    gc.collect()
    torch.cuda.empty_cache()


def no_room(device: torch.device, what: str, failure: str) -> ValueError:
    """The error where nothing smaller is left to try.

    Example:
        >>> str(no_room(torch.device("cpu"), "one sample", "Tried to allocate 2 GiB."))
        'memory: cpu has no room for one sample (Tried to allocate 2 GiB.)'
    """
    lines = failure.strip().splitlines()
    return ValueError(
        f"memory: {device} has no room for {what}" + (f" ({lines[0]})" if lines else "")
    )


@contextlib.contextmanager
def whole(device: torch.device, what: str) -> Iterator[None]:
    """For what cannot be done in parts: where memory ends within, the error of `no_room`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise no_room(device, what, str(error)) from error
