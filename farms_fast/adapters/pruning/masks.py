"""Masks of the lowest scores, in exact numbers, over a matrix, a row or groups of N:M.

A threshold alone prunes too many where scores are equal, as they often are in bfloat16. Among equal
scores the first one goes first, so that a mask is the same on every device and in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from farms_fast.core.arguments import check_int, check_type, is_real

NM = tuple[int, int]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks exactly `count` of the lowest scores, which have no NaN: bool (rows, cols)."""
    return _lowest_in_each_row(scores.reshape(1, -1), count).reshape(scores.shape)


def lowest_in_rows(scores: Tensor, ratio: float) -> Tensor:
    """Marks round(ratio * (rows * cols)) of the lowest scores, as many in a row to within one."""
    rows, cols = scores.shape
    ends = torch.tensor([round(ratio * (cols * (row + 1))) for row in range(rows)])
    counts = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for count in counts.unique().tolist():
        chosen = (counts == count).to(scores.device)
        mask[chosen] = _lowest_in_each_row(scores[chosen], count)
    return mask


def lowest_in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Marks all but the `n` highest of every `m` consecutive scores of a row."""
    groups = scores.reshape(scores.shape[0], -1, m)
    order = groups.argsort(dim=-1, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., : m - n], True).reshape(scores.shape)


def split_in_proportion(total: int, capacities: list[int]) -> list[int]:
    """Splits a number of at most sum(capacities) in proportion to them, and exceeds none."""
    capacity = sum(capacities)
    parts, given, filled = [], 0, 0
    for size in capacities:
        filled += size
        # Integers: a float is inexact beyond 2^53, and a part could exceed its capacity.
        upto = (2 * total * filled + capacity) // (2 * capacity) if capacity else 0
        parts.append(upto - given)
        given = upto
    return parts


def check_weight(weight: Tensor, layer: str = "") -> None:
    """Raises unless a weight is a floating matrix with finite values."""
    check_type("weight", weight, Tensor, "a torch.Tensor")
    of = f" of layer {layer!r}" if layer else ""
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"weight{of}: expected a floating matrix (out, in), "
            f"got {tuple(weight.shape)} of {weight.dtype}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight{of}: expected finite values, got NaN or infinity")


def check_target(weight: Tensor, ratio: float | None, n_m: NM | None, layer: str = "") -> None:
    """Checks a weight and its one target: a ratio in [0, 1], or an N:M that divides the columns."""
    check_weight(weight, layer)
    of = f" of layer {layer!r}" if layer else ""
    if _shares_elements(weight):
        raise ValueError(
            f"weight{of}: expected each element in memory of its own, got shape"
            f" {tuple(weight.shape)} with strides {weight.stride()}: give a contiguous copy"
        )
    if (ratio is None) == (n_m is None):
        raise ValueError(f"ratio, n_m: expected one of the two, got ratio={ratio}, n_m={n_m}")
    if n_m is None:
        if not is_real(ratio) or not 0 <= ratio <= 1:
            raise ValueError(f"ratio{of}: expected a number from 0 to 1, got {ratio!r}")
    elif weight.shape[1] % (m := check_pattern(n_m, layer)[1]):
        raise ValueError(
            f"n_m{of}: groups of {m} do not divide the {weight.shape[1]} columns of the weight"
        )


def _shares_elements(weight: Tensor) -> bool:
    """Whether two elements of a matrix are one in memory, as in an expanded one."""
    (rows, cols), (down, along) = weight.shape, weight.stride()
    if (rows > 1 and down == 0) or (cols > 1 and along == 0):
        return True
    # The nearest (i, j) that lies where (0, j') does is `along / common` rows on.
    common = math.gcd(down, along)
    return common > 0 and along // common < rows and down // common < cols


def check_pattern(n_m: object, layer: str = "") -> NM:
    """Checks an N:M pattern and returns its n and m."""
    of = f" of layer {layer!r}" if layer else ""
    pair = list(n_m) if isinstance(n_m, Iterable) else []
    if len(pair) != 2:
        raise ValueError(f"n_m{of}: expected (n, m), n kept of every m, got {n_m!r}")
    n, m = check_int(f"n_m[0]{of}", pair[0]), check_int(f"n_m[1]{of}", pair[1], least=1)
    if n > m:
        raise ValueError(f"n_m{of}: expected n <= m, n kept of every m, got {n}:{m}")
    return n, m


def _lowest_in_each_row(scores: Tensor, count: int) -> Tensor:
    if count in (0, scores.shape[1]):
        return torch.full(scores.shape, bool(count), device=scores.device)
    threshold = _kth_lowest(scores, count)
    mask = scores < threshold
    equal = scores == threshold
    missing = count - mask.sum(dim=1, keepdim=True)
    return mask | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    # CUDA's kthvalue gives each row to one thread block, which is slow for a row of millions.
    if scores.is_cuda and scores.shape[0] == 1:
        return scores.sort(dim=1).values[:, k - 1 : k]
    return scores.kthvalue(k, dim=1, keepdim=True).values
