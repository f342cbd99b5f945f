"""Options, the measuring fixture, and what is saved with the times."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.machine import describe
from benchmarks.measure import Bench
from benchmarks.peers import CONTENDER, EIGEN_PEERS
from farms_fast import build_info

_RECORD = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("farms_fast benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes, one round: checks only")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    group.addoption("--solver", default="auto", help="the solver that farms_fast uses")
    group.addoption(
        "--time-limit", type=float, default=None, help="seconds after which no case is begun"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What peers warn about is theirs.
    config.addinivalue_line("filterwarnings", "ignore")
    # That nothing is saved when every case failed is no error of its own, which would hide theirs.
    warnings.filterwarnings("ignore", message="Not saving anything")
    device = config.getoption("device")
    if device == "cuda" and not (build_info()["cuda"] and torch.cuda.is_available()):
        raise pytest.UsageError("--device cuda: needs a CUDA device and a build with the CUDA ops")
    config.stash[_RECORD] = {
        "began": time.monotonic(),
        "device": device,
        "profile": "quick" if config.getoption("quick") else device,
        "skipped": [],
        "failed": [],
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.module, "parametrise"):
        metafunc.module.parametrise(metafunc, metafunc.config.stash[_RECORD]["profile"])


_RANK = {CONTENDER: -1, **{peer.name: rank for rank, peer in enumerate(EIGEN_PEERS)}}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Short of time, the contender and the first peers of every case are what counts. Otherwise the
    # contender and its peers take turns, so that what else the machine does meets all of them.
    if config.getoption("time_limit") is not None:
        items.sort(key=lambda item: _RANK.get(_peer_name(item), len(_RANK)))


def _peer_name(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return callspec.params["peer"].name if callspec and "peer" in callspec.params else ""


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    config = request.config
    record, limit = config.stash[_RECORD], config.getoption("time_limit")
    if limit is not None and time.monotonic() - record["began"] > limit:
        pytest.skip("the run's time limit was reached")
    made = Bench(
        request.getfixturevalue("benchmark"),
        torch.device(config.getoption("device")),
        bool(config.getoption("quick")),
        config.getoption("solver"),
    )
    yield made
    if not made.quick:
        gc.collect()
    if made.device.type == "cuda":
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.outcome != "passed" and not hasattr(report, "wasxfail"):
        if report.skipped:
            text = report.longrepr[2].removeprefix("Skipped: ")
        else:
            text = (
                report.longrepr.reprcrash.message.splitlines()[0]
                if hasattr(report.longrepr, "reprcrash") and report.longrepr.reprcrash
                else str(report.longrepr).splitlines()[-1]
            )
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        item.config.stash[_RECORD][report.outcome].append(
            {
                "family": Path(item.path).stem.removeprefix("test_"),
                "case": case.id if case is not None else item.name,
                "peer": _peer_name(item),
                "reason": text,
            }
        )
    return report


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    record = config.stash[_RECORD]
    output_json["machine_info"] = describe(torch.device(record["device"]))
    output_json["commit_info"] = {
        key: output_json["commit_info"].get(key) for key in ("id", "dirty", "time")
    }
    output_json["run"] = {
        "device": record["device"],
        "profile": record["profile"],
        "seconds": round(time.monotonic() - record["began"]),
        "skipped": record["skipped"],
        "failed": record["failed"],
    }
    for entry in output_json["benchmarks"]:
        # Only what the report reads: the files stay in the repository.
        entry["stats"] = {k: entry["stats"][k] for k in ("min", "median", "max", "iqr", "rounds")}
        for key in ("params", "param", "options", "fullname"):
            entry.pop(key, None)
