"""Digests of weights: whether a layer is still what it was when it was analysed.

A tensor's digest depends on its dtype, shape and values alone, bit by bit: not on strides, device
or origin. It is BLAKE2b over pieces of 16 MiB, which several threads hash at once, and then over
the pieces' digests; no more than a few pieces are ever copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from farms_fast.weights.recipes import Recipe, recipe_id
from farms_fast.weights.stacks import LayerSpec

# Part of the digest: another size of piece is another digest.
_PIECE = 16 * 2**20
_SIZE = 20
_THREADS = max(1, min(8, os.cpu_count() or 1))


def tensor_digest(tensor: Tensor) -> str:
    """Digest of dtype, shape and values: 40 hexadecimal digits.

    Args:
        tensor: dense, on any device, with any strides.

    Raises:
        ValueError: the tensor has no data (meta device) or is not dense.

    Example:
        >>> import torch
        >>> weight = torch.arange(6.0).reshape(2, 3)
        >>> tensor_digest(weight.T.contiguous().T) == tensor_digest(weight)
        True
        >>> tensor_digest(weight.reshape(3, 2)) == tensor_digest(weight)
        False
    """
    if tensor.layout is not torch.strided or tensor.is_meta:
        what = "the meta device" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"tensor: expected a dense tensor with data, got one of {what}")
    tensor = tensor.detach()
    per_piece = _PIECE // tensor.element_size()
    size = tensor.numel()
    bounds = [(start, min(start + per_piece, size)) for start in range(0, size, per_piece)]

    def digest(bound: tuple[int, int]) -> bytes:
        state = hashlib.blake2b(digest_size=_SIZE)
        for run in _runs(tensor, *bound):
            state.update(_bytes(run))
        return state.digest()

    dtype = str(tensor.dtype).removeprefix("torch.")
    head = f"tensor {dtype} {tuple(tensor.shape)}".encode()
    if len(bounds) > 1:
        with ThreadPoolExecutor(_THREADS) as pool:
            pieces = b"".join(pool.map(digest, bounds))
    else:
        pieces = b"".join(map(digest, bounds))
    return hashlib.blake2b(head + pieces, digest_size=_SIZE).hexdigest()


def layer_digest_of(spec: LayerSpec, tensors: Sequence[Tensor]) -> str:
    """Digest of a layer from its loaded tensors, as `LayerSpec.to_stack` takes them.

    It covers the layer's name, kind and shape, the identity of its recipe, and what the stack is
    made from: of a fused tensor, the rows of this layer alone.

    Raises:
        ValueError: there are more or fewer tensors than the layer has, or one has no data.
        TypeError: `to_stack` is a caller's own and no plain function.
    """
    if len(tensors) != len(spec.tensors):
        raise ValueError(
            f"tensors: expected {len(spec.tensors)} for layer {spec.name!r}, got {len(tensors)}"
        )
    recipe = spec.to_stack
    read = recipe.region(*tensors) if isinstance(recipe, Recipe) else tensors
    head = json.dumps([spec.name, spec.kind, spec.shape, recipe_id(recipe)])
    text = "".join([head, *map(tensor_digest, read)])
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()


def _bytes(run: Tensor) -> memoryview:
    held = run.resolve_conj().resolve_neg().cpu().contiguous()
    # One element has whatever stride it was cut out with.
    return held.as_strided(held.shape, (1,)).view(torch.uint8).numpy().data


def _runs(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Elements `start` to `stop` in the order of a contiguous tensor, as 1-D tensors."""
    if tensor.is_contiguous():
        yield tensor.view(-1)[start:stop]
    elif tensor.dim() == 1:
        yield tensor[start:stop]
    else:
        inner = tensor[0].numel()
        first, last = -(-start // inner), stop // inner
        if first > last:  # within one entry of the first dimension
            yield from _runs(tensor[last], start - last * inner, stop - last * inner)
            return
        if start < first * inner:
            yield from _runs(tensor[first - 1], start - (first - 1) * inner, inner)
        if first < last:
            yield tensor[first:last].reshape(-1)
        if last * inner < stop:
            yield from _runs(tensor[last], 0, stop - last * inner)
