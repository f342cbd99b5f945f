from __future__ import annotations

import copy
import csv
import hashlib
import io
import math
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast.adapters.layer_rates.rate_table import COLUMNS
from farms_fast.adapters.training import (
    CsvLog,
    LayerRate,
    RateTable,
    RateWarning,
    TempBalance,
    TensorBoardLog,
    cifar100,
)
from farms_fast.adapters.training.cifar100 import load_cifar100
from tests.support.rate_models import linears, median_alpha, small, whole

# The assignments


def by_hand(rule: str, alphas: list[float], a: float, b: float) -> list[float]:
    """The published formulas, over the base rate."""
    n = len(alphas)
    if rule == "linear":
        width = max(alphas) - min(alphas)
        return [a + (b - a) * (alpha - min(alphas)) / width for alpha in alphas]
    if rule == "sqrt":
        return [n * alpha**0.5 / sum(x**0.5 for x in alphas) for alpha in alphas]
    if rule == "log2":
        return [n * math.log(alpha) / sum(math.log(x) for x in alphas) for alpha in alphas]
    return [a + (b - a) * sum(x < alpha for x in alphas) / n for alpha in alphas]


@pytest.mark.parametrize(
    ("assign", "expected"),
    [
        # alphas 2, 4, 3, 6 at a base rate of 0.1 and the range (0.5, 1.5)
        ("linear", [0.05, 0.1, 0.075, 0.15]),
        ("step", [0.05, 0.1, 0.075, 0.125]),
        ("sqrt", [0.0744739, 0.1053220, 0.0912115, 0.1289926]),  # roots add up to 7.5957541
        ("log2", [0.0557886, 0.1115772, 0.0884228, 0.1442114]),  # logarithms to 7.1699250
    ],
)
def test_rates_of_four_alphas(assign: str, expected: list[float]) -> None:
    rates = whole(linears(4), assign=assign)
    found = [0.1 * factor for factor in rates.factors([2.0, 4.0, 3.0, 6.0])]
    assert found == pytest.approx(expected, abs=5.1e-8)
    if assign in ("sqrt", "log2"):  # the mean rate is the base rate
        assert sum(found) == pytest.approx(0.4, rel=1e-12)


def test_equal_alphas_are_ranked_in_the_order_of_the_layers() -> None:
    rates = whole(linears(4), assign="step", lr_range=(1.0, 2.0))
    assert rates.factors([3.0, 2.0, 3.0, 2.0]) == [1.5, 1.0, 1.75, 1.25]


