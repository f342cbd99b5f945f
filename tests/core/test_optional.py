"""Packages that are not there, or that are broken, where an extra of this one brings them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from farms_fast.adapters.layer_rates.logs import TensorBoardLog
from farms_fast.adapters.sciml.pdebench import read_pdebench
from farms_fast.compat import weightwatcher
from farms_fast.core.optional import optional_import
from farms_fast.results.analysis import Analysis

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("hidden", "call", "message"),
    [
        ("pandas", lambda: Analysis([]).to_pandas(), "to_pandas: pandas .* 'farms-fast[pandas]'"),
        (
            "pyarrow",
            lambda: Analysis([]).to_parquet("never.parquet"),
            "to_parquet: pyarrow .* 'farms-fast[parquet]'",
        ),
        (
            "matplotlib.pyplot",
            lambda: Analysis([]).plot_alpha(),
            "plots: matplotlib .* 'farms-fast[plot]', or use to_html",
        ),
        ("pandas", lambda: weightwatcher(torch.nn.Linear(8, 8)), "weightwatcher: pandas .*"),
        (
            "torch.utils.tensorboard",
            lambda: TensorBoardLog("never"),
            "event files: tensorboard .* 'farms-fast[tensorboard]'",
        ),
        (
            "h5py",
            lambda: read_pdebench("never.hdf5"),
            "PDEBench's files: h5py .* 'farms-fast[sciml]'",
        ),
    ],
)
def test_what_needs_a_package_says_which_and_how_to_get_it(
    hidden: str, call: Callable[[], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ImportError, match=re.escape(message).replace(r"\.\*", ".*")):
        call()


def test_the_reason_of_a_broken_package_is_kept() -> None:
    broken = ImportError("libfrobnicate.so.1: cannot open shared object file")
    with (
        pytest.raises(ImportError, match=r"libfrobnicate\.so\.1") as caught,
        optional_import("frobnicate", extra="plot", needed_for="plots"),
    ):
        raise broken
    assert caught.value.__cause__ is broken


def test_other_errors_pass() -> None:
    with (
        pytest.raises(KeyError, match="inner"),
        optional_import("frobnicate", extra="plot", needed_for="plots"),
    ):
        raise KeyError("inner")


def test_every_extra_that_is_named_is_one_of_the_package() -> None:
    there = re.search(
        r"^\[project\.optional-dependencies\]$(.*?)^\[",
        (REPOSITORY / "pyproject.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    assert there is not None
    known = set(re.findall(r"^([\w-]+) = ", there[1], re.MULTILINE))
    sources = [path.read_text() for path in (REPOSITORY / "farms_fast").rglob("*.py")]
    named = {extra for text in sources for extra in re.findall(r'extra="([^"]+)"', text)}
    assert {"pandas", "plot", "sciml"} <= named <= known
