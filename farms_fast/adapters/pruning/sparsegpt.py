"""SparseGPT (arXiv 2301.00774): prune column by column, and let later columns make up for it.

With H = U⁻¹U⁻ᵀ the damped Hessian of a layer's inputs, U upper triangular (the Cholesky factor of
H⁻¹ = UᵀU), column j of a row w leaves the error e_j = w_j / U_jj if it is pruned, and 0 if not, and
every later column changes by −e_j U_j,: . Columns go in blocks; a block chooses its mask by
w² / U_jj² when its first column is reached, in N:M a group of M when its first column is.
"""

from __future__ import annotations

import torch

from farms_fast.adapters.pruning.masks import (
    check_target,
    check_weight,
    lowest,
    lowest_in_groups,
    share_out,
)
from farms_fast.adapters.pruning.sparsities import is_number
from farms_fast.adapters.pruning.statistics import (
    InputStatistics,
    check_statistics,
    full_float32,
)
from farms_fast.core.arguments import check_int

__all__ = ["check_damping", "inverse_factor", "sparsegpt_prune_"]

_MOST_DAMPING = 100.0


def check_damping(damping: object) -> None:
    """Raises ValueError unless it is a number above 0."""
    if not is_number(damping) or not damping > 0:
        raise ValueError(f"damping: expected a number above 0, got {damping!r}")


def inverse_factor(
    hessian: torch.Tensor, damping: float = 0.01, *, layer: str = ""
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The upper Cholesky factor of a damped Hessian's inverse.

    `damping` times the mean of the diagonal is added to the diagonal. Where a Cholesky
    factorisation fails all the same, ten times as much, and so on. A dead column (an input that was
    always zero) has a zero on the diagonal; it gets the mean of the others.

    Args:
        hessian: float32 or float64 (n, n), symmetric; not written.
        damping: share of the mean diagonal, above 0.
        layer: the layer's name for messages.

    Returns:
        The factor U (n, n) with UᵀU = (H + damping·mean·I)⁻¹, the dead columns bool (n,), and the
        damping that was enough.

    Raises:
        TypeError: hessian is no tensor.
        ValueError: hessian is not square, damping is not positive, or 100 times the mean diagonal
            was not enough, as for a matrix that is no Hessian.

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
    """Prunes a matrix and changes what is kept so that the layer's outputs change little.

    Args:
        weight: floating (out, in), any strides; written in place.
        ratio: share of all weights that are zero afterwards, exactly round(ratio * (out * in)),
            shared out evenly over the blocks of columns. Zeros that were there before count and
            stay zero; a matrix with more of them than that stays as it is. Of inputs that were
            always zero, weights go first, those of least magnitude before others. None with
            `n_m`.
        statistics: of the layer's inputs, made with `hessian=True`.
        n_m: (n, m): n weights are kept of every m consecutive ones of a row, instead of a ratio.
            Zeros that were there before stay zero.
        block: columns that choose their mask together; with n_m rounded up to a multiple of m.
        damping: as `inverse_factor` takes it.
        layer: the layer's name for messages.

    Returns:
        bool (out, in), true where the weight was set to zero. (A kept weight can still round to
        zero in float16.)

    Raises:
        TypeError: weight is no tensor, or statistics are missing.
        ValueError: as `magnitude_prune_`,
            `inverse_factor` and the statistics.

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
        quotas = share_out(wanted, free)

    with full_float32():
        factor, dead, _ = inverse_factor(hessian, damping, layer=layer)
        # Rows side by side whatever the weight's strides, so that they do not change the rounding.
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

    `quota` is the number of weights to prune beside the zeros. The errors are transposed, so that
    those of one column lie side by side.
    """
    rows, width = work.shape
    group = width if n_m is None else n_m[1]
    diagonal = factor.diagonal()
    errors = torch.zeros((width, rows), dtype=work.dtype, device=work.device)
    for first in range(0, width, group):
        part = slice(first, first + group)
        # What the columns before the group have made of it.
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
