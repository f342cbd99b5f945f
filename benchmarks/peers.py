"""Who is measured: farms_fast and its peers, with what each promises and what its time covers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.agreement import FLOAT32, FLOAT64, JACOBI32, JACOBI64, Accuracy
from farms_fast.core import ops
from farms_fast.spectra.windows import FullMatrix, WindowGrid, window_table

CONTENDER = "farms_fast"
BOTH = ("cpu", "cuda")


def missing_modules(names: Sequence[str]) -> str:
    """Why a peer cannot run, empty when it can."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


@dataclass(frozen=True)
class EigenPeer:
    """Turns windows into eigenvalues.

    Attributes:
        name: as the tables show it.
        devices: where it runs.
        prepare: (order, matrices) to a function from windows (matrices, k, k), float64, to
            eigenvalues (matrices, k) in any order; handles and plans are made here, untimed.
        accuracy: its promise, on the CPU and on CUDA.
        fresh: what is done to the windows before the clock starts.
        one_by_one: it has no batches, so that the time of a sample is that of all in proportion.
        needs: modules.
        note: what its time covers.
    """

    name: str
    devices: tuple[str, ...]
    prepare: Callable[[int, int], Callable[[Any], Any]]
    accuracy: dict[str, Accuracy]
    fresh: Callable[[Tensor], Any] = lambda windows: windows
    one_by_one: bool = False
    needs: tuple[str, ...] = ()
    note: str = "windows to eigenvalues, Gram matrices included"

    def missing(self) -> str:
        return missing_modules(self.needs)


def contender(solver: str) -> EigenPeer:
    def prepare(order: int, matrices: int) -> Callable[[Tensor], Tensor]:
        table = window_table(FullMatrix().grid(order, order), matrices)

        def run(windows: Tensor) -> Tensor:
            return ops.window_eigvalsh([windows], table, order, solver=solver)

        return run

    return EigenPeer(CONTENDER, BOTH, prepare, _same(FLOAT64))


def _same(accuracy: Accuracy) -> dict[str, Accuracy]:
    return {"cpu": accuracy, "cuda": accuracy}


def _numpy(windows: Tensor) -> Any:
    return windows.cpu().numpy()


def _cupy(windows: Tensor) -> Any:
    import cupy

    return cupy.from_dlpack(windows)


def _gram(windows: Tensor) -> Tensor:
    return windows @ windows.mT


def _numpy_svd(order: int, matrices: int) -> Callable[[Any], Any]:
    return lambda windows: np.linalg.svd(windows, compute_uv=False) ** 2


def _numpy_eigvalsh(order: int, matrices: int) -> Callable[[Any], Any]:
    return lambda windows: np.linalg.eigvalsh(windows @ windows.swapaxes(1, 2))


def _scipy_svdvals(order: int, matrices: int) -> Callable[[Any], Any]:
    import scipy.linalg

    return lambda windows: np.stack([scipy.linalg.svdvals(w) ** 2 for w in windows])


def _scipy_eigvalsh(order: int, matrices: int) -> Callable[[Any], Any]:
    import scipy.linalg

    return lambda windows: np.stack([scipy.linalg.eigvalsh(w @ w.T) for w in windows])


def _torch_svdvals(order: int, matrices: int) -> Callable[[Tensor], Tensor]:
    return lambda windows: torch.linalg.svdvals(windows).square()


def _torch_eigvalsh(order: int, matrices: int) -> Callable[[Tensor], Tensor]:
    return lambda windows: torch.linalg.eigvalsh(_gram(windows))


def _published(order: int, matrices: int) -> Callable[[Tensor], Tensor]:
    return lambda windows: torch.stack(published.window_eigenvalues(windows))


def _bare(order: int, matrices: int) -> Callable[[Tensor], Tensor]:
    from benchmarks.bare_cusolver import BareXsyevBatched

    return BareXsyevBatched(matrices, order)


def _cupy_single(order: int, matrices: int) -> Callable[[Any], Any]:
    import cupy

    return lambda windows: cupy.stack([cupy.linalg.eigvalsh(w @ w.T) for w in windows])


def _cupy_batched(order: int, matrices: int) -> Callable[[Any], Any]:
    import cupy

    return lambda windows: cupy.linalg.eigvalsh(windows @ windows.swapaxes(1, 2))


