"""What a plan has to know of a device: told of one that is not there, asked of one that is."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass

import torch

from farms_fast.core import extension, ops
from farms_fast.core.ops import SolverFacts

# Windows that fill any device: a solver that is chosen for so many is chosen for more.
FULL_BATCH = 2**20


@dataclass(frozen=True)
class Machine:
    """What a run is planned and predicted for.

    Attributes:
        kind: "cuda" or "cpu".
        memory: bytes of device memory, of an H200 by default.
        cores: for a CPU, those that a run may use.
        speed: how many times as fast as the measured device, or a core as the measured core.
        compute_capability: of a GPU, 10·major + minor, of an H200 by default; of a GPU that is
            there as `ops.compute_capability` tells it.
        index: of a GPU that is there and tells of its solvers itself; None for one that is not.

    Raises:
        ValueError: an unknown kind, or a number that is not positive.
    """

    kind: str = "cuda"
    memory: int = 150_109_880_320
    cores: int = 1
    speed: float = 1.0
    compute_capability: int = 90
    index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cuda", "cpu"):
            raise ValueError(f"kind: expected 'cuda' or 'cpu', got {self.kind!r}")
        for name in ("memory", "cores", "speed", "compute_capability"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def solver_facts(
        self, order: int, inner: int, count: int, dtype: torch.dtype, solver: str = "auto"
    ) -> SolverFacts:
        """Facts of the solver of a call of `window_eigvalsh`, see `farms_fast.core.ops`.

        Args:
            order: k, the shorter side of the windows.
            inner: their longer side.
            count: windows of the call. A CPU solves as many at a time as there are cores.
            dtype: of the Gram matrices.
            solver: "auto", or the name of a solver.

        Example:
            >>> Machine(compute_capability=80).solver_facts(512, 512, 9, torch.float64).solver
            'two_stage'
        """
        return _solver_facts(self, order, inner, count, dtype, solver)

    def window_bytes(self, order: int, inner: int, count: int, dtype: torch.dtype) -> int:
        """Bytes that one window takes while it is solved; 0 where none of it leaves the chip.

        The choice of a solver may depend on the number of windows, and a batch may be halved or
        joined: of the solvers of `count` windows, half of them and a full batch it is the one that
        takes the most.

        Args:
            order: as for `solver_facts`.
            inner: as for `solver_facts`.
            count: as for `solver_facts`.
            dtype: as for `solver_facts`.
        """
        solvers = {
            self.solver_facts(order, inner, windows, dtype).solver
            for windows in (count, -(-count // 2), FULL_BATCH)
        }
        return max(self.solver_facts(order, inner, 1, dtype, name).bytes for name in solvers)


def machine_of(device: torch.device) -> Machine:
    """The machine that a device is: a GPU as it is, the CPU with torch's number of threads.

    Args:
        device: the CPU, or a CUDA device that is there.

    Example:
        >>> import torch
        >>> machine_of(torch.device("cpu")).kind
        'cpu'
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        gpu = torch.cuda.get_device_properties(index)
        if not extension.has_cuda():
            capability = 10 * gpu.major + gpu.minor
            return Machine("cuda", memory=gpu.total_memory, compute_capability=capability)
        with torch.cuda.device(index):
            capability = ops.compute_capability()
        return Machine("cuda", gpu.total_memory, compute_capability=capability, index=index)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", memory=memory, cores=torch.get_num_threads())


@functools.lru_cache(maxsize=2**12)
def _solver_facts(
    machine: Machine, order: int, inner: int, count: int, dtype: torch.dtype, solver: str
) -> SolverFacts:
    if machine.kind == "cpu":
        count = min(count, machine.cores)
    is_here = machine.index is not None
    try:
        with torch.cuda.device(machine.index) if is_here else contextlib.nullcontext():
            return ops.solver_facts(
                order,
                inner,
                count=count,
                dtype=dtype,
                device=machine.kind,
                compute_capability=0 if is_here else machine.compute_capability,
                solver=solver,
            )
    except RuntimeError as error:
        if "argument 'solver'" not in str(error):
            raise
        # No solver takes so large windows, which the call will say of their layer alone.
        square = order * order * dtype.itemsize
        return SolverFacts("cusolver", 1, square, square)
