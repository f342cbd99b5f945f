"""Alphas of a live model: equal to those of `analyze`, whatever happens to the model meanwhile."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from farms_fast import FixedAspectSampling, FullMatrix, LayerRecord, analyze
from farms_fast.engine.solve import SolveTask
from farms_fast.live import LayerAlpha, LiveAnalysis, passes
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.power_law import PowerLawFits
from farms_fast.spectra.windows import Sampling
from tests.support.purity import left_as_it_was

SAMPLING = FixedAspectSampling(rows=12, per_dim=3)


def network(device: torch.device | str = "cpu", seed: int = 0) -> Any:
    """Layers of several orders, some of them shared by layers, with norms between them."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 20, 3, groups=2),
        nn.Conv1d(24, 16, 1),
        nn.Linear(40, 24),
        nn.LayerNorm(24),
        nn.Linear(24, 64),
        nn.Embedding(30, 8),
    )
    return made.to(device)


def expected(model: nn.Module, *given: Any, **options: Any) -> list[LayerRecord]:
    device = next(model.parameters()).device
    return analyze(model, *given, bootstrap=0, device=device, progress=False, **options).layers


def assert_equal(found: Sequence[LayerAlpha], records: Sequence[LayerRecord]) -> None:
    assert [layer.name for layer in found] == [record.name for record in records]
    for layer, record in zip(found, records, strict=True):
        assert (layer.status, layer.message) == (record.status, record.message), layer.name
        for value, wanted in zip(
            (layer.alpha, layer.D, layer.xmin), (record.alpha, record.D, record.xmin), strict=True
        ):
            assert value == wanted or (math.isnan(value) and math.isnan(wanted)), layer.name
        assert layer.n_tail == record.num_pl_spikes, layer.name
        assert layer.n_evals == record.num_evals, layer.name


def assert_as_analyze(model: nn.Module, *given: Any, **options: Any) -> list[LayerAlpha]:
    live = LiveAnalysis(model, *given, **options)
    records = expected(model, *given, **options)
    found = live()
    assert_equal(found, records)
    assert_equal(live.start(overlap=True).result(), records)
    return found


@pytest.mark.parametrize("xmin", ["median", "ks", "peak"])
@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, FullMatrix(), FixedAspectSampling(rows=12, per_dim=3, compat="farms")],
    ids=str,
)
def test_equals_analyze_to_the_bit(device: torch.device, sampling: Sampling, xmin: str) -> None:
    model = network(device)
    found = assert_as_analyze(model, sampling, xmin)
    assert len(found) == 5
    assert all(layer.status == "ok" for layer in found)


@pytest.mark.parametrize(
    ("options"),
    [
        {"xmin": "median", "xmin_pos": 3},
        {"xmin": "peak", "bins": 7},
        {"dtype": torch.float32},
        {"include": ["0", "7"]},
        {"exclude": "4"},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_analyze(
    device: torch.device, options: dict[str, Any]
) -> None:
    options = dict(options)
    given = (SAMPLING, options.pop("xmin")) if "xmin" in options else (SAMPLING,)
    assert_as_analyze(network(device), *given, **options)


def test_specs_and_skipped_are_those_of_analyze() -> None:
    model = nn.ModuleDict({"none": nn.Linear(2, 9), "some": nn.Linear(12, 12)})

    class Wide:
        def grid(self, rows: int, columns: int) -> Any:
            grid = FixedAspectSampling(rows=4, per_dim=2)
            return grid.grid(rows, columns) if columns > 4 else FixedAspectSampling(q=50).grid(1, 1)

    # One object, for its name is in the reason.
    wide = Wide()
    live = LiveAnalysis(model, wide)
    whole = analyze(model, wide, bootstrap=0, progress=False)
    assert [spec.name for spec in live.specs] == ["some"]
    assert live.skipped == whole.skipped
    assert_equal(live(), whole.layers)
    assert set(live.specs[0].tensors) <= set(model.state_dict())


def test_weights_are_read_anew_at_each_start(device: torch.device) -> None:
    model = network(device)
    live = LiveAnalysis(model, SAMPLING)
    first = live()
    with torch.no_grad():
        model[4].weight.mul_(torch.linspace(0.1, 3, 40, device=device))
    second = live()
    assert [a.alpha != b.alpha for a, b in zip(first, second, strict=True)] == [
        False, False, False, True, False,
    ]  # fmt: skip
    assert_equal(second, expected(model, SAMPLING))
    # Another tensor in the same place, of other strides.
    model[6].weight.data = torch.randn(24, 64, device=device).T
    assert_equal(live(), expected(model, SAMPLING))
    # Another parameter object.
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    assert_equal(live(), expected(model, SAMPLING))
    assert_equal(live.start(overlap=True).result(), expected(model, SAMPLING))


def test_a_start_holds_on_to_the_weights_as_they_were(device: torch.device) -> None:
    model = network(device)
    live = LiveAnalysis(model, SAMPLING)
    before = expected(model, SAMPLING)
    for overlap in (False, True, True):
        pending = live.start(overlap=overlap)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter))
        after = expected(model, SAMPLING)
        assert_equal(pending.result(), before)
        assert pending.ready()
        assert_equal(pending.result(), before)
        before = after


