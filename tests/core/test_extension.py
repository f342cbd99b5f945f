"""The compiled modules: what they say of themselves, and that they and the package belong."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re

import pytest
import torch

import farms_fast
import farms_fast._host as _host
from farms_fast import build_info
from farms_fast.core import extension as _extension

TYPES: dict[str, type] = {
    "version": str,
    "python": str,
    "torch": str,
    "torch_target": str,
    "abi": str,
    "compiler": str,
    "cxx_standard": int,
    "cuda": bool,
    "cuda_toolkit": str,
    "cuda_architectures": str,
    "solvers": dict,
}
OPS = {
    "window_gram",
    "eigvalsh",
    "window_eigvalsh",
    "fit_power_law",
    "solver_names",
    "solver_facts",
    "compute_capability",
    "cuda_versions",
    "set_solver_choices",
    "shipped_choices",
}


def test_keys_and_types() -> None:
    info = build_info()
    assert {key: type(value) for key, value in info.items()} == TYPES
    assert json.loads(json.dumps(info)) == info


def test_versions() -> None:
    info = build_info()
    assert info["version"] == farms_fast.__version__ == importlib.metadata.version("farms-fast")
    assert (info["python"], info["torch"]) == (platform.python_version(), torch.__version__)
    assert re.fullmatch(r"\d+\.\d+", str(info["torch_target"]))
    running = tuple(int(n) for n in torch.__version__.split(".")[:2])
    assert tuple(int(n) for n in str(info["torch_target"]).split(".")) <= running
    assert str(info["torch_target"]) in str(info["abi"])
    assert re.search(r"\d+\.\d+", str(info["compiler"]))
    assert info["cxx_standard"] >= 201703


def test_cuda_is_told_consistently() -> None:
    info = build_info()
    assert info["cuda"] is _extension.has_cuda()
    assert bool(info["cuda_toolkit"]) is info["cuda"]
    assert bool(info["cuda_architectures"]) is info["cuda"]
    if info["cuda"]:
        assert torch.version.cuda is not None


def test_solver_names() -> None:
    solvers = build_info()["solvers"]
    assert list(solvers) == ["cpu", "cuda"]
    assert solvers["cpu"] == ["lapack", "two_stage"]
    assert bool(solvers["cuda"]) is build_info()["cuda"]
    for device, names in solvers.items():
        assert "auto" not in names
        assert len(set(names)) == len(names)
        assert torch.ops.farms_fast.solver_names(device) == names
    with pytest.raises(RuntimeError, match=r"expected cpu or cuda, got tpu"):
        torch.ops.farms_fast.solver_names("tpu")


@pytest.mark.parametrize(
    ("version", "is_zeroed"),
    [(11400, True), (11701, True), (11702, True), (11703, False), (11705, False), (12004, False)],
)
def test_workspace_of_an_older_cusolver_is_zeroed(version: int, is_zeroed: bool) -> None:
    # 11.7.1.2 was seen to return wrong results otherwise, 11.7.3.90 right ones.
    assert _host.needs_zeroed_workspace(version) is is_zeroed


@pytest.mark.gpu
def test_versions_of_this_machine() -> None:
    driver, runtime, cusolver = torch.ops.farms_fast.cuda_versions()
    assert driver >= runtime // 1000 * 1000 >= 11000
    assert cusolver >= 11000


def test_each_call_is_a_new_dict() -> None:
    build_info()["solvers"]["cpu"].append("abacus")
    assert build_info()["solvers"]["cpu"] == ["lapack", "two_stage"]


@pytest.mark.parametrize("name", sorted(OPS))
def test_ops_are_registered_with_schemas(name: str) -> None:
    schema = getattr(torch.ops.farms_fast, name).default._schema
    assert schema.name == f"farms_fast::{name}"
    assert not schema.is_mutable


def test_host_types_know_nothing_of_torch() -> None:
    assert set(_host.build_settings()) == {
        "compiler",
        "cxx_standard",
        "cuda_toolkit",
        "cuda_architectures",
        "torch_target",
    }
    grid = _host.full_grid(3, 4)
    with pytest.raises(AttributeError):
        grid.rows = 5


def test_everything_promised_is_there() -> None:
    assert sorted(farms_fast.__all__) == list(farms_fast.__all__)
    for name in farms_fast.__all__:
        assert getattr(farms_fast, name) is not None
