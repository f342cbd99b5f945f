"""Collects the statistics of layers' inputs while their block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from farms_fast.adapters.pruning.blocks import PrunableLayer
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.pruners import Pruner
from farms_fast.adapters.pruning.statistics import InputStatistics

__all__ = ["collect_statistics"]


def collect_statistics(
    runner: BlockRunner, layers: Sequence[PrunableLayer], pruner: Pruner, *, keep: bool = False
) -> dict[str, InputStatistics]:
    """Runs the current block on every batch and collects the statistics of its layers' inputs.

    Args:
        runner: entered, with the block on its device.
        layers: layers of that block.
        pruner: decides which statistics.
        keep: as in `BlockRunner.run`.

    Returns:
        Statistics by layer name; layers that always have the same input share theirs.
    """
    # A kept run cannot be repeated, and only Hessians are worth sharing.
    for share in (True, False) if pruner.needs_hessian and not keep else (False,):
        collector = _Collector(pruner, share)
        try:
            with _input_hooks(layers, collector.add):
                if (layers and pruner.needs_inputs) or keep:
                    runner.run(keep=keep, on_restart=collector.clear)
            return collector.statistics(layers)
        except _InputsDiffer:
            continue
    raise AssertionError("inputs that are not shared cannot differ")


@contextlib.contextmanager
def _input_hooks(
    layers: Iterable[PrunableLayer], add: Callable[[PrunableLayer, Tensor], None]
) -> Iterator[None]:
    """Passes every input (..., in) of these layers to `add`."""
    with contextlib.ExitStack() as hooks:
        for layer in layers:

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                layer: PrunableLayer = layer,
            ) -> None:
                add(layer, (*args, *kwargs.values())[0])

            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


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

    def add(self, layer: PrunableLayer, inputs: Tensor) -> None:
        """Adds one input of a layer; raises `_InputsDiffer` if it is not the shared one."""
        name = layer.name
        leader = self._leader(name, inputs) if self._share else name
        self._leaders[name] = leader
        self._calls[name] = self._calls.get(name, 0) + 1
        if leader == name:
            if name not in self._own:
                statistics = self._pruner.statistics(layer.shape[1], layer=name)
                assert statistics is not None  # hooks are set only for pruners that need them
                self._own[name] = statistics
            self._own[name].add(inputs)

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
        for layer in layers:
            leader = self._leaders.get(layer.name)
            if leader is None:
                empty = self._pruner.statistics(layer.shape[1], layer=layer.name)
                if empty is not None:
                    by_name[layer.name] = empty
                continue
            if self._calls[layer.name] != self._calls[leader]:
                raise _InputsDiffer
            by_name[layer.name] = self._own[leader]
        return by_name
