"""Prunes a model block by block, each block on the outputs of the pruned ones before it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning.blocks import Block, Blocks, PrunableLayer, find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.collecting import collect
from farms_fast.adapters.pruning.masks import check_target, check_weight
from farms_fast.adapters.pruning.owl import check_threshold, outlier_ratio
from farms_fast.adapters.pruning.placement import block_device, device_of
from farms_fast.adapters.pruning.pruners import Pruner, pruner
from farms_fast.adapters.pruning.shortage import whole
from farms_fast.adapters.pruning.sparsities import Allocation
from farms_fast.adapters.pruning.statistics import InputStatistics
from farms_fast.adapters.pruning.tokens import check_tokens
from farms_fast.adapters.pruning.wanda import wanda_scores
from farms_fast.core.arguments import check_int
from farms_fast.core.progress import Progress, reporter
from farms_fast.weights.layers import Skipped

__all__ = ["PrunedLayer", "PruningReport", "owl_statistics", "prune_model"]

NM = tuple[int, int]
# A ratio or an N:M, the other None.
Target = tuple[float | None, NM | None]


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one layer.

    Attributes:
        name: of its module.
        block: name of its block's module.
        shape: (out, in).
        target: the ratio that was asked for; 1 − n/m with N:M.
        zeros: weights that are zero now.
        zeros_before: weights that were zero before.
        n_m: (n, m): n weights kept of every m, or None.
        pruned_by: the method, or "" for a layer that was left as it is (ratio 0).
    """

    name: str
    block: str
    shape: tuple[int, int]
    target: float
    zeros: int
    zeros_before: int
    n_m: NM | None
    pruned_by: str

    @property
    def reached(self) -> float:
        """Share of weights that are zero now."""
        return self.zeros / math.prod(self.shape)


