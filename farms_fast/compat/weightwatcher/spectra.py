"""Eigenvalues of many layers at once, of their weights and of their weights shuffled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, starmap

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farms_fast.compat.weightwatcher.layers import WeightLayer
from farms_fast.core.packing import group_by_budget
from farms_fast.engine.solve import SolveTask, make_pools
from farms_fast.spectra.power_law import rounding_share
from farms_fast.spectra.windows import FullMatrix

FloatArray = npt.NDArray[np.float64]

# Weights that are on the device at a time.
_WEIGHT_BYTES = 4 * 2**30
# Layers with fewer eigenvalues than this are shuffled several times, for their largest eigenvalue.
_FEW = 100
_REPLICAS = 5
# Shuffles of more values than this go by buckets.
_IN_CACHE = 2**21
_BUCKETS = 256


@dataclass(frozen=True)
class LayerSpectra:
    """The eigenvalues of a layer, ascending; empty where a weight is not finite.

    `evals` and, on the device, `packed` are those of all matrices together, `per_matrix` (P, c)
    those of each, and `shuffled` those of the shuffled weights, all replicas together.
    `shuffled_once` are those of the first replica: WeightWatcher shuffles once more for them, and
    whatever is made of them has the same distribution either way.
    """

    evals: FloatArray
    packed: Tensor
    per_matrix: FloatArray
    shuffled: FloatArray
    shuffled_once: FloatArray


def layer_spectra(
    layers: Sequence[WeightLayer], device: torch.device, *, shuffle: bool, seed: int
) -> list[LayerSpectra]:
    """Solves all layers, those of equal order together, shuffled as well where asked for.

    A layer's shuffles depend on the seed, its id, its slice and the device alone.
    """

    def weight_bytes(index: int) -> int:
        layer = layers[index]
        return 4 * math.prod(layer.shape) * (1 + shuffle * _draws(layer))

    batches = group_by_budget(
        range(len(layers)), lambda index: layers[index].order, weight_bytes, _WEIGHT_BYTES
    )
    spectra: dict[int, LayerSpectra] = {}
    # As near to the layers' order as it goes.
    for batch in sorted(batches):
        solved = _solved([layers[index] for index in batch], device, seed if shuffle else None)
        spectra.update(zip(batch, solved, strict=True))
    return [spectra[index] for index in range(len(layers))]


def shuffled(values: Tensor, key: tuple[int, ...]) -> Tensor:
    """The values (n,) in a random order that depends on n, the key and the device alone."""
    seed = np.random.SeedSequence(key)
    if values.device.type == "cuda":
        number = int(seed.generate_state(1, np.uint64)[0])
        generator = torch.Generator(values.device).manual_seed(number)
        order = torch.randperm(values.numel(), generator=generator, device=values.device)
        return values[order]
    drawn = np.random.Generator(np.random.SFC64(seed))
    ordered = values.numpy()
    if ordered.size <= _IN_CACHE:
        ordered = ordered.copy()
        drawn.shuffle(ordered)
        return torch.from_numpy(ordered)
    # Every value to a bucket at random, and each bucket shuffled where the cache holds it: as
    # uniform as one shuffle of all (Rao 1961, Sandelius 1962), which would miss at every step.
    bucket = drawn.integers(0, _BUCKETS, ordered.size, dtype=np.uint8)
    ordered = ordered[np.argsort(bucket, kind="stable")]
    ends = np.cumsum(np.bincount(bucket, minlength=_BUCKETS))
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        drawn.shuffle(ordered[begin:end])
    return torch.from_numpy(ordered)


def _draws(layer: WeightLayer) -> int:
    return _REPLICAS if layer.components < _FEW else 1


def _solved(
    layers: Sequence[WeightLayer], device: torch.device, seed: int | None
) -> list[LayerSpectra]:
    """The spectra of layers of one order; of shuffled weights too unless the seed is None."""
    weights = [layer.load().to(device) for layer in layers]
    replicas = [] if seed is None else _replicas(weights, layers, seed)
    # Of the product of two adapters no more are wanted than its rank, and nothing asks for the
    # smallest of a shuffled matrix.
    exact = [min(layer.order, layer.components) for layer in layers]
    solved = _eigenvalues([*weights, *replicas], exact)
    evals = _counting(solved[: len(layers)], layers)
    random_evals = [own[:0] for own in evals]
    if replicas:
        random_evals = _counting(solved[len(layers) :], layers)
    # Of each layer all eigenvalues, those of the shuffled weights, and those of the first replica.
    parts = [
        part
        for own, random in zip(evals, random_evals, strict=True)
        for part in (own, random, random[: len(own)])
    ]
    lengths = [part.numel() for part in parts]
    (pool,) = make_pools(lengths, device)
    sorted_evals = pool.sort(torch.cat([part.flatten() for part in parts]))
    packed, on_host = sorted_evals.split(lengths)[::3], sorted_evals.cpu().numpy()
    values = np.split(on_host, np.cumsum(lengths)[:-1])
    spectra = []
    for number, own in enumerate(evals):
        pooled, random, once = values[3 * number : 3 * number + 3]
        per_matrix, on_device = own.cpu().numpy(), packed[number]
        if not np.isfinite(pooled[-1:]).all():
            pooled, random, once = pooled[:0], random[:0], once[:0]
            per_matrix, on_device = per_matrix[:, :0], on_device[:0]
        spectra.append(LayerSpectra(pooled, on_device, per_matrix, random, once))
    return spectra


def _replicas(weights: Sequence[Tensor], layers: Sequence[WeightLayer], seed: int) -> list[Tensor]:
    """(draws, P, B, R, C) a layer: the elements of each of the P matrices in a random order."""
    keyed_rows = [
        (row, (seed, layer.layer_id, int(str(layer.extra.get("slice_id", 0))), draw, position))
        for weight, layer in zip(weights, layers, strict=True)
        for draw in range(_draws(layer))
        for position, row in enumerate(weight.reshape(layer.shape[0], -1))
    ]
    if weights[0].device.type == "cuda":
        drawn: Iterator[Tensor] = starmap(shuffled, keyed_rows)
    else:
        # NumPy shuffles without holding the interpreter.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            drawn = pool.map(shuffled, *zip(*keyed_rows, strict=True))
    return [
        torch.stack(list(islice(drawn, _draws(layer) * layer.shape[0]))).reshape(-1, *layer.shape)
        for layer in layers
    ]


def _eigenvalues(weights: Sequence[Tensor], exact: Sequence[int]) -> list[Tensor]:
    """(S, order) of all matrices of each weight (..., R, C).

    Of the first weights, the `exact` largest are right even where they almost vanish.
    """
    stacks = [weight.flatten(0, -3) for weight in weights]
    if len({stack.dtype for stack in stacks}) > 1:
        stacks = [stack.double() for stack in stacks]
    windows = [(FullMatrix().grid(*stack.shape[1:]), len(stack)) for stack in stacks]
    task = SolveTask.of(windows, published=True)
    evals = list(task.solve(stacks).split(task.windows))
    for number, count in enumerate(exact):
        stack, part = stacks[number], evals[number]
        # A Gram matrix knows its eigenvalues to this; below it, only singular values can tell 0
        # from small, as ranks ask for.
        vague = (part[:, -count] <= rounding_share(task.order) * part[:, -1]) & (part[:, -1] > 0)
        if bool(vague.any()):
            driver = "gesvd" if stack.device.type == "cuda" else None
            singular = torch.linalg.svdvals(stack[vague].double(), driver=driver)
            evals[number] = part.clone()
            evals[number][vague] = singular.square().flip(-1)
    return evals


def _counting(evals: Sequence[Tensor], layers: Sequence[WeightLayer]) -> list[Tensor]:
    """(draws * P, c) of each layer, ascending: the eigenvalues that count, scaled."""
    counting = []
    for layer, part in zip(layers, evals, strict=True):
        rows = part.reshape(-1, layer.shape[1] * layer.order)
        if layer.shape[1] > 1:
            rows = rows.sort(dim=-1).values
        counting.append(rows[:, -layer.components :] * layer.scale)
    return counting
