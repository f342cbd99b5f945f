"""Rates beside schedulers, precision, compilers, snapshots, checkpoints and other processes."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

from farms_fast import FullMatrix
from farms_fast.adapters.sciml import TBSigmoid
from farms_fast.adapters.training import LayerRates, RateTable, TempBalance
from farms_fast.live import LayerAlpha, LiveAnalysis, PendingAlphas
from tests.support.rate_models import TinyResNet, batches, linears, small, whole

ROOT = Path(__file__).parents[3]


def train(model: nn.Module, optimizer: Optimizer, epoch: int) -> None:
    for images, labels in batches(epoch):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


# Schedulers

EPOCHS = 7


def plateau(optimizer: Optimizer) -> Any:
    return schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.3)


def warm_up(optimizer: Optimizer) -> Any:
    return schedulers.SequentialLR(
        optimizer,
        [
            schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=3),
            schedulers.CosineAnnealingLR(optimizer, T_max=EPOCHS - 3),
        ],
        milestones=[3],
    )


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=EPOCHS),
    "cosine, half, above 0": lambda o: schedulers.CosineAnnealingLR(o, T_max=3, eta_min=0.01),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.3, total_steps=EPOCHS + 1),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "exponential": lambda o: schedulers.ExponentialLR(o, gamma=0.8),
    "steps": lambda o: schedulers.MultiStepLR(o, [2, 4], gamma=0.1),
    "plateau": plateau,
    "warm-up": warm_up,
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "cyclic": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=EPOCHS),
}


def advance(schedule: Any, optimizer: Optimizer, epoch: int) -> None:
    optimizer.step()
    if isinstance(schedule, schedulers.ReduceLROnPlateau):
        schedule.step(float(epoch % 2))
    else:
        schedule.step()


@pytest.mark.filterwarnings(
    "ignore:.*The epoch parameter in `scheduler.step.*"  # torch's own, inside of SequentialLR
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_base_rate_is_that_of_a_run_without_rates_per_layer(name: str) -> None:
    alone = SGD(linears(5).parameters(), lr=0.1, momentum=0.9)
    model = linears(5)
    rates = whole(model)
    optimizer = SGD(rates.param_groups(0.1), momentum=0.9)
    schedule, schedule_alone = SCHEDULES[name](optimizer), SCHEDULES[name](alone)
    for epoch in range(EPOCHS):
        assert optimizer.param_groups[0]["lr"] == alone.param_groups[0]["lr"]
        advance(schedule, optimizer, epoch)
        advance(schedule_alone, alone, epoch)
        model.load_state_dict(linears(5, seed=epoch).state_dict())
        table = rates.step(optimizer)
        base = alone.param_groups[0]["lr"]
        assert table.base_lr == base
        assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {
            "rest": base,
            **{name: base * table[name].factor for name in "123"},
        }
        assert sorted(table[name].factor for name in "123")[::2] == [0.5, 1.5]


def test_the_recursive_cosine_meets_its_closed_form() -> None:
    rates = whole(linears(5))
    optimizer = SGD(rates.param_groups(0.1))
    schedule = schedulers.CosineAnnealingLR(optimizer, T_max=50)
    for epoch in range(1, 51):
        optimizer.step()
        schedule.step()
        rates.step(optimizer)
        closed = 0.1 * (1 + math.cos(math.pi * epoch / 50)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(closed, rel=1e-9, abs=1e-12)


def test_apply_sets_rates_again_without_making_new_ones() -> None:
    model = linears(5)
    rates = whole(model)
    optimizer = SGD(rates.param_groups(0.1))
    schedule = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    factors = rates.factors_by_layer
    model.load_state_dict(linears(5, seed=3).state_dict())
    for step in range(1, 4):
        optimizer.step()
        schedule.step()
        rates.apply(optimizer)
        assert [g["lr"] for g in optimizer.param_groups[1:]] == [
            0.1 / (1 + step) * factors[name] for name in "123"
        ]
    assert rates.calls == 0
    assert rates.factors_by_layer == factors


def test_apply_finds_the_groups_of_a_restored_optimizer() -> None:
    rates = whole(linears(5))
    optimizer = SGD(rates.param_groups(0.1), momentum=0.9)
    rates.apply(optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = 0.01
    optimizer.load_state_dict(state)  # puts new groups into the place of the old ones
    rates.apply(optimizer)
    factors = [rates.factors_by_layer[name] for name in "123"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, *(0.01 * f for f in factors)]
    other = SGD(rates.param_groups(0.3))
    rates.apply(other)
    assert [g["lr"] for g in other.param_groups] == [0.3, *(0.3 * f for f in factors)]
    assert optimizer.param_groups[1]["lr"] == 0.01 * factors[0]


def test_rates_are_made_at_every_so_many_calls() -> None:
    model = linears(5)
    rates = whole(model, every=3)
    optimizer = SGD(rates.param_groups(0.1))
    seen = [rates.factors_by_layer]
    for call in range(1, 8):
        model.load_state_dict(linears(5, seed=call).state_dict())
        optimizer.param_groups[0]["lr"] = 0.1 / call
        table = rates.step(optimizer)
        assert (table.call, table.base_lr) == (call, 0.1 / call)
        assert optimizer.param_groups[1]["lr"] == 0.1 / call * table["1"].factor
        seen.append(rates.factors_by_layer)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5] != seen[6] == seen[7]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    model = linears(5)
    rates = whole(model)
    given = torch.tensor(0.1)
    optimizer = torch.optim.Adam(rates.param_groups(given, no_decay="vectors"))
    held = [group["lr"] for group in optimizer.param_groups]
    assert len({id(lr) for lr in [given, *held]}) == len(held) + 1
    optimizer.param_groups[0]["lr"].fill_(0.05)
    table = rates.step(optimizer)
    for lr, group in zip(held, optimizer.param_groups, strict=True):
        assert group["lr"] is lr
        if group["layer"] != "rest":
            assert float(lr) == pytest.approx(0.05 * table[group["layer"]].factor, rel=1e-6)
    assert float(given) == pytest.approx(0.1)


# Checkpoints


def started(seed: int = 0, **options: Any) -> tuple[Any, ...]:
    model = TinyResNet(seed)
    rates = small(model, **options)
    optimizer = SGD(rates.param_groups(0.1, weight_decay=5e-4), momentum=0.9)
    return model, rates, optimizer, schedulers.CosineAnnealingLR(optimizer, T_max=8)


def run(parts: tuple[Any, ...], epochs: range) -> list[RateTable]:
    model, rates, optimizer, schedule = parts
    tables = []
    for epoch in epochs:
        train(model, optimizer, epoch)
        schedule.step()
        tables.append(rates.step(optimizer))
    return tables


@pytest.mark.parametrize(
    "options", [{}, {"overlap": True}, {"every": 2}, {"assign": "step", "per": "block"}]
)
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(options: dict[str, Any]) -> None:
    unbroken = started(**options)
    tables = run(unbroken, range(6))
    broken = started(**options)
    before = run(broken, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in broken], file)
    file.seek(0)
    resumed = started(seed=7, **options)  # other weights, and other rates made from them
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    after = run(resumed, range(3, 6))
    assert repr(before + after) == repr(tables)  # NaN equals itself there
    for name, value in unbroken[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name
    for ours, theirs in zip(unbroken[2].param_groups, resumed[2].param_groups, strict=True):
        assert (ours["name"], ours["lr"]) == (theirs["name"], theirs["lr"])
    assert len({group["lr"] for group in resumed[2].param_groups}) > 1


def test_a_state_says_what_it_is_of() -> None:
    rates = whole(linears(5))
    rates.param_groups(0.1)
    state = rates.state_dict()
    assert state == copy.deepcopy(state)
    other = linears(5)
    other[2] = nn.Linear(8, 16)
    with pytest.raises(ValueError, match=r"another '2': \[\[1, 16, 16\]\] in .* \[\[1, 16, 8\]"):
        whole(other).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"another '5': missing in the state, \[\[1, 16, 16\]\] in"
    ):
        whole(linears(6)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another '4': .* in the state, missing in the model"):
        whole(linears(4)).load_state_dict(state)
    with pytest.raises(TypeError, match=r"state: expected what state_dict\(\) gave"):
        rates.load_state_dict({"calls": 3})

    class Other(TempBalance):
        pass

    with pytest.raises(ValueError, match="state: expected one of Other, got TempBalance"):
        Other(linears(5)).load_state_dict(state)


def damaged(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(state), **changes}


def test_a_damaged_state_changes_nothing() -> None:
    rates = whole(linears(5))
    rates.param_groups(0.1)
    state = rates.state_dict()
    rows = state["last"]["rows"]
    ahead = {"name": "1", "alpha": 2.0, "D": 0.1, "xmin": 1.0}
    for changes in (
        {"calls": "x"},
        {"calls": True},
        {"calls": -1},
        {"layers": [1]},
        {"settings": 3},
        {"last": {"a": 1}},
        {"last": 3},
        {"last": {**state["last"], "call": "x"}},
        {"last": {**state["last"], "rows": rows[1:]}},
        {"last": {**state["last"], "rows": [{**row, "name": "z"} for row in rows]}},
        {"last": {**state["last"], "rows": [{**row, "alpha": "2"} for row in rows]}},
        {"last": {**state["last"], "rows": [{**row, "factor": 0.0} for row in rows]}},
        {"last": {**state["last"], "rows": [{**row, "colour": 1} for row in rows]}},
        {"calls": 7, "ahead": [{"q": 1}]},
        {"calls": 7, "ahead": [ahead]},
        {"calls": 7, "ahead": [{**ahead, "n_tail": 3, "n_evals": 6, "status": "ok",
                                "message": "", "name": "no layer"}]},
    ):  # fmt: skip
        fresh = whole(linears(5))
        with pytest.raises(ValueError, match=r"^state: expected what state_dict\(\) gave, got"):
            fresh.load_state_dict(damaged(state, **changes))
        assert (fresh.calls, fresh.last, fresh.state_dict()["ahead"]) == (0, None, None)


def test_a_state_of_other_settings_is_refused() -> None:
    rates = whole(linears(5), assign="step")
    rates.param_groups(0.1)
    state = json.loads(json.dumps(rates.state_dict(), allow_nan=False))
    with pytest.raises(ValueError, match=r"state: expected one of assign='linear', got .*'step'"):
        whole(linears(5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: expected one of lr_range=\[0\.1, 3\.0\], got"):
        whole(linears(5), assign="step", lr_range=(0.1, 3)).load_state_dict(state)
    sigmoid = TBSigmoid(linears(5), FullMatrix(), tau=2)
    sigmoid.param_groups(0.1)
    with pytest.raises(ValueError, match=r"state: expected one of tau=10\.0, got tau=2\.0"):
        TBSigmoid(linears(5), FullMatrix()).load_state_dict(sigmoid.state_dict())
    again = whole(linears(5), assign="step")
    again.load_state_dict(state)
    assert again.factors_by_layer == rates.factors_by_layer
    again.load_state_dict({k: v for k, v in state.items() if k != "settings"})  # an older one


# Copies


class Holder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = linears(5)
        self.rates = small(self.net, **options)
        self.optimizer = torch.optim.SGD(self.rates.param_groups(0.1))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_model_that_holds_its_rates_is_copied_and_pickled(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PendingAlphas, protocol: int) -> Any:
        raise TypeError("cannot pickle an event of a device")

    monkeypatch.setattr(PendingAlphas, "__reduce_ex__", refuse)
    holder = Holder(overlap=overlap)
    holder.rates.step(holder.optimizer)
    expected = str(holder.rates.last)
    copies = [
        copy.deepcopy(holder),
        pickle.loads(pickle.dumps(holder)),
        torch.optim.swa_utils.AveragedModel(holder).module,
    ]
    following = holder.rates.step(holder.optimizer)
    for copied in copies:
        assert copied.rates.model is copied.net is not holder.net
        # NaNs are different from one another, so tables are compared as text.
        assert str(copied.rates.last) == expected
        assert str(copied.rates.step(copied.optimizer)) == str(following)
        groups = copied.optimizer.param_groups
        assert groups[1]["params"][0] is copied.net[1].weight
        assert [g["lr"] for g in groups] == [g["lr"] for g in holder.optimizer.param_groups]


# Snapshots


def test_with_overlap_rates_are_those_of_the_weights_one_call_before() -> None:
    model, plain = linears(5), linears(5)
    ahead, now = whole(model, overlap=True), whole(plain)
    optimizer, plain_optimizer = SGD(ahead.param_groups(0.1)), SGD(now.param_groups(0.1))
    expected = [now.factors_by_layer]  # the first call only takes a snapshot
    found = []
    for seed in range(4):
        weights = linears(5, seed=10 + seed).state_dict()
        model.load_state_dict(weights)
        plain.load_state_dict(weights)
        ahead.step(optimizer)
        # Training goes on while the snapshot is analysed.
        with torch.no_grad():
            model[1].weight.zero_()
        found.append(ahead.factors_by_layer)
        now.step(plain_optimizer)
        expected.append(now.factors_by_layer)
    assert found == expected[:-1]
    assert len({str(factors) for factors in found}) == 4


def test_a_failed_start_does_not_leave_rates_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = whole(linears(5), overlap=True)
    optimizer = SGD(rates.param_groups(0.1))

    def broken(self: LiveAnalysis, *, overlap: bool = False) -> None:
        raise ValueError("no room for a snapshot")

    monkeypatch.setattr(LiveAnalysis, "start", broken)
    with pytest.raises(ValueError, match="no room for a snapshot"):
        rates.step(optimizer)


# Precision, compilers and wrappers


@pytest.mark.filterwarnings("ignore:.*CPU Autocast.*")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_scaled_gradients(dtype: torch.dtype) -> None:
    model, rates, optimizer, schedule = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for epoch in range(2):
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        schedule.step()
        table = rates.step(optimizer)
        assert {row.status for row in table} == {"ok", "skipped"}
    assert optimizer.param_groups[1]["lr"] == table.base_lr * table["layer1.0.conv1"].factor


@pytest.mark.slow
def test_compiled_models_and_plain_ones_have_the_same_rates() -> None:
    plain = TinyResNet()
    compiled = torch.compile(TinyResNet(), backend="aot_eager")
    found = []
    for model in (plain, compiled):
        rates = small(model)
        optimizer = SGD(rates.param_groups(0.1), momentum=0.9)
        for epoch in range(2):
            train(model, optimizer, epoch)
            rates.step(optimizer)
        found.append(rates)
    ours, theirs = (rates.last for rates in found)
    assert ours is not None
    assert theirs is not None
    for row, other in zip(ours, theirs, strict=True):
        assert (row.name, row.status) == (other.name, other.status)
        if row.status == "ok":
            assert row.factor == pytest.approx(other.factor, rel=1e-3)
    found[1].load_state_dict(found[0].state_dict())
    assert {group["name"] for group in found[1].param_groups(0.1)} == {
        group["name"] for group in found[0].param_groups(0.1)
    }


def test_data_parallel_is_looked_through() -> None:
    model = linears(5)
    rates = whole(nn.DataParallel(model))
    assert [layer.name for layer in rates.layers] == list("01234")
    assert rates.model is model


# Other processes


@pytest.mark.slow
def test_two_processes_have_the_rates_of_the_first(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            str(ROOT / "tests/support/rate_processes.py"), str(tmp_path),
        ],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    # The second process was made to analyse other weights, had it analysed any.
    assert first["analyses"] == {"plain": 4, "overlap": 4}
    assert second["analyses"] == {"plain": 0, "overlap": 0}
    for mode in ("plain", "overlap"):
        assert repr(first[mode]["tables"]) == repr(second[mode]["tables"])
        assert second[mode]["tables"][0]["base_lr"] == 0.1
        assert first[mode]["groups"] == second[mode]["groups"]
        for name, weight in first[mode]["weights"].items():
            assert torch.equal(weight, second[mode]["weights"][name]), name
        assert len({lr for _, lr in first[mode]["groups"]}) > 2
    assert first["error"] == "ValueError: broken on the first"
    assert second["error"] == "RuntimeError: the first rank failed: ValueError: broken on the first"
    # Alone, each goes by its own weights.
    assert first["alone"] != second["alone"]
    # What one process finds with whole batches, two find with their halves.
    parts = started()
    parts[0].eval()  # as there: normalisations that do not look at the batch
    for table, state in zip(run(parts, range(3)), first["plain"]["tables"][1:], strict=True):
        for row, kept in zip(table, state["rows"], strict=True):
            assert row.status == kept["status"]
            if row.status == "ok":
                assert row.alpha == pytest.approx(kept["alpha"], rel=1e-3)
                assert row.lr == pytest.approx(kept["lr"], rel=2e-2)


def test_rates_are_what_measured_alphas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way from alphas to groups, with alphas that are given."""
    rates: LayerRates = whole(linears(6))
    given = {"0": 9.0, "1": 2.0, "2": 4.0, "3": 3.0, "4": 6.0, "5": 1.5}

    def measured(self: LiveAnalysis) -> list[LayerAlpha]:
        return [LayerAlpha(n, alpha, 0.1, 1.0, 8, 16, "ok", "") for n, alpha in given.items()]

    monkeypatch.setattr(LiveAnalysis, "__call__", measured)
    groups = rates.param_groups(0.1)
    assert [g["name"] for g in groups] == ["rest", "1", "2", "3", "4"]
    assert [g["lr"] for g in groups] == pytest.approx([0.1, 0.05, 0.1, 0.075, 0.15])
