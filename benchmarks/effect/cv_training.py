"""Image classification with one learning rate, with TempBalance, and with TempBalance and FARMS.

`python -m benchmarks.effect.cv_training --data DIR` trains with the published settings (SGD with
momentum 0.9 and weight decay 5e-4, 200 epochs of batches of 128, cosine schedule, seeds 43, 37 and
13) on CIFAR-100, whose archive is in DIR; `--data digits` on scikit-learn's handwritten digits,
upscaled, which every machine has: 200 epochs too, of 512 images. Accuracy is that of the last
epoch, on images that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.effect.images import Images, cifar100, digits
from benchmarks.effect.networks import NETWORKS, network
from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.adapters.training import RateTable, TempBalance

ARMS = {
    "baseline": "one learning rate",
    "full": "TempBalance, whole matrices",
    "farms": "TempBalance, FARMS windows",
}
# Base learning rate, and the published range of factors.
MODELS = {
    "resnet18": (0.1, (0.1, 1.9)),
    "resnet34": (0.1, (0.2, 1.8)),
    "vgg16": (0.05, (0.2, 1.8)),
    "vgg19": (0.05, (0.2, 1.8)),
}
CIFAR_IMAGES = 50_000


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: str = "resnet18"
    arm: str = "farms"
    seed: int = 43
    data: str = "digits"
    train: int | None = None
    epochs: int = 200
    batch: int = 128
    width: int = 64
    lr: float = 0.1
    lr_range: tuple[float, float] = (0.1, 1.9)
    weight_decay: float = 5e-4
    xmin: str = "median"
    assign: str = "linear"
    overlap: bool = False
    device: str = "cpu"


def images_of(settings: Settings) -> Images:
    """The data set on its device."""
    if settings.data == "digits":
        found = digits(512 if settings.train is None else settings.train)
    else:
        found = cifar100(settings.data, settings.train)
    return found.to(torch.device(settings.device))


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """On some CPUs torch 2.13 crashes in oneDNN's backward convolutions of few channels."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class Run:
    """A model in training."""

    def __init__(self, settings: Settings, images: Images) -> None:
        self.settings, self.images = settings, images
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        model = network(settings.model, settings.width, images.classes)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        self.rates: TempBalance | None = None
        options = {"momentum": 0.9, "weight_decay": settings.weight_decay}
        if settings.arm == "baseline":
            self.optimizer = SGD(self.model.parameters(), settings.lr, **options)
        else:
            self.rates = TempBalance(
                self.model,
                FullMatrix() if settings.arm == "full" else FixedAspectSampling(),
                settings.xmin,
                assign=settings.assign,
                lr_range=settings.lr_range,
                overlap=settings.overlap,
            )
            self.optimizer = SGD(self.rates.param_groups(settings.lr), **options)
        self.schedule = CosineAnnealingLR(self.optimizer, T_max=settings.epochs)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            found: torch.Tensor = self.model(x)
        return found.float()

    def train_epoch(self) -> None:
        self.model.train()
        for x, labels in self.images.batches(self.settings.batch, self.generator):
            self.step(x, labels)

    def train(self, steps: int) -> None:
        """So many steps, through the data as often as it takes."""
        self.model.train()
        done = 0
        while done < steps:
            for x, labels in self.images.batches(self.settings.batch, self.generator):
                self.step(x, labels)
                done += 1
                if done == steps:
                    break

    def step(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with without_onednn():
            nn.functional.cross_entropy(self.logits(x), labels).backward()
        self.optimizer.step()

    def rebalance(self) -> RateTable | None:
        return None if self.rates is None else self.rates.step(self.optimizer)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Percent of the test images."""
        self.model.eval()
        parts = zip(self.images.test.split(512), self.images.test_labels.split(512), strict=True)
        right = [(self.logits(x).argmax(dim=1) == labels).sum() for x, labels in parts]
        return 100 * float(torch.stack(right).sum()) / len(self.images.test_labels)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def train(settings: Settings) -> dict[str, Any]:
    """One run: its accuracy and its last rates."""
    started = time.perf_counter()
    run = Run(settings, images_of(settings))
    for _ in range(settings.epochs):
        run.train_epoch()
        run.schedule.step()
        run.rebalance()
    accuracy = run.accuracy()
    table = None if run.rates is None else run.rates.last
    return {
        "settings": asdict(settings),
        "accuracy": accuracy,
        "seconds": time.perf_counter() - started,
        "mean_alpha": None if table is None else _mean([r.alpha for r in table if r.tuned]),
        "failed": [] if table is None else [row.name for row in table.failed],
    }


def time_of_analyses(settings: Settings, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of training steps, with and without an analysis before them.

    Rounds with and without take turns. Nothing else should run meanwhile.

    Args:
        settings: of the run; `overlap` decides whether an analysis may hide behind the next steps.
        steps: of a round.
        repeats: rounds of either kind, after two that are not counted.
    """
    run = Run(settings, images_of(settings))
    rounds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(2 * (repeats + 1)):
        analysed = repeat % 2 == 1
        run.wait()
        started = time.perf_counter()
        if analysed:  # first, so that one of a snapshot has the round to hide in
            run.rebalance()
        run.train(steps)
        run.wait()
        if repeat > 1:
            rounds[analysed].append(1e3 * (time.perf_counter() - started))
    step = statistics.median(rounds[False]) / steps
    analysis = statistics.median(rounds[True]) - statistics.median(rounds[False])
    cifar = step * CIFAR_IMAGES / settings.batch
    return {
        "steps": steps,
        "without_ms": quartiles(rounds[False]),
        "with_ms": quartiles(rounds[True]),
        "step_ms": step,
        "analysis_ms": analysis,
        "cifar_epoch_ms": cifar,
        "cifar_share_percent": 100 * analysis / cifar,
    }


def times_of_networks(base: Settings, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """`time_of_analyses` of every network with FARMS, waited for and beside the training."""
    found = {}
    for model, (lr, lr_range) in MODELS.items():
        for overlap in (False, True):
            settings = replace(
                base, model=model, lr=lr, lr_range=lr_range, arm="farms", overlap=overlap
            )
            name = f"{model}, {'from a copy beside the training' if overlap else 'waited for'}"
            found[name] = time_of_analyses(settings, steps, repeats)
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return [*values, *values, *values]
    return statistics.quantiles(values, n=4, method="inclusive")


def line_of(what: str, found: dict[str, Any]) -> str:
    """The times of one arm or network in words."""
    (low, without, high), (below, within, above) = found["without_ms"], found["with_ms"]
    return (
        f"{ARMS.get(what, what)}: {found['steps']} steps take {without:.1f} ms "
        f"[{low:.1f}, {high:.1f}], with an analysis {within:.1f} ms [{below:.1f}, {above:.1f}]: "
        f"{found['analysis_ms']:+.2f} ms. "
        f"Of an epoch of {CIFAR_IMAGES} images at this pace ({found['cifar_epoch_ms'] / 1e3:.2f} s)"
        f" that is {found['cifar_share_percent']:.2f} %."
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def run_all(wanted: Sequence[Settings], workers: int) -> list[dict[str, Any]]:
    """Every run, so many at a time, in the order asked for."""
    found: dict[Settings, dict[str, Any]] = {}

    def report(settings: Settings, result: dict[str, Any]) -> None:
        found[settings] = result
        print(
            f"{settings.arm:9} seed {settings.seed:3}  {result['accuracy']:6.2f} %"
            f"  {result['seconds']:7.1f} s",
            flush=True,
        )

    if workers == 1:
        for settings in wanted:
            report(settings, train(settings))
    else:
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            futures = {pool.submit(train, settings): settings for settings in wanted}
            for future in as_completed(futures):
                report(futures[future], future.result())
    return [found[settings] for settings in wanted]


def table_of(results: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[str]:
    """Accuracy by arm: the mean over seeds, their sample deviation, each seed, and the gain."""
    by_arm: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for result in results:
        by_arm[result["settings"]["arm"]][result["settings"]["seed"]] = result["accuracy"]
    lines = ["| | accuracy, % | by seed | over baseline |", "|---|---|---|---|"]
    for arm, found in by_arm.items():
        values = list(found.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        seeds = ", ".join(f"{seed}: {value:.2f}" for seed, value in found.items())
        gain = ""
        if arm != "baseline" and "baseline" in by_arm:
            # Of runs that begin with the same weights and see the same images.
            pairs = [value - by_arm["baseline"][seed] for seed, value in found.items()]
            gain = f"{statistics.fmean(pairs):+.2f}"
            gain += f" ± {statistics.stdev(pairs):.2f}" if len(pairs) > 1 else ""
        mean = statistics.fmean(values)
        lines.append(f"| {ARMS[arm]} | {mean:.2f}{spread} | {seeds} | {gain} |")
    return lines


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effect.cv_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--data", default="digits", help="folder of CIFAR-100's archive, or digits (default)")
    add("--model", choices=sorted(NETWORKS), default="resnet18")
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--seeds", nargs="+", type=int, default=[43, 37, 13])
    add("--epochs", type=int, default=200)
    add("--batch", type=int, default=128)
    add("--train", type=int, help="so many training images (digits 512, CIFAR-100 all)")
    add("--width", type=int, default=64, help="channels of the first stage")
    add("--lr", type=float, help="base rate (0.1 for ResNets, 0.05 for VGGs)")
    add("--lr-range", nargs=2, type=float, metavar=("A", "B"), help="factors (as published)")
    add("--weight-decay", type=float, default=5e-4)
    add("--xmin", default="median")
    add("--assign", default="linear")
    add("--overlap", action="store_true", help="analyse a snapshot while training goes on")
    add("--device", default=default_device)
    add("--workers", type=int, default=1, help="runs at a time, on one device")
    add("--repeats", type=int, default=7, help="rounds that are timed, alone; 0 for none")
    add("--timed-steps", type=int, default=100, help="training steps of such a round")
    add("--only-times", action="store_true", help="of analyses in all networks, no run")
    add("--json", help="write settings and results there")
    return parser.parse_args(argv)


def _write(path: str | None, device: str, found: dict[str, Any]) -> None:
    if path:
        name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "device": name} | found, file, indent=1)


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    lr, lr_range = MODELS[options.model]
    base = Settings(
        model=options.model,
        data=options.data,
        train=options.train,
        epochs=options.epochs,
        batch=options.batch,
        width=options.width,
        lr=lr if options.lr is None else options.lr,
        lr_range=lr_range if options.lr_range is None else tuple(options.lr_range),
        weight_decay=options.weight_decay,
        xmin=options.xmin,
        assign=options.assign,
        overlap=options.overlap,
        device=options.device,
    )
    if options.only_times:
        times = times_of_networks(base, options.timed_steps, options.repeats)
        print("\n".join(line_of(name, found) for name, found in times.items()))
        _write(options.json, base.device, {"times": times})
        return 0
    description = images_of(replace(base, device="cpu")).description
    print(
        f"{options.model} on {description}, {options.epochs} epochs, base rate {base.lr}, factors "
        f"{base.lr_range[0]} to {base.lr_range[1]}, torch {torch.__version__}, {options.device}"
    )
    wanted = [replace(base, arm=arm, seed=seed) for seed in options.seeds for arm in options.arms]
    results = run_all(wanted, options.workers)
    lines = table_of(results, options.arms)
    times = {
        arm: time_of_analyses(replace(base, arm=arm), options.timed_steps, options.repeats)
        for arm in options.arms
        if options.repeats and arm != "baseline"
    }
    print("\n".join(["", *lines, "", *(line_of(arm, found) for arm, found in times.items())]))
    _write(
        options.json,
        base.device,
        {
            "data": description,
            "workers": options.workers,
            "results": results,
            "times": times,
            "table": lines,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
