"""Callbacks in real, tiny runs of the trainers that they are for."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, Dataset, TensorDataset

from farms_fast.adapters.layer_rates.rate_scheduler import StepCounter
from farms_fast.adapters.training import LayerRates, RateTable
from tests.support.rate_models import TinyResNet, batches, small

with warnings.catch_warnings():  # deprecations inside of these libraries, at their import
    warnings.simplefilter("ignore")
    import transformers
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import (
        LearningRateMonitor,
        ModelCheckpoint,
        StochasticWeightAveraging,
    )
    from lightning.pytorch.loggers import CSVLogger

    from farms_fast.adapters.training.lightning import LightningRates
    from farms_fast.adapters.training.transformers import TrainerRates

# What the trainers warn of on a small machine is none of this project's business.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

STEPS = 3  # in an epoch


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def images() -> TensorDataset:
    pairs = [pair for epoch in range(STEPS) for pair in batches(epoch, count=1)]
    return TensorDataset(*(torch.cat(part) for part in zip(*pairs, strict=True)))


# Lightning


class Classifier(LightningModule):  # type: ignore[misc]
    def __init__(self, interval: str = "epoch", schedule: str = "cosine", **options: Any) -> None:
        super().__init__()
        self.net = TinyResNet()
        self.interval, self.schedule, self.options = interval, schedule, options
        self.used: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        self.rates = small(self.net, **self.options)
        optimizer = torch.optim.SGD(self.rates.param_groups(0.1), momentum=0.9)
        if self.schedule == "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            config = {"scheduler": plateau, "monitor": "loss", "interval": self.interval}
        else:
            cosine = schedulers.CosineAnnealingLR(optimizer, T_max=20)
            config = {"scheduler": cosine, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.used.append([group["lr"] for group in self.optimizers().param_groups])
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss


def lightning_trainer(folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Trainer:
    options = {"enable_checkpointing": False, "logger": False, **options}
    return Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def fit(model: Classifier, trainer: Trainer, **options: Any) -> None:
    trainer.fit(model, DataLoader(images(), batch_size=8), **options)


def assert_tuned(used: list[list[float]], tables: list[RateTable], bases: list[float]) -> None:
    """Batch by batch, the rates that a table says at the base rate of that batch."""
    for lrs, table, base in zip(used, tables, bases, strict=True):
        factors = [row.factor for row in table if row.status == "ok"]
        assert lrs[0] == pytest.approx(base, rel=1e-12)
        assert lrs[1:] == [lrs[0] * factor for factor in factors]
        assert len(set(lrs)) > 3


def cosine(step: int, length: int = 20) -> float:
    return 0.05 * (1 + math.cos(math.pi * step / length))


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_lightning_trains_each_batch_at_the_rates(tmp_path: Path, interval: str, unit: str) -> None:
    tables: list[RateTable] = []
    model = Classifier(interval, unit=unit, log=tables.append)
    fit(model, lightning_trainer(tmp_path, 3, LightningRates("rates")))
    every = 1 if unit == "step" else STEPS
    assert [table.call for table in tables] == list(range(9 // every))
    of_batch = [tables[batch // every] for batch in range(9)]
    bases = [cosine(batch if interval == "step" else batch // STEPS) for batch in range(9)]
    assert_tuned(model.used, of_batch, bases)
    factors = {str([row.factor for row in table]) for table in tables}
    assert len(factors) == len(tables)


def test_lightning_counts_optimizer_steps_where_gradients_accumulate(tmp_path: Path) -> None:
    tables: list[RateTable] = []
    model = Classifier("step", unit="step", every=2, log=tables.append)
    trainer = lightning_trainer(tmp_path, 2, LightningRates(), accumulate_grad_batches=3)
    fit(model, trainer)
    assert trainer.global_step == 2
    assert [table.call for table in tables] == [0]  # the second step was the last one


def test_lightning_with_a_plateau(tmp_path: Path) -> None:
    model = Classifier(schedule="plateau")
    fit(model, lightning_trainer(tmp_path, 4, LightningRates(lambda module: module.rates)))
    bases = [lrs[0] for lrs in model.used[::STEPS]]
    assert bases == pytest.approx([0.1, 0.01, 0.001, 0.0001])
    for lrs in model.used:
        assert max(lrs) / lrs[0] == pytest.approx(1.5)


def test_lightning_logs_scalars_with_any_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs", version=0)
    model = Classifier()
    # The monitor demands a name of its own for every group.
    callbacks = (LightningRates(), LearningRateMonitor())
    fit(model, lightning_trainer(tmp_path, 3, *callbacks, logger=logger, log_every_n_steps=1))
    (file,) = tmp_path.rglob("metrics.csv")
    columns = file.read_text().splitlines()[0].split(",")
    for name in ("alpha/layer1.0.conv1", "lr/layer1.1.downsample.0", "lr/base", "alpha/mean"):
        assert name in columns


def test_lightning_resumes_to_the_bit(tmp_path: Path) -> None:
    unbroken = Classifier()
    fit(unbroken, lightning_trainer(tmp_path, 4, LightningRates()))
    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_epochs=1)
    first = Classifier()
    trainer = lightning_trainer(tmp_path, 2, LightningRates(), saver, enable_checkpointing=True)
    fit(first, trainer)
    second = Classifier()
    resumed = lightning_trainer(tmp_path, 4, LightningRates())
    fit(second, resumed, ckpt_path=saver.best_model_path, weights_only=True)
    assert first.used + second.used == unbroken.used
    assert second.rates.calls == unbroken.rates.calls == 3
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


class Adversaries(LightningModule):  # type: ignore[misc]
    """Two networks, each with an optimizer and rates of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleList([TinyResNet(0), TinyResNet(1)])

    def configure_optimizers(self) -> Any:
        self.first, self.second = (small(net) for net in self.nets)
        return [torch.optim.SGD(r.param_groups(0.1)) for r in (self.first, self.second)]

    def training_step(self, batch: Any, index: int) -> None:
        for net, optimizer in zip(self.nets, self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(net(batch[0]), batch[1]))
            optimizer.step()


