"""The first process computes, and all processes have the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from farms_fast.engine.distributed import Ranks
from farms_fast.live import LayerAlpha, LiveAnalysis, PendingAlphas

T = TypeVar("T")
if TYPE_CHECKING:  # torch can be built without process groups
    # "default" is the group of torch.distributed, None this process alone.
    ProcessGroup = dist.ProcessGroup | str | None
else:
    ProcessGroup = object


def ranks_of(process_group: ProcessGroup) -> Ranks:
    """The processes that share rates now; TypeError or ValueError for what is no group."""
    has_groups = dist.is_available()
    if isinstance(process_group, str) and process_group == "default":
        return Ranks.of(dist.group.WORLD if has_groups and dist.is_initialized() else None)
    if process_group is None or (has_groups and isinstance(process_group, dist.ProcessGroup)):
        return Ranks.of(process_group)
    is_word = isinstance(process_group, str)
    got = repr(process_group) if is_word else type(process_group).__name__
    error = ValueError if is_word else TypeError
    raise error(f"process_group: expected 'default', None or a group, got {got}")


def compute_once(ranks: Ranks, compute: Callable[[], T]) -> T:
    """Runs `compute` on the first rank and returns its result on every rank.

    If it fails, the first rank raises the exception as it is, and the others a RuntimeError.
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
    """An analysis that was started: here, in vain, or before a resume, which knows its alphas.

    The outcome is None if another rank has it.
    """

    outcome: PendingAlphas | Exception | list[LayerAlpha] | None = None

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
            return PendingAnalysis(error)  # raised on all ranks by the next call

    def result(self) -> list[LayerAlpha]:
        """Waits for the alphas and returns them; raises what the start raised."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if isinstance(self.outcome, PendingAlphas):
            self.outcome = self.outcome.result()
        assert self.outcome is not None  # other ranks do not ask
        return self.outcome