# In order of what they tell: a run that is short of time leaves out the last.
EIGEN_PEERS = (
    EigenPeer(
        "XsyevBatched bare",
        ("cuda",),
        _bare,
        _same(FLOAT64),
        _gram,
        note="cuSOLVER's call alone on Gram matrices that are there already; handle, plan and "
        "workspace are made before",
    ),
    EigenPeer("numpy svd", ("cpu",), _numpy_svd, _same(FLOAT64), _numpy, one_by_one=True),
    EigenPeer("numpy eigvalsh", ("cpu",), _numpy_eigvalsh, _same(FLOAT64), _numpy, one_by_one=True),
    EigenPeer("torch eigvalsh", BOTH, _torch_eigvalsh, _same(FLOAT64)),
    EigenPeer(
        "CuPy eigvalsh",
        ("cuda",),
        _cupy_batched,
        _same(JACOBI64),
        _cupy,
        needs=("cupy",),
        note="cuSOLVER's batched Jacobi method",
    ),
    EigenPeer(
        "published FARMS",
        BOTH,
        _published,
        {"cpu": FLOAT32, "cuda": JACOBI32},
        one_by_one=True,
        note="one float32 torch.linalg.svdvals a window",
    ),
    EigenPeer(
        "torch svdvals",
        BOTH,
        _torch_svdvals,
        {"cpu": FLOAT64, "cuda": JACOBI64},
        one_by_one=True,
    ),
    EigenPeer(
        "CuPy eigvalsh, one by one",
        ("cuda",),
        _cupy_single,
        _same(FLOAT64),
        _cupy,
        one_by_one=True,
        needs=("cupy",),
    ),
    EigenPeer(
        "scipy svdvals",
        ("cpu",),
        _scipy_svdvals,
        _same(FLOAT64),
        _numpy,
        one_by_one=True,
        needs=("scipy",),
    ),
    EigenPeer(
        "scipy eigvalsh",
        ("cpu",),
        _scipy_eigvalsh,
        _same(FLOAT64),
        _numpy,
        one_by_one=True,
        needs=("scipy",),
    ),
)


@dataclass(frozen=True)
class GramPeer:
    """Turns a weight into the Gram matrices of its windows, in float64.

    Attributes:
        name: as the tables show it.
        devices: where it runs.
        prepare: a grid to a function from the weight (R, C), float32, to Gram matrices.
        fresh: what is done to the weight before the clock starts.
        needs: modules.
    """

    name: str
    devices: tuple[str, ...]
    prepare: Callable[[WindowGrid], Callable[[Any], Any]]
    fresh: Callable[[Tensor], Any] = lambda weight: weight
    needs: tuple[str, ...] = ()
    note: str = "a float32 weight to float64 Gram matrices"

    def missing(self) -> str:
        return missing_modules(self.needs)


def window_slices(grid: WindowGrid) -> list[tuple[slice, slice]]:
    """Every window as the slices that cut it out, in the order of the window table."""
    return [
        (slice(row, row + grid.rows), slice(column, column + grid.columns))
        for row in grid.row_starts
        for column in grid.column_starts
    ]


def _gram_contender(grid: WindowGrid) -> Callable[[Tensor], Tensor]:
    table = window_table(grid)
    return lambda weight: ops.window_gram([weight.unsqueeze(0)], table, grid.order)


def _gram_numpy(grid: WindowGrid) -> Callable[[Any], Any]:
    def run(weight: Any) -> Any:
        windows = (weight[position].astype(np.float64) for position in window_slices(grid))
        return np.stack([window @ window.T for window in windows])

    return run


def _gram_torch(grid: WindowGrid) -> Callable[[Tensor], Tensor]:
    def run(weight: Tensor) -> Tensor:
        windows = (weight[position].double() for position in window_slices(grid))
        return torch.stack([window @ window.T for window in windows])

    return run


def _gram_bmm(grid: WindowGrid) -> Callable[[Tensor], Tensor]:
    def run(weight: Tensor) -> Tensor:
        return _gram(torch.stack([weight[position] for position in window_slices(grid)]).double())

    return run


def _gram_cupy(grid: WindowGrid) -> Callable[[Any], Any]:
    import cupy

    def run(weight: Any) -> Any:
        windows = (weight[position].astype(cupy.float64) for position in window_slices(grid))
        return cupy.stack([window @ window.T for window in windows])

    return run


GRAM_PEERS = (
    GramPeer(CONTENDER, BOTH, _gram_contender),
    GramPeer("numpy, one by one", ("cpu",), _gram_numpy, _numpy),
    GramPeer("torch, one by one", BOTH, _gram_torch),
    GramPeer("torch bmm", BOTH, _gram_bmm),
    GramPeer("CuPy, one by one", ("cuda",), _gram_cupy, _cupy, ("cupy",)),
)