def test_two_callbacks_in_one_trainer_keep_their_states_apart(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [LightningRates("first"), LightningRates("second", optimizer=1)]

    saver = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_epochs=1)
    model = Adversaries()
    trainer = lightning_trainer(tmp_path, 3, *callbacks(), saver, enable_checkpointing=True)
    fit(model, trainer)
    assert model.first.calls == model.second.calls == 2
    states = torch.load(saver.best_model_path, weights_only=True)["callbacks"]
    # The first of the two has the key of releases that knew only one.
    assert {"LightningRates", "LightningRates[optimizer=1]"} <= states.keys()
    resumed = Adversaries()
    fit(
        resumed, lightning_trainer(tmp_path, 4, *callbacks()),
        ckpt_path=saver.best_model_path, weights_only=True,
    )  # fmt: skip
    assert resumed.first.calls == resumed.second.calls == 3


def test_lightning_refuses_an_optimizer_that_is_not_there(tmp_path: Path) -> None:
    for wrong in (-1, True):
        with pytest.raises(ValueError, match="optimizer: expected an integer of at least 0, got"):
            LightningRates(optimizer=wrong)
    with pytest.raises(TypeError, match=r"optimizer: expected an index of .*, got str"):
        LightningRates(optimizer="0")  # type: ignore[arg-type]
    trainer = lightning_trainer(tmp_path, 1, LightningRates(optimizer=4))
    with pytest.raises(IndexError, match=r"expected an index .*1 optimizers, got 4"):
        fit(Classifier(), trainer)


def test_a_trained_module_with_its_rates_is_copied_and_averaged(tmp_path: Path) -> None:
    model = Classifier()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(model, lightning_trainer(tmp_path, 3, LightningRates(), averaging))
    copied = copy.deepcopy(model)
    assert copied.rates.model is copied.net
    torch.save(model, tmp_path / "model.pt")


def test_a_counter_without_a_state_keeps_its_own() -> None:
    rates = small(TinyResNet())
    rates.param_groups(0.1)
    counter = StepCounter(rates)
    counter.seen = 3
    for state in ({}, {"seen": 5}, None):
        with pytest.raises(TypeError, match=r"state: expected what state_dict\(\) gave"):
            counter.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state: expected what"):
        counter.load_state_dict({"seen": 5, "rates": {**rates.state_dict(), "calls": "x"}})
    with pytest.raises(TypeError, match="state: 'seen': expected an integer, got str"):
        counter.load_state_dict({"seen": "x", "rates": rates.state_dict()})
    assert counter.seen == 3


