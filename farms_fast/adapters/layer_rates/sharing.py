"""One process computes, all processes have the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from farms_fast.engine.distributed import Ranks
from farms_fast.live import LayerAlpha, LiveAnalysis, PendingAlphas

__all__ = ["Ahead", "ProcessGroup", "computed_once", "ranks_of"]

T = TypeVar("T")
if TYPE_CHECKING:  # torch can be built without process groups
    # "default" is that of torch.distributed, None this process alone.
    ProcessGroup = dist.ProcessGroup | str | None
else:
    ProcessGroup = object


def ranks_of(process_group: ProcessGroup) -> Ranks:
    """The processes that a rate is shared between, at this moment.

    Raises:
        TypeError: no group.
        ValueError: a word other than "default".
    """
    if isinstance(process_group, str):
        if process_group != "default":
            raise ValueError(
                f"process_group: expected 'default', None or a group, got {process_group!r}"
            )
        if not (dist.is_available() and dist.is_initialized()):
            return Ranks()
        process_group = dist.group.WORLD
    elif process_group is not None and not (
        dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    ):
        raise TypeError(
            "process_group: expected 'default', None or a group, "
            f"got {type(process_group).__name__}"
        )
    return Ranks.of(process_group)


def computed_once(ranks: Ranks, compute: Callable[[], T]) -> T:
    """What `compute` returns on the first rank, on every rank.

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
        except Exception as error:  # the others wait: they have to hear of it
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
class Ahead:
    """An analysis under way: on this device, on another rank, failed at its start, or restored.

    Attributes:
        pending: what was started here.
        failure: why nothing could be started.
        rows: what is known already.
    """

    pending: PendingAlphas | None = None
    failure: Exception | None = None
    rows: list[LayerAlpha] | None = None

    @staticmethod
    def start(live: LiveAnalysis, ranks: Ranks) -> Ahead:
        """An analysis of a snapshot of the weights, on the first rank."""
        if not ranks.is_main:
            return Ahead()
        try:
            return Ahead(live.start(overlap=True))
        except Exception as error:
            if ranks.size == 1:
                raise
            return Ahead(failure=error)  # the others hear of it when they ask

    @property
    def elsewhere(self) -> bool:
        """Whether another rank has it."""
        return self.pending is None and self.failure is None and self.rows is None

    def result(self) -> list[LayerAlpha]:
        """The alphas; waits for them, and raises what the start raised."""
        if self.failure is not None:
            raise self.failure
        if self.rows is None:
            assert self.pending is not None  # other ranks do not ask
            self.rows = self.pending.result()
        return self.rows
