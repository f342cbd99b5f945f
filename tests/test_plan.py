"""The plan of batches: nothing lost, nothing mixed, nothing above the budget but what must be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.engine import plan as planning
from farms_fast.engine.plan import Batch, LayerWindows, Plan, plan
from farms_fast.layers import LayerSpec, TensorHeader, layers_from_headers

no_deadline = settings(deadline=None)
DTYPES = (torch.float32, torch.float16, torch.float64, torch.complex64)


def no_stack(*tensors: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a plan reads no weight")


def spec(
    name: str,
    rows: int,
    columns: int,
    entries: int = 1,
    dtype: torch.dtype = torch.float32,
    kind: str = "linear",
) -> LayerSpec:
    return LayerSpec(name, kind, (name,), (entries, rows, columns), dtype, no_stack)


def names(planned: Plan) -> list[list[str]]:
    return [[layer.spec.name for layer in batch.layers] for batch in planned.batches]


def bytes_of(layer: LayerWindows) -> int:
    entries, rows, columns = layer.spec.shape
    numbers = entries * rows * columns * (2 if stored_as_two_reals(layer.spec) else 1)
    return numbers * torch.empty(0, dtype=layer.spec.dtype).element_size()


def stored_as_two_reals(layer: LayerSpec) -> bool:
    return layer.kind == "spectral" and not layer.dtype.is_complex


def eigenvalues_of(layer: LayerWindows) -> int:
    return layer.spec.shape[0] * layer.grid.count * min(layer.grid.rows, layer.grid.columns)


sides = st.sampled_from([2, 3, 8, 20]) | st.integers(1, 60)
kinds = st.sampled_from(["linear", "conv2d", "spectral"])
layer_lists = st.lists(
    st.tuples(sides, sides, st.integers(1, 4), st.sampled_from(DTYPES), kinds), max_size=12
).map(lambda shapes: [spec(f"layer{i}", *shape) for i, shape in enumerate(shapes)])
samplings = st.sampled_from(
    [
        FullMatrix(),
        FixedAspectSampling(rows=8, per_dim=3),
        FixedAspectSampling(rows=20, q=4.0, per_dim=1),
        FixedAspectSampling(rows=5, q=0.5, per_dim=2, compat="farms"),
    ]
)
budgets = st.none() | st.integers(0, 200_000)


@no_deadline
@given(specs=layer_lists, sampling=samplings, memory=budgets)
def test_every_layer_exactly_once(
    specs: list[LayerSpec], sampling: FixedAspectSampling | FullMatrix, memory: int | None
) -> None:
    planned = plan(specs, sampling, memory)
    found = [layer for batch in planned.batches for layer in batch.layers]
    assert sorted([x.spec.name for x in found] + [x.name for x in planned.skipped]) == sorted(
        x.name for x in specs
    )
    for layer in found:
        assert layer.spec is specs[layer.index]
        expected = sampling.grid(*layer.spec.shape[1:])
        assert layer.grid.table().tolist() == expected.table().tolist()
        assert layer.grid.count > 0
        assert layer.windows == layer.spec.shape[0] * expected.count
        assert layer.weight_bytes == bytes_of(layer)
    for skipped in planned.skipped:
        shape = specs[int(skipped.name.removeprefix("layer"))].shape
        assert skipped.shape == shape
        assert sampling.grid(*shape[1:]).count == 0


@no_deadline
@given(specs=layer_lists, sampling=samplings, memory=budgets)
def test_batches(
    specs: list[LayerSpec], sampling: FixedAspectSampling | FullMatrix, memory: int | None
) -> None:
    batches = plan(specs, sampling, memory).batches
    limit = math.inf if memory is None else memory // 4
    alike: dict[tuple[int, torch.dtype, bool], list[Batch]] = {}
    for batch in batches:
        assert len(batch.layers) > 0
        assert {layer.grid.order for layer in batch.layers} == {batch.order}
        # One dtype of the stacks: two reals become complex, so they do not meet plain reals.
        (stored,) = {(x.spec.dtype, stored_as_two_reals(x.spec)) for x in batch.layers}
        assert len(batch.layers) == 1 or sum(map(bytes_of, batch.layers)) <= limit
        assert batch.windows == sum(layer.windows for layer in batch.layers)
        alike.setdefault((batch.order, *stored), []).append(batch)
    for parts in alike.values():
        # In the model's order throughout, and no batch is closed while the next layer still fits.
        indices = [layer.index for part in parts for layer in part.layers]
        assert indices == sorted(indices)
        for part, following in itertools.pairwise(parts):
            assert sum(map(bytes_of, part.layers)) + bytes_of(following.layers[0]) > limit
    firsts = [batch.layers[0].index for batch in batches]
    assert firsts == sorted(firsts)


@no_deadline
@given(specs=layer_lists, sampling=samplings, memory=budgets)
def test_the_plan_is_a_function_of_shapes(
    specs: list[LayerSpec], sampling: FixedAspectSampling | FullMatrix, memory: int | None
) -> None:
    before = list(specs)
    first, second = plan(specs, sampling, memory), plan(tuple(specs), sampling, memory)
    assert names(first) == names(second)
    assert first.skipped == second.skipped
    assert specs == before


def test_equal_orders_meet_across_layers() -> None:
    specs = [spec("a", 8, 4), spec("b", 6, 6), spec("c", 4, 9), spec("d", 6, 7), spec("e", 4, 4, 5)]
    planned = plan(specs, FullMatrix())
    assert [batch.order for batch in planned.batches] == [4, 6]
    assert names(planned) == [["a", "c", "e"], ["b", "d"]]


def test_dtypes_do_not_meet() -> None:
    specs = [spec(str(i), 4, 4, 1, DTYPES[i % 2]) for i in range(4)]
    assert names(plan(specs, FullMatrix())) == [["0", "2"], ["1", "3"]]


def test_complex_weights_stored_as_reals_do_not_meet_reals() -> None:
    specs = [spec("a", 4, 4), spec("w1", 4, 4, kind="spectral"), spec("b", 4, 4)]
    specs.append(spec("w2", 4, 4, kind="spectral"))
    planned = plan(specs, FullMatrix())
    assert names(planned) == [["a", "b"], ["w1", "w2"]]
    assert [batch.layers[0].weight_bytes for batch in planned.batches] == [64, 128]


def test_batches_come_in_the_order_of_their_first_layers() -> None:
    # Order 4 splits after c, and its second half starts behind b.
    specs = [spec("a", 4, 4), spec("b", 6, 6), spec("c", 4, 4), spec("d", 4, 4)]
    assert names(plan(specs, FullMatrix(), memory=4 * 128)) == [["a", "c"], ["b"], ["d"]]


def test_a_quarter_of_the_budget_is_for_weights() -> None:
    specs = [spec(str(i), 8, 8) for i in range(6)]  # 256 bytes each
    for fitting in (1, 2, 3, 4, 6):
        sizes = [len(batch) for batch in names(plan(specs, FullMatrix(), 4 * 256 * fitting))]
        assert sizes == [fitting] * (6 // fitting) + [6 % fitting] * (6 % fitting > 0)
    assert names(plan(specs, FullMatrix(), 4 * 512 - 1)) == [[str(i)] for i in range(6)]


def test_a_layer_above_the_budget_is_alone() -> None:
    specs = [spec("a", 4, 4), spec("big", 4, 4000), spec("b", 4, 4), spec("c", 4, 4)]
    assert names(plan(specs, FullMatrix(), 4 * 128)) == [["a"], ["big"], ["b", "c"]]
    assert names(plan(specs[1:2] * 2, FullMatrix(), 0)) == [["big"], ["big"]]


def test_default_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec(str(i), 8, 8) for i in range(5)]
    assert names(plan(specs, FullMatrix())) == [["0", "1", "2", "3", "4"]]
    monkeypatch.setattr(planning, "DEFAULT_WEIGHT_BYTES", 512)
    assert names(plan(specs, FullMatrix())) == [["0", "1"], ["2", "3"], ["4"]]


def test_eigenvalues_of_a_batch_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = FixedAspectSampling(rows=8, per_dim=15)
    specs = [spec(str(i), 22, 22) for i in range(5)] + [spec("experts", 22, 22, 3)]
    monkeypatch.setattr(planning, "MAX_EIGENVALUES", 2 * 225 * 8)
    planned = plan(specs, sampling)
    assert names(planned) == [["0", "1"], ["2", "3"], ["4"], ["experts"]]
    for batch in planned.batches[:-1]:
        assert sum(map(eigenvalues_of, batch.layers)) <= 2 * 225 * 8


def test_llama_stays_within_memory() -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    specs = [
        spec(f"{i}.{j}", *s, 1, torch.float16) for i in range(32) for j, s in enumerate(shapes)
    ]
    planned = plan(specs, FixedAspectSampling())
    assert sum(batch.windows for batch in planned.batches) == 224 * 225
    for batch in planned.batches:
        assert sum(map(bytes_of, batch.layers)) <= 4 * 2**30
        assert sum(map(eigenvalues_of, batch.layers)) <= 2**24


def test_layers_without_windows_are_listed() -> None:
    sampling = FixedAspectSampling(q=5.0)
    planned = plan([spec("thin", 9, 4), spec("wide", 4, 20)], sampling)
    assert names(planned) == [["wide"]]
    assert planned.batches[0].layers[0].index == 1
    (skipped,) = planned.skipped
    assert (skipped.name, skipped.shape) == ("thin", (1, 9, 4))
    assert skipped.reason == f"no window of {sampling} fits 9 x 4"


def test_nothing_to_plan() -> None:
    assert plan([], FixedAspectSampling()) == Plan((), ())


def test_plans_a_checkpoint_from_its_headers() -> None:
    headers = [
        TensorHeader("conv.weight", (16, 8, 3, 3), torch.bfloat16),
        TensorHeader("fc.weight", (12, 8), torch.bfloat16),
        TensorHeader("fc.bias", (12,), torch.bfloat16),
    ]
    specs, _ = layers_from_headers(headers)
    planned = plan(specs, FixedAspectSampling(rows=8, per_dim=2))
    assert names(planned) == [["conv", "fc"]]
    assert planned.batches[0].windows == 9 * 2 + 2
