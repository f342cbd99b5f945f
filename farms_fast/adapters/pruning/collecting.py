"""What a pruner has to know of a block's layers, gathered while the block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from farms_fast.adapters.pruning.blocks import PrunableLayer
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.pruners import Pruner
from farms_fast.adapters.pruning.statistics import InputStatistics

__all__ = ["collect"]


def collect(
    runner: BlockRunner, layers: Sequence[PrunableLayer], how: Pruner, *, keep: bool = False
) -> dict[str, InputStatistics]:
    """Runs the block that is due on every batch, and gives the statistics of its layers' inputs.

    Args:
        runner: entered, with the block on its device.
        layers: of that block.
        how: which statistics.
        keep: as in `BlockRunner.run`.

    Returns:
        By the layers' names; of layers that always have the same input, the same ones.
    """
    # What is kept cannot be taken back, and only Hessians are worth the trouble.
    for sharing in (True, False) if how.needs_hessian and not keep else (False,):
        collector = _Collector(how, sharing)
        try:
            with _listening(layers, collector.add):
                if (layers and how.needs_inputs) or keep:
                    runner.run(keep=keep, again=collector.clear)
            return collector.statistics(layers)
        except _NotTheSame:
            continue
    raise AssertionError("without sharing nothing has to be the same")


@contextlib.contextmanager
def _listening(
    layers: Iterable[PrunableLayer], add: Callable[[PrunableLayer, Tensor], None]
) -> Iterator[None]:
    """Hands every input of some layers on, (..., in), while their block runs."""
    with contextlib.ExitStack() as hooks:
        for layer in layers:

            def look(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: PrunableLayer = layer,
            ) -> None:
                add(layer, (*args, *kwargs.values())[0])

            handle = layer.module.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


class _NotTheSame(Exception):
    """Layers that had the same inputs in the first batch have different ones later."""


class _Collector:
    """Statistics of layers; those that are given one and the same tensor can share theirs.

    Query, key and value projections are, and so are gate and up projections: half of the Hessians.
    Which do is seen in the first batch. A layer's second call begins a new round, which is a batch
    unless a block calls a layer more than once.
    """

    def __init__(self, how: Pruner, sharing: bool) -> None:
        self._how = how
        self._sharing = sharing
        self.clear()

    def clear(self) -> None:
        """Forgets all inputs, those of a batch that ended half-way among them."""
        self._own: dict[str, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._round: dict[str, Tensor] = {}

    def add(self, layer: PrunableLayer, inputs: Tensor) -> None:
        """Takes one input of a layer.

        Raises:
            _NotTheSame: the layer shares statistics, and this is not the input that they have.
        """
        name = layer.name
        leader = self._leader(name, inputs) if self._sharing else name
        self._leaders[name] = leader
        self._calls[name] = self._calls.get(name, 0) + 1
        if leader == name:
            if name not in self._own:
                found = self._how.statistics(layer.shape[1], layer=name)
                assert found is not None  # only asked for what needs them
                self._own[name] = found
            self._own[name].add(inputs)

    def _leader(self, name: str, inputs: Tensor) -> str:
        """The layer that keeps the statistics of this one."""
        if name in self._round:
            self._round.clear()
        leader = self._leaders.get(name)
        if leader is None:
            in_first_round = all(count == 1 for count in self._calls.values())
            alike = [n for n, x in self._round.items() if x is inputs]
            leader = self._leaders[alike[0]] if in_first_round and alike else name
        elif leader != name and self._round.get(leader) is not inputs:
            raise _NotTheSame
        self._round[name] = inputs
        return leader

    def statistics(self, layers: Sequence[PrunableLayer]) -> dict[str, InputStatistics]:
        """Of every layer, empty ones of a layer that was never called.

        Raises:
            _NotTheSame: a layer was called more often than one that it shares statistics with.
        """
        found = {}
        for layer in layers:
            leader = self._leaders.get(layer.name)
            if leader is None:
                empty = self._how.statistics(layer.shape[1], layer=layer.name)
                if empty is not None:
                    found[layer.name] = empty
                continue
            if self._calls[layer.name] != self._calls[leader]:
                raise _NotTheSame
            found[layer.name] = self._own[leader]
        return found
