"""Runs a model block by block over a calibration set, with one block on the device at a time.

The model prepares the inputs of its blocks itself: for every block and batch its forward pass runs
anew. In it, the blocks before the current one return the hidden states that were kept of the last
of them, and the current block ends the pass. So a block gets every argument as in a plain run,
whatever the model calls its masks, positions and flags, and only one set of hidden states is kept.
What precedes the blocks (embeddings, masks, positions) runs once for each block and batch, on the
device of its weights.

When the device runs out of memory, everything runs again from the first block with half of the
batch size: nothing tells which dimension of a block's output is that of the samples.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from farms_fast.adapters.pruning.blocks import Block, Blocks
from farms_fast.adapters.pruning.memory_use import plan_memory
from farms_fast.adapters.pruning.modules import (
    block_device,
    device_of,
    evaluating,
    input_device,
    move_module,
    patched,
)
from farms_fast.adapters.pruning.oom import (
    is_out_of_memory,
    out_of_memory_error,
    raise_oom_as_value_error,
    retry_with_less,
)
from farms_fast.core.arguments import check_int
from farms_fast.engine.machine import machine_of

_Tree = TypeVar("_Tree")
_CPU = torch.device("cpu")


class _BlockReached(Exception):
    """Ends the model's forward pass after the current block."""


