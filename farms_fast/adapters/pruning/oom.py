"""Out of memory on a device: recognised, retried with less, and reported."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")

# Libraries that allocate past torch's allocator have no error class of their own.
_MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports a failed allocation."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    )


def release_memory() -> None:
    """Returns torch's cached device memory; call it outside of the handler of an error."""
    # Inside of the handler, the error's frames still hold the tensors of the failed attempt.
    gc.collect()
    torch.cuda.empty_cache()


def out_of_memory_error(device: torch.device, what: str, failure: str) -> ValueError:
    """The error to raise where no smaller attempt is left."""
    lines = failure.strip().splitlines()
    reason = f" ({lines[0]})" if lines else ""
    return ValueError(f"memory: {device} has no room for {what}{reason}")


@contextlib.contextmanager
def raise_oom_as_value_error(device: torch.device, what: str) -> Iterator[None]:
    """Turns out of memory into `out_of_memory_error`, for work that cannot be divided."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory_error(device, what, str(error)) from error


def retry_with_less(attempt: Callable[[], T], reduce: Callable[[str], None]) -> T:
    """Calls `attempt` until it has enough memory; `reduce` makes the next attempt smaller.

    `reduce` gets the message of the failure, and raises where nothing smaller is possible.
    """
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error)
        try:
            reduce(failure)
        finally:
            release_memory()
