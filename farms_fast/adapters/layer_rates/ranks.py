"""The first process computes, and all processes have the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from farms_fast.engine.distributed import Ranks
from farms_fast.live import LayerAlpha, LiveAnalysis, PendingAlphas

__all__ = ["PendingAnalysis", "ProcessGroup", "compute_once", "ranks_of"]

T = TypeVar("T")
if TYPE_CHECKING:  # torch can be built without process groups
    # "default" is the group of torch.distributed, None this process alone.
    ProcessGroup = dist.ProcessGroup | str | None
else:
    ProcessGroup = object


def ranks_of(process_group: ProcessGroup) -> Ranks:
    """Returns the processes that share rates now.

    Raises:
        TypeError: `process_group` is no group.
        ValueError: it is a word other than "default".
    """
    expected = "process_group: expected 'default', None or a group, got"
    if isinstance(process_group, str):
        if process_group != "default":
            raise ValueError(f"{expected} {process_group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        process_group = dist.group.WORLD
    elif process_group is not None and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise TypeError(f"{expected} {type(process_group).__name__}")
    return Ranks.of(process_group)


def compute_once(ranks: Ranks, compute: Callable[[], T]) -> T:
    """Runs `compute` on the first rank and returns its result on every rank.

    Raises:
        RuntimeError: it failed there; the first rank itself raises the exception as it is.
    """
    if ranks.group is None:
        return compute()
    answer: list[object] = [None, ""]
    failure: Exception | None = None
    if ranks.is_main:
        try:
            answer[0] = compute()
        except Exception as error:  # the other ranks wait for an answer
            failure = error
            answer[1] = f"{type(error).__name__}: {error}"
    first = dist.get_global_rank(ranks.group, 0)
    dist.broadcast_object_list(answer, src=first, group=ranks.group)
    if failure is not None:
        raise failure
    if answer[1]:
        raise RuntimeError(f"the first rank failed: {answer[1]}")
    return answer[0]  # type: ignore[return-value]


@dataclass
class PendingAnalysis:
    """An analysis that was started: here, on another rank, in vain, or before a resume.

    Attributes:
        pending: what was started here.
        failure: why nothing could be started.
        rows: the alphas, where they are known already.
    """

    pending: PendingAlphas | None = None
    failure: Exception | None = None
    rows: list[LayerAlpha] | None = None

    @staticmethod
    def start(live: LiveAnalysis, ranks: Ranks) -> PendingAnalysis:
        """Starts an analysis of a snapshot of the weights, on the first rank only."""
        if not ranks.is_main:
            return PendingAnalysis()
        try:
            return PendingAnalysis(live.start(overlap=True))
        except Exception as error:
            if ranks.size == 1:
                raise
            return PendingAnalysis(failure=error)  # raised on all ranks by the next call

    @property
    def elsewhere(self) -> bool:
        """Whether another rank has it."""
        return self.pending is None and self.failure is None and self.rows is None

    def result(self) -> list[LayerAlpha]:
        """Waits for the alphas and returns them; raises what the start raised."""
        if self.failure is not None:
            raise self.failure
        if self.rows is None:
            assert self.pending is not None  # other ranks do not ask
            self.rows = self.pending.result()
        return self.rows
