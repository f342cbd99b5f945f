"""Runs a model block by block over a calibration set, with one block on the device at a time.

The model itself prepares what its blocks get: for every block and batch its forward pass runs anew,
in which the blocks before give back what is kept of the last of them, and which ends with the block
that is due. So a block gets every argument as it gets it in a plain run, whatever the model calls
its masks, positions and flags, and only one set of hidden states is ever kept. What precedes the
blocks (embeddings, masks, positions) runs once for each block and batch, where its weights are.

Where the device's memory ends, everything is done again with half of the samples at a time, from
the first block on: which dimension of what a block returns is that of the samples, nobody knows.
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
from farms_fast.adapters.pruning.module_state import evaluating, patched
from farms_fast.adapters.pruning.placement import (
    block_device,
    device_of,
    input_device,
    move_module,
)
from farms_fast.adapters.pruning.shortage import is_out_of_memory, no_room, release, whole
from farms_fast.core.arguments import check_int
from farms_fast.engine.machine import machine_of

__all__ = ["BlockRunner"]

_Tree = TypeVar("_Tree")


class _Done(Exception):
    """Ends the model's forward pass after the block that is due."""


class BlockRunner:
    """The blocks of a model over the batches of a calibration set, one block after the other.

    Use it as a context: outside of it the model is as it was, but for its weights. It is in
    evaluation mode and without gradients inside.

    Args:
        model: called with `model(tokens)`, and `use_cache=False` where it knows that.
        blocks: as `find_blocks` gives them.
        tokens: int64 (samples, seqlen).
        device: where blocks run; None is where each of them is.
        memory: bytes to take on that device at most; None is half of the device's. The hidden
            states are kept on the device where they fit beside the rest, else in the host's memory,
            which has to have room for them.
        batch_size: samples at a time to begin with; None is about 4096 tokens, fewer where memory
            is short. Where the device has no room for them after all, half as many.
        statistics: bytes of what is collected of a block.

    Attributes:
        use: what it takes, a `farms_fast.adapters.pruning.memory_use.MemoryUse`.
        batch_size: samples at a time by now.

    Raises:
        ValueError: the memory is not enough for one sample at a time, an unknown device, or the
            model never reaches its first block.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        tokens: Tensor,
        *,
        device: str | torch.device | None = None,
        memory: int | None = None,
        batch_size: int | None = None,
        statistics: Callable[[Block], int] = lambda block: 0,
    ) -> None:
        self._model = model
        self._blocks = blocks.blocks
        self._tokens = tokens
        home = device_of(self._blocks[0].module)
        self._device = None if device is None else block_device(device, home)
        self._where = self._device or home
        self._home = home
        self._homes = [device_of(block.module) for block in self._blocks]
        self._direct = True
        self._next = 0
        self._due: Callable[..., Any] | None = None
        self._carried: Any = None
        self._kept: list[Any] = []
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        if memory is None:
            budget = machine_of(self._where).memory // 2
        else:
            budget = check_int("memory", memory, least=1)
        self.batch_size, self.use = plan_memory(
            self._blocks, self._probe(), tokens, self._where, budget, batch_size, statistics
        )

    def _probe(self) -> Tensor:
        """The hidden states that the first block gets for one sample."""
        found: list[Tensor] = []

        def look(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found.extend(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise _Done

        what = f"what precedes the blocks with one sample of {self._tokens.shape[1]} tokens"
        with self, self._calling(look), whole(self._where, what):
            self._call(self._tokens[:1])
        if not found or found[0].dim() < 2:
            raise ValueError(
                "model: expected hidden states as the first argument of block "
                f"{self._blocks[0].name!r}, got "
                f"{tuple(found[0].shape) if found else 'no tensor'}"
            )
        return found[0]

    # ----------------------------------------------------------------------------------- runs

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
        forward = self._blocks[index].module.forward

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if index < self._next:
                return self._carried
            if index > self._next:
                raise ValueError(
                    f"model: expected block {self._blocks[self._next].name!r} to run before "
                    f"{self._blocks[index].name!r}"
                )
            assert self._due is not None
            return self._due(forward, *args, **kwargs)

        return stand_in

    @contextlib.contextmanager
    def _calling(self, due: Callable[..., Any]) -> Iterator[None]:
        self._due = due
        try:
            yield
        finally:
            self._due = None

    def _call(self, tokens: Tensor) -> None:
        """Runs the model until the block that is due has run."""
        place = input_device(self._model)
        try:
            self._model(tokens.to(place), **self._options)
        except _Done:
            return
        raise ValueError(
            f"model: its forward pass never called block {self._blocks[self._next].name!r}"
        )

    def run(self, *, keep: bool, again: Callable[[], object] = lambda: None) -> None:
        """Runs the block that is due on every batch; with half of the batch where it has no room.

        Args:
            keep: take what it returns as input of the next block, which is due from then on; else
                forget it.
            again: called before every batch runs again, to forget what was collected of them.

        Raises:
            ValueError: it returns NaN or infinity, or the device has no room for a single sample;
                the message names the block.
        """
        due = self._next
        block = self._blocks[due]
        place = device_of(block.module)
        while True:
            try:
                self._catch_up(due)
                move_module(block.module, place)
                self._run_all(keep)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            # Beyond the handler, where the tensors of what failed are no longer held by its frames.
            again()
            self._shrink(f"block {block.name!r}", failure)

    def _run_all(self, keep: bool) -> None:
        block = self._blocks[self._next]
        store = self._where if self.use.on_device else torch.device("cpu")
        for number, batch in enumerate(self._tokens.split(self.batch_size)):
            output = self._run_batch(number, batch)
            if keep:
                _check_finite(output, block)
                self._kept[number : number + 1] = [_moved(output, store)]
            # Not beside that of the next batch.
            output = None
        if keep:
            self._next += 1

    def _shrink(self, what: str, failure: str) -> None:
        """Less at a time; the first block is due then, and nothing is kept.

        Half of the samples; with one at a time, hidden states in the host's memory.

        Raises:
            ValueError: there is nothing less.
        """
        self._kept, self._next = [], 0
        release()
        if self.batch_size > 1:
            self.batch_size //= 2
        elif self.use.on_device and self._where.type != "cpu":
            self.use = replace(self.use, on_device=False)
        else:
            seqlen = self._tokens.shape[1]
            raise no_room(self._where, f"{what} with one sample of {seqlen} tokens", failure)

    def _catch_up(self, due: int) -> None:
        """Runs the blocks before the one that is due, which makes room for them meanwhile."""
        if self._next < due < len(self._blocks):
            move_module(self._blocks[due].module, self._homes[due])
        while self._next < due:
            with self.on_device():
                self._run_all(keep=True)

    def _run_batch(self, number: int, batch: Tensor) -> Any:
        """What the block that is due returns for one batch."""
        place = device_of(self._blocks[self._next].module)
        reached = False
        output: Any = None

        def due(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal reached, output
            reached = True
            args, kwargs = _moved((args, kwargs), place)
            output = forward(*args, **kwargs)
            raise _Done

        with self._calling(due):
            if self._next == 0:
                self._call(batch)
                return output
            # Where nothing happens between two blocks, hidden states need not go back to where the
            # model is; most models are such.
            self._carried = self._inputs(number, place if self._direct else self._home)
            try:
                self._call(batch)
            except RuntimeError as error:
                if reached or not self._direct or place == self._home or is_out_of_memory(error):
                    raise
                self._direct = False
                self._carried = self._inputs(number, self._home)
                self._call(batch)
            finally:
                self._carried = None
        return output

    def _inputs(self, number: int, place: torch.device) -> Any:
        """A copy of what is kept of a batch, for a block may write to its input."""
        return tree_map_only(Tensor, lambda x: x.to(place, copy=True), self._kept[number])

    def outputs(
        self, make: Callable[[Any, int], Any] = lambda output, first: output
    ) -> Iterator[Any]:
        """Goes once over what the model returns, after all blocks have run with `keep`.

        Args:
            make: called with what it returns for a batch, and with the number of the batch's first
                sample. Where memory ends in there, the batch is halved as it is in a block.

        Yields:
            For every batch what `make` returns.

        Raises:
            ValueError: as `run`.
        """
        first = 0
        while len(self._tokens):
            batch = self._tokens[: self.batch_size]
            failure = None
            try:
                self._catch_up(len(self._blocks))
                made = self._finish(batch, first, make)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            if failure is not None:
                self._shrink("what follows the blocks", failure)
                continue
            # What is left is all that may have to run again.
            self._tokens = self._tokens[len(batch) :]
            del self._kept[0]
            first += len(batch)
            yield made

    def _finish(self, batch: Tensor, first: int, make: Callable[[Any, int], Any]) -> Any:
        self._carried = self._inputs(0, self._home)
        try:
            output = self._model(batch.to(input_device(self._model)), **self._options)
            return make(output, first)
        finally:
            self._carried = None

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Block]:
        """The block that is due, with its weights on the device for as long.

        Raises:
            ValueError: the device has no room for them.
        """
        number = self._next
        block, home = self._blocks[number], self._homes[number]
        try:
            self._bring(block)
            yield block
        finally:
            move_module(block.module, home)

    def _bring(self, block: Block) -> None:
        if self._device is None:
            return
        while True:
            try:
                move_module(block.module, self._device)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            if not self.use.on_device:
                raise no_room(self._where, f"the weights of block {block.name!r}", failure)
            # The hidden states can make room for them.
            self.use = replace(self.use, on_device=False)
            for number, kept in enumerate(self._kept):
                self._kept[number] = _moved(kept, torch.device("cpu"))
            release()


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
