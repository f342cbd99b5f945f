"""Records made up for tests: every value that a file has to keep, and none that was computed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from farms_fast import Analysis
from farms_fast.results.record import INT_FIELDS, SCALAR_FIELDS, TEXT_FIELDS, LayerRecord
from farms_fast.results.store import ResultsStore


def made_up(index: int, weights: int = 0, windows: int = 6, k: int = 64) -> LayerRecord:
    """A whole record that depends on nothing but its arguments."""
    generator = np.random.default_rng((index, weights))
    spectra = np.sort(generator.pareto(2.0, (windows, k)), axis=1)
    return LayerRecord(
        name=f"layer.{index}",
        kind="linear",
        shape=(1, k, k),
        status="ok",
        windows=windows,
        window_rows=k,
        window_cols=k,
        alpha=float(generator.uniform(2, 4)),
        xmin=float(spectra.min()),
        matrix_rank=windows * k,
        num_evals=spectra.size,
        window_alphas=generator.uniform(2, 4, windows),
        window_evals=spectra,
    )


def assert_same(found: LayerRecord, expected: LayerRecord) -> None:
    """Equal to the last bit and of equal types; any NaN is NaN."""
    for field in dataclasses.fields(LayerRecord):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert type(a) is type(b), field.name
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert a.tobytes() == b.tobytes(), field.name
        elif isinstance(a, float) and math.isnan(a):
            assert math.isnan(b), field.name
        elif isinstance(a, float):
            assert a.hex() == b.hex(), field.name
        else:
            assert a == b, field.name


def _scalar(name: str) -> st.SearchStrategy:
    natural = st.integers(0, 2**63 - 1)
    if name == "shape":
        return st.tuples(natural, natural, natural)
    if name in TEXT_FIELDS:
        # All of Unicode, lone surrogates and NUL included.
        return st.text(st.characters())
    if name in INT_FIELDS:
        return natural
    return natural | st.just(math.nan) if name == "matrix_rank" else st.floats()


def any_array(dims: int) -> st.SearchStrategy[np.ndarray]:
    """float64 arrays of any bit patterns, ascending or not, empty ones too."""
    shapes = arrays.array_shapes(min_dims=dims, max_dims=dims, min_side=0, max_side=7)
    patterns = arrays.arrays(np.uint64, shapes).map(lambda bits: bits.view(np.float64))
    return patterns | arrays.arrays(np.float64, shapes, elements=st.floats())


def any_record() -> st.SearchStrategy[LayerRecord]:
    """Records with any value that their fields can have."""
    return st.builds(
        LayerRecord,
        **{name: _scalar(name) for name in SCALAR_FIELDS},
        window_alphas=any_array(1),
        window_evals=any_array(2),
    )


def stored(store: ResultsStore, run: int | None = None) -> Analysis:
    return Analysis(*store.read(run))