class BlockRunner:
    """Runs the blocks of a model over the batches of a calibration set, one after the other.

    It is a context manager: inside, the model is in evaluation mode and without gradients; after
    it, only the model's weights may differ. Tokens are int64 (samples, seqlen); `statistics` gives
    the bytes of a block's statistics; the other arguments are those of `prune_model`. The predicted
    `use` of memory and the `batch_size` change when memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        tokens: Tensor,
        device: str | torch.device | None = None,
        memory: int | None = None,
        batch_size: int | None = None,
        statistics: Callable[[Block], int] = lambda block: 0,
    ) -> None:
        self._model = model
        self._blocks = blocks.blocks
        self._tokens = tokens
        self._homes = [device_of(block.module) for block in self._blocks]
        self._home = self._homes[0]
        self._block_device = None if device is None else block_device(device, self._home)
        self._device = self._block_device or self._home
        self._direct = True
        self._current = 0
        self._run_current: Callable[..., Any] | None = None
        self._last_output: Any = None
        self._kept: list[Any] = []
        parameters = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in parameters else {}
        if memory is None:
            budget = machine_of(self._device).memory // 2
        else:
            budget = check_int("memory", memory, least=1)
        self.batch_size, self.use = plan_memory(
            self._blocks, self._probe(), tokens, self._device, budget, batch_size, statistics
        )

    def _probe(self) -> Tensor:
        """The hidden states that the first block gets for one sample."""
        inputs: list[Tensor] = []

        def record(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            inputs.extend(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise _BlockReached

        what = f"what precedes the blocks with one sample of {self._tokens.shape[1]} tokens"
        with self, raise_oom_as_value_error(self._device, what):
            self._call(self._tokens[:1], record)
        if not inputs or inputs[0].dim() < 2:
            raise ValueError(
                "model: expected hidden states as the first argument of block "
                f"{self._blocks[0].name!r}, got "
                f"{tuple(inputs[0].shape) if inputs else 'no tensor'}"
            )
        return inputs[0]

    def __enter__(self) -> BlockRunner:
        self._restore = contextlib.ExitStack()
        self._restore.enter_context(torch.no_grad())
        self._restore.enter_context(evaluating(self._model))
        for index, block in enumerate(self._blocks):
            self._restore.enter_context(patched(block.module, self._stand_in(index)))
        return self

    def __exit__(self, *error: object) -> None:
        self._restore.close()

    def _stand_in(self, index: int) -> Callable[..., Any]:
        """The forward pass that replaces a block's own."""
        forward = self._blocks[index].module.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if index < self._current:
                return self._last_output
            if index > self._current:
                raise ValueError(
                    f"model: expected block {self._blocks[self._current].name!r} to run before "
                    f"{self._blocks[index].name!r}"
                )
            assert self._run_current is not None
            return self._run_current(forward, *args, **kwargs)

        return stand_in

    def _call(self, tokens: Tensor, run_current: Callable[..., Any]) -> None:
        """Runs the model up to the current block, which `run_current` runs."""
        self._run_current = run_current
        try:
            self._model(tokens.to(input_device(self._model)), **self._options)
        except _BlockReached:
            return
        finally:
            self._run_current = None
        raise ValueError(
            f"model: its forward pass never called block {self._blocks[self._current].name!r}"
        )

    def run(self, *, keep: bool, on_restart: Callable[[], object] = lambda: None) -> None:
        """Runs the current block on every batch, with smaller ones if memory runs out.

        With `keep` its outputs become the inputs of the next block, which then is the current one.
        `on_restart` is called before all batches run again, to discard what was collected.
        """
        index = self._current
        block = self._blocks[index]
        device = device_of(block.module)

        def attempt() -> None:
            self._catch_up(index)
            move_module(block.module, device)
            self._run_all(keep)

        def reduce(failure: str) -> None:
            on_restart()
            self._reduce(f"block {block.name!r}", failure)

        retry_with_less(attempt, reduce)

    def _run_all(self, keep: bool) -> None:
        block = self._blocks[self._current]
        store = self._device if self.use.on_device else _CPU
        for number, batch in enumerate(self._tokens.split(self.batch_size)):
            output = self._run_batch(number, batch)
            if keep:
                _check_finite(output, block)
                self._kept[number : number + 1] = [_moved(output, store)]
            # Frees it before the next batch runs.
            output = None
        if keep:
            self._current += 1

    def _reduce(self, what: str, failure: str) -> None:
        """Halves the batch, then moves hidden states to the host; restarts at the first block."""
        self._kept, self._current = [], 0
        if self.batch_size > 1:
            self.batch_size //= 2
        elif self.use.on_device and self._device.type != "cpu":
            self.use = replace(self.use, on_device=False)
        else:
            what = f"{what} with one sample of {self._tokens.shape[1]} tokens"
            raise out_of_memory_error(self._device, what, failure)

    def _catch_up(self, index: int) -> None:
        """Runs the blocks before this one again after a restart."""
        if self._current < index < len(self._blocks):
            move_module(self._blocks[index].module, self._homes[index])
        while self._current < index:
            with self.on_device():
                self._run_all(keep=True)

    def _run_batch(self, number: int, batch: Tensor) -> Any:
        """The output of the current block for one batch."""
        device = device_of(self._blocks[self._current].module)
        reached = False
        output: Any = None

        def run_current(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal reached, output
            reached = True
            args, kwargs = _moved((args, kwargs), device)
            output = forward(*args, **kwargs)
            raise _BlockReached

        if self._current == 0:
            self._call(batch, run_current)
            return output
        # Most models do nothing between two blocks: hidden states need not return to the model's
        # device in between.
        self._last_output = self._inputs(number, device if self._direct else self._home)
        try:
            self._call(batch, run_current)
        except RuntimeError as error:
            if reached or not self._direct or device == self._home or is_out_of_memory(error):
                raise
            self._direct = False
            self._last_output = self._inputs(number, self._home)
            self._call(batch, run_current)
        finally:
            self._last_output = None
        return output

    def _inputs(self, number: int, device: torch.device) -> Any:
        """A copy of a batch's kept hidden states, for a block may write to its input."""
        return tree_map_only(Tensor, lambda x: x.to(device, copy=True), self._kept[number])

    def outputs(
        self, make: Callable[[Any, int], Any] = lambda output, first: output
    ) -> Iterator[Any]:
        """Yields, once, the model's outputs by batch, after all blocks have run with `keep`.

        `make` gets the output of a batch and the number of its first sample; its result is yielded.
        """
        first = 0

        def attempt() -> Any:
            self._catch_up(len(self._blocks))
            batch = self._tokens[: self.batch_size].to(input_device(self._model))
            self._last_output = self._inputs(0, self._home)
            try:
                return make(self._model(batch, **self._options), first)
            finally:
                self._last_output = None

        def reduce(failure: str) -> None:
            self._reduce("what follows the blocks", failure)

        while len(self._tokens):
            made = retry_with_less(attempt, reduce)
            # Only the rest may have to run again.
            first += len(self._tokens[: self.batch_size])
            self._tokens = self._tokens[self.batch_size :]
            del self._kept[0]
            yield made

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Holds the weights of the current block on the device; ValueError if they do not fit."""
        index = self._current
        module = self._blocks[index].module
        try:
            if self._block_device is not None:
                self._bring(self._blocks[index], self._block_device)
            yield
        finally:
            move_module(module, self._homes[index])

    def _bring(self, block: Block, device: torch.device) -> None:
        def reduce(failure: str) -> None:
            if not self.use.on_device:
                what = f"the weights of block {block.name!r}"
                raise out_of_memory_error(device, what, failure)
            # The hidden states make room for them.
            self.use = replace(self.use, on_device=False)
            for number, hidden in enumerate(self._kept):
                self._kept[number] = _moved(hidden, _CPU)

        retry_with_less(lambda: move_module(block.module, device), reduce)


def _moved(tree: _Tree, device: torch.device) -> _Tree:
    moved: _Tree = tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)
    return moved


def _check_finite(output: object, block: Block) -> None:
    first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if first is None:
        raise ValueError(
            f"model: expected block {block.name!r} to return a tensor or a tuple of tensors, "
            f"got {type(output).__name__}"
        )
    if not torch.isfinite(first).all():
        raise ValueError(
            f"calibration: block {block.name!r} returns NaN or infinite activations: check its "
            "weights, or run in a wider dtype"
        )
