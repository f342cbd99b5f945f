"""Empirical spectral densities of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from farms_fast.core import ops
from farms_fast.core.arguments import (
    DTypeLike,
    check_sampling,
    check_solver,
    dtype_of,
    memory_bytes,
    resolve_device,
)
from farms_fast.core.arrays import on_stream_of, to_tensor
from farms_fast.spectra.windows import FullMatrix, Sampling, window_table


def esd(
    W: Any,
    sampling: Sampling | None = None,
    *,
    dtype: DTypeLike = torch.float64,
    device: str | torch.device | None = None,
    solver: str | None = None,
    memory: int | str | None = None,
) -> Any:
    """Eigenvalues of W·Wᴴ, the squared singular values of W, pooled over windows.

    Args:
        W: array of shape (..., R, C), floating or complex; NumPy, torch, or CuPy and others through
            DLPack. Leading dimensions are a batch. It is never written.
        sampling: the windows, `FixedAspectSampling(...)`; None is the full matrix.
        dtype: precision of the computation and of the result, or its name. float64 errs by less
            than 8·k·2⁻⁵²·λ_max. float32 is an explicit choice: its absolute error is about
            k·2⁻²³·λ_max, so that the small eigenvalues of square matrices are noise, and λ beyond
            3e38 overflow.
        device: where to compute, "cpu", "cuda" or "cuda:N"; None is where W lives.
        solver: a name from `build_info()["solvers"]`; None chooses.
        memory: bytes of workspace at most, also as text such as "2GiB"; None is the default of
            `ops.window_eigvalsh`.

    Returns:
        (..., windows · k) eigenvalues, ascending, with k = min(rows, columns) of a window, of
        `dtype`, in the kind of array that came and on its device.

    Raises:
        TypeError: W is not a dense array, or is of integers or objects; another argument is of
            another kind.
        ValueError: W is empty, has fewer than two dimensions or, in a window, a value that is not
            finite; no window fits; an eigenvalue overflows; an unknown dtype, device or solver.
        RuntimeError: memory does not hold one window.

    Example:
        >>> import numpy as np
        >>> import farms_fast
        >>> W = np.diag([1.0, 3.0, 2.0])
        >>> farms_fast.esd(W)
        array([1., 4., 9.])
        >>> farms_fast.esd(W, farms_fast.FixedAspectSampling(rows=1, per_dim=2)).shape
        (9,)
    """
    with on_stream_of(W):
        tensor, restore = to_tensor("W", W)
        if tensor.ndim < 2:
            raise ValueError(f"W: expected at least 2 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"W: expected a matrix with elements, got shape {tuple(tensor.shape)}")
        precision = dtype_of(dtype)
        where = resolve_device(device, tensor.device)
        check_solver(solver, where)
        budget = 0 if memory is None else memory_bytes(memory)
        sampling = FullMatrix() if sampling is None else sampling
        check_sampling(sampling)
        rows, columns = tensor.shape[-2:]
        grid = sampling.grid(rows, columns)
        if grid.count == 0:
            raise ValueError(
                f"sampling: expected a window that fits {rows} x {columns}, {sampling} has none"
            )
        stack = tensor.reshape(-1, rows, columns).to(where)
        table = window_table(grid, entries=stack.shape[0])
        evals = window_eigenvalues([stack], table, grid.order, precision, solver, budget)
        pooled = evals.reshape(stack.shape[0], -1)
        if not bool(pooled.isfinite().all()):
            if bool(stack.isfinite().all()):
                name = str(precision).removeprefix("torch.")
                raise ValueError(
                    f"W: expected eigenvalues within the range of {name}, got an overflow"
                )
            raise ValueError("W: expected finite values, got NaN or infinity")
        if grid.count > 1:
            pooled = pooled.sort(dim=-1).values
        return restore(pooled.reshape(*tensor.shape[:-2], -1))


def window_eigenvalues(
    stacks: Sequence[Tensor],
    table: Tensor,
    order: int,
    dtype: torch.dtype,
    solver: str | None,
    memory: int,
) -> Tensor:
    """`ops.window_eigvalsh`, with a budget that holds no matrix as a ValueError naming `memory`."""
    try:
        return ops.window_eigvalsh(stacks, table, order, dtype, solver or "auto", memory)
    except RuntimeError as error:
        _, _, needed = str(error).partition("argument 'memory_budget': ")
        if not needed:
            raise
        raise ValueError(f"memory: {needed}") from None