@pytest.mark.parametrize("assign", ["linear", "sqrt", "log2", "step"])
@pytest.mark.parametrize("lr_range", [(0.5, 1.5), (0.1, 1.9)])
def test_rates_in_an_optimizer_follow_the_alphas_of_its_weights(
    assign: str, lr_range: tuple[float, float]
) -> None:
    model = linears(7)
    rates = whole(model, assign=assign, lr_range=lr_range)
    optimizer = torch.optim.SGD(rates.param_groups(0.2))
    for seed in (0, 1):
        model.load_state_dict(linears(7, seed=seed).state_dict())
        table = rates.step(optimizer, lr=0.2 / (seed + 1))
        alphas = [median_alpha(model[index].weight) for index in range(1, 6)]
        assert [row.alpha for row in table][1:-1] == pytest.approx(alphas, rel=1e-9)
        expected = [0.2 / (seed + 1) * f for f in by_hand(assign, alphas, *lr_range)]
        groups = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert [groups[str(index)] for index in range(1, 6)] == pytest.approx(expected, rel=1e-8)
        assert [row.lr for row in table][1:-1] == [groups[str(index)] for index in range(1, 6)]
        assert groups["rest"] == table["0"].lr == table["6"].lr == 0.2 / (seed + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_of_equal_singular_values_keeps_the_base_rate(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = linears(4)
    torch.nn.init.orthogonal_(model[1].weight)
    model.to(dtype)
    rates = whole(model, skip_first=False, skip_last=False)
    with pytest.warns(RateWarning, match="1 keeps the base rate"):
        rates.param_groups(lr=1.0)
    assert [row.status for row in rates.last] == ["ok", "degenerate_tail", "ok", "ok"]
    others = rates.factors([row.alpha for row in rates.last if row.status == "ok"])
    assert [row.factor for row in rates.last] == [others[0], 1.0, *others[1:]]
    for layer in model:
        layer.weight.data = torch.nn.init.orthogonal_(torch.empty(16, 16)).to(dtype)
    rates = whole(model, skip_first=False, skip_last=False)
    with pytest.warns(RateWarning):
        rates.param_groups(lr=1.0)
    assert [row.factor for row in rates.last] == [1.0] * 4


def test_windows_change_the_rates() -> None:
    model = linears(6)
    with_farms, without = small(model), whole(model)
    with_farms.param_groups(0.1)
    without.param_groups(0.1)
    assert with_farms.factors_by_layer != without.factors_by_layer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"assign": "cubic"}, ValueError, "assign: expected one of 'linear', 'sqrt', 'log2', 'st"),
        ({"lr_range": (0, 1)}, ValueError, "lr_range: expected positive numbers in order"),
        ({"lr_range": (2, 1)}, ValueError, "lr_range: expected positive numbers in order"),
        ({"lr_range": (1, math.inf)}, ValueError, "lr_range: expected positive numbers"),
        ({"lr_range": 1.5}, TypeError, "lr_range: expected two numbers, got 1.5"),
        ({"lr_range": (1, 2, 3)}, TypeError, "lr_range: expected two numbers"),
        ({"lr_range": (True, 2)}, TypeError, "lr_range: expected two numbers"),
        ({"lr_range": "12"}, TypeError, "lr_range: expected two numbers"),
        ({"speed": 1}, TypeError, "speed: no argument of TempBalance, which takes assign, bins, "),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TempBalance(linears(4), **options)


# Tables and logs


