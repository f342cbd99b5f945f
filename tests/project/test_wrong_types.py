"""Public entry points called with things of a wholly other type: one error that names the argument.

Each row is a call with one wrong argument, and the beginning of the error: the argument, what was
expected, and what came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast import (
    Analysis,
    FixedAspectSampling,
    FullMatrix,
    LayerRecord,
    analyze,
    compare,
    esd,
    fit_power_law,
)
from farms_fast.adapters.layer_rates.logs import scalars
from farms_fast.adapters.sciml import CompressibleFlow, TBSigmoid, read_pdebench, write_pdebench
from farms_fast.adapters.training import CsvLog, TempBalance, TensorBoardLog
from farms_fast.adapters.training.cifar100 import load_cifar100
from farms_fast.adapters.training.lightning import LightningRates
from farms_fast.adapters.training.transformers import TrainerRates
from farms_fast.compat import modelbalancing as balancing
from farms_fast.compat import net_esd_estimator, net_esd_estimator_farms, weightwatcher
from farms_fast.core.arguments import check_type, list_of, path_of
from farms_fast.live import LiveAnalysis
from farms_fast.results.store import ResultsStore, merge

LAYER = LayerRecord("fc", "linear", (1, 4, 4), "ok", alpha=2.5, window_evals=np.ones((1, 4)))
ANALYSIS = Analysis([LAYER])
COMPARISON = compare(ANALYSIS, ANALYSIS)
MODEL = torch.nn.Linear(16, 16)
FLOW = CompressibleFlow(*(torch.ones(1),) * 4, 0.1, 0.1, 0.1)

Call = Callable[[Any], object]

# What is called with the wrong value, and what the error says was expected.
MODULES: dict[str, tuple[Call, str]] = {
    "LiveAnalysis": (LiveAnalysis, "model"),
    "TempBalance": (TempBalance, "model"),
    "TBSigmoid": (TBSigmoid, "model"),
    "net_esd_estimator": (net_esd_estimator, "net"),
    "net_esd_estimator_farms": (net_esd_estimator_farms, "net"),
    "modelbalancing": (balancing.net_esd_estimator, "net"),
}
PATHS: dict[str, tuple[Call, str]] = {
    "to_html": (ANALYSIS.to_html, "path"),
    "to_csv": (ANALYSIS.to_csv, "path"),
    "to_json": (ANALYSIS.to_json, "path"),
    "to_parquet": (ANALYSIS.to_parquet, "path"),
    "from_json": (Analysis.from_json, "path"),
    "from_store": (Analysis.from_store, "path"),
    "spectra_to_npz": (ANALYSIS.spectra_to_npz, "path"),
    "spectra_to_safetensors": (ANALYSIS.spectra_to_safetensors, "path"),
    "Comparison.to_html": (COMPARISON.to_html, "path"),
    "Comparison.to_csv": (COMPARISON.to_csv, "path"),
    "Comparison.to_json": (COMPARISON.to_json, "path"),
    "ResultsStore": (ResultsStore, "path"),
    "merge target": (lambda path: merge(path, []), "target"),
    "merge parts": (lambda path: merge("never.sqlite", [path]), "parts"),
    "CsvLog": (CsvLog, "path"),
    "TensorBoardLog": (TensorBoardLog, "where"),
    "load_cifar100": (load_cifar100, "path"),
    "read_pdebench": (read_pdebench, "path"),
    "write_pdebench": (lambda path: write_pdebench(path, FLOW), "path"),
    "analyze store": (lambda path: analyze(MODEL, store=path), "store"),
}
OTHERS: dict[str, tuple[Call, str, str]] = {
    "analyze": (analyze, "model", "a torch.nn.Module, a mapping of names to tensors, or a path"),
    "analyze group": (
        lambda wrong: analyze(MODEL, process_group=wrong),
        "process_group",
        "None or a group of torch.distributed",
    ),
    "analyze sampling": (lambda wrong: analyze(MODEL, wrong), "sampling", "FixedAspectSampling"),
    "compare a": (lambda wrong: compare(wrong, ANALYSIS), "a", "an Analysis"),
    "compare b": (lambda wrong: compare(ANALYSIS, wrong), "b", "an Analysis"),
    "esd": (esd, "W", "a NumPy array, a torch tensor"),
    "fit_power_law": (fit_power_law, "evals", "a NumPy array, a torch tensor"),
    "Analysis layers": (Analysis, "layers", "LayerRecords"),
    "Analysis skipped": (lambda wrong: Analysis([], wrong), "skipped", "Skipped tensors"),
    "Analysis settings": (lambda wrong: Analysis([], (), wrong), "settings", "a mapping of names"),
    "to_html title": (lambda wrong: ANALYSIS.to_html("never", title=wrong), "title", "a string"),
    "plot_alpha ax": (ANALYSIS.plot_alpha, "ax", "None or matplotlib's Axes"),
    "plot_esd ax": (LAYER.plot_esd, "ax", "None or matplotlib's Axes"),
    "LiveAnalysis change": (
        lambda wrong: LiveAnalysis(MODEL, change=wrong),
        "change",
        "None or a function",
    ),
    "step": (lambda wrong: rates().step(wrong), "optimizer", "a torch optimizer"),
    "apply": (lambda wrong: rates().apply(wrong), "optimizer", "a torch optimizer"),
    "apply again": (lambda wrong: applied().apply(wrong), "optimizer", "a torch optimizer"),
    "CsvLog table": (CsvLog("never.csv"), "table", "a RateTable"),
    "scalars": (scalars, "table", "a RateTable"),
    "LightningRates": (lambda wrong: LightningRates(optimizer=wrong), "optimizer", "an index"),
    "TrainerRates": (TrainerRates, "rates", "LayerRates"),
    "write_pdebench": (lambda wrong: write_pdebench("never", wrong), "flow", "a CompressibleFlow"),
    "weightwatcher": (weightwatcher, "model", "a torch.nn.Module, a mapping"),
    "weightwatcher base": (
        lambda wrong: weightwatcher(MODEL, base_model=wrong),
        "base_model",
        "a torch.nn.Module, a mapping",
    ),
    "init_stable_rank": (
        lambda wrong: balancing.net_esd_estimator(MODEL, init_stable_rank=wrong),
        "init_stable_rank",
        "None or a number for each layer",
    ),
    "window rows": (lambda wrong: FixedAspectSampling().grid(wrong, 4), "rows", "an integer"),
    "window columns": (lambda wrong: FullMatrix().grid(4, wrong), "columns", "an integer"),
    "merge": (lambda wrong: merge("never.sqlite", wrong), "parts", "a sequence of paths"),
}


def rates() -> TempBalance:
    """Rates that groups were made from."""
    made = TempBalance(torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4))))
    made.param_groups(lr=0.1)
    return made


def applied() -> TempBalance:
    """Rates that know an optimizer already."""
    made = TempBalance(torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4))))
    made.apply(torch.optim.SGD(made.param_groups(lr=0.1)))
    return made


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, and if it were it would be here."""
    monkeypatch.chdir(tmp_path)


