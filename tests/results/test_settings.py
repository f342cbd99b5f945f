"""How an analysis was made: typed values, their canonical JSON, and what tells runs apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farms_fast import FixedAspectSampling, FullMatrix, analyze
from farms_fast.results.settings import (
    COMPARABILITY_FIELDS,
    RUN_KEY_FIELDS,
    AnalysisSettings,
    OtherSampling,
    declared_sampling,
)
from farms_fast.spectra.windows import WindowGrid
from tests.support.records import SETTINGS

EXAMPLE = replace(
    SETTINGS,
    base="größe",
    include=("a", "b*"),
    sampling=FixedAspectSampling(rows=100, q=0.1, per_dim=9, compat="farms"),
    xmin="peak",
    bins=50,
)
TEXT = (
    '{"base":"gr\\u00f6\\u00dfe","bins":50,"bootstrap":100,"device":"cpu","dtype":"float64",'
    '"exclude":[],"farms_fast":"0.1","include":["a","b*"],"key":null,"layout":"auto",'
    '"numpy":"2.4","sampling":'
    '{"compat":"farms","kind":"fixed_aspect","per_dim":9,"q":0.1,"rows":100},"solver":"auto",'
    '"source":"model.safetensors","torch":"2.13","xmin":"peak","xmin_pos":2.0}'
)
KEY = (
    '{"base":"gr\\u00f6\\u00dfe","bins":50,"bootstrap":100,"dtype":"float64","exclude":[],'
    '"farms_fast":"0.1","include":["a","b*"],"key":null,"layout":"auto",'
    '"sampling":{"compat":"farms","kind":'
    '"fixed_aspect","per_dim":9,"q":0.1,"rows":100},"solver":"auto","source":"model.safetensors",'
    '"xmin":"peak","xmin_pos":2.0}'
)


def any_settings() -> st.SearchStrategy[AnalysisSettings]:
    text = st.text(st.characters())
    texts = st.lists(text, max_size=3).map(tuple)
    samplings = (
        st.builds(
            FixedAspectSampling,
            rows=st.integers(1, 10**6),
            q=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
            per_dim=st.integers(1, 10**6),
            compat=st.sampled_from([None, "farms"]),
        )
        | st.just(FullMatrix())
        | st.builds(OtherSampling, text)
    )
    return st.builds(
        AnalysisSettings,
        source=text,
        base=st.none() | text,
        key=st.none() | text,
        layout=st.sampled_from(["auto", "torch", "channels_last"]),
        include=texts,
        exclude=texts,
        sampling=samplings,
        xmin=st.sampled_from(["median", "ks", "peak"]),
        xmin_pos=st.floats(allow_nan=False, allow_infinity=False),
        bins=st.integers(0, 2**20),
        bootstrap=st.integers(0, 10**5),
        dtype=st.sampled_from(["float64", "float32"]),
        **{name: text for name in ("device", "solver", "farms_fast", "torch", "numpy")},
    )


@given(any_settings())
def test_round_trip(settings: AnalysisSettings) -> None:
    text = settings.to_json()
    text.encode("ascii")
    assert AnalysisSettings.from_json(text) == settings
    assert AnalysisSettings.from_json(text).to_json() == text


def test_canonical_json_and_key_are_pinned() -> None:
    assert EXAMPLE.to_json() == TEXT
    assert EXAMPLE.run_key == KEY
    assert replace(EXAMPLE, sampling=FullMatrix()).to_plain()["sampling"] == {"kind": "full_matrix"}


def test_equal_settings_have_equal_text() -> None:
    sampling = FixedAspectSampling(rows=np.int64(100), q=1, per_dim=9)
    same = replace(EXAMPLE, sampling=sampling)
    assert same.to_json() == replace(same, sampling=FixedAspectSampling(100, 1.0, 9)).to_json()


@pytest.mark.parametrize("kind", [FixedAspectSampling, FullMatrix, AnalysisSettings])
def test_a_class_of_another_name_changes_nothing(kind: type) -> None:
    settings = [EXAMPLE, replace(EXAMPLE, sampling=FullMatrix())]
    before = [(one.run_key, one.to_json()) for one in settings]
    names = {name: getattr(kind, name) for name in ("__name__", "__qualname__", "__module__")}
    try:
        for name in names:
            setattr(kind, name, "Renamed")
        after = [(one.run_key, one.to_json()) for one in settings]
    finally:
        for name, value in names.items():
            setattr(kind, name, value)
    assert after == before


def test_what_makes_runs_the_same_and_alphas_comparable() -> None:
    others = {
        "source": "other",
        "base": None,
        "key": "model",
        "include": (),
        "exclude": ("c",),
        "layout": "torch",
        "sampling": FullMatrix(),
        "xmin": "ks",
        "xmin_pos": 3.0,
        "bins": 7,
        "bootstrap": 7,
        "dtype": "float32",
        "device": "cuda",
        "solver": "lapack",
        "farms_fast": "9",
        "torch": "9",
        "numpy": "9",
    }
    assert list(others) == [field.name for field in fields(AnalysisSettings)]
    changed = {name: replace(EXAMPLE, **{name: value}) for name, value in others.items()}
    other_runs = [name for name, one in changed.items() if one.run_key != EXAMPLE.run_key]
    assert tuple(other_runs) == RUN_KEY_FIELDS
    incomparable = [name for name, one in changed.items() if not EXAMPLE.is_comparable_with(one)]
    assert tuple(incomparable) == COMPARABILITY_FIELDS


def changed_json(change: Callable[[dict[str, Any]], object]) -> str:
    plain = EXAMPLE.to_plain()
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(more=1), r"^settings: unknown field 'more', expected source, base, "),
        (lambda s: s.pop("dtype"), r"^settings: no field 'dtype', expected source, base, "),
        (lambda s: s.update(bins="50"), r"^settings: bins: expected an integer .*, got '50'$"),
        (lambda s: s.update(bins=True), r"^settings: bins: expected an integer .*, got True$"),
        (lambda s: s.update(bootstrap=-1), r"^settings: bootstrap: expected .*, got -1$"),
        (lambda s: s.update(include="a"), r"^settings: include: expected a list .*, got 'a'$"),
        (lambda s: s.update(exclude=[1]), r"^settings: exclude: expected a list of texts"),
        (lambda s: s.update(source=None), r"^settings: source: expected text, got None$"),
        (lambda s: s.update(xmin="mode"), r"^settings: xmin: expected median, ks or peak, got 'mo"),
        (lambda s: s.update(xmin=["ks"]), r"^settings: xmin: expected median, ks or peak, got \["),
        (
            lambda s: s.update(xmin_pos=math.nan),
            r"^settings: xmin_pos: .* finite float, got nan$",
        ),
        (
            lambda s: s.update(layout="last"),
            r"^settings: layout: expected auto, torch, channels_last",
        ),
        (lambda s: s.update(dtype="float16"), r"^settings: dtype: expected float64 or float32, "),
        (lambda s: s.update(sampling=3), r"^settings: sampling: expected an object .*, got 3$"),
        (
            lambda s: s.update(sampling={"kind": "mine"}),
            r"^settings: sampling: .* kind of fixed_aspect, full_matrix, other, got {'kind': 'mi",
        ),
        (
            lambda s: s["sampling"].pop("q"),
            r"^settings: sampling: no field 'q', expected rows, q, per_dim, compat$",
        ),
        (
            lambda s: s["sampling"].update(rows=0),
            r"^settings: sampling: rows: expected a positive integer, got 0$",
        ),
    ],
)
def test_other_values_are_refused(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnalysisSettings.from_json(changed_json(change))


def test_settings_of_before_there_was_a_layout_are_read() -> None:
    settings = AnalysisSettings.from_json(changed_json(lambda s: s.pop("layout")))
    assert settings == replace(EXAMPLE, layout="auto")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON"), ("[]", "expected an object")]
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^settings: {message}"):
        AnalysisSettings.from_json(text)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="xmin_pos: expected a finite float, got nan"):
        replace(EXAMPLE, xmin_pos=math.nan)


@dataclass(frozen=True)
class Corner:
    """A sampling that is the caller's own."""

    identity: object = "the upper left corner"

    def grid(self, rows: int, columns: int) -> WindowGrid:
        return FixedAspectSampling(rows=8, per_dim=1).grid(rows, columns)


def test_a_sampling_of_ones_own(tmp_path: Path) -> None:
    weights = {"fc.weight": torch.eye(16)}
    settings = analyze(weights, Corner(), device="cpu", store=tmp_path / "run.sqlite").settings
    assert settings is not None
    assert settings.sampling == OtherSampling("the upper left corner")
    # Without an identity there is an analysis, but nothing that a store could know it by.
    settings = analyze(weights, Corner(3), device="cpu").settings
    assert settings is not None
    assert settings.sampling == OtherSampling("")
    with pytest.raises(ValueError, match=r"^sampling: a store .* an `identity`"):
        analyze(weights, Corner(3), device="cpu", store=tmp_path / "run.sqlite")


def test_a_sampling_that_is_derived_is_another() -> None:
    class Mine(FixedAspectSampling):
        pass

    assert declared_sampling(Mine()) == OtherSampling("")
