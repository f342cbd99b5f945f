"""Prunes a model block by block, each on the outputs of the pruned blocks before it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning.blocks import Block, Blocks, PrunableLayer, find_blocks
from farms_fast.adapters.pruning.calibration import BlockRunner
from farms_fast.adapters.pruning.layer_inputs import collect_statistics
from farms_fast.adapters.pruning.masks import NM, check_target
from farms_fast.adapters.pruning.modules import block_device, device_of
from farms_fast.adapters.pruning.oom import raise_oom_as_value_error
from farms_fast.adapters.pruning.owl import outlier_ratio
from farms_fast.adapters.pruning.pruners import Pruner, pruner, wanda_scores
from farms_fast.adapters.pruning.sparsities import Allocation, check_positive
from farms_fast.adapters.pruning.statistics import InputStatistics
from farms_fast.adapters.pruning.tokens import check_tokens
from farms_fast.core.arguments import check_int
from farms_fast.core.progress import Progress, reporter
from farms_fast.weights.stacks import Skipped

# A ratio or an N:M, the other None.
Target = tuple[float | None, NM | None]


@dataclass(frozen=True)
class PrunedLayer:
    """The result of one layer.

    Attributes:
        name: name of its module.
        block: name of its block's module.
        shape: (out, in).
        target: the requested ratio; 1 − n/m with N:M.
        zeros: weights that are zero now.
        zeros_before: weights that were zero before.
        n_m: (n, m): n weights kept of every m, or None.
        pruned_by: the method, or "" for a layer that did not change (ratio 0).
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
    """The result of `prune_model`.

    Attributes:
        method: the pruner's name.
        layers: the layers in the model's order.
        skipped: the matrices that are not pruned, each with its reason.
        seconds: elapsed time.
        calibration_bytes: the predicted peak of bytes on the device besides the model
            (`farms_fast.adapters.pruning.memory_use.MemoryUse`); 0 without calibration.
        batch_size: the last batch size, after every halving for want of memory; 0 without
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
        """Share of zeros in all of these layers."""
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

    For every block, the calibration set runs through it and gives the pruner the statistics of its
    layers' inputs; then its layers are pruned, and the set runs through the pruned block, whose
    outputs are the inputs of the next one. All arguments and weights are checked before the first
    weight changes. After an error in a later block the blocks before it are pruned.

    Args:
        model: a language model that is called with token ids (samples, seqlen), as those of
            transformers are; `find_blocks` describes the layers that are pruned. For
            `method="magnitude"` any module with repeated blocks.
        method: "magnitude", "wanda" or "sparsegpt".
        ratios: share of zeros, from 0 (no change) to 1, for every layer of the blocks by name, or
            one for all, or an `Allocation`. `Allocation.for_modules` transfers one over other
            layers, such as the parts of a fused weight. Ignored if `n_m` is given.
        calibration: int64 (samples, seqlen), token ids; None for magnitude.
        n_m: (n, m): keeps n of every m consecutive inputs; one for all layers, or one for each by
            name. n = m leaves a layer as it is.
        device: where blocks run and are pruned, one at a time; None leaves each where it is.
        memory: the most bytes to take on the device, see
            `farms_fast.adapters.pruning.memory_use.MemoryUse`; None is half of the device's.
        batch_size: samples at a time to begin with; None is about 4096 tokens. It is halved, down
            to one, when the device runs out of memory.
        progress: as `farms_fast.analyze` takes it; layers count.

    Returns:
        A `PruningReport` with the exact sparsity of every layer. Existing zeros count; a layer with
        more of them than asked for does not change.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown method or device, no repeated blocks, a layer that cannot be pruned
            (see `find_blocks`), ratios that are missing, unknown or out of range, calibration that
            is missing, empty, too long for the model or has unknown tokens, NaN or infinity in
            weights or activations (the message names the layer), or too little memory for one
            sample or for one layer.

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
    chosen = pruner(method)
    for argument, value in (("memory", memory), ("batch_size", batch_size)):
        if value is not None:
            check_int(argument, value, least=1)
    blocks = find_blocks(model)
    targets = _targets(blocks, ratios, n_m)
    for layer in blocks.layers:
        check_target(layer.matrix, *targets[layer.name], layer.name)
    tokens = None
    if calibration is not None:
        tokens = check_tokens(model, calibration)
    elif chosen.needs_inputs:
        raise TypeError(f"calibration: {method} needs token ids (samples, seqlen), got None")
    pruned: list[PrunedLayer] = []
    used = size = 0
    weights = {layer.name: math.prod(layer.shape) for layer in blocks.layers}
    count = len(weights)
    with reporter(progress, count, sum(weights.values()), "weights") as report, torch.no_grad():

        def prune_block(
            block: Block, statistics: dict[str, InputStatistics], device: torch.device | None = None
        ) -> None:
            for layer in block.layers:
                # Popped, so that a layer's statistics end with it.
                inputs, target = statistics.pop(layer.name, None), targets[layer.name]
                pruned.append(_prune_layer(layer, block, chosen, inputs, target, device))
                report(layer.name, weights[layer.name], True)

        if tokens is None or not chosen.needs_inputs:
            where = None if device is None else block_device(device, torch.device("cpu"))
            for block in blocks.blocks:
                prune_block(block, {}, where)
        else:
            needed = partial(_statistics_bytes, chosen)
            runner = BlockRunner(model, blocks, tokens, device, memory, batch_size, needed)
            used = runner.use.device
            with runner:
                for block in blocks.blocks:
                    with runner.on_device():
                        changing = [x for x in block.layers if not _unchanged(targets[x.name])]
                        prune_block(block, collect_statistics(runner, changing, chosen))
                        if block is not blocks.blocks[-1]:
                            runner.run(keep=True)
            size = runner.batch_size
    seconds = time.perf_counter() - start
    return PruningReport(method, tuple(pruned), blocks.skipped, seconds, used, size)


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
    """Counts the outliers of every block of the dense model (OWL, arXiv 2310.05175).

    D of a block is the percentage of the scores |W|·√(mean x²) of all its layers that exceed M
    times their mean.

    Args:
        model: as in `prune_model`; it does not change.
        calibration: int64 (samples, seqlen), token ids.
        threshold: M, above 0.
        device: as in `prune_model`.
        memory: as in `prune_model`.
        batch_size: as in `prune_model`.
        progress: as in `prune_model`; blocks count.

    Returns:
        D by block name in the model's order, as `owl_sparsity` takes it.

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
    check_positive("threshold", threshold)
    blocks = find_blocks(model)
    tokens = check_tokens(model, calibration)

    def needed(block: Block) -> int:
        return 12 * sum(math.prod(layer.shape) for layer in block.layers)

    runner = BlockRunner(model, blocks, tokens, device, memory, batch_size, needed)
    outliers: dict[str, float] = {}
    count = len(blocks.blocks)
    with reporter(progress, count, count, "blocks") as report, runner:
        for block in blocks.blocks:
            with runner.on_device():
                statistics = collect_statistics(runner, block.layers, pruner("wanda"), keep=True)
                what = f"the scores of block {block.name!r}"
                with raise_oom_as_value_error(device_of(block.module), what):
                    scores = [wanda_scores(x.matrix, statistics[x.name]) for x in block.layers]
                    outliers[block.name] = outlier_ratio(scores, threshold)
            report(block.name, 1, True)
    return outliers


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
    """A value for each layer, from one for all or from a mapping with exactly these names."""
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