@dataclass(frozen=True)
class PruningReport:
    """What was pruned.

    Attributes:
        method: of all layers.
        layers: in the model's order.
        skipped: the matrices of the model that were not to be pruned, each with its reason.
        seconds: what it took.
        calibration_bytes: the most bytes taken on the device beside the model, as predicted
            (`farms_fast.adapters.pruning.memory_use.MemoryUse`); 0 without calibration.
        batch_size: samples at a time in the end, after every halving for want of memory; 0 without
            calibration.
    """

    method: str
    layers: tuple[PrunedLayer, ...]
    skipped: tuple[Skipped, ...] = field(repr=False)
    seconds: float
    calibration_bytes: int
    batch_size: int = 0

    @property
    def sparsity(self) -> float:
        """Share of all weights of these layers that are zero."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return sum(layer.zeros for layer in self.layers) / weights


def prune_model(
    model: nn.Module,
    method: str,
    ratios: float | Mapping[str, float] | Allocation,
    calibration: Tensor | None = None,
    *,
    n_m: NM | Mapping[str, NM] | None = None,
    device: str | torch.device | None = None,
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool | Progress = True,
) -> PruningReport:
    """Prunes the linear layers of a model's repeated blocks in place, with a ratio for each.

    Block by block: the calibration set runs through the block, which tells the pruner what its
    layers get; the layers are pruned; the set runs through the pruned block, which gives the inputs
    of the next one. Everything that can be checked is checked before the first weight changes.
    After an error in a later block the blocks before it are pruned.

    Args:
        model: a language model that is called with token ids (samples, seqlen), as those of
            transformers are; see `find_blocks` for what is pruned. For `method="magnitude"`
            any module with repeated blocks.
        method: "magnitude", "wanda" or "sparsegpt".
        ratios: share of zeros for every layer of the blocks by name, from 0 (the layer stays as it
            is) to 1, those of an `Allocation`, or one for all. An Allocation over other layers,
            such as the parts of a fused weight, is carried over by its `for_modules`. Not looked
            at when `n_m` is given.
        calibration: int64 (samples, seqlen), token ids; None for magnitude, which needs none.
        n_m: (n, m): n weights are kept of every m consecutive inputs; one for all layers, or one
            for each by name. n = m leaves a layer as it is.
        device: where blocks run and are pruned, one at a time; None is where each of them is.
        memory: bytes to take on the device at most, see
            `farms_fast.adapters.pruning.memory_use.MemoryUse`; None is half of the device's.
        batch_size: samples at a time to begin with; None is about 4096 tokens. Where the device's
            memory ends, half of them, and so on down to one.
        progress: as `farms_fast.analyze` takes it; layers count.

    Returns:
        A `PruningReport` with the exact sparsity of every layer. Zeros that were there before
        count; a layer with more of them than asked for stays as it is.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown method or device, no repeated blocks, a layer that cannot be pruned
            (see `find_blocks`), ratios that are missing, unknown or out of range, calibration that
            is missing, empty, too long for the model or has unknown tokens, NaN or infinity in
            weights or activations (the message names the layer), or too little memory for one
            sample at a time or for the pruning of one layer.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> layer = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> model = nn.Sequential(nn.Embedding(10, 8), *(layer() for _ in range(2)))
        >>> report = prune_model(model, "wanda", 0.5, torch.randint(10, (4, 6)))
        >>> [(layer.name, layer.zeros, layer.shape) for layer in report.layers][:2]
        [('1.0', 64, (16, 8)), ('1.2', 64, (8, 16))]
        >>> report.sparsity
        0.5
    """
    start = time.perf_counter()
    how = pruner(method)
    _check_room(memory, batch_size)
    blocks = find_blocks(model)
    targets = _targets(blocks, ratios, n_m)
    for layer in blocks.layers:
        check_weight(layer.matrix, layer.name)
        ratio, groups = targets[layer.name]
        check_target(layer.matrix, ratio, groups, layer.name)
    tokens = None
    if calibration is not None:
        tokens = check_tokens(model, calibration)
    elif how.needs_inputs:
        raise TypeError(f"calibration: {method} needs token ids (samples, seqlen), got None")
    done: list[PrunedLayer] = []
    used = size = 0
    place = None if device is None else block_device(device, torch.device("cpu"))
    weights = {layer.name: math.prod(layer.shape) for layer in blocks.layers}
    count = len(weights)
    with reporter(progress, count, sum(weights.values()), "weights") as report, torch.no_grad():
        if tokens is None or not how.needs_inputs:
            for block in blocks.blocks:
                for layer in block.layers:
                    target = targets[layer.name]
                    done.append(_prune_layer(layer, block, how, None, target, place))
                    report(layer.name, weights[layer.name], True)
        else:
            runner = BlockRunner(
                model,
                blocks,
                tokens,
                device=device,
                memory=memory,
                batch_size=batch_size,
                statistics=lambda block: _statistics_bytes(block, how),
            )
            used = runner.use.device
            with runner:
                for number, block in enumerate(blocks.blocks):
                    with runner.on_device():
                        wanted = [x for x in block.layers if not _stays(targets[x.name])]
                        found = collect(runner, wanted, how)
                        for layer in block.layers:
                            target, seen = targets[layer.name], found.pop(layer.name, None)
                            done.append(_prune_layer(layer, block, how, seen, target))
                            report(layer.name, weights[layer.name], True)
                        if number + 1 < len(blocks.blocks):
                            runner.run(keep=True)
            size = runner.batch_size
    seconds = time.perf_counter() - start
    return PruningReport(method, tuple(done), blocks.skipped, seconds, used, size)


def owl_statistics(
    model: nn.Module,
    calibration: Tensor,
    *,
    threshold: float = 5.0,
    device: str | torch.device | None = None,
    memory: int | None = None,
    batch_size: int | None = None,
    progress: bool | Progress = True,
) -> dict[str, float]:
    """How many outliers every block of the dense model has (OWL, arXiv 2310.05175).

    D_b is the percentage of a block's scores |W|·√(mean x²), over all of its layers together, that
    are above M times their mean.

    Args:
        model: as in `prune_model`; it is not changed.
        calibration: int64 (samples, seqlen), token ids.
        threshold: M.
        device: as in `prune_model`.
        memory: as in `prune_model`.
        batch_size: as in `prune_model`.
        progress: as in `prune_model`; blocks count.

    Returns:
        D_b by the name of the block, in the model's order, as
        `farms_fast.adapters.pruning.owl.owl_sparsity` takes it.

    Raises:
        TypeError: as `prune_model`.
        ValueError: as `prune_model`, or M is not positive.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> layer = lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> model = nn.Sequential(nn.Embedding(10, 8), *(layer() for _ in range(2)))
        >>> list(owl_statistics(model, torch.randint(10, (4, 6)), threshold=2))
        ['1', '2']
    """
    check_threshold(threshold)
    blocks = find_blocks(model)
    tokens = check_tokens(model, calibration)
    how = pruner("wanda")
    runner = BlockRunner(
        model,
        blocks,
        tokens,
        device=device,
        memory=memory,
        batch_size=batch_size,
        statistics=lambda block: 12 * sum(math.prod(layer.shape) for layer in block.layers),
    )
    found: dict[str, float] = {}
    count = len(blocks.blocks)
    with reporter(progress, count, count, "blocks") as report, runner:
        for block in blocks.blocks:
            with runner.on_device():
                statistics = collect(runner, block.layers, how, keep=True)
                with whole(device_of(block.module), f"the scores of block {block.name!r}"):
                    scores = [wanda_scores(x.matrix, statistics[x.name]) for x in block.layers]
                    found[block.name] = outlier_ratio(scores, threshold)
            report(block.name, 1, True)
    return found


def _check_room(memory: int | None, batch_size: int | None) -> None:
    for argument, value in (("memory", memory), ("batch_size", batch_size)):
        if value is not None:
            check_int(argument, value, least=1)


def _targets(
    blocks: Blocks,
    ratios: float | Mapping[str, float] | Allocation,
    n_m: NM | Mapping[str, NM] | None,
) -> dict[str, Target]:
    names = [layer.name for layer in blocks.layers]
    if isinstance(ratios, Allocation):
        if n_m is None and set(ratios.ratios) != set(names):
            ratios = ratios.for_modules({x.name: math.prod(x.shape) for x in blocks.layers})
        ratios = ratios.ratios
    if n_m is None:
        return {name: (value, None) for name, value in _for_all("ratios", ratios, names).items()}
    return {name: (None, value) for name, value in _for_all("n_m", n_m, names).items()}


def _for_all(argument: str, given: object, names: list[str]) -> dict[str, Any]:
    """A value for each layer, from one for all or from a mapping that has exactly these names."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in set(names)]
    if missing or unknown:
        what, which = ("nothing for", missing) if missing else ("an unknown layer,", unknown)
        raise ValueError(
            f"{argument}: expected a value for each of the {len(names)} layers of the model's "
            f"blocks and no others, got {what} {which[0]!r} ({len(missing)} missing, "
            f"{len(unknown)} unknown); Allocation.for_modules carries values over to them"
        )
    return {name: given[name] for name in names}