def test_a_csv_log_has_a_line_for_every_layer_and_call(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    rates = whole(linears(5), log=path)
    optimizer = torch.optim.SGD(rates.param_groups(0.1))
    tables = [rates.last, *(rates.step(optimizer, lr=0.1 / call) for call in (1, 2))]
    again = CsvLog(path)  # as a run that resumes
    assert tables[-1] is not None
    again(tables[-1])
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == COLUMNS
    assert [(line[0], line[2]) for line in lines] == [
        (call, name) for call in "0122" for name in "01234"
    ]
    for table, start in zip(tables, (0, 5, 10), strict=True):
        assert table is not None
        for row, line in zip(table, lines[start : start + 5], strict=True):
            kept = dict(zip(header, line, strict=True))
            assert float(kept["base_lr"]) == table.base_lr
            assert (float(kept["alpha"]), float(kept["lr"])) == (row.alpha, row.lr)
            assert (kept["status"], float(kept["factor"])) == (row.status, row.factor)


def test_several_logs_may_be_paths_and_functions(tmp_path: Path) -> None:
    class Where:
        def __fspath__(self) -> str:
            return str(tmp_path / "b.csv")

    told: list[RateTable] = []
    rates = whole(linears(5), log=[str(tmp_path / "a.csv"), Where(), told.append])
    rates.step(torch.optim.SGD(rates.param_groups(0.1)))
    assert [table.call for table in told] == [0, 1]
    texts = [(tmp_path / name).read_text() for name in ("a.csv", "b.csv")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 1 + 2 * 5


def test_a_resumed_run_does_not_log_initial_rates_again(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    first = whole(linears(5), log=path)
    optimizer = torch.optim.SGD(first.param_groups(0.1))
    assert not path.exists()  # it may still be given a state
    first.apply(optimizer)
    first.step(optimizer)
    resumed = whole(linears(5, seed=1), log=path)
    optimizer = torch.optim.SGD(resumed.param_groups(0.1))
    resumed.load_state_dict(first.state_dict())
    resumed.apply(optimizer)
    resumed.step(optimizer)
    with path.open(newline="") as file:
        calls = [row["call"] for row in csv.DictReader(file)]
    assert calls == [call for call in "012" for _ in range(5)]


def test_a_tensorboard_log_is_copied_and_pickled(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "events")
    assert copy.deepcopy(log).writer is log.writer
    again = pickle.loads(pickle.dumps(log))
    again(RateTable(1, 0.1, (LayerRate("fc", alpha=2.0),)))
    again.writer.close()
    log.writer.close()
    assert len(list((tmp_path / "events").iterdir())) == 2


def test_names_and_messages_of_any_kind_stay_in_their_cell(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "rates.csv")
    row = LayerRate('odd, "name"\n', status="error", message="a, b\nc")
    log(RateTable(0, 0.1, (row,)))
    with log.path.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [(k["name"], k["message"]) for k in kept] == [(row.name, row.message)]


def test_tensorboard_has_the_scalars_of_every_layer(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path / "events")
    rates = whole(linears(5), log=[log])
    optimizer = torch.optim.SGD(rates.param_groups(0.1))
    tables = [rates.last, rates.step(optimizer), rates.step(optimizer)]
    log.writer.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert len(events.Tags()["scalars"]) == 2 + 3 * 5
    for name, what in (("alpha/2", "alpha"), ("factor/2", "factor"), ("lr/2", "lr")):
        kept = events.Scalars(name)
        assert [event.step for event in kept] == [0, 1, 2]
        expected = [getattr(table["2"], what) for table in tables if table is not None]
        assert [event.value for event in kept] == pytest.approx(expected, rel=1e-6)
    assert [event.value for event in events.Scalars("lr/base")] == pytest.approx([0.1] * 3)


def test_tensorboard_takes_a_writer_and_leaves_out_what_is_not_a_number() -> None:
    class Writer:
        def __init__(self) -> None:
            self.told: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.told.append((name, value, step))

        def flush(self) -> None:
            pass

    writer = Writer()
    log = TensorBoardLog(writer)
    log(RateTable(4, 0.1, (LayerRate("a", status="nonfinite", lr=0.1),)))
    assert writer.told == [("lr/base", 0.1, 4), ("factor/a", 1.0, 4), ("lr/a", 0.1, 4)]


def test_without_tensorboard_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[tensorboard\]'"):
        TensorBoardLog("events")


def test_a_table_is_found_by_name_and_becomes_a_data_frame() -> None:
    rates = whole(linears(5))
    rates.param_groups(0.1)
    table = rates.last
    assert table is not None
    assert len(table) == 5
    frame = table.to_pandas()
    assert tuple(frame.columns) == COLUMNS
    assert frame["name"].tolist() == list("01234")
    assert frame["factor"].tolist() == [row.factor for row in table]
    assert set(frame["call"]) == {0}
    heading, *lines = str(table).splitlines()
    assert heading == "RateTable(call 0, base rate 0.1, 5 layers, 0 failed)"
    assert lines[0] == "  0  rate 0.1 = 1.000 x base, skipped: the first layer (skip_first)"
    row = table["1"]
    assert lines[1].startswith(f"  1  rate {row.lr:.4g} = {row.factor:.3f} x base, alpha ")
    with pytest.raises(KeyError, match="no layer named 'x' among 5"):
        table["x"]
    assert RateTable.from_state(table.to_state())["1"] == table["1"]


# CIFAR-100


def published_pickle(value: dict[str, Any]) -> bytes:
    """Of protocol 2 and with byte strings, as Python 2 wrote it."""
    return pickle.dumps(value, protocol=2)


def write_archive(folder: Path, count: int = 6, **changes: Any) -> tuple[Path, Any]:
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [int(label) for label in generator.integers(0, 100, count)]
    files = {
        "train": {"data": data, "fine_labels": labels, "coarse_labels": labels, "filenames": []},
        "test": {"data": data[:2], "fine_labels": labels[:2], "batch_label": "testing"},
        "meta": {"fine_label_names": [f"class {n}" for n in range(100)]},
    }
    files["train"].update(changes)
    path = folder / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            content = published_pickle(value)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path, (data, labels)


def test_the_archive_is_read_where_it_is_or_unpacked(tmp_path: Path) -> None:
    archive, (data, labels) = write_archive(tmp_path)
    found = [load_cifar100(archive, verify=False), load_cifar100(tmp_path, verify=False)]
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            content = tar.extractfile(member)
            if content is not None:
                unpacked = tmp_path / "unpacked" / member.name
                unpacked.parent.mkdir(parents=True, exist_ok=True)
                unpacked.write_bytes(content.read())
    archive.unlink()
    found += [
        load_cifar100(tmp_path / "unpacked", verify=False),
        load_cifar100(tmp_path / "unpacked" / "cifar-100-python", verify=False),
    ]
    for read in found:
        assert read.train_images.dtype == torch.uint8
        assert read.train_images.shape == (6, 3, 32, 32)
        # A row is the red plane, then green, then blue, each row by row.
        assert read.train_images[4, 1, 2, 3] == data[4, 1024 + 2 * 32 + 3]
        assert read.train_labels.tolist() == labels
        assert read.train_labels.dtype == torch.int64
        assert read.test_labels.tolist() == labels[:2]
        assert read.classes[7] == "class 7"
        assert not read.published


def test_only_the_published_files_pass_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path)
    with pytest.raises(ValueError, match=r"expected the published file 'train' \(MD5 16019d7e"):
        load_cifar100(tmp_path)
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz") as tar:
        for name in ("train", "test", "meta"):
            member = tar.extractfile(f"cifar-100-python/{name}")
            assert member is not None
            monkeypatch.setitem(cifar100._FILE_MD5, name, hashlib.md5(member.read()).hexdigest())
    assert load_cifar100(tmp_path).published


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch stolen",)


def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_archive(tmp_path, filenames=Evil())
    with pytest.raises(ValueError, match=r"'train'.* (posix|nt)\.system"):
        load_cifar100(tmp_path, verify=False)
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((6, 3072), np.float32)}, r"uint8 \(N, 3072\) as 'data' of 'train', got"),
        ({"data": np.zeros((6, 3071), np.uint8)}, r"got uint8 \(6, 3071\)"),
        ({"data": [1, 2]}, "got list"),
        ({"fine_labels": [1, 2]}, "expected 6 labels below 100 as 'fine_labels' of 'train'"),
        ({"fine_labels": [1, 2, 3, 4, 5, 100]}, "expected 6 labels below 100"),
        ({"fine_labels": None}, "expected 6 labels below 100"),
    ],
)
def test_data_of_another_structure(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_archive(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_cifar100(tmp_path, verify=False)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected cifar-100-python\.tar\.gz"):
        load_cifar100(tmp_path)
    archive, _ = write_archive(tmp_path, count=200)
    whole_file = archive.read_bytes()
    archive.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(ValueError, match=r"path: expected .*tar archive"):
        load_cifar100(archive, verify=False)
    archive.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"path: expected .*tar archive"):
        load_cifar100(archive, verify=False)
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-100-python/train"), io.BytesIO())
    with pytest.raises(ValueError, match="expected cifar-100-python/test in"):
        load_cifar100(archive, verify=False)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="expected a list 'fine_label_names' in the file 'meta'"):
        load_cifar100(tmp_path, verify=False)
    (folder / "meta").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="in the file 'meta'"):
        load_cifar100(tmp_path, verify=False)
