"""`net_esd_estimator` of ModelBalancing (TB for fine-tuning; EMNLP 2024).

It is AlphaPruning's function with other defaults and other columns.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from torch import nn

from farms_fast.compat.arguments import number
from farms_fast.compat.farms.estimators import COLUMNS, Results, results_of, whole_layers
from farms_fast.compat.farms.spectra import FittedSpectrum, TailRule
from farms_fast.core.arguments import check_int, check_type


def net_esd_estimator(
    net: nn.Module,
    EVALS_THRESH: float = 0.00001,
    bins: int = 100,
    fix_fingers: str | None = None,
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    eigs_num_thresh: int = 50,
    filter_zeros: bool = False,
    init_stable_rank: Sequence[float] | None = None,
    sr_mid_pos: float | None = None,
    *,
    memory: int | None = None,
) -> Results:
    """Alpha and stable ranks of every Linear and Conv2d, with ModelBalancing's columns.

    Args:
        net: see `farms_fast.compat.net_esd_estimator`.
        EVALS_THRESH: see there.
        bins: see there.
        fix_fingers: see there.
        xmin_pos: see there.
        conv_norm: see there.
        eigs_num_thresh: layers with fewer eigenvalues have no entry.
        filter_zeros: see there; it holds for the stable ranks too.
        init_stable_rank: `norm_stable_rank` of an earlier call, at least one number a layer.
        sr_mid_pos: the stable ranks leave out the first int(N / sr_mid_pos) eigenvalues.
        memory: as in `farms_fast.compat.net_esd_estimator`.

    Returns:
        A dict of lists as `farms_fast.compat.net_esd_estimator` gives, with the same answers where
        the published code fails, and the columns `alpha, spectral_norm, D, longname, eigs, norm,
        stable_rank, norm_stable_rank, init_norm_stable_rank, eig_ratio`: sum over largest; mean;
        mean over that of `init_stable_rank`, 0 where that is None; and largest over median, each
        of the eigenvalues that count for the stable ranks.

    Raises:
        TypeError: as for `farms_fast.compat.net_esd_estimator`.
        ValueError: likewise, or `init_stable_rank` has too few numbers.

    Example:
        >>> import torch
        >>> from farms_fast.compat.modelbalancing import net_esd_estimator
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 2))
        >>> metrics = net_esd_estimator(net, fix_fingers="xmin_mid")
        >>> metrics["longname"], round(metrics["eig_ratio"][0], 2)
        (['0'], 3.92)
    """
    rule = TailRule.published(fix_fingers, xmin_pos, bins, EVALS_THRESH, filter_zeros)
    min_evals = check_int("eigs_num_thresh", eigs_num_thresh)
    if sr_mid_pos is not None and not number("sr_mid_pos", sr_mid_pos) > 1:
        raise ValueError(f"sr_mid_pos: expected None or a number above 1, got {sr_mid_pos!r}")
    layers = [layer for layer in whole_layers(net, conv_norm) if layer.count >= min_evals]
    if init_stable_rank is not None:
        check_type("init_stable_rank", init_stable_rank, Sized, "None or a number for each layer")
        if len(init_stable_rank) < len(layers):
            raise ValueError(
                f"init_stable_rank: expected a number for each of {len(layers)} layers, "
                f"got {len(init_stable_rank)}"
            )
    initial = None if init_stable_rank is None else iter(init_stable_rank)

    def row(spectra: Sequence[FittedSpectrum]) -> dict[str, Any]:
        evals = spectra[0].entered
        if sr_mid_pos is not None:
            evals = evals[int(len(evals) / sr_mid_pos) :]
        total, largest = evals.sum(), evals.max()
        mean = float(total / len(evals))
        # NaN or infinity for zeros.
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "eigs": spectra[0].evals.astype(np.float32),
                "stable_rank": float(total / largest),
                "norm_stable_rank": mean,
                "init_norm_stable_rank": 0 if initial is None else mean / float(next(initial)),
                "eig_ratio": float(largest / evals[len(evals) // 2]),
            }

    own = ("stable_rank", "norm_stable_rank", "init_norm_stable_rank", "eig_ratio")
    return results_of(layers, rule, memory, (*COLUMNS, *own), row)
