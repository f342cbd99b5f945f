"""What is remembered about a GPU: for whom it counts, and which files are no such record."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest

from farms_fast.core.gpu_records import (
    Gpu,
    cache_folder,
    read_record,
    record_path,
    write_record,
)
from tests.support.gpus import A100


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARMS_FAST_CACHE_DIR", str(tmp_path / "not" / "there"))
    return tmp_path / "not" / "there"


def test_a_record_comes_back(folder: Path) -> None:
    assert read_record(A100, "x") is None
    path = write_record(A100, "x", {"rows": [1, 2]})
    assert path == folder / "nvidia-a100-sxm4-80gb-80.x.json"
    found = read_record(A100, "x")
    assert found is not None
    gpu, record = found
    assert (gpu, record["rows"]) == (A100, [1, 2])
    assert len(record["made"]) == len("2026-01-01")
    assert read_record(A100, "y") is None
    assert read_record(dataclasses.replace(A100, compute_capability=90), "x") is None


@pytest.mark.parametrize("fact", [field.name for field in dataclasses.fields(Gpu)])
def test_every_fact_tells_gpus_apart(fact: str) -> None:
    value = getattr(A100, fact)
    other = dataclasses.replace(
        A100, **{fact: value + "x" if fact != "processors" and isinstance(value, str) else 7}
    )
    assert A100.difference(other) == f"{fact} {getattr(other, fact)}, not {value}"
    assert A100.difference(A100) == ""


def test_the_users_cache_folder_is_taken_where_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FARMS_FAST_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "farms_fast"


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "not JSON",
        lambda record: [],
        lambda record: {**record, "gpu": None},
        lambda record: {**record, "gpu": {}},
        lambda record: {**record, "gpu": {**record["gpu"], "more": 1}},
        lambda record: {**record, "gpu": {**record["gpu"], "processors": "108"}},
        lambda record: {**record, "gpu": {**record["gpu"], "compute_capability": True}},
        lambda record: {**record, "made": 20261201},
    ],
)
def test_a_damaged_record_is_named(change: object) -> None:
    path = write_record(A100, "x", {})
    damaged = change(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(ValueError, match=f"^{path}: expected "):
        read_record(A100, "x")


def test_a_folder_in_its_place_is_an_error_and_not_a_record() -> None:
    record_path(A100, "x").mkdir(parents=True)
    with pytest.raises(ValueError, match="expected a regular file, got a folder"):
        read_record(A100, "x")


def test_two_that_write_at_a_time_leave_one_whole_record() -> None:
    rows = [[number] * 2000 for number in range(4)]
    threads = [
        threading.Thread(target=write_record, args=(A100, "x", {"rows": each})) for each in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_record(A100, "x")
    assert found is not None
    assert found[1]["rows"] in rows
    assert [path.name for path in cache_folder().iterdir()] == [record_path(A100, "x").name]
