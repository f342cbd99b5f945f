"""Whether the CUDA solvers keep their bound on a GPU whose like was never measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OWN_SOLVERS = ("one_stage", "two_stage")
_ORDERS = ((torch.float64, (33, 150, 300)), (torch.complex128, (33, 100)))


def failures(index: int, solvers: Sequence[str] = OWN_SOLVERS) -> list[str]:
    """Solvers that miss |λ − λ_ref| ≤ 8·k·2⁻⁵²·λ_max against LAPACK's on small windows.

    The work runs on a stream of its own; the current one is left as it is.

    Args:
        index: of a GPU that is there.
        solvers: names; one that does not take an order is not asked for it.

    Returns:
        A line for each solver, order and kind that fails; none where all is well.

    Raises:
        torch.OutOfMemoryError: the GPU has no memory for some megabytes.
    """
    device = torch.device("cuda", index)
    found = []
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        for dtype, orders in _ORDERS:
            for order in orders:
                windows = _windows(order, dtype)
                reference = torch.linalg.eigvalsh(windows @ windows.mH)
                on_gpu = windows.to(device)
                for solver in solvers:
                    said = _failure(solver, on_gpu, reference)
                    if said:
                        kind = "complex" if dtype.is_complex else "real"
                        found.append(f"{solver}, {kind} order {order}: {said}")
    return found


def _failure(solver: str, windows: Tensor, reference: Tensor) -> str:
    """How a solver misses its bound; empty where it does not, or takes no such windows."""
    count, order = reference.shape
    table = torch.tensor(
        [[0, entry, 0, 0, order, order] for entry in range(count)], dtype=torch.int64, device="cpu"
    )
    try:
        evals = torch.ops.farms_fast.window_eigvalsh(
            [windows], table, order, torch.float64, solver, 0
        )
    except RuntimeError as error:
        if "farms_fast: out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        return "" if "expected one that takes order" in str(error) else str(error)
    bound = 8 * order * 2**-52 * reference[:, -1:]
    errors = (evals.cpu() - reference).abs() / bound
    # Also of a NaN.
    return "" if bool((errors <= 1).all()) else f"an error of {float(errors.max()):.3g} bounds"


def _windows(order: int, dtype: torch.dtype) -> Tensor:
    """Two seeded windows: a spectrum with a heavy tail over nine decades, and repeated values."""
    ranks = torch.arange(1, order + 1, dtype=torch.float64, device="cpu")
    spectra = torch.stack([ranks ** (-9 / torch.log10(ranks[-1])), torch.ceil(ranks / 8)])
    generator = torch.Generator("cpu").manual_seed(order)
    random = torch.randn(2, order, order, generator=generator, dtype=dtype, device="cpu")
    windows: Tensor = torch.linalg.qr(random).Q * spectra.sqrt().unsqueeze(-2)
    return windows
