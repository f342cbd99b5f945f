"""Pre-training and fine-tuning of a neural operator, and its errors."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.effect.navier_stokes import simulate
from benchmarks.effect.operators import DenoisingOperator, DenoisingSize, FourierOperator
from farms_fast import FixedAspectSampling, FullMatrix
from farms_fast.adapters.sciml import CompressibleFlow, TBSigmoid, read_pdebench

ARMS = ("baseline", "full", "farms")
# nRMSE of one frame from true ones, and over a rollout.
Errors = tuple[float, float]
CHANNELS = 4


@dataclass(frozen=True)
class Task:
    """Flows in units of the pre-training flows' mean and spread, on the device."""

    train: torch.Tensor
    test: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def flows(args: argparse.Namespace, number: int) -> CompressibleFlow:
    """The flows to pre-train on (0) or to fine-tune on (1), read or simulated."""
    path = (args.pretrain_data, args.data)[number]
    count = args.train + args.test
    if path is not None:
        steps = {"space_step": args.space_step, "time_step": args.time_step}
        return read_pdebench(path, samples=count, **steps)
    eta = args.eta[number]
    return simulate(
        count,
        args.grid,
        eta=eta,
        zeta=eta,
        mach=args.mach,
        frames=args.frames,
        duration=args.duration,
        seed=10_000 * (number + 1),
        device=args.device,
    )


def make_tasks(args: argparse.Namespace) -> list[Task]:
    """The task to pre-train on and the one to fine-tune on."""
    found = [flows(args, number).fields.to(args.device) for number in (0, 1)]
    axes = (0, 1, 3, 4)
    mean = found[0][: args.train].mean(axes)[:, None, None]
    std = found[0][: args.train].std(axes)[:, None, None].clamp(min=1e-6)
    scaled = [(fields - mean) / std for fields in found]
    return [Task(f[: args.train], f[args.train :], mean, std) for f in scaled]


def make_model(args: argparse.Namespace, seed: int, task: Task) -> nn.Module:
    """The model of a seed, for flows of the task's size."""
    torch.manual_seed(seed)
    if args.model == "fno":
        modes = (args.modes[0], args.modes[1])
        made: nn.Module = FourierOperator(CHANNELS, args.history, args.width, modes, args.layers)
    else:
        grid, modes = task.test.shape[-1], max(args.modes)
        size = DenoisingSize(
            grid, args.patch, args.width, args.blocks, args.depth, modes, args.head
        )
        made = DenoisingOperator(CHANNELS, args.history, size)
    return made.to(args.device)


def rates_of(args: argparse.Namespace, arm: str, model: nn.Module) -> TBSigmoid | None:
    if arm == "baseline":
        return None
    farms = FixedAspectSampling(args.rows, args.q, args.per_dim)
    return TBSigmoid(
        model,
        farms if arm == "farms" else FullMatrix(),
        args.xmin,
        scale=(args.scale[0], args.scale[1]),
        tau=args.tau,
        per=args.per,
        min_evals=args.min_evals,
        filter_zeros=args.filter_zeros,
        solver=args.solver,
        every=args.every,
        unit="step",
    )


def train(
    model: nn.Module,
    flow: torch.Tensor,
    args: argparse.Namespace,
    *,
    steps: int,
    lr: float,
    seed: int,
    rates: TBSigmoid | None = None,
) -> None:
    """One-step prediction by Adam under a cosine schedule, with the rates' groups if there are."""
    groups = list(model.parameters()) if rates is None else rates.param_groups(lr)
    optimizer = torch.optim.Adam(groups, lr=lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * lr)
    draw = torch.Generator().manual_seed(seed)
    history, batch = args.history, min(args.batch, len(flow) * (flow.shape[1] - args.history))
    pairs = torch.cartesian_prod(torch.arange(len(flow)), torch.arange(flow.shape[1] - history))
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(pairs), generator=draw)))
        picked, order = pairs[order[:batch]].to(flow.device), order[batch:]
        times = picked[:, 1:] + torch.arange(history + 1, device=flow.device)
        frames = flow[picked[:, :1], times]
        loss = relative_error(model(frames[:, :history]), frames[:, history]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if rates is not None:
            rates.step(optimizer)


def relative_error(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """RMSE of each frame's each quantity over its root mean square."""
    return (predicted - true).square().mean((-2, -1)).sqrt() / true.square().mean((-2, -1)).sqrt()


@torch.no_grad()
def prediction_error(
    model: nn.Module, task: Task, history: int, length: int, batch: int = 64
) -> float:
    """Mean nRMSE in physical units of predictions, ``length`` frames one from the other.

    The flows are cut into stretches of so many frames; each begins with true ones.
    """
    model.eval()
    errors = []
    for flow in task.test.split(batch):
        physical = flow * task.std + task.mean
        for start in range(history, flow.shape[1] - length + 1, length):
            frames = flow[:, start - history : start]
            for n in range(start, start + length):
                predicted = model(frames)
                errors.append(relative_error(predicted * task.std + task.mean, physical[:, n]))
                frames = torch.cat((frames[:, 1:], predicted[:, None]), dim=1)
    return float(torch.stack([error.mean() for error in errors]).mean())


@dataclass
class Bench:
    """Options, data, and the folder of the pre-trained models."""

    args: argparse.Namespace
    tasks: list[Task]
    folder: Path

    def errors(self, model: nn.Module, task: Task) -> Errors:
        """Of single frames, and of all frames after the first ones."""
        history = self.args.history
        return (
            prediction_error(model, task, history, 1),
            prediction_error(model, task, history, task.test.shape[1] - history),
        )

    def pretrained(self, seed: int) -> Errors:
        """Pre-trains a model and stores it; its errors at the viscosity that it has seen."""
        args = self.args
        model = make_model(args, seed, self.tasks[0])
        train(
            model, self.tasks[0].train, args, steps=args.pretrain_steps, lr=args.pretrain_lr,
            seed=seed,
        )  # fmt: skip
        torch.save(model.state_dict(), self.folder / f"{seed}.pt")
        return self.errors(model, self.tasks[0])

    def fine_tuned(self, seed: int, fraction: float, arm: str) -> Errors:
        """Fine-tunes with a part of the flows; the errors at their viscosity."""
        args = self.args
        model = make_model(args, seed, self.tasks[0])
        model.load_state_dict(torch.load(self.folder / f"{seed}.pt", weights_only=True))
        if arm != "none":
            count = max(1, round(len(self.tasks[1].train) * fraction / 100))
            draw = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(self.tasks[1].train), generator=draw)[:count]
            train(
                model, self.tasks[1].train[chosen], args, steps=args.steps, lr=args.lr, seed=seed,
                rates=rates_of(args, arm, model),
            )  # fmt: skip
        return self.errors(model, self.tasks[1])