def test_two_starts_may_be_under_way(device: torch.device) -> None:
    model = network(device)
    live = LiveAnalysis(model, SAMPLING)
    pending = []
    wanted = []
    for overlap in (True, True, False, True):
        wanted.append(expected(model, SAMPLING))
        pending.append(live.start(overlap=overlap))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
    for one, records in reversed(list(zip(pending, wanted, strict=True))):
        assert_equal(one.result(), records)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_does_not_touch_the_others(
    device: torch.device, value: float
) -> None:
    model = network(device)
    live = LiveAnalysis(model, SAMPLING)
    good = live()
    with torch.no_grad():
        model[4].weight[3, 30] = value
    bad = live()
    assert [layer.status for layer in bad] == ["ok", "ok", "ok", "nonfinite", "ok"]
    assert bad[3].message.startswith("NaN, infinity or overflow in ")
    assert bad[3].n_evals == bad[3].n_tail == 0
    assert [x for n, x in enumerate(bad) if n != 3] == [x for n, x in enumerate(good) if n != 3]
    assert_equal(bad, expected(model, SAMPLING))


def test_failed_fits_are_told_as_analyze_tells_them(device: torch.device) -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)]).to(device)
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.copy_(torch.eye(8))
    found = assert_as_analyze(model, FullMatrix())
    assert [layer.status for layer in found] == ["too_few", "degenerate_tail", "ok"]


