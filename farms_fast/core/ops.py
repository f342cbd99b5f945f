"""The ops of `torch.ops.farms_fast` under Python signatures, and their fake kernels.

These are the lowest layer: tensors in, tensors out, on the current stream, checked in C++. Windows
are rows of a table (see `farms_fast.spectra.windows.window_table`): int64, on the CPU, of shape
(windows, 6), with the columns weight, entry, row, column, rows, columns. An argument that is not as
described is a RuntimeError that names it; a device without memory is a `torch.OutOfMemoryError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from farms_fast.core import extension, solver_choice

_GRAM_DTYPES = {
    (torch.float64, False): torch.float64,
    (torch.float32, False): torch.float32,
    (torch.float64, True): torch.complex128,
    (torch.float32, True): torch.complex64,
}
_REAL_DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# How csrc/allocate.h begins; an op of the stable ABI can raise no error of its own kind.
_OUT_OF_MEMORY = "farms_fast: out of memory"


class FitTensors(NamedTuple):
    """What the fit op returns: one entry a spectrum in every tensor.

    `status` counts in the order of `farms_fast.spectra.power_law.STATUSES`.
    """

    alpha: Tensor
    D: Tensor
    xmin: Tensor
    n_tail: Tensor
    status: Tensor
    dropped: Tensor


class SolverFacts(NamedTuple):
    """What a solver needs for windows that are solved in one call.

    Attributes:
        solver: its name; of "auto", the one that it stands for.
        max_batch: windows that are solved at a time, at most.
        matrix_bytes: of the Gram matrix of one window; 0 where it never leaves the chip.
        workspace_bytes: for `max_batch` windows, besides their Gram matrices.
    """

    solver: str
    max_batch: int
    matrix_bytes: int
    workspace_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes that `max_batch` windows take while they are solved."""
        return self.max_batch * self.matrix_bytes + self.workspace_bytes


