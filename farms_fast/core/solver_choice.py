"""Which CUDA solver "auto" stands for on the GPUs of this machine, settled on a GPU's first use.

A table that `farms-fast tune` measured on that GPU decides where there is one, then the table that
is shipped for its architecture, then a model of it (csrc/host/cuda_solvers.h). On an architecture
that nobody measured, the package's own solvers are tested first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.core import extension, self_test
from farms_fast.core.gpu_records import Gpu, read_record, write_record
from farms_fast.core.solver_table import NO_LIMIT, Row, SolverTable, use_rows

_SELF_TEST = "self-test"
_CUSOLVER_ALONE = tuple(Row(kind, NO_LIMIT, NO_LIMIT, "cusolver") for kind in (False, True))

_lock = threading.RLock()
_settled: set[int] = set()
_decisions: dict[int, Decision] = {}


@dataclass(frozen=True)
class Decision:
    """What decides on a GPU.

    Attributes:
        gpu: the GPU.
        table: what `farms-fast tune` measured there; None where that does not count.
        ignored: why a table that is there does not count; empty where there is none.
        failed: how the package's own solvers failed the self-test; empty where they did not.
    """

    gpu: Gpu
    table: SolverTable | None = None
    ignored: str = ""
    failed: str = ""

    @property
    def rows(self) -> Sequence[Row]:
        """Those that come before what is shipped."""
        if self.failed:
            return _CUSOLVER_ALONE
        return () if self.table is None else self.table.rows

    @property
    def text(self) -> str:
        """Which table decides, in a line for people.

        Example:
            >>> gpu = Gpu("NVIDIA A100", 80, 108, "13000", "13000", "12004")
            >>> Decision(gpu).text
            'a model of compute capability 8.0 (`farms-fast tune` measures)'
        """
        shipped = torch.ops.farms_fast.shipped_choices(self.gpu.compute_capability)
        if self.failed:
            text = f"cuSOLVER alone, because the self-test failed: {self.failed}"
        elif self.table is not None:
            text = f"measured here on {self.table.made}"
        elif shipped:
            text = f"the table shipped for compute capability {_dotted(shipped)}"
        else:
            capability = _dotted(self.gpu.compute_capability)
            text = f"a model of compute capability {capability} (`farms-fast tune` measures)"
        return text + (f"; {self.ignored}" if self.ignored else "")


def settle(tensor: Tensor) -> None:
    """Settles the choice on a tensor's GPU; nothing for a CPU, or what is not computed now.

    Args:
        tensor: an argument of an op that is about to be called.
    """
    # Also of a GPU that is not there: fake tensors, and what is being compiled.
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return
    if tensor.is_cuda and tensor.get_device() not in _settled and extension.has_cuda():
        settle_on(tensor.get_device())


def settle_on(index: int) -> None:
    """Settles the choice on a GPU that is there, once in a process.

    While a CUDA graph is captured the self-test waits for the next call.

    Args:
        index: of the GPU.

    Raises:
        RuntimeError: neither the package's solvers nor cuSOLVER are right on it.
    """
    if index in _settled:
        return
    with _lock, torch.cuda.device(index):
        if index in _settled:
            return
        decision = decision_on(index)
        if _needs_self_test(decision.gpu):
            if torch.cuda.is_current_stream_capturing():
                return
            _self_test(index, decision)
        _settled.add(index)


def decision_on(index: int) -> Decision:
    """What decides on a GPU that is there; its table, if there is one, is given to the ops."""
    with _lock:
        if index not in _decisions:
            use(index, _decide(Gpu.at(index)))
        return _decisions[index]


def decided_by(device: str) -> str:
    """What chooses the solvers on a device, in a line for people; empty for what is no GPU here."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not extension.has_cuda() or not torch.cuda.is_available():
        return ""
    number = index or str(torch.cuda.current_device())
    here = map(str, range(torch.cuda.device_count()))
    return decision_on(int(number)).text if number in here else ""


def use(index: int, decision: Decision) -> None:
    """From now on goes by this decision on a GPU."""
    with _lock:
        use_rows(index, decision.rows)
        _decisions[index] = decision


def self_test_text(decision: Decision) -> str:
    """What is known of the package's own solvers on a GPU, in a line for people."""
    if decision.failed:
        return "failed"
    made = _tested(decision.gpu)
    if made:
        return f"passed on {made}"
    return "not needed" if _was_measured(decision.gpu) else "not run"


def _decide(gpu: Gpu) -> Decision:
    try:
        table = SolverTable.read(gpu)
    except (ValueError, OSError) as error:
        ignored = f"the table that was measured here is ignored: {error}"
        warnings.warn(f"farms_fast: {ignored}; `farms-fast tune` makes it anew", stacklevel=2)
        return Decision(gpu, ignored=ignored)
    if table is None:
        return Decision(gpu)
    difference = gpu.difference(table.gpu)
    if difference:
        made = f"the table of {table.made} is ignored: it was measured with {difference}"
        return Decision(gpu, ignored=f"{made}; `farms-fast tune` makes it anew")
    return Decision(gpu, table)


def _tested(gpu: Gpu) -> str:
    """When such a GPU passed; empty where it did not, with this driver and release."""
    try:
        found = read_record(gpu, _SELF_TEST)
    except (ValueError, OSError):
        return ""
    return str(found[1]["made"]) if found is not None and found[0] == gpu else ""


def _was_measured(gpu: Gpu) -> bool:
    shipped = torch.ops.farms_fast.shipped_choices(gpu.compute_capability)
    return bool(shipped == gpu.compute_capability)


def _needs_self_test(gpu: Gpu) -> bool:
    if os.environ.get("FARMS_FAST_SELFTEST", "1") == "0" or _was_measured(gpu):
        return False
    return not _tested(gpu)


def _self_test(index: int, decision: Decision) -> None:
    """Tests the solvers on a GPU. Only that they passed is remembered: a failure shows again."""
    try:
        failed = "; ".join(self_test.failures(index))
        if not failed:
            # Without a cache folder each process tests anew.
            with contextlib.suppress(OSError):
                write_record(decision.gpu, _SELF_TEST, {"passed": True})
            return
        library = "; ".join(self_test.failures(index, ("cusolver",)))
    except torch.OutOfMemoryError:
        return
    report = f"{decision.gpu}: {failed}"
    if library:
        raise RuntimeError(
            "farms_fast: no eigensolver is right on this GPU; compute on the CPU, and please "
            f"report this: {report}; {library}"
        )
    use(index, dataclasses.replace(decision, failed=failed))
    warnings.warn(
        "farms_fast: the self-test of its eigensolvers failed, so that cuSOLVER takes their place "
        f"in this process. Please report this: {report}",
        stacklevel=2,
    )


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"
