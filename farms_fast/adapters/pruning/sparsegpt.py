"""SparseGPT (arXiv 2301.00774): prunes column by column, and later columns compensate.

Let H be the damped Hessian of a layer's inputs and U the upper Cholesky factor of H⁻¹ = UᵀU.
Pruning column j of a row w leaves the error e_j = w_j / U_jj (0 if w_j is kept), and every later
column changes by −e_j U_j,: . A block of columns chooses its mask by w² / U_jj² when its first
column is reached; with N:M a group of M does.
"""

from __future__ import annotations

import torch

from farms_fast.adapters.pruning.masks import (
    check_target,
    check_weight,
    lowest,
    lowest_in_groups,
    split_in_proportion,
)
from farms_fast.adapters.pruning.statistics import (
    InputStatistics,
    check_statistics,
    full_float32,
)
from farms_fast.core.arguments import check_int, is_real

__all__ = ["check_damping", "inverse_factor", "sparsegpt_prune_"]

_MOST_DAMPING = 100.0


def check_damping(damping: object) -> None:
    """Raises ValueError unless it is a number above 0."""
    if not is_real(damping) or not damping > 0:
        raise ValueError(f"damping: expected a number above 0, got {damping!r}")


def inverse_factor(
    hessian: torch.Tensor, damping: float = 0.01, *, layer: str = ""
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The upper Cholesky factor of a damped Hessian's inverse.

    `damping` times the mean of the diagonal is added to the diagonal. Each time the Cholesky
    factorisation fails, the damping grows tenfold. A dead column (an input that was always zero)
    has a zero on the diagonal and gets the mean of the others.

    Args:
        hessian: float32 or float64 (n, n), symmetric; not written.
        damping: share of the mean diagonal, above 0.
        layer: the layer's name for messages.

    Returns:
        The factor U (n, n) with UᵀU = (H + damping·mean·I)⁻¹, the dead columns bool (n,), and the
        damping that sufficed.

    Raises:
        TypeError: hessian is no tensor.
        ValueError: hessian is not square, damping is not positive, or 100 times the mean diagonal
            does not suffice, as for a matrix that is no Hessian.

    Example:
        >>> factor, dead, damping = inverse_factor(torch.eye(2) * 2, 1.0)
        >>> factor.diagonal().tolist(), dead.tolist(), damping
        ([0.5, 0.5], [False, False], 1.0)
    """
    check_damping(damping)
    if not isinstance(hessian, torch.Tensor):
        raise TypeError(f"hessian: expected a torch.Tensor, got {type(hessian).__name__}")
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


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


@torch.no_grad()
def sparsegpt_prune_(
    weight: torch.Tensor,
    ratio: float | None,
    statistics: InputStatistics | None = None,
    *,
    n_m: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
    layer: str = "",
) -> torch.Tensor:
    """Prunes a matrix and adjusts the kept weights so that the layer's outputs change little.

    Other arguments and errors are those of `farms_fast.adapters.pruning.pruners.PruneFunction`. The
    zeros are evenly distributed over the blocks of columns. Existing zeros stay zero; a matrix with
    more of them than asked for does not change. Weights of inputs that were always zero go first,
    by magnitude. The mask that is returned marks the weights set to zero; a kept weight can round
    to zero in float16.

    Args:
        weight: floating (out, in); written in place.
        ratio: share of zeros.
        statistics: those of the layer's inputs, made with `hessian=True`.
        n_m: (n, m) instead of a ratio.
        block: columns that choose their mask together; with n_m rounded up to a multiple of m.
        damping: as `inverse_factor` takes it.
        layer: the layer's name for messages.

    Example:
        >>> statistics = InputStatistics(2, hessian=True)
        >>> statistics.add(torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> sparsegpt_prune_(weight, 0.5, statistics).tolist()
        [[True, False]]
        >>> 2.9 < float(weight[0, 1]) < 3.0
        True
    """
    check_weight(weight, layer)
    check_target(weight, ratio, n_m, layer)
    hessian = check_statistics(statistics, weight, layer).hessian
    check_damping(damping)
    cols = weight.shape[1]
    width = check_int("block", block, least=1)
    if n_m is not None:
        width = -(-width // n_m[1]) * n_m[1]
    hessian = hessian.to(weight.device, torch.promote_types(hessian.dtype, weight.dtype))
    zero = weight == 0
    starts = range(0, cols, width)
    quotas: list[int] | None = None
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
            errors = _prune_block(
                work[:, columns],
                factor[columns, columns],
                zero[:, columns],
                dead[columns],
                mask[:, columns],
                quotas[number] if quotas else 0,
                n_m,
            )
            work[:, columns.stop :].addmm_(errors.T, factor[columns, columns.stop :], alpha=-1)
    weight.copy_(work)
    return mask


def _prune_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    zero: torch.Tensor,
    dead: torch.Tensor,
    mask: torch.Tensor,
    quota: int,
    n_m: tuple[int, int] | None,
) -> torch.Tensor:
    """Prunes a block in place, fills in its mask, and returns its errors (columns, rows).

    `quota` is the number of weights to prune besides the zeros. The errors are transposed, so that
    those of one column are contiguous.
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
