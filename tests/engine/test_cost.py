"""What work is predicted to take: against the measurements, and against itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks import cost_table
from farms_fast.engine.cost import (
    Cost,
    eigenvalue_stages,
    eigenvalues_cost,
    fit_cost,
    fit_stages,
    gram_flops,
    measured_on,
    total,
    weights_cost,
)
from farms_fast.engine.machine import FULL_BATCH, Machine

SAVED = Path(__file__).parents[2] / "benchmarks/saved"
RULES = ("median", "peak", "ks")
orders = st.integers(1, 12_000)
machines = st.sampled_from([Machine("cuda"), Machine("cpu", cores=1), Machine("cpu", cores=16)])
costs = st.builds(
    Cost,
    st.integers(0, 10**15),
    st.integers(0, 10**12),
    st.integers(0, 10**6),
    st.integers(0, 10**12),
)


def measured(kind: str, family: str) -> list[tuple[str, float]]:
    run = json.loads((SAVED / f"{kind}.json").read_text())
    return [
        (entry["extra_info"]["case"], entry["stats"]["median"])
        for entry in run["benchmarks"]
        if (entry["extra_info"]["family"], entry["extra_info"]["peer"]) == (family, "farms_fast")
    ]


@pytest.mark.parametrize("machine", [Machine("cuda"), Machine("cpu", cores=2)])
def test_measured_batches_are_predicted_as_measured(machine: Machine) -> None:
    checked = 0
    for case, seconds in measured(machine.kind, "eigenvalues"):
        found = re.match(r"k=(\d+) x (\d+)", case)
        assert found
        order, windows = int(found[1]), int(found[2])
        predicted = eigenvalues_cost(machine, order, order, windows).seconds
        # A core takes one matrix at a time, so that two take nine in five turns.
        assert predicted == pytest.approx(seconds, rel=0.25 if windows == 9 else 1e-6), case
        checked += 1
    assert checked >= 9


@pytest.mark.parametrize("machine", [Machine("cuda"), Machine("cpu", cores=2)])
def test_whole_layers_are_predicted_as_measured(machine: Machine) -> None:
    """From weight to alpha, without a bootstrap: 15 x 15 windows and the peak rule."""
    checked = 0
    for case, seconds in measured(machine.kind, "jobs"):
        found = re.search(r"15x15 windows of (\d+), peak", case)
        if found:
            order = int(found[1])
            solved = eigenvalues_cost(machine, order, order, 225).seconds
            fitted = fit_cost(machine, order, 225, "peak", 0, 2**24).seconds
            # These windows share the work of their Gram matrices, which is not in the prediction: a
            # tenth of all of it on a GPU, a third on a CPU with windows of 250.
            least, most = (1.0, 1.15) if machine.kind == "cuda" else (1.0, 1.5)
            assert least * seconds < solved + fitted < most * seconds
            checked += 1
    assert checked == 2


@pytest.mark.parametrize("machine", [Machine("cuda"), Machine("cpu", cores=2)])
@pytest.mark.parametrize("rule", RULES)
def test_one_fit_is_predicted_about_as_measured(machine: Machine, rule: str) -> None:
    for case, seconds in measured(machine.kind, "fit"):
        found = re.fullmatch(rf"{rule} of (\d+)", case)
        if found:
            predicted = fit_cost(machine, int(found[1]), 1, rule, 0, 2**24).seconds
            assert seconds / 2 < predicted < 2 * seconds, case


def test_a_bootstrap_costs_its_resamples() -> None:
    for machine in (Machine("cuda"), Machine("cpu", cores=2)):
        none, one, many = (
            fit_cost(machine, 2000, 225, "median", n, 2**24).seconds for n in (0, 1, 100)
        )
        assert none < one < many
        # Resamples of one call go side by side on a GPU, and one by one on a CPU.
        assert many - none == pytest.approx(100 * (one - none), rel=0.15) or machine.kind == "cuda"
        # A smaller call's bound makes more calls.
        assert fit_cost(machine, 2000, 225, "median", 100, 1).seconds > many
        # One window has nothing to resample.
        alone = [fit_cost(machine, 2000, 1, "median", n, 2**24) for n in (0, 100)]
        assert alone[0] == alone[1]
    resampled = fit_cost(Machine(), 10, 9, "median", 100, 2**24).flops
    assert resampled == fit_stages(103 * 90)[0].flops


@given(machine=machines, order=orders, windows=st.integers(1, 10**4), longer=st.integers(0, 9000))
def test_more_work_costs_more(machine: Machine, order: int, windows: int, longer: int) -> None:
    def seconds(order: int, inner: int, windows: int) -> float:
        cost = eigenvalues_cost(machine, order, inner, windows)
        assert min(cost.flops, cost.bytes, cost.seconds) > 0
        return cost.seconds

    least = seconds(order, order, windows)
    assert seconds(order + 1, order + 1, windows) > least
    assert seconds(order, order, windows + 16) > least
    assert seconds(order, order + 1 + longer, windows) > least
    complexes = eigenvalues_cost(machine, order, order, windows, is_complex=True)
    assert complexes.seconds > least
    assert complexes.flops == 4 * eigenvalues_cost(machine, order, order, windows).flops
    twice = eigenvalues_cost(machine, order, order, windows, calls=2).seconds
    assert twice > least or machine.kind == "cpu"


@given(
    machine=machines,
    order=st.integers(1, 4000),
    windows=st.integers(2, 5000),
    rule=st.sampled_from(RULES),
    bootstrap=st.integers(0, 200),
)
def test_more_fits_cost_more(
    machine: Machine, order: int, windows: int, rule: str, bootstrap: int
) -> None:
    least = fit_cost(machine, order, windows, rule, bootstrap, 2**24)
    for more in (
        fit_cost(machine, order + 1, windows, rule, bootstrap, 2**24),
        fit_cost(machine, order, windows + 1, rule, bootstrap, 2**24),
        fit_cost(machine, order, windows, rule, bootstrap + 1, 2**24),
    ):
        assert more.seconds > least.seconds
        assert more.flops > least.flops
        assert more.bytes > least.bytes


@given(order=orders, windows=st.integers(1, 5000))
def test_a_batch_is_cheaper_than_its_windows(order: int, windows: int) -> None:
    machine = Machine("cuda")
    together = eigenvalues_cost(machine, order, order, windows).seconds
    alone = windows * eigenvalues_cost(machine, order, order, 1).seconds
    assert together < alone or windows == 1


@given(order=orders, windows=st.integers(1, 5000), speed=st.floats(0.1, 10))
def test_faster_machines_take_less(order: int, windows: int, speed: float) -> None:
    for kind in ("cuda", "cpu"):
        base, other = Machine(kind), Machine(kind, speed=speed)
        for cost in (
            lambda m: eigenvalues_cost(m, order, order, windows).seconds,
            lambda m: fit_cost(m, order, windows, "ks", 10, 2**24).seconds,
        ):
            assert cost(other) == pytest.approx(cost(base) / speed)
    # Twice the cores halve what every core has its own matrices for.
    assume(windows % 4 == 0)
    four, two = (
        eigenvalues_cost(Machine("cpu", cores=c), order, order, windows).seconds for c in (4, 2)
    )
    assert two == pytest.approx(2 * four)


@given(st.lists(costs))
def test_costs_add(parts: list[Cost]) -> None:
    added = total(parts)
    assert added.flops == sum(part.flops for part in parts)
    assert added.bytes == sum(part.bytes for part in parts)
    assert added.seconds == sum(part.seconds for part in parts)
    # One after the other they take the memory of the largest.
    assert added.memory == max((part.memory for part in parts), default=0)


def test_operations_counted_by_hand() -> None:
    # Rows 1, 2, 3 against themselves and those before them: 6 products of 5 numbers.
    assert gram_flops(3, 5) == 6 * 5 * 2
    gram, tridiagonal, bisection = eigenvalue_stages(3, 5, windows=2, item=4)
    assert (gram.flops, gram.bytes) == (2 * 60, 2 * 4 * 15)
    assert (tridiagonal.flops, tridiagonal.bytes) == (2 * 36, 0)
    assert (bisection.flops, bisection.bytes) == (2 * 53 * 4 * 9, 2 * 8 * 3)


def test_weights_are_copied_to_a_gpu_only() -> None:
    assert weights_cost(Machine("cpu"), 10**9) == Cost()
    copied = weights_cost(Machine("cuda"), 12 * 10**9)
    assert (copied.bytes, copied.seconds, copied.flops) == (12 * 10**9, 1.0, 0)


@given(order=orders, windows=st.integers(1, 5000), is_complex=st.booleans())
def test_elsewhere_a_solver_takes_its_measured_times(
    order: int, windows: int, is_complex: bool
) -> None:
    def seconds(machine: Machine) -> float:
        return eigenvalues_cost(machine, order, order, windows, is_complex=is_complex).seconds

    here, ampere, turing = (Machine(compute_capability=each) for each in (90, 80, 75))
    half = Machine(compute_capability=80, speed=0.5)
    assert seconds(half) == pytest.approx(2 * seconds(ampere))
    dtype = torch.complex128 if is_complex else torch.float64
    # Times are those of the solver of a full batch.
    names = {
        machine: machine.solver_facts(order, order, FULL_BATCH, dtype).solver
        for machine in (here, ampere, turing)
    }
    # Before Ampere it is the library's, which takes longer than the package's own.
    assert names[turing] == "cusolver"
    for machine in (ampere, turing):
        if names[machine] == names[here]:
            assert seconds(machine) == seconds(here)
    if names[here] != "cusolver":
        assert seconds(turing) > seconds(here)


def test_the_table_is_that_of_the_saved_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = cost_table.TABLE.read_text()
    monkeypatch.setattr(cost_table, "TABLE", tmp_path / "measured.json")
    cost_table.main()
    assert (tmp_path / "measured.json").read_text() == kept
    assert (measured_on("cuda"), measured_on("cpu")) == ("NVIDIA H200", "AMD EPYC")