@pytest.mark.parametrize("xmin", ["median", "ks", "peak"])
def test_zero_and_equal_but_for_rounding(device: torch.device, xmin: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(16, 64)
    model = nn.ModuleList([nn.Linear(64, 48, bias=False) for _ in range(4)])
    with torch.no_grad():
        model[0].weight.copy_(rows.repeat(3, 1))
        model[1].weight.copy_(3 * rows.repeat(3, 1)[torch.randperm(48)])
        nn.init.orthogonal_(model[2].weight)
        nn.init.orthogonal_(model[3].weight)
    model[3].to(torch.bfloat16)
    model.to(device)
    assert_as_analyze(model, FixedAspectSampling(rows=24, per_dim=2), xmin)
    found = assert_as_analyze(model, FullMatrix(), xmin)
    assert [layer.status for layer in found] == ["ok", "ok", "degenerate_tail", "degenerate_tail"]
    assert [layer.zeros for layer in found] == [32, 32, 0, 0]
    assert found[0].n_tail == found[1].n_tail <= 16
    # Three times a float32 is rounded.
    assert found[0].alpha == pytest.approx(found[1].alpha, rel=1e-6)


def test_few_eigenvalues_make_no_alpha(device: torch.device) -> None:
    model = network(device)
    counts = {layer.name: layer.n_evals for layer in LiveAnalysis(model, FullMatrix())()}
    assert counts == {"0": 27, "2": 144, "3": 16, "4": 24, "6": 24}
    found = LiveAnalysis(model, FullMatrix(), min_evals=24)()
    assert [layer.status for layer in found] == ["ok", "ok", "too_few", "ok", "ok"]
    assert found[2].n_evals == 16
    assert math.isnan(found[2].alpha)
    assert found[2].message == "16 eigenvalues, fewer than min_evals, which is 24"


def test_eigenvalues_below_the_threshold_are_dropped(device: torch.device) -> None:
    model = nn.Linear(64, 32, bias=False).to(device)
    whole = analyze(model, FullMatrix(), bootstrap=0, device=device, progress=False).layers[0]
    evals = torch.from_numpy(whole.evals)
    threshold = float(evals[10])
    (found,) = LiveAnalysis(model, FullMatrix(), evals_threshold=threshold)()
    assert found.n_evals == 22
    # The median rule: half of those that are left.
    assert found.n_tail == 11
    assert found.xmin == float(evals[21])
    (found,) = LiveAnalysis(model, FullMatrix(), evals_threshold=threshold, min_evals=23)()
    assert found.status == "too_few"
    assert found.message.startswith("22 eigenvalues of at least ")


# torch.compile imports parts of torch that warn of themselves.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_wrapped_models_have_the_names_of_their_state_dict(device: torch.device) -> None:
    model = network(device)
    plain = LiveAnalysis(model, SAMPLING)()
    compiled = torch.compile(model)
    live = LiveAnalysis(compiled, SAMPLING)
    assert [layer.name for layer in live.specs] == ["_orig_mod." + x.name for x in plain]
    assert all(set(s.tensors) <= set(compiled.state_dict()) for s in live.specs)
    assert [layer.alpha for layer in live()] == [layer.alpha for layer in plain]

    class Wrapper(nn.Module):  # as DistributedDataParallel names what it wraps
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    live = LiveAnalysis(Wrapper(), SAMPLING)
    assert [layer.name for layer in live.specs] == ["module." + layer.name for layer in plain]
    assert [layer.alpha for layer in live()] == [layer.alpha for layer in plain]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    assert_as_analyze(network(device).to(dtype), SAMPLING)


def test_layers_of_several_dtypes(device: torch.device) -> None:
    model = network(device)
    model[4].half()
    model[6].bfloat16()
    assert_as_analyze(model, SAMPLING)


def test_parametrised_shared_and_strided_weights(device: torch.device) -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.utils.parametrizations.weight_norm(nn.Linear(20, 16)),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(20, 16)),
            "first": nn.Linear(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "expanded": nn.Linear(16, 16),
        }
    ).to(device)
    model["again"] = model["first"]
    model["expanded"].weight = nn.Parameter(torch.randn(4, 64, 64, device=device)[1, ::4, 3::4])
    live = LiveAnalysis(model, SAMPLING)
    assert [layer.name for layer in live()].count("first") == 1
    for _ in range(3):
        assert_equal(live(), expected(model, SAMPLING))
        assert_equal(live.start(overlap=True).result(), expected(model, SAMPLING))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter))


def test_a_layer_that_cannot_be_read_is_reported_and_comes_back(device: torch.device) -> None:
    class Fragile(nn.Module):
        broken = False

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise KeyError("no such weight")
            return 2 * weight

    model = network(device)
    fragile = Fragile()
    nn.utils.parametrize.register_parametrization(model[4], "weight", fragile)
    live = LiveAnalysis(model, SAMPLING)
    good = live()
    fragile.broken = True
    for overlap in (False, True):
        bad = live.start(overlap=overlap).result()
        assert [layer.status for layer in bad] == ["ok", "ok", "ok", "error", "ok"]
        assert bad[3].message == "KeyError: 'no such weight'"
        assert [a for a in bad if a.name != "4"] == [a for a in good if a.name != "4"]
    fragile.broken = False
    assert live() == good


