"""What a call must leave as it was: the caller's arrays and everything that is global."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _of_array(array: Any) -> tuple[Any, ...]:
    if isinstance(array, torch.Tensor):
        # The version counts writes, also those that leave the values as they were.
        bits = array.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        return (
            bits.view(torch.uint8).numpy().tobytes(),
            array._version,
            array.stride(),
            array.requires_grad,
            array.data_ptr(),
        )
    return (array.tobytes(), array.strides, array.flags.writeable, array.dtype)


def _of_process() -> dict[str, object]:
    return {
        "torch RNG": torch.get_rng_state().numpy().tobytes(),
        "numpy RNG": str(np.random.get_state()),  # noqa: NPY002 (the global one is what matters)
        "python RNG": random.getstate(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "numpy errors": np.geterr(),
    }


@contextmanager
def left_as_it_was(*arrays: Any) -> Iterator[None]:
    """Fails unless the arrays keep their bits and the process its global state."""
    arrays_before, process_before = [_of_array(a) for a in arrays], _of_process()
    yield
    process = _of_process()
    assert {k: v for k, v in process.items() if v != process_before[k]} == {}
    for number, (array, before) in enumerate(zip(arrays, arrays_before, strict=True)):
        assert _of_array(array) == before, f"array {number} was changed"
