"""Which solvers a GPU gets: by its own table, by what is shipped, and after which test."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from farms_fast.core import extension, ops, self_test, solver_choice
from farms_fast.core.gpu_records import record_path
from farms_fast.core.solver_choice import decision_on, settle, settle_on
from farms_fast.core.solver_table import NO_LIMIT, Row, SolverTable, use_rows
from tests.support.gpus import A100, H200, INDEX, pretend

ROWS = (
    Row(False, 300, 10, "cusolver"),
    Row(False, 300, NO_LIMIT, "two_stage"),
    Row(True, 80, NO_LIMIT, "cusolver"),
)


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FARMS_FAST_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FARMS_FAST_SELFTEST", raising=False)
    yield
    use_rows(INDEX, ())


@pytest.fixture
def tests_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The solvers of each self-test, none of which fails."""
    return pretend_tests(monkeypatch)


def pretend_tests(
    monkeypatch: pytest.MonkeyPatch, failing: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    run: list[tuple[str, ...]] = []

    def failures(index: int, solvers: Sequence[str] = self_test.OWN_SOLVERS) -> list[str]:
        run.append(tuple(solvers))
        return [f"{solver}, real order 33: NaN" for solver in solvers if solver in failing]

    monkeypatch.setattr(self_test, "failures", failures)
    return run


def chosen(order: int, count: int = 1, capability: int = 80) -> str:
    told = {"device": "cuda", "count": count, "compute_capability": capability}
    return ops.solver_facts(order, **told).solver


# ------------------------------------------------------------------------------------------ tables


def test_a_table_comes_back_as_it_was() -> None:
    table = SolverTable(A100, ROWS)
    table.write()
    found = SolverTable.read(A100)
    assert found is not None
    assert (found.gpu, found.rows) == (A100, ROWS)
    assert found.made
    assert SolverTable.read(H200) is None


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [],
        [[False, 300, 10]],
        [[0, 300, 10, "cusolver"]],
        [[False, 0, 10, "cusolver"]],
        [[False, True, 10, "cusolver"]],
        [[False, 300, 2**62 + 1, "cusolver"]],
        [[False, 300, 10.0, "cusolver"]],
        [[False, 300, 10, "fastest"]],
        [[False, 300, 10, ["cusolver"]]],
        [{"a": 1}],
    ],
)
def test_a_damaged_table_is_ignored_with_one_warning(
    rows: object, monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    SolverTable(A100, ROWS).write()
    path = record_path(A100, "solvers")
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": rows}))
    pretend(A100, monkeypatch)
    with pytest.warns(
        UserWarning, match=f"is ignored: {path}: expected rows .*; `farms-fast tune`"
    ):
        settle_on(INDEX)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle_on(INDEX)
    assert chosen(100) == "one_stage"
    assert "a model of compute capability 8.0" in decision_on(INDEX).text
    assert f"is ignored: {path}" in decision_on(INDEX).text


def test_a_table_of_this_gpu_decides(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    before = chosen(100), chosen(100, 11), chosen(301, 11)
    assert before == ("one_stage", "one_stage", "two_stage")
    SolverTable(A100, ROWS).write()
    pretend(A100, monkeypatch)
    settle_on(INDEX)
    assert (chosen(100), chosen(100, 11), chosen(301, 11)) == ("cusolver", "two_stage", before[2])
    decision = decision_on(INDEX)
    assert decision.table is not None
    assert decision.text == f"measured here on {decision.table.made}"


@pytest.mark.parametrize(
    ("fact", "value"), [("driver", "12080"), ("cusolver", "12004"), ("farms_fast", "9.9")]
)
def test_a_table_of_another_driver_or_release_is_ignored_and_said(
    fact: str, value: str, monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    SolverTable(dataclasses.replace(A100, **{fact: value}), ROWS).write()
    pretend(A100, monkeypatch)
    settle_on(INDEX)
    assert chosen(100) == "one_stage"
    said = f"was measured with {fact} {value}, not {getattr(A100, fact)}; `farms-fast tune`"
    assert said in decision_on(INDEX).text


def test_what_decides_without_a_table() -> None:
    assert solver_choice.Decision(H200).text == "the table shipped for compute capability 9.0"
    blackwell = dataclasses.replace(H200, compute_capability=100)
    assert solver_choice.Decision(blackwell).text == "the table shipped for compute capability 9.0"
    assert "a model of compute capability 8.0" in solver_choice.Decision(A100).text


def test_what_chooses_on_a_device_by_name(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    pretend(A100, monkeypatch)
    monkeypatch.setattr(extension, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(solver_choice, "use_rows", lambda index, rows: None)
    text = "a model of compute capability 8.0 (`farms-fast tune` measures)"
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert solver_choice.decided_by(device) == text
    for device in ("cpu", "cuda:2", "cuda:x", "cuda:-1", ""):
        assert solver_choice.decided_by(device) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert solver_choice.decided_by("cuda") == ""


# --------------------------------------------------------------------------------------- self-test


def test_the_self_test_runs_once_for_a_gpu_driver_and_release(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    pretend(A100, monkeypatch)
    assert solver_choice.self_test_text(decision_on(INDEX)) == "not run"
    settle_on(INDEX)
    settle_on(INDEX)
    assert tests_run == [("one_stage", "two_stage")]
    # Another process.
    pretend(A100, monkeypatch)
    settle_on(INDEX)
    assert len(tests_run) == 1
    assert solver_choice.self_test_text(decision_on(INDEX)).startswith("passed on 2")
    pretend(dataclasses.replace(A100, driver="13010"), monkeypatch)
    settle_on(INDEX)
    assert len(tests_run) == 2


def test_a_measured_architecture_is_not_tested_and_its_successor_is(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    pretend(H200, monkeypatch)
    settle_on(INDEX)
    assert tests_run == []
    assert solver_choice.self_test_text(decision_on(INDEX)) == "not needed"
    pretend(dataclasses.replace(H200, compute_capability=100), monkeypatch)
    settle_on(INDEX)
    assert len(tests_run) == 1


def test_a_variable_skips_it(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    monkeypatch.setenv("FARMS_FAST_SELFTEST", "0")
    pretend(A100, monkeypatch)
    settle_on(INDEX)
    assert tests_run == []


def test_while_a_graph_is_captured_it_waits_for_the_next_call(
    monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    SolverTable(A100, ROWS).write()
    pretend(A100, monkeypatch, is_capturing=True)
    settle_on(INDEX)
    assert tests_run == []
    # The table counts at once.
    assert chosen(100) == "cusolver"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    settle_on(INDEX)
    assert len(tests_run) == 1


def test_solvers_that_fail_give_way_to_cusolver_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SolverTable(A100, ROWS).write()
    run = pretend_tests(monkeypatch, failing=("two_stage",))
    for _ in range(2):
        # A failure is not remembered: the next process tests again.
        pretend(A100, monkeypatch)
        with pytest.warns(UserWarning, match="report this: .*A100.*two_stage, real order 33: NaN"):
            settle_on(INDEX)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            settle_on(INDEX)
        assert {chosen(order, count) for order in (10, 100, 2000) for count in (1, 99)} == {
            "cusolver"
        }
        decision = decision_on(INDEX)
        assert solver_choice.self_test_text(decision) == "failed"
        assert decision.text.startswith("cuSOLVER alone, because the self-test failed: two_stage")
    assert run == [("one_stage", "two_stage"), ("cusolver",)] * 2


def test_a_gpu_on_which_no_solver_is_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tests(monkeypatch, failing=("one_stage", "cusolver"))
    pretend(A100, monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no eigensolver is right on this GPU"):
            settle_on(INDEX)


def test_a_full_gpu_is_tested_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def failures(index: int) -> list[str]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(self_test, "failures", failures)
    pretend(A100, monkeypatch)
    settle_on(INDEX)
    assert solver_choice.self_test_text(decision_on(INDEX)) == "not run"


def test_without_a_cache_folder_each_process_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tests_run: list[tuple[str, ...]]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FARMS_FAST_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        pretend(A100, monkeypatch)
        settle_on(INDEX)
    assert len(tests_run) == 2


def test_the_cpu_and_what_is_not_computed_now_settle_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(index: int) -> None:
        raise AssertionError(index)

    monkeypatch.setattr(solver_choice, "settle_on", never)
    settle(torch.ones(1))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        settle(torch.ones(1, device="cuda"))


# ------------------------------------------------------------------------- the self-test's matrices


@pytest.mark.parametrize("order", [33, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_its_windows_have_hard_spectra(order: int, dtype: torch.dtype) -> None:
    windows = self_test._windows(order, dtype)
    evals = torch.linalg.eigvalsh(windows @ windows.mH)
    heavy, repeated = evals
    assert heavy[-1] == pytest.approx(1)
    assert heavy[0] == pytest.approx(1e-9, rel=1e-4)
    torch.testing.assert_close(repeated[:8], torch.ones(8, dtype=torch.float64))
    assert torch.equal(windows, self_test._windows(order, dtype))


def test_right_eigenvalues_pass_and_wrong_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = self_test._windows(33, torch.float64)
    reference = torch.linalg.eigvalsh(windows @ windows.mH)
    for solver in ("lapack", "two_stage"):
        assert self_test._failure(solver, windows, reference) == ""
    wrong = reference.clone()
    wrong[1, 20] += 9 * 33 * 2**-52 * float(reference[1, -1])
    assert self_test._failure("lapack", windows, wrong) != ""
    assert "nan" in self_test._failure("lapack", windows * torch.nan, reference)
    assert "expected one of auto" in self_test._failure("jacobi", windows, reference)


@pytest.mark.gpu
def test_the_self_test_on_this_gpu() -> None:
    assert self_test.failures(torch.cuda.current_device()) == []
    assert self_test.failures(torch.cuda.current_device(), ("cusolver",)) == []


@pytest.mark.gpu
def test_a_wrong_solver_on_this_gpu_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.cuda.current_device()
    monkeypatch.setattr(solver_choice, "_was_measured", lambda gpu: False)
    monkeypatch.setattr(solver_choice, "_settled", set())
    monkeypatch.setattr(solver_choice, "_decisions", {})
    monkeypatch.setattr(
        self_test,
        "failures",
        lambda index, solvers=self_test.OWN_SOLVERS: ["two_stage: x"] * (solvers[0] != "cusolver"),
    )
    matrices = torch.eye(300, dtype=torch.float64, device="cuda").expand(9, -1, -1).contiguous()
    try:
        with pytest.warns(UserWarning, match="self-test of its eigensolvers failed"):
            evals = ops.eigvalsh(matrices)
        torch.testing.assert_close(evals, torch.ones_like(evals))
        assert ops.solver_facts(300, count=9, device="cuda").solver == "cusolver"
    finally:
        use_rows(index, ())


@pytest.mark.gpu
def test_a_capture_on_a_gpu_that_is_not_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    index = torch.cuda.current_device()
    matrices = torch.eye(100, dtype=torch.float64, device="cuda").expand(9, -1, -1).contiguous()
    ops.eigvalsh(matrices, "one_stage")
    monkeypatch.setattr(solver_choice, "_was_measured", lambda gpu: False)
    monkeypatch.setattr(solver_choice, "_settled", set())
    monkeypatch.setattr(solver_choice, "_decisions", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        evals = ops.eigvalsh(matrices, "one_stage")
    assert index not in solver_choice._settled
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(evals, torch.ones_like(evals))
    current = torch.cuda.current_stream()
    ops.eigvalsh(matrices, "one_stage")
    assert index in solver_choice._settled
    assert torch.cuda.current_stream() == current
    assert solver_choice.self_test_text(decision_on(index)).startswith("passed on")