def refused(call: Call, wrong: object, argument: str, expected: str) -> None:
    """Asserts one TypeError with argument, what was expected and the type that came."""
    message = f"^{re.escape(argument)}: expected {re.escape(expected)}.*, got .+"
    with pytest.raises(TypeError, match=message) as caught:
        call(wrong)
    got = str(caught.value).rpartition(", got ")[2]
    assert got.startswith(type(wrong).__name__) or got == repr(wrong)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("wrong", ["x", 3, None])
@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_module(name: str, wrong: object) -> None:
    call, argument = MODULES[name]
    refused(call, wrong, argument, "a torch.nn.Module")


@pytest.mark.parametrize("wrong", [3, [1], b"x"])
@pytest.mark.parametrize("name", PATHS)
def test_what_is_no_path(name: str, wrong: object) -> None:
    call, argument = PATHS[name]
    refused(call, wrong, argument, "a path")


@pytest.mark.parametrize("wrong", [2.5, object()], ids=["float", "object"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_of_the_kind(name: str, wrong: object) -> None:
    call, argument, expected = OTHERS[name]
    refused(call, wrong, argument, expected)


@pytest.mark.parametrize("rule", [["ks"], {}, 3])
def test_a_rule_that_is_no_word(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"^fix_fingers: expected one of .*; got "):
        net_esd_estimator(MODEL, fix_fingers=rule)


def test_a_run_and_a_timeout_of_another_type() -> None:
    wrong: Any = [1]
    with ResultsStore("run.sqlite") as store:
        store.run({"xmin": "median"})
        with pytest.raises(ValueError, match=r"^run: expected one of 1, got \[1\]"):
            store.read(wrong)
        with pytest.raises(TypeError, match=r"^settings: expected a mapping .*, got list"):
            store.run(wrong)
    with pytest.raises(TypeError, match=r"^timeout: expected a number, got \[1\]"):
        ResultsStore("run.sqlite", timeout=wrong)


def test_one_wrong_thing_among_right_ones() -> None:
    layers: Any = [LAYER, "fc"]
    with pytest.raises(TypeError, match=r"^layers: expected LayerRecords, got list with str in it"):
        Analysis(layers)
    assert list_of("layers", (LAYER, LAYER), LayerRecord, "LayerRecords") == [LAYER, LAYER]


def test_right_types_pass(tmp_path: Path) -> None:
    check_type("a", ANALYSIS, (str, Analysis), "text or an Analysis")
    assert path_of("path", "a/b") == Path("a/b")
    assert path_of("path", tmp_path) == tmp_path
    assert FixedAspectSampling(rows=2).grid(np.int64(4), np.int64(4)).rows == 2
