"""What a plan knows of a device: as the library tells it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farms_fast.core import ops
from farms_fast.engine.machine import Machine, machine_of

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
machines = st.sampled_from(
    [*(Machine(compute_capability=each) for each in (75, 80, 86, 90, 120)), Machine("cpu", cores=3)]
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "tpu"}, "kind: expected 'cuda' or 'cpu', got 'tpu'"),
        ({"memory": 0}, "memory: expected a positive number, got 0"),
        ({"cores": -1}, "cores: expected a positive number, got -1"),
        ({"speed": 0.0}, r"speed: expected a positive number, got 0\.0"),
        ({"compute_capability": 0}, "compute_capability: expected a positive number, got 0"),
    ],
)
def test_bad_machines(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Machine(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_of_an_h200(dtype: torch.dtype) -> None:
    machine = Machine()
    of_one, of_few, of_many = (100, 100, 1), (200, 300, 9), (1000, 1000, 500)
    if dtype.is_complex:
        of_one = (80, 80, 1)
    assert machine.window_bytes(*of_one, dtype) == 0
    # A few windows never leave the chip, more of the same order do.
    for size, solver in ((of_few, "one_stage"), (of_many, "two_stage")):
        assert machine.solver_facts(*size, dtype).solver == solver
        two_stage = machine.solver_facts(*size[:2], 1, dtype, "two_stage")
        assert machine.window_bytes(*size, dtype) == two_stage.bytes


@pytest.mark.parametrize("capability", [61, 75])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [100, 161, 1000, 12_000])
def test_windows_elsewhere_take_the_librarys_workspace(
    order: int, dtype: torch.dtype, capability: int
) -> None:
    machine = Machine(compute_capability=capability)
    assert machine.solver_facts(order, order, 9, dtype).solver == "cusolver"
    library = ops.solver_facts(
        order, dtype=dtype, device="cuda", compute_capability=capability, solver="cusolver"
    )
    assert machine.window_bytes(order, order, 9, dtype) == library.bytes
    assert library.workspace_bytes >= library.matrix_bytes + 2**20
    assert library.matrix_bytes == order**2 * dtype.itemsize


def test_a_cpu_solves_a_window_a_core() -> None:
    machine = Machine("cpu", cores=3)
    facts = machine.solver_facts(300, 400, 9, torch.float64)
    assert facts == ops.solver_facts(300, 400, count=3)
    assert machine.solver_facts(300, 400, 2, torch.float64).max_batch == 2
    assert 3 * machine.window_bytes(300, 400, 9, torch.float64) == facts.bytes


@given(
    machine=machines,
    order=st.integers(1, 12_000),
    longer=st.integers(0, 5000),
    count=st.integers(1, 10**5),
    dtype=st.sampled_from(DTYPES),
)
def test_a_call_takes_no_more_than_its_windows(
    machine: Machine, order: int, longer: int, count: int, dtype: torch.dtype
) -> None:
    facts = machine.solver_facts(order, order + longer, count, dtype)
    each = machine.window_bytes(order, order + longer, count, dtype)
    assert facts.bytes <= facts.max_batch * each
    # Nor does half of it, whose solver may be another one.
    half = machine.solver_facts(order, order + longer, -(-count // 2), dtype)
    assert half.bytes <= half.max_batch * each


def test_windows_that_no_solver_takes_are_planned_all_the_same() -> None:
    # Their call fails, and the other layers go on.
    with pytest.raises(RuntimeError, match="takes up to 46340"):
        ops.solver_facts(50_000, device="cuda", compute_capability=90)
    assert Machine().window_bytes(50_000, 50_000, 1, torch.float64) >= 2 * 8 * 50_000**2
    with pytest.raises(RuntimeError, match="'inner': expected the longer side"):
        Machine().solver_facts(20, 10, 1, torch.float64)


def test_the_machine_of_a_device(device: torch.device) -> None:
    machine = machine_of(device)
    assert machine.kind == device.type
    assert machine.memory > 2**28
    if device.type == "cpu":
        assert machine == Machine("cpu", machine.memory, cores=torch.get_num_threads())
    else:
        assert machine.compute_capability == ops.compute_capability()
        assert machine.index == torch.cuda.current_device()
        # It tells what it takes itself, and of its own solvers the same as without it.
        told = Machine(compute_capability=machine.compute_capability)
        for order, count in ((100, 1000), (300, 9), (2000, 20)):
            here = machine.solver_facts(order, order, count, torch.float64)
            assert here == ops.solver_facts(order, count=count, device="cuda")
            elsewhere = told.solver_facts(order, order, count, torch.float64)
            assert here[:3] == elsewhere[:3]
            assert here.solver == "cusolver" or here == elsewhere