def window_gram(
    weights: Sequence[Tensor], windows: Tensor, order: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Gram matrices of windows, read in place from the weights.

    Windows of one matrix that overlap, one after the other in the table, may share their products:
    where that is estimated to be faster, and takes no more memory than the result.

    Args:
        weights: stacks of shape (S, R, C), any strides, all of one device and one of float16,
            bfloat16, float32, float64, complex64, complex128.
        windows: the window table, (windows, 6), int64, CPU, contiguous.
        order: k = min(rows, columns), the same for every window.
        dtype: precision of the result, float64 or float32 (sums are float64 on CUDA either way).

    Returns:
        (windows, k, k): `G[i, j] = Σ_t v_i[t]·conj(v_j[t])` with v the window's rows, or its
        columns where those are fewer; real or complex as the weights are.

    Raises:
        RuntimeError: an argument is not as above; the message names it.
        torch.OutOfMemoryError: the device has no memory for it.

    Example:
        >>> import torch
        >>> from farms_fast.core import ops
        >>> weight = torch.arange(6.0).reshape(1, 2, 3)
        >>> ops.window_gram([weight], torch.tensor([[0, 0, 0, 0, 2, 3]]), order=2)
        tensor([[[ 5., 14.],
                 [14., 50.]]], dtype=torch.float64)
    """
    call = torch.ops.farms_fast.window_gram
    return cast(Tensor, _called(call, weights, windows, order, dtype))


def eigvalsh(gram: Tensor, solver: str = "auto", memory_budget: int = 0) -> Tensor:
    """Eigenvalues of a batch of symmetric or Hermitian matrices.

    Args:
        gram: (batch, k, k), contiguous, float32, float64, complex64 or complex128, symmetric or
            Hermitian with both triangles filled. It is not written.
        solver: "auto", or a name from `build_info()["solvers"]` for the device.
        memory_budget: bytes of workspace, 0 for the default (on CUDA a quarter of the device).

    Returns:
        (batch, k), real, ascending. A matrix with a value that is not finite gives NaN.

    Raises:
        RuntimeError: an argument is not as above, or the budget does not hold one matrix.
        torch.OutOfMemoryError: the device has no memory for it.

    Example:
        >>> import torch
        >>> from farms_fast.core import ops
        >>> ops.eigvalsh(torch.diag(torch.tensor([3.0, 1.0, 2.0])).unsqueeze(0))
        tensor([[1., 2., 3.]])
    """
    solver_choice.settle(gram)
    return cast(Tensor, _called(torch.ops.farms_fast.eigvalsh, gram, solver, memory_budget))


def window_eigvalsh(
    weights: Sequence[Tensor],
    windows: Tensor,
    order: int,
    dtype: torch.dtype = torch.float64,
    solver: str = "auto",
    memory_budget: int = 0,
) -> Tensor:
    """Eigenvalues of the windows' Gram matrices; neither windows nor all Grams are ever stored.

    Overlapping windows share products as in `window_gram`, within the budget.

    Args:
        weights: as for `window_gram`.
        windows: as for `window_gram`.
        order: as for `window_gram`.
        dtype: precision of the Gram matrices, the solver and the result, float64 or float32.
        solver: as for `eigvalsh`.
        memory_budget: bytes for Gram matrices and workspace, 0 for the default: on CUDA a quarter
            of the device, on the CPU 1 GiB of shared products and no bound on the rest.

    Returns:
        (windows, k) of `dtype`, ascending, negative rounding noise set to 0; NaN for a window with
        a value that is not finite, infinity or NaN where an eigenvalue is beyond `dtype`'s range.

    Raises:
        RuntimeError: as for `window_gram` and `eigvalsh`.
        torch.OutOfMemoryError: the device has no memory for it.

    Example:
        >>> import torch
        >>> from farms_fast.core import ops
        >>> weight = torch.diag(torch.tensor([2.0, 1.0])).unsqueeze(0)
        >>> ops.window_eigvalsh([weight], torch.tensor([[0, 0, 0, 0, 2, 2]]), order=2)
        tensor([[1., 4.]], dtype=torch.float64)
    """
    for weight in weights[:1]:
        solver_choice.settle(weight)
    call = torch.ops.farms_fast.window_eigvalsh
    return cast(Tensor, _called(call, weights, windows, order, dtype, solver, memory_budget))


def fit_power_law(
    evals: Tensor,
    offsets: Tensor,
    rule: str = "median",
    xmin_pos: float = 2.0,
    bins: int = 100,
    published: bool = False,
    least_spread: Tensor | None = None,
) -> FitTensors:
    """Power-law fits of many spectra at once.

    Args:
        evals: packed spectra, (total,), float64, contiguous, each ascending with NaN last.
        offsets: (spectra + 1,), int64, on the same device: spectrum s is
            `evals[offsets[s]:offsets[s + 1]]`.
        rule: "median", "ks" or "peak".
        xmin_pos: the median rule's xmin is the value at index `int(N / xmin_pos)`.
        bins: bins of the peak rule's histogram.
        published: as in the published code, a tail may begin in the middle of equal values, and
            the peak rule's lower bound is log10 of itself.
        least_spread: (spectra,), float64, on the same device: tails with ln(largest / xmin) of
            this or less are no tails; None is 0.

    Returns:
        A `FitTensors` of tensors (spectra,).

    Raises:
        RuntimeError: an argument is not as above; the message names it.
        torch.OutOfMemoryError: the device has no memory for it.

    Example:
        >>> import torch
        >>> from farms_fast.core import ops
        >>> evals = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
        >>> fit = ops.fit_power_law(evals, torch.tensor([0, 4]))
        >>> fit.n_tail, fit.status
        (tensor([2]), tensor([0]))
    """
    call = torch.ops.farms_fast.fit_power_law
    rest = rule, float(xmin_pos), int(bins), published, least_spread
    return FitTensors(*_called(call, evals, offsets, *rest))


def drop_rounding(evals: Tensor) -> Tensor:
    """Eigenvalues with 0 for those that are zero but for rounding.

    These are at or below `8·k·ε·λ_max` of their own window, with ε that of the dtype: the accuracy
    of every solver, so that a weight of lower rank has zeros there whatever its scale. A window
    whose largest eigenvalue is not finite stays as it is.

    Args:
        evals: (windows, k), float32 or float64, contiguous, each row ascending. It is not written.

    Returns:
        (windows, k), of the same dtype.

    Raises:
        RuntimeError: `evals` is not as above.
        torch.OutOfMemoryError: the device has no memory for it.

    Example:
        >>> import torch
        >>> from farms_fast.core import ops
        >>> evals = torch.tensor([[1e-16, 1e-3, 4.0]], dtype=torch.float64)
        >>> ops.drop_rounding(evals).tolist()
        [[0.0, 0.001, 4.0]]
    """
    return cast(Tensor, _called(torch.ops.farms_fast.drop_rounding, evals))


def solver_facts(
    order: int,
    inner: int | None = None,
    *,
    count: int = 1,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    compute_capability: int = 0,
    solver: str = "auto",
) -> SolverFacts:
    """Facts of the solver that a call of `window_eigvalsh` would take, without calling it.

    The GPU need not be there, nor a build with CUDA, where its compute capability is given. Of
    cuSOLVER's workspace there is then an estimate only, because the library tells it on a device
    alone. The window table (32 bytes a window) and the results come on top.

    Args:
        order: k, the shorter side of the windows.
        inner: their longer side, `order` if left out.
        count: windows of the call.
        dtype: of the Gram matrices, float64, float32, complex128 or complex64.
        device: "cpu" or "cuda". On a CPU each window that is solved at a time takes a thread.
        compute_capability: of a GPU, 10·major + minor, such as 90 for an H200; 0 for torch's
            current one.
        solver: "auto", or the name of a solver of the device.
    """
    if device == "cuda" and compute_capability == 0 and extension.has_cuda():
        solver_choice.settle_on(torch.cuda.current_device())
    call = torch.ops.farms_fast.solver_facts
    inner = order if inner is None else inner
    return SolverFacts(*call(device, compute_capability, count, order, inner, dtype, solver))


def compute_capability() -> int:
    """10·major + minor of torch's current GPU, as the compiled code knows it.

    Code that was built for an older architecture alone keeps to that one's limits: then it is the
    older one's.
    """
    return int(torch.ops.farms_fast.compute_capability())


def _called(op: Callable[..., Any], *arguments: object) -> Any:
    """Calls an op whose error for want of memory is to be torch's own."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if _OUT_OF_MEMORY in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


@torch.library.register_fake("farms_fast::window_gram")
def _(weights: Sequence[Tensor], windows: Tensor, order: int, dtype: torch.dtype) -> Tensor:
    gram_dtype = _GRAM_DTYPES[dtype, weights[0].is_complex()]
    return weights[0].new_empty((windows.shape[0], order, order), dtype=gram_dtype)


@torch.library.register_fake("farms_fast::eigvalsh")
def _(gram: Tensor, solver: str, memory_budget: int) -> Tensor:
    return gram.new_empty(gram.shape[:2], dtype=_REAL_DTYPES.get(gram.dtype, gram.dtype))


@torch.library.register_fake("farms_fast::window_eigvalsh")
def _(
    weights: Sequence[Tensor],
    windows: Tensor,
    order: int,
    dtype: torch.dtype,
    solver: str,
    memory_budget: int,
) -> Tensor:
    return weights[0].new_empty((windows.shape[0], order), dtype=dtype)


@torch.library.register_fake("farms_fast::drop_rounding")
def _(evals: Tensor) -> Tensor:
    return evals.new_empty(evals.shape)


@torch.library.register_fake("farms_fast::fit_power_law")
def _(
    evals: Tensor,
    offsets: Tensor,
    rule: str,
    xmin_pos: float,
    bins: int,
    published: bool,
    least_spread: Tensor | None = None,
) -> tuple[Tensor, ...]:
    spectra = offsets.shape[0] - 1
    reals = tuple(evals.new_empty(spectra) for _ in range(3))
    counts = tuple(offsets.new_empty(spectra) for _ in range(3))
    return (*reals, *counts)
