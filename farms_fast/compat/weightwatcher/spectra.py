"""Eigenvalues of many layers at once, of their weights and of their weights shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from farms_fast.compat.weightwatcher.layers import WeightLayer
from farms_fast.core.packing import pack
from farms_fast.spectra.esd import window_eigenvalues
from farms_fast.spectra.windows import FullMatrix, window_table

__all__ = ["LayerSpectra", "layer_spectra", "shuffled"]

FloatArray = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
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
    """The eigenvalues of a layer.

    Attributes:
        evals: (n,), float64, ascending, of all matrices together; empty where a weight is not
            finite.
        packed: the same on the device.
        per_matrix: (P, c), ascending by row.
        shuffled: of the shuffled weights, all replicas together; empty unless asked for.
        shuffled_once: of the first replica. WeightWatcher shuffles once more for it; whatever is
            made of it has the same distribution either way.
    """

    evals: FloatArray
    packed: Tensor
    per_matrix: FloatArray
    shuffled: FloatArray
    shuffled_once: FloatArray


def layer_spectra(
    layers: Sequence[WeightLayer], device: torch.device, *, shuffle: bool, seed: int
) -> list[LayerSpectra]:
    """Solves the matrices of all layers, those of equal order together.

    Args:
        layers: what to solve.
        device: where.
        shuffle: solve every layer with its elements shuffled as well.
        seed: of the shuffles; a layer's depend on it, its id, its slice and the device alone.
    """
    spectra: dict[int, LayerSpectra] = {}
    for batch in _batches(layers, shuffle):
        spectra.update(_solved(layers, batch, device, shuffle, seed))
    return [spectra[index] for index in range(len(layers))]


def shuffled(values: Tensor, key: tuple[int, ...]) -> Tensor:
    """The values in a random order that depends on their number, the key and the device alone.

    Args:
        values: (n,), on the CPU or on CUDA; not written.
        key: integers, none negative.

    Example:
        >>> import torch
        >>> from farms_fast.compat.weightwatcher.spectra import shuffled
        >>> first, second = (shuffled(torch.arange(9.0), (0, i)) for i in range(2))
        >>> bool((first == second).all()), first.sort().values.tolist() == list(range(9))
        (False, True)
    """
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


def _batches(layers: Sequence[WeightLayer], shuffle: bool) -> list[list[int]]:
    """Layers of one order, in parts of bounded size; as near to the layers' order as that goes."""
    buckets: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        buckets.setdefault(layer.order, []).append(index)

    def weight_bytes(index: int) -> int:
        layer = layers[index]
        return 4 * math.prod(layer.shape) * (1 + shuffle * _draws(layer))

    return sorted(
        batch for bucket in buckets.values() for batch in pack(bucket, weight_bytes, _WEIGHT_BYTES)
    )


def _solved(
    layers: Sequence[WeightLayer],
    batch: Sequence[int],
    device: torch.device,
    shuffle: bool,
    seed: int,
) -> dict[int, LayerSpectra]:
    order = layers[batch[0]].order
    weights = [layers[index].load().to(device) for index in batch]
    random = _replicas(weights, [layers[index] for index in batch], seed) if shuffle else []
    stacks: list[Tensor] = []
    for number, weight in enumerate(weights):
        shape = weight.shape[2:]
        stacks.append(weight.reshape(-1, *shape))
        if shuffle:
            stacks.append(random[number].reshape(-1, *shape))
    # Of the product of two adapters no more are wanted than its rank, and nothing asks for the
    # smallest of a shuffled matrix.
    kept = [
        count
        for index in batch
        for count in (min(order, layers[index].components), 0)[: 1 + shuffle]
    ]
    evals = iter(_eigenvalues(stacks, order, kept))
    solved: dict[int, LayerSpectra] = {}
    for index in batch:
        layer = layers[index]
        own = _largest(next(evals), layer)
        randomized = _largest(next(evals), layer) if shuffle else own.new_empty(0)
        if not bool(own.isfinite().all()):
            own, randomized = own[:, :0], randomized[:0]
        packed = own.flatten().sort().values
        once = own.shape[0]
        solved[index] = LayerSpectra(
            packed.cpu().numpy(),
            packed,
            own.cpu().numpy(),
            randomized.flatten().sort().values.cpu().numpy(),
            randomized[:once].flatten().sort().values.cpu().numpy(),
        )
    return solved


def _replicas(weights: Sequence[Tensor], layers: Sequence[WeightLayer], seed: int) -> list[Tensor]:
    """(draws, P, B, R, C) a layer: the elements of each of the P matrices in a random order."""
    keys: list[tuple[int, ...]] = []
    rows: list[Tensor] = []
    for weight, layer in zip(weights, layers, strict=True):
        matrices = weight.reshape(layer.shape[0], -1)
        slice_id = int(str(layer.extra.get("slice_id", 0)))
        for draw in range(_draws(layer)):
            for position, row in enumerate(matrices):
                keys.append((seed, layer.layer_id, slice_id, draw, position))
                rows.append(row)
    if weights[0].device.type == "cuda":
        drawn = iter([shuffled(row, key) for row, key in zip(rows, keys, strict=True)])
    else:
        # NumPy shuffles without holding the interpreter.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            drawn = iter(list(pool.map(shuffled, rows, keys)))
    return [
        torch.stack(list(islice(drawn, _draws(layer) * layer.shape[0]))).reshape(-1, *layer.shape)
        for layer in layers
    ]


def _eigenvalues(stacks: list[Tensor], order: int, kept: Sequence[int]) -> list[Tensor]:
    """(S, order) of every stack, the largest `kept` of them right even where they almost vanish."""
    tables = [
        window_table(FullMatrix().grid(*stack.shape[1:]), entries=len(stack), weight=number)
        for number, stack in enumerate(stacks)
    ]
    if len({stack.dtype for stack in stacks}) > 1:
        stacks = [stack.double() for stack in stacks]
    evals = window_eigenvalues(stacks, torch.cat(tables), order, torch.float64, None, 0)
    found = []
    parts = evals.split([len(table) for table in tables])
    for stack, part, count in zip(stacks, parts, kept, strict=True):
        if count == 0:
            found.append(part)
            continue
        # A Gram matrix knows its eigenvalues to this; below it, only singular values can tell 0
        # from small, as ranks ask for.
        vague = (part[:, -count] <= 8 * order * _EPS * part[:, -1]) & (part[:, -1] > 0)
        if bool(vague.any()):
            driver = "gesvd" if stack.device.type == "cuda" else None
            exact = torch.linalg.svdvals(stack[vague].double(), driver=driver)
            part = part.clone()
            part[vague] = exact.square().flip(-1)
        found.append(part)
    return found


def _largest(evals: Tensor, layer: WeightLayer) -> Tensor:
    """(draws * P, c), ascending: the eigenvalues that count, scaled."""
    rows = evals.reshape(-1, layer.shape[1] * layer.order)
    if layer.shape[1] > 1:
        rows = rows.sort(dim=-1).values
    return rows[:, -layer.components :] * layer.scale