def test_a_weight_that_was_not_planned_for_is_that_layers_error(device: torch.device) -> None:
    class Changing(nn.Module):
        how: Any = staticmethod(torch.clone)

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return self.how(weight)

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return weight

    model = network(device)
    changing = Changing()
    nn.utils.parametrize.register_parametrization(model[4], "weight", changing)
    live = LiveAnalysis(model, SAMPLING)
    good = live()
    for how, said in (
        (lambda w: w[1:], r"expected a stack of shape \(1, 24, 40\).*got shape \(1, 23, 40\)"),
        (torch.Tensor.half, "float32, on .*, got .*float16"),
    ):
        Changing.how = staticmethod(how)
        bad = live()
        assert [layer.status for layer in bad] == ["ok", "ok", "ok", "error", "ok"]
        assert re.search(said, bad[3].message)
        assert [a for a in bad if a.name != "4"] == [a for a in good if a.name != "4"]


def test_a_model_without_layers() -> None:
    live = LiveAnalysis(nn.LayerNorm(4))
    assert live() == []
    assert [skip.name for skip in live.skipped] == ["weight", "bias"]


def grown(model: nn.Module) -> None:
    model[4].weight = nn.Parameter(torch.zeros(24, 41))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (grown, r"'4.weight' of shape \(24, 41\), which was \(24, 40\)"),
        (lambda m: m.half(), "'0.weight' of dtype torch.float16, which was torch.float32"),
        (lambda m: m.to("meta"), "'0.weight' of device meta, which was cpu"),
        (lambda m: m.append(nn.Linear(2, 2)), "'8.weight', which it had not"),
        (lambda m: m[4].register_parameter("bias", None), "none of the name '4.bias'"),
        (
            lambda m: nn.utils.parametrizations.weight_norm(m[6]),
            "none of the name '6.weight'",
        ),
    ],
)
def test_a_model_that_has_changed_is_refused(change: Any, said: str) -> None:
    model = network()
    live = LiveAnalysis(model, SAMPLING)
    live()
    change(model)
    with pytest.raises(ValueError, match=f"^model: expected the parameters .*got {said}"):
        live.start()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"model": {}}, TypeError, "model: expected a torch.nn.Module, got dict"),
        ({"sampling": 3}, TypeError, "sampling: expected"),
        ({"xmin": "mean"}, ValueError, "xmin: expected"),
        ({"xmin_pos": 1}, ValueError, "xmin_pos: expected"),
        ({"bins": 0}, ValueError, "bins: expected"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected"),
        ({"solver": "fast"}, ValueError, "solver: expected"),
        ({"memory": 0}, ValueError, "memory: expected"),
        ({"memory": 1.5}, TypeError, "memory: expected"),
        ({"memory": 1000}, ValueError, "memory: expected at least"),
        ({"include": "x"}, ValueError, "include: expected"),
        ({"exclude": 3}, TypeError, "exclude: expected"),
        ({"layout": "last"}, ValueError, "layout: expected"),
        ({"min_evals": -1}, ValueError, "min_evals: expected"),
        ({"min_evals": 2.0}, TypeError, "min_evals: expected"),
        ({"evals_threshold": -1.0}, ValueError, "evals_threshold: expected"),
        ({"evals_threshold": math.nan}, ValueError, "evals_threshold: expected"),
        ({"evals_threshold": "0"}, TypeError, "evals_threshold: expected"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"model": network(), **options}
    with pytest.raises(error, match=f"^{said}"):
        LiveAnalysis(**given)


def test_weights_without_a_device_are_refused() -> None:
    said = r"model: '0\.weight' .*meta device"
    with pytest.raises(ValueError, match=said):
        LiveAnalysis(network("meta"))


def test_nothing_of_the_caller_changes(device: torch.device) -> None:
    model = network(device)
    model[4] = nn.utils.parametrizations.spectral_norm(model[4])
    state = list(model.state_dict().values())
    random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    live = LiveAnalysis(model, SAMPLING)
    with left_as_it_was(*state):
        live()
        live.start(overlap=True).result()
    assert model.training
    if random is not None:
        assert torch.equal(torch.cuda.get_rng_state(device), random)
        assert torch.cuda.current_stream(device) == stream


class Rotated(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ torch.linalg.qr(torch.ones_like(weight).triu()).Q


def test_works_within_the_callers_contexts(device: torch.device) -> None:
    model = network(device)
    live = LiveAnalysis(model, SAMPLING)
    wanted = live()
    with torch.inference_mode():
        assert live.start(overlap=True).result() == wanted
    assert live.start(overlap=True).result() == wanted
    rotated = nn.Linear(24, 24).to(device)
    nn.utils.parametrize.register_parametrization(rotated, "weight", Rotated())
    once = LiveAnalysis(rotated, SAMPLING)()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert LiveAnalysis(model, SAMPLING).start(overlap=True).result() == wanted
        assert LiveAnalysis(rotated, SAMPLING)() == once
    with torch.device("meta"):
        assert LiveAnalysis(model, SAMPLING)() == wanted
    torch.use_deterministic_algorithms(True)
    try:
        assert live() == wanted
    finally:
        torch.use_deterministic_algorithms(False)


def least_memory(model: nn.Module, xmin: str = "median") -> int:
    """Bytes below which the model is refused."""
    least = 1
    while True:
        try:
            LiveAnalysis(model, SAMPLING, xmin, memory=least)
        except ValueError as error:  # it names what the first layer takes that does not fit
            least = next(int(word) for word in str(error).split() if word.isdigit())
        else:
            return least


@pytest.mark.parametrize("xmin", ["median", "ks"])
def test_little_memory_takes_several_passes(
    device: torch.device, xmin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(device)
    fitted: list[int] = []

    def counting(
        rule: FitRule, packed: torch.Tensor, offsets: torch.Tensor, spread: torch.Tensor
    ) -> PowerLawFits:
        fitted.append(len(offsets) - 1)
        assert len(spread) == fitted[-1]
        return fit_at(rule, packed, offsets, spread)

    fit_at = FitRule.fit_at
    least = least_memory(model, xmin)
    wanted = expected(model, SAMPLING, xmin, memory=least)
    little = LiveAnalysis(model, SAMPLING, xmin, memory=least)
    ample = LiveAnalysis(model, SAMPLING, xmin, memory=2_000_000)
    monkeypatch.setattr(FitRule, "fit_at", counting)
    assert_equal(little(), wanted)
    assert sum(fitted) == 5
    assert len(fitted) > 1
    fitted.clear()
    ample()
    assert fitted == [5]


@pytest.mark.gpu
def test_a_copy_that_does_not_fit_is_refused() -> None:
    model = network("cuda")
    least = least_memory(model)
    live = LiveAnalysis(model, SAMPLING, memory=least)
    assert_equal(live(), expected(model, SAMPLING, memory=least))
    with pytest.raises(ValueError, match=r"memory: expected at least \d+ bytes with overlap=True"):
        live.start(overlap=True)


@pytest.mark.gpu
def test_without_memory_for_a_copy_it_goes_on_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*given: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    model = network("cuda")
    live = LiveAnalysis(model, SAMPLING)
    wanted = live()
    with monkeypatch.context() as patched:
        patched.setattr(passes.Snapshot, "allocate", no_room)
        pending = live.start(overlap=True)
        with torch.no_grad():
            model[4].weight.mul_(2)
        assert pending.result() == wanted
    assert_equal(live.start(overlap=True).result(), expected(model, SAMPLING))


class LittleMemory:
    """A solver that runs out of memory beyond so many windows."""

    def __init__(self, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows = windows
        self.calls: list[int] = []
        solve = SolveTask.solve

        def limited(task: SolveTask, *given: Any) -> torch.Tensor:
            self.calls.append(len(task.table))
            if len(task.table) > self.windows:
                raise torch.OutOfMemoryError("no room")
            return solve(task, *given)

        monkeypatch.setattr(SolveTask, "solve", limited)


def test_without_memory_it_goes_on_in_smaller_parts(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)] + [nn.Linear(3, 3)]).to(device)
    sampling = FixedAspectSampling(rows=4, per_dim=2)
    live = LiveAnalysis(model, sampling)
    wanted = live()
    little = LittleMemory(8, monkeypatch)
    assert live() == wanted
    # Batches of their own, then halves; 4 windows a layer but the last.
    assert little.calls == [20, 20, 8, 12, 4, 8, 1]
    little.windows = 0
    failed = live.start(overlap=True).result()
    assert [layer.status for layer in failed] == ["error"] * 6
    assert {layer.message for layer in failed} == {"out of memory: no room"}
    little.windows = 100
    assert live() == wanted


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_start_waits_for_nothing() -> None:
    model = network("cuda")
    live = LiveAnalysis(model, SAMPLING)
    wanted = live()
    live.start(overlap=True).result()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for overlap in (False, True):
            torch.cuda._sleep(100_000_000)
            pending = live.start(overlap=overlap)
            assert not pending.ready()
            assert pending.result() == wanted
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_follows_the_callers_stream(overlap: bool) -> None:
    model = network("cuda")
    live = LiveAnalysis(model, SAMPLING)
    stream = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(20_000_000)
            for parameter in model.parameters():
                parameter.mul_(torch.rand_like(parameter))
            copy = deepcopy(model)
            pending = live.start(overlap=overlap)
            for parameter in model.parameters():
                parameter.zero_()
        torch.cuda.synchronize()
        assert_equal(pending.result(), expected(copy, SAMPLING))
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), copy.parameters(), strict=True):
                parameter.copy_(kept)
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_training_goes_on_beside_an_overlapping_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("cuda")
    live = LiveAnalysis(model, SAMPLING)
    wanted = live()

    solve = SolveTask.solve

    def slowly(*given: Any) -> torch.Tensor:
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        return solve(*given)

    monkeypatch.setattr(SolveTask, "solve", slowly)
    pending = live.start(overlap=True)
    with torch.no_grad():
        model[4].weight.zero_()
    torch.cuda.current_stream().synchronize()
    # The current stream's work was done before the analysis was.
    assert not pending.ready()
    assert pending.result() == wanted
    assert pending.ready()


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_memory_stays_within_the_budget_and_does_not_grow(overlap: bool) -> None:
    model = nn.ModuleList(
        [nn.Linear(600, 600, device="cuda") for _ in range(6)]
        + [nn.Linear(300, 500, device="cuda") for _ in range(6)]
    )
    memory = 200_000_000
    live = LiveAnalysis(model, FixedAspectSampling(rows=200, per_dim=6), memory=memory)
    live.start(overlap=overlap).result()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        live.start(overlap=overlap).result()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held <= memory
    assert torch.cuda.memory_allocated() == held


@pytest.mark.gpu
def test_layers_on_several_devices() -> None:
    model = network("cuda")
    model[2].cpu()
    model[6].cpu()
    live = LiveAnalysis(model, SAMPLING)
    wanted = {
        device: [layer for layer in expected(deepcopy(model).to(device), SAMPLING)]
        for device in ("cuda", "cpu")
    }
    on_cpu = (1, 4)
    records = [wanted["cpu" if n in on_cpu else "cuda"][n] for n in range(5)]
    for overlap in (False, True):
        found = live.start(overlap=overlap).result()
        assert [layer.name for layer in found] == [record.name for record in records]
        for layer, record in zip(found, records, strict=True):
            assert layer.alpha == pytest.approx(record.alpha, rel=1e-12)
