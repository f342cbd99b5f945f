"""Runs a model block by block over a calibration set, with one block on the device at a time.

The model itself prepares what its blocks get: for every block and batch its forward pass runs anew,
in which the blocks before give back what is kept of the last of them, and which ends with the block
that is due. So a block gets every argument as it gets it in a plain run, whatever the model calls
its masks, positions and flags, and only one set of hidden states is ever kept. What precedes the
blocks (embeddings, masks, positions) runs once for each block and batch, where its weights are.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from farms_fast.adapters.pruning.blocks import Block, Blocks, PrunableLayer
from farms_fast.adapters.pruning.placement import block_device, device_of, input_device
from farms_fast.arguments import natural
from farms_fast.engine.machine import machine_of

__all__ = ["BlockRunner", "MemoryUse", "evaluating", "usual_batch"]

_Tree = TypeVar("_Tree")
_BATCH_TOKENS = 4096


class _Done(Exception):
    """Ends the model's forward pass after the block that is due."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a calibration takes, beside what the model takes where it is.

    Attributes:
        kept: The hidden states between two blocks: samples · seqlen · hidden size · bytes of a
            value (and whatever else a block returns).
        block: The largest block's weights, if they are not on the device already.
        statistics: Of one block's layers, as the method says.
        batch: What one batch takes inside a block: batch · seqlen · (2 · hidden size + the inputs
            and outputs of its layers) · bytes of a value, and a float32 copy of the widest input.
            Attention is taken to keep no matrix of scores.
        on_device: Whether ``kept`` is on the device; else it is in the host's memory.
    """

    kept: int
    block: int
    statistics: int
    batch: int
    on_device: bool

    @property
    def device(self) -> int:
        """Bytes on the device at most."""
        return self.block + self.statistics + self.batch + (self.kept if self.on_device else 0)


class BlockRunner:
    """The blocks of a model over the batches of a calibration set, one block after the other.

    Use it as a context: outside of it the model is as it was, but for its weights. It is in
    evaluation mode and without gradients inside.

    Args:
        model: Called with ``model(tokens)``, and ``use_cache=False`` where it knows that.
        blocks: As `find_blocks` gives them.
        tokens: int64 (samples, seqlen).
        device: Where blocks run; None is where each of them is.
        memory: Bytes to take on that device at most; None is half of the device's. The hidden
            states are kept on the device where they fit beside the rest, else in the host's memory,
            which has to have room for them.
        batch_size: Samples at a time; None is about 4096 tokens, fewer where memory is short.
        statistics: Bytes of what is collected of a block.

    Attributes:
        use: What it takes, a `MemoryUse`.
        batch_size: Samples at a time.

    Raises:
        ValueError: The memory is not enough for one sample at a time, an unknown device, or the
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
        """Runs one sample up to the first block, to know the size of the hidden states."""
        self._model = model
        self._blocks = blocks.blocks
        self._tokens = tokens
        home = device_of(self._blocks[0].module)
        self._device = None if device is None else block_device(device, home)
        self._where = self._device or home
        self._home = home
        self._direct = True
        self._budget = None if memory is None else natural("memory", memory, least=1)
        self._next = 0
        self._due: Callable[..., Any] | None = None
        self._carried: Any = None
        self._kept: list[Any] = []
        takes = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in takes else {}
        self.batch_size, self.use = self._plan(batch_size, statistics)

    # -------------------------------------------------------------------------------- memory

    def _plan(
        self, batch_size: int | None, statistics: Callable[[Block], int]
    ) -> tuple[int, MemoryUse]:
        samples, seqlen = self._tokens.shape
        if batch_size is None:
            size = min(samples, usual_batch(seqlen))
        else:
            size = min(samples, natural("batch_size", batch_size, least=1))
        hidden = self._probe()
        budget = self._budget
        if budget is None:
            budget = machine_of(self._where).memory // 2
        while True:
            use = self._use(hidden, samples, size, statistics, budget)
            if use.device <= budget:
                return size, use
            if size == 1 or batch_size is not None:
                raise ValueError(
                    f"memory: expected at least {use.device} bytes on {self._where} for {size} "
                    f"samples of {seqlen} tokens at a time (block {use.block}, statistics "
                    f"{use.statistics}, batch {use.batch}, kept hidden states "
                    f"{use.kept if use.on_device else 'in host memory'}), got {budget}"
                )
            size //= 2

    def _use(
        self,
        hidden: Tensor,
        samples: int,
        size: int,
        statistics: Callable[[Block], int],
        budget: int,
    ) -> MemoryUse:
        value = hidden.element_size()
        kept = samples * hidden.numel() * value
        block = collected = batch = 0
        for item in self._blocks:
            if device_of(item.module) != self._where:
                weights = sum(p.numel() * p.element_size() for p in item.module.parameters())
                block = max(block, weights)
            collected = max(collected, statistics(item))
            width = 2 * hidden.shape[-1] + sum(sum(layer.shape) for layer in item.layers)
            widest = max((layer.shape[1] for layer in item.layers), default=0)
            token = width * value + 4 * widest
            batch = max(batch, size * (hidden.numel() // hidden.shape[-1]) * token)
        use = MemoryUse(kept, block, collected, batch, on_device=True)
        if use.device > budget and self._where.type != "cpu":
            use = MemoryUse(kept, block, collected, batch, on_device=False)
        return use

    def _probe(self) -> Tensor:
        """The hidden states that the first block gets for one sample."""
        found: list[Tensor] = []

        def look(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found.extend(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            raise _Done

        with self, self._calling(look):
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
        """Puts the runner in the place of the blocks' forward passes."""
        self._restore = contextlib.ExitStack()
        self._restore.enter_context(torch.no_grad())
        self._restore.enter_context(evaluating(self._model))
        for index, block in enumerate(self._blocks):
            self._restore.enter_context(_patched(block.module, self._stand_in(index)))
        return self

    def __exit__(self, *error: object) -> None:
        """Puts the blocks' own forward passes back."""
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

    def run(self, *, keep: bool) -> None:
        """Runs the block that is due on every batch.

        Args:
            keep: Take what it returns as input of the next block, which is due from then on; else
                forget it.

        Raises:
            ValueError: It returns NaN or infinity, or the device is out of memory; the message
                names the block.
        """
        block = self._blocks[self._next]
        store = self._where if self.use.on_device else torch.device("cpu")
        for number, batch in enumerate(self._tokens.split(self.batch_size)):
            try:
                output = self._run_batch(number, batch)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"memory: {self._where} has no room for block {block.name!r} with "
                    f"{len(batch)} samples at a time: give a smaller batch_size"
                ) from error
            if keep:
                _check_finite(output, block)
                self._kept[number : number + 1] = [_moved(output, store)]
        if keep:
            self._next += 1

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
            except RuntimeError:
                if reached or not self._direct or place == self._home:
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

    def outputs(self) -> Iterator[Any]:
        """What the model returns for every batch, once all blocks have run with ``keep``."""
        for number, batch in enumerate(self._tokens.split(self.batch_size)):
            self._carried = self._inputs(number, self._home)
            yield self._model(batch.to(input_device(self._model)), **self._options)
        self._carried = None

    @contextlib.contextmanager
    def on_device(self) -> Iterator[Block]:
        """The block that is due, with its weights on the device for as long."""
        block = self._blocks[self._next]
        home = device_of(block.module)
        if self._device is None or home == self._device:
            yield block
            return
        block.module.to(self._device)
        try:
            yield block
        finally:
            block.module.to(home)

    @contextlib.contextmanager
    def collecting(
        self, layers: Iterable[PrunableLayer], add: Callable[[PrunableLayer, Tensor], None]
    ) -> Iterator[None]:
        """Hands every input of some layers on while the block runs.

        Args:
            layers: Of the block that is due.
            add: Called with a layer and its input (..., in).
        """
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


def usual_batch(seqlen: int) -> int:
    """Samples at a time where nobody says: about 4096 tokens."""
    return max(1, _BATCH_TOKENS // seqlen)


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and afterwards each module's own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _patched(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass, whether the module has one of its own or its class's."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
