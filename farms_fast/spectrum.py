"""Empirical spectral densities of arrays."""

from __future__ import annotations

import operator
from typing import Any

import torch

from farms_fast import ops
from farms_fast.arrays import resolve_device, to_tensor
from farms_fast.windows import FullMatrix, Sampling, window_table


def esd(
    W: Any,
    sampling: Sampling | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
    solver: str | None = None,
    memory: int | None = None,
) -> Any:
    """Eigenvalues of W·Wᴴ, the squared singular values of W, pooled over windows.

    Args:
        W: array of shape (..., R, C), floating or complex; NumPy, torch, or CuPy and others through
            DLPack. Leading dimensions are a batch. It is never written.
        sampling: the windows, `FixedAspectSampling(...)`; None is the full matrix.
        dtype: precision of the computation and of the result. float64 errs by less than
            8·k·2⁻⁵²·λ_max. float32 is an explicit choice: its absolute error is about
            k·2⁻²³·λ_max, so that the small eigenvalues of square matrices are noise, and λ beyond
            3e38 overflow.
        device: where to compute, "cpu", "cuda" or "cuda:N"; None is where W lives.
        solver: a name from `build_info()["solvers"]`; None chooses.
        memory: bytes of workspace at most; None is the default of `ops.window_eigvalsh`.

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
    tensor, restore = to_tensor("W", W)
    if tensor.ndim < 2:
        raise ValueError(f"W: expected at least 2 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"W: expected a matrix with elements, got shape {tuple(tensor.shape)}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype!r}")
    where = resolve_device(device, tensor.device)
    check_solver(solver, where)
    budget = 0 if memory is None else natural("memory", memory, least=1)
    sampling = FullMatrix() if sampling is None else sampling
    check_sampling(sampling)
    rows, columns = tensor.shape[-2:]
    grid = sampling.grid(rows, columns)
    if grid.count == 0:
        raise ValueError(
            f"sampling: expected a window that fits {rows} x {columns}, {sampling} has none"
        )
    stack = tensor.reshape(-1, rows, columns).to(where)
    evals = ops.window_eigvalsh(
        [stack],
        window_table(grid, entries=stack.shape[0]),
        grid.order,
        dtype,
        solver or "auto",
        budget,
    )
    pooled = evals.reshape(stack.shape[0], -1)
    if bool(pooled.isnan().any()):
        if bool(stack.isfinite().all()):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"W: expected eigenvalues within the range of {name}, got an overflow")
        raise ValueError("W: expected finite values, got NaN or infinity")
    if grid.count > 1:
        pooled = pooled.sort(dim=-1).values
    return restore(pooled.reshape(*tensor.shape[:-2], -1))


def check_sampling(sampling: object) -> None:
    """Raises TypeError for anything that lays no grid of windows."""
    if not hasattr(sampling, "grid"):
        raise TypeError(
            "sampling: expected FixedAspectSampling(...) or FullMatrix(), "
            f"got {type(sampling).__name__}"
        )


def natural(argument: str, value: object, least: int = 0) -> int:
    """The value as an int; TypeError unless it is an integer, ValueError below the least."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
    return number


def check_solver(solver: str | None, device: torch.device) -> None:
    """Raises ValueError unless the solver is None, "auto" or one of the device's."""
    known = ["auto", *torch.ops.farms_fast.solver_names(device.type)]
    if solver is not None and solver not in known:
        raise ValueError(
            f"solver: expected one of {', '.join(known)} on {device.type}, got {solver!r}"
        )
