"""Collects the statistics of layers' inputs while their block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from farms_fast.adapters.pruning.blocks import PrunableLayer
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.pruners import Pruner
from farms_fast.adapters.pruning.statistics import InputStatistics


def collect_statistics(
    runner: BlockRunner, layers: Sequence[PrunableLayer], pruner: Pruner, *, keep: bool = False
) -> dict[str, InputStatistics]:
    """Statistics of the current block's layers by name, from a run on every batch.

    Layers that always have the same input share theirs. `keep` is that of `BlockRunner.run`.
    """
    # A kept run cannot be repeated, and only Hessians are worth sharing.
    for share in (True, False) if pruner.needs_hessian and not keep else (False,):
        collector = _Collector(pruner, share)
        with contextlib.ExitStack() as hooks, contextlib.suppress(_InputsDiffer):
            for layer in layers:
                hook = partial(collector.add, layer)
                handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            if (layers and pruner.needs_inputs) or keep:
                runner.run(keep=keep, on_restart=collector.clear)
            return collector.statistics(layers)
    raise AssertionError("inputs that are not shared cannot differ")


class _InputsDiffer(Exception):
    """Layers that shared their input in the first batch do not in a later one."""


class _Collector:
    """Statistics of layers; layers that get the same tensor share theirs.

    Query, key and value projections do, and so do gate and up projections: this saves half of the
    Hessians. The first batch shows which layers share. A layer's second call begins a new round; a
    round is a batch unless a block calls a layer more than once.
    """

    def __init__(self, pruner: Pruner, share: bool) -> None:
        self._pruner = pruner
        self._share = share
        self.clear()

    def clear(self) -> None:
        """Discards all inputs, also those of an unfinished batch."""
        self._own: dict[str, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._round: dict[str, Tensor] = {}

    def add(
        self, layer: PrunableLayer, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """A pre-hook that adds a call's input; `_InputsDiffer` if it is not the shared one."""
        name, inputs = layer.name, (*args, *kwargs.values())[0]
        leader = self._leader(name, inputs) if self._share else name
        self._leaders[name] = leader
        self._calls[name] = self._calls.get(name, 0) + 1
        if leader == name:
            if name not in self._own:
                self._own[name] = self._empty(layer)
            self._own[name].add(inputs)

    def _empty(self, layer: PrunableLayer) -> InputStatistics:
        statistics = self._pruner.statistics(layer.shape[1], layer=layer.name)
        assert statistics is not None  # what needs no inputs has no layers here
        return statistics

    def _leader(self, name: str, inputs: Tensor) -> str:
        """The layer whose statistics this one shares; its own name if it shares none."""
        if name in self._round:
            self._round.clear()
        leader = self._leaders.get(name)
        if leader is None:
            in_first_round = all(count == 1 for count in self._calls.values())
            alike = [n for n, x in self._round.items() if x is inputs]
            leader = self._leaders[alike[0]] if in_first_round and alike else name
        elif leader != name and self._round.get(leader) is not inputs:
            raise _InputsDiffer
        self._round[name] = inputs
        return leader

    def statistics(self, layers: Sequence[PrunableLayer]) -> dict[str, InputStatistics]:
        """Statistics by layer name, empty for a layer that was never called."""
        by_name = {}
        for layer in layers if self._pruner.needs_inputs else ():
            leader = self._leaders.get(layer.name)
            if leader is not None and self._calls[layer.name] != self._calls[leader]:
                raise _InputsDiffer
            by_name[layer.name] = self._empty(layer) if leader is None else self._own[leader]
        return by_name