def _unchanged(target: Target) -> bool:
    ratio, groups = target
    return ratio == 0 if groups is None else groups[0] == groups[1]


def _statistics_bytes(chosen: Pruner, block: Block) -> int:
    """Bytes of all layers' statistics, and of the pruner's work on the largest layer."""
    columns = [layer.shape[1] for layer in block.layers]
    # Scores, their order, and masks.
    work = 16 * max((math.prod(layer.shape) for layer in block.layers), default=0)
    if not chosen.needs_hessian:
        return 4 * sum(columns) + work
    return 4 * sum(c * c for c in columns) + 16 * max(columns, default=0) ** 2 + work


def _prune_layer(
    layer: PrunableLayer,
    block: Block,
    chosen: Pruner,
    statistics: InputStatistics | None,
    target: Target,
    device: torch.device | None = None,
) -> PrunedLayer:
    """Prunes one layer in place, on a device if one is given."""
    ratio, groups = target
    matrix = layer.matrix
    device = device or matrix.device
    what = f"pruning layer {layer.name!r} of {layer.shape} by {chosen.name}"
    with raise_oom_as_value_error(device, what):
        before = int((matrix == 0).sum())
        if not _unchanged(target):
            work = matrix.to(device)
            chosen.prune_(work, None if groups else ratio, statistics, n_m=groups, layer=layer.name)
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
        "" if _unchanged(target) else chosen.name,
    )