def _stays(target: Target) -> bool:
    ratio, groups = target
    return ratio == 0 if groups is None else groups[0] == groups[1]


def _statistics_bytes(block: Block, how: Pruner) -> int:
    """Of the sums of all layers, and of what the pruner makes of the largest one's."""
    columns = [layer.shape[1] for layer in block.layers]
    weights = max((math.prod(layer.shape) for layer in block.layers), default=0)
    if not how.needs_hessian:
        # Scores, their order, and masks.
        return 4 * sum(columns) + 16 * weights
    return 4 * sum(c * c for c in columns) + 16 * max(columns, default=0) ** 2 + 16 * weights


def _prune_layer(
    layer: PrunableLayer,
    block: Block,
    how: Pruner,
    statistics: InputStatistics | None,
    target: Target,
    device: torch.device | None = None,
) -> PrunedLayer:
    """Prunes one layer in place, on the device if there is one."""
    ratio, groups = target
    matrix = layer.matrix
    place = device or matrix.device
    with whole(place, f"pruning layer {layer.name!r} of {layer.shape} by {how.name}"):
        before = int((matrix == 0).sum())
        if not _stays(target):
            work = matrix.to(place)
            how.prune_(work, None if groups else ratio, statistics, n_m=groups, layer=layer.name)
            if work is not matrix:
                matrix.copy_(work)
    return PrunedLayer(
        layer.name,
        block.name,
        layer.shape,
        float(ratio or 0.0) if groups is None else 1 - groups[0] / groups[1],
        int((matrix == 0).sum()),
        before,
        groups,
        "" if _stays(target) else how.name,
    )
