"""One analysis on several devices or machines: who takes which layer, and who collects.

Every process runs the same program; `torchrun` starts them and tells each its rank. The layers are
shared out by their predicted cost, and each process reads only its own tensors.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# How long ranks wait for each other before they are connected. Nothing tells them that one has died
# until then. torchrun starts them together; they differ by how long importing takes.
_JOINING = timedelta(seconds=30)
# How long ranks that are done wait for the slowest one.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """The processes that share an analysis: this one's number, how many there are, their group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a group, of a single process for None; TypeError for anything else."""
        if group is None:
            return Ranks()
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group: expected None or a group of torch.distributed, "
                f"got {type(group).__name__}"
            )
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that collects: rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on the main rank, which waits; nothing elsewhere."""
        if self.group is None:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.is_main else None
        first = dist.get_global_rank(self.group, 0)
        dist.gather_object(value, values, dst=first, group=self.group)
        return [] if values is None else [v for v in values if v is not None]

    def on_main_machine(self) -> bool:
        """Whether this process runs on the machine of the main rank. All ranks have to ask."""
        if self.group is None:
            return True
        main = [_machine()]
        dist.broadcast_object_list(main, src=dist.get_global_rank(self.group, 0), group=self.group)
        return main[0] == _machine()

    def wait(self) -> None:
        """Waits for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)


def _machine() -> str:
    """An identity of this machine or container."""
    booted = Path("/proc/sys/kernel/random/boot_id")
    return platform.node() + (booted.read_text() if booted.exists() else "")


def share(costs: Sequence[float], size: int) -> list[int]:
    """Each layer's rank: the costliest first, each to the rank with the least to do.

    Example:
        >>> share([1.0, 5.0, 2.0, 2.0], 2)
        [1, 0, 1, 1]
    """
    owners = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(size)]
    for layer in sorted(range(len(costs)), key=lambda layer: (-costs[layer], layer)):
        load, rank = heapq.heappop(loads)
        owners[layer] = rank
        heapq.heappush(loads, (load + costs[layer], rank))
    return owners


@contextlib.contextmanager
def torchrun_group() -> Iterator[dist.ProcessGroup | None]:
    """The group of the processes that torchrun started; None where it did not start this one.

    A group that is there already is used and left alone. Records travel between hosts' memories, so
    the group speaks gloo whatever the devices are.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield None
        return
    if dist.is_initialized():
        yield dist.group.WORLD
        return
    try:
        dist.init_process_group("gloo", timeout=_JOINING)
    except (dist.DistError, RuntimeError) as error:
        seconds = _JOINING.total_seconds()
        raise TimeoutError(
            f"torchrun: expected all {os.environ.get('WORLD_SIZE')} processes to join within "
            f"{seconds:.0f} s, and one has not: {str(error).partition(chr(10))[0]}"
        ) from error
    # Once they are connected, a process that dies ends the others' waiting at once.
    dist.distributed_c10d._set_pg_timeout(_PATIENCE)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device | None:
    """This process's CUDA device among those that torchrun started here; None without either."""
    local, count = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if local is None or not dist.is_torchelastic_launched() or count == 0:
        return None
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        raise ValueError(
            f"nproc-per-node: expected no more than the {count} CUDA devices of this machine, "
            f"got {processes} (give --device to share one)"
        )
    return torch.device("cuda", int(local))
