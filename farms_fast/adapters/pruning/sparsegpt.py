"""SparseGPT (arXiv 2301.00774): prunes column by column, and later columns compensate.

Let H be the damped Hessian of a layer's inputs and U the upper Cholesky factor of H⁻¹ = UᵀU.
Pruning column j of a row w leaves the error e_j = w_j / U_jj (0 if w_j is kept), and every later
column changes by −e_j U_j,: . A block of columns chooses its mask by w² / U_jj² when its first
column is reached; with N:M a group of M does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from farms_fast.adapters.pruning.masks import (
    NM,
    check_target,
    lowest,
    lowest_in_groups,
    split_in_proportion,
)
from farms_fast.adapters.pruning.sparsities import check_positive
from farms_fast.adapters.pruning.statistics import InputStatistics, check_statistics, full_float32
from farms_fast.core.arguments import check_int, check_type

_MOST_DAMPING = 100.0


def inverse_factor(
    hessian: Tensor, damping: float = 0.01, *, layer: str = ""
) -> tuple[Tensor, Tensor, float]:
    """The upper U (n, n) with UᵀU = (H + damping·mean·I)⁻¹, the dead columns and the damping.

    The mean is that of the diagonal. The damping grows tenfold each time the factorisation fails. A
    dead column (an input that was always zero) has a zero on the diagonal and gets the mean.
    """
    check_positive("damping", damping)
    check_type("hessian", hessian, Tensor, "a torch.Tensor")
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(
            f"hessian: expected a square matrix (n, n), got shape {tuple(hessian.shape)}"
        )
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    alive = int((~dead).sum())
    mean = diagonal.sum() / alive if alive else torch.ones_like(diagonal.sum())
    while damping <= _MOST_DAMPING:
        damped = hessian.clone()
        added = damped.diagonal()
        added += torch.where(dead, mean, damping * mean)
        factor = _inverse_factor(damped)
        if factor is not None:
            return factor, dead, damping
        damping *= 10
    raise ValueError(
        f"hessian of layer {layer!r}: expected a positive semidefinite matrix, but no Cholesky "
        f"factorisation succeeds with {_MOST_DAMPING:g} times its mean diagonal added"
    )


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


@torch.no_grad()
def sparsegpt_prune_(
    weight: Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: NM | None = None,
    block: int = 128,
    damping: float = 0.01,
    layer: str = "",
) -> Tensor:
    """Prunes a matrix and adjusts the kept weights so that the layer's outputs change little.

    Arguments and errors are those of `farms_fast.adapters.pruning.pruners.PruneFunction`, with
    statistics made with `hessian=True`. `block` columns choose their mask together; with n_m that
    is rounded up to a multiple of m. `damping` is that of `inverse_factor`.

    The zeros are evenly distributed over the blocks of columns. Existing zeros stay zero; a matrix
    with more of them than asked for does not change. Weights of inputs that were always zero go
    first, by magnitude. The mask that is returned marks the weights set to zero; a kept weight can
    round to zero in float16.
    """
    check_target(weight, ratio, n_m, layer)
    hessian = check_statistics(statistics, weight, layer).hessian
    check_positive("damping", damping)
    cols = weight.shape[1]
    width = check_int("block", block, least=1)
    if n_m is not None:
        width = -(-width // n_m[1]) * n_m[1]
    hessian = hessian.to(weight.device, torch.promote_types(hessian.dtype, weight.dtype))
    zero = weight == 0
    starts = range(0, cols, width)
    quotas: list[int] = []
    if n_m is None:
        wanted = round((ratio or 0.0) * weight.numel()) - int(zero.sum())
        if wanted <= 0:
            return zero
        free = [int((~zero[:, start : start + width]).sum()) for start in starts]
        quotas = split_in_proportion(wanted, free)

    with full_float32():
        factor, dead, _ = inverse_factor(hessian, damping, layer=layer)
        # Contiguous, so that the weight's strides do not change the rounding.
        work = weight.to(hessian.dtype, copy=True, memory_format=torch.contiguous_format)
        mask = torch.empty_like(zero)
        for number, start in enumerate(starts):
            columns = slice(start, min(start + width, cols))
            parts = work[:, columns], factor[columns, columns], zero[:, columns], dead[columns]
            quota = quotas[number] if quotas else 0
            errors = _prune_block(*parts, mask[:, columns], quota, n_m)
            work[:, columns.stop :].addmm_(errors.T, factor[columns, columns.stop :], alpha=-1)
    weight.copy_(work)
    return mask


def _prune_block(
    work: Tensor,
    factor: Tensor,
    zero: Tensor,
    dead: Tensor,
    mask: Tensor,
    quota: int,
    n_m: NM | None,
) -> Tensor:
    """Prunes a block in place, fills in its mask, and returns its errors (columns, rows).

    `quota` is the number of weights to prune besides the zeros.
    """
    rows, width = work.shape
    group = width if n_m is None else n_m[1]
    diagonal = factor.diagonal()
    errors = torch.zeros((width, rows), dtype=work.dtype, device=work.device)
    for first in range(0, width, group):
        part = slice(first, first + group)
        # Apply the errors of the block's earlier columns.
        work[:, part].addmm_(errors[:first].T, factor[:first, part], alpha=-1)
        scores = (work[:, part] / diagonal[part]).square_()
        idle = -1 / (1 + work[:, part].abs())
        scores = torch.where(dead[part], idle, scores).masked_fill_(zero[:, part], -2)
        if n_m is None:
            mask[:, part] = lowest(scores, quota + int(zero.sum()))
        else:
            mask[:, part] = lowest_in_groups(scores, *n_m) | zero[:, part]
        pruned = mask[:, part].T / diagonal[part, None]
        for column in range(first, first + group):
            since = slice(first, column)
            value = torch.addmv(work[:, column], errors[since].T, factor[since, column], alpha=-1)
            torch.mul(value, pruned[column - first], out=errors[column])
        inner = factor[part, part].triu(1)
        work[:, part].addmm_(errors[part].T, inner, alpha=-1).masked_fill_(mask[:, part], 0)
    return errors
