"""What each of two processes does in the test of rates in several processes.

Run by torchrun with a folder; leaves what it found in `RANK.pt` there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from farms_fast.live import LiveAnalysis
from tests.support.rate_models import TinyResNet, batches, small


def count_analyses() -> list[int]:
    """Counts the starts of analyses in this process."""
    counted = [0]
    start = LiveAnalysis.start

    def counting(self: LiveAnalysis, *, overlap: bool = False) -> Any:
        counted[0] += 1
        return start(self, overlap=overlap)

    LiveAnalysis.start = counting  # type: ignore[method-assign]
    return counted


def train(rank: int, overlap: bool) -> dict[str, Any]:
    model = DistributedDataParallel(SyncFree(TinyResNet(seed=rank)))  # takes the first's weights
    rates = small(model.module.inner, overlap=overlap)
    optimizer = torch.optim.SGD(rates.param_groups(0.1, weight_decay=5e-4), momentum=0.9)
    assert rates.last is not None
    schedule = CosineAnnealingLR(optimizer, T_max=8)
    tables = [rates.last.to_state()]
    for epoch in range(3):
        for images, labels in batches(epoch):
            optimizer.zero_grad()
            half = slice(4 * rank, 4 * rank + 4)
            nn.functional.cross_entropy(model(images[half]), labels[half]).backward()
            optimizer.step()
        schedule.step()
        tables.append(rates.step(optimizer).to_state())
    return {
        "tables": tables,
        "groups": [(group["name"], group["lr"]) for group in optimizer.param_groups],
        "weights": {
            name: value
            for name, value in model.state_dict().items()
            if "running" not in name and "num_batches" not in name
        },
    }


class SyncFree(nn.Module):
    """The network with normalisations that do not look at the batch, so that halves add up."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        return logits

    def train(self, mode: bool = True) -> SyncFree:
        return self


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counted = count_analyses()
    found: dict[str, Any] = {"analyses": {}}
    for mode in ("plain", "overlap"):
        counted[0] = 0
        found[mode] = train(rank, overlap=mode == "overlap")
        found["analyses"][mode] = counted[0]

    alone = small(TinyResNet(seed=rank), process_group=None)
    alone.param_groups(0.1)
    found["alone"] = alone.factors_by_layer

    def broken(self: LiveAnalysis, *, overlap: bool = False) -> None:
        raise ValueError("broken on the first")

    LiveAnalysis.start = broken  # type: ignore[assignment, method-assign]
    try:
        small(TinyResNet()).param_groups(0.1)
    except (ValueError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