def test_lightning_says_what_it_cannot_find(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rates: expected LayerRates, "):
        LightningRates(3)  # type: ignore[arg-type]
    trainer = lightning_trainer(tmp_path, 1, LightningRates("missing"))
    with pytest.raises(TypeError, match=r"rates: expected 'missing' .*LayerRates, got None"):
        fit(Classifier(), trainer)


def test_rates_made_beforehand_are_given_as_they_are(tmp_path: Path) -> None:
    model = Classifier()
    rates = small(model.net, initial=False)

    class Given(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(rates.param_groups(0.1))

    given = Given()
    given.net = model.net
    fit(given, lightning_trainer(tmp_path, 2, LightningRates(rates)))
    assert rates.calls == 1
    assert {len(set(lrs)) for lrs in given.used} == {1, 6}


# transformers


class Labelled(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.data = images()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"pixels": image, "labels": label}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyResNet()
        self.used: list[list[float]] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.optimizer is not None:
            self.used.append([group["lr"] for group in self.optimizer.param_groups])
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer_of(
    folder: Path, epochs: int, network: Network, rates: LayerRates, **options: Any
) -> transformers.Trainer:
    optimizer = torch.optim.AdamW(rates.param_groups(0.1, weight_decay=0.01, no_decay="vectors"))
    network.optimizer = optimizer
    arguments = {
        "save_strategy": "no", "report_to": [], "per_device_train_batch_size": 8,
        "num_train_epochs": epochs, "lr_scheduler_type": "linear", "use_cpu": True,
        "disable_tqdm": True, "logging_strategy": "epoch", "max_steps": -1, "seed": 3,
        "save_safetensors": None, **options,
    }  # fmt: skip
    known = set(transformers.TrainingArguments.__dataclass_fields__)
    chosen = {k: v for k, v in arguments.items() if k in known and v is not None}
    return transformers.Trainer(
        model=network,
        args=transformers.TrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=Labelled(),
        optimizers=(optimizer, None),
        callbacks=[TrainerRates(rates)],
    )


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_transformers_trains_each_batch_at_the_rates(tmp_path: Path, unit: str) -> None:
    tables: list[RateTable] = []
    network = Network()
    rates = small(network, unit=unit, log=tables.append)
    trainer = trainer_of(tmp_path, 3, network, rates)
    trainer.train()
    every = 1 if unit == "step" else STEPS
    assert [table.call for table in tables] == list(range(9 // every))
    for step, lrs in enumerate(network.used):
        base = 0.1 * (1 - step / 9)
        table = tables[step // every]
        expected = {base, *(base * row.factor for row in table)}
        assert sorted(set(lrs)) == pytest.approx(sorted(expected))
        assert lrs[0] == pytest.approx(base)
    # What the Trainer reports is the rate of its first group, the base rate.
    reported = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert reported == pytest.approx([0.1 * (1 - step / 9) for step in (2, 5, 8)])


@pytest.mark.parametrize("save", [{"save_steps": 3}, {"save_steps": 4}, {"save_steps": 6}])
def test_transformers_resumes_to_the_bit(tmp_path: Path, save: dict[str, int]) -> None:
    unbroken = Network()
    trainer_of(tmp_path / "a", 3, unbroken, small(unbroken)).train()
    first = Network()
    options = {"save_strategy": "steps", **save}
    trainer_of(tmp_path / "b", 3, first, small(first), **options).train()
    second = Network()
    rates = small(second)
    resumed = trainer_of(tmp_path / "b", 3, second, rates, **options)
    at = save["save_steps"]
    checkpoint = tmp_path / "b" / f"checkpoint-{at}"
    # Strict JSON: layers that are skipped have no alpha, which is null, not NaN.
    json.loads((checkpoint / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert second.used == unbroken.used[at:]
    assert rates.calls == 2
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_transformers_says_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="rates: expected LayerRates, got str"):
        TrainerRates("rates")  # type: ignore[arg-type]
    network = Network()
    trainer = trainer_of(tmp_path, 1, network, small(network))
    trainer.remove_callback(TrainerRates)
    trainer.add_callback(TrainerRates())
    with pytest.raises(ValueError, match="rates: expected LayerRates, got none"):
        trainer.train()


# Libraries that are not there


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("lightning", ("lightning.pytorch", "pytorch_lightning"), "lightning"),
        ("transformers", ("transformers",), "transformers"),
    ],
)
def test_a_missing_library_is_an_error_that_names_the_extra(
    module: str, hidden: tuple[str, ...], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"farms_fast.adapters.training.{module}"
    monkeypatch.delitem(sys.modules, name)
    for missing in hidden:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"pip install 'farms-fast\[{extra}\]'"):
        importlib.import_module(name)
