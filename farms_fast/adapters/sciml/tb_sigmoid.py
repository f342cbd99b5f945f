"""TB_Sigmoid: the learning rate of a layer by the distance of its alpha from the mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import nn

from farms_fast.adapters.layer_rates.rates import DEFAULT_SAMPLING, LayerRates
from farms_fast.core.arguments import not_negative
from farms_fast.spectra.windows import Sampling
from farms_fast.weights.rules.operator_layers import factor_matrices

# 10 to half of this, and the inverse of that, are normal numbers of double precision.
_MAX_SCALE = 600.0


class TBSigmoid(LayerRates):
    """Learning rates per layer from alpha by a sigmoid, for fine-tuning with few data.

    With base rate η, the alphas α of the layers and their mean ᾱ, the rate of a layer is η·10^φ,

    φ = s·[1/(1 + e^(−τ(α − ᾱ))) − ½]

    with s = s_high for α above ᾱ and s = s_low below it, so that it lies between η·10^(−s_low/2)
    and η·10^(s_high/2) (TB_Sigmoid, arXiv 2410.12178; with FARMS, arXiv 2506.06280). A layer that
    is left alone or has no fit keeps η and does not count for the mean. All layers keep η where
    there is nothing to compare.

    The layers of neural operators are analysed too: spectral convolutions (one complex matrix for
    each mode, all modes of a layer in one spectrum), AFNO blocks and factorised weights. See
    `farms_fast.weights.rules.operator_layers`.

    Args:
        model, xmin: as in `LayerRates`.
        sampling: as in `LayerRates`; `FullMatrix()` for the rule as published without FARMS.
        scale: (s_low, s_high), below and above the mean, or one number for both; from 0 to 600,
            beyond which a factor has no double precision. The published grid goes from 0.125 to
            1.5.
        tau: the slope of the sigmoid, positive.
        per: as in `LayerRates`. Scientific machine learning takes ᾱ over layers ("layer"),
            language models over transformer blocks ("block").
        min_evals: as in `LayerRates`; 5 as in `TempBalance`.
        filter_zeros: smaller eigenvalues are left out, as published; None or 0 for no limit. It is
            an absolute number: a layer whose weights are so small that hardly an eigenvalue
            reaches it has the status "too_few". What is zero but for rounding is never in a
            fit.
        factorised: what a Tucker, CP or TT weight is analysed as: "reconstructed", the complex
            matrices of its modes; or "factors", each factor a layer with a rate of its own.
        **options: the other arguments of `LayerRates`, with the same defaults: `per="layer"`,
            `xmin_pos=2`, `bins=100`, `skip_first=False`, `skip_last=False`, `norm="name"`,
            `every=1`, `unit="epoch"`, `overlap=False`, `initial=True`, `include=None`,
            `exclude=None`, `dtype=torch.float64`, `solver=None`, `memory=None`,
            `process_group="default"`, `log=None`, `change=None`.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of range, or as `LayerRates`: the model has no layer to
            tune, for one.

    Example:
        >>> import torch
        >>> from farms_fast import FullMatrix
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 1), torch.nn.Conv2d(16, 16, 1))
        >>> model.modes = torch.nn.Parameter(torch.randn(16, 16, 8, 5, dtype=torch.complex64))
        >>> rates = TBSigmoid(model, FullMatrix(), filter_zeros=None, min_evals=1)
        >>> optimizer = torch.optim.Adam(rates.param_groups(lr=1e-3))
        >>> table = rates.step(optimizer)
        >>> [(row.name, row.n_evals, row.status) for row in table]
        [('modes', 640, 'ok'), ('0', 4, 'ok'), ('1', 16, 'ok')]
        >>> [round(f, 3) for f in TBSigmoid(model, scale=1.0, tau=2.0).factors([2.0, 4.0])]
        [0.416, 2.403]
    """

    def __init__(
        self,
        model: nn.Module,
        sampling: Sampling = DEFAULT_SAMPLING,
        xmin: str = "median",
        *,
        scale: float | tuple[float, float] = (1.0, 2.0),
        tau: float = 10.0,
        min_evals: int = 5,
        filter_zeros: float | None = 1e-5,
        factorised: str = "reconstructed",
        **options: Any,
    ) -> None:
        if "evals_threshold" in options:
            raise TypeError("evals_threshold: expected its name here, filter_zeros")
        self._check_options(options)
        if factorised not in ("reconstructed", "factors"):
            raise ValueError(
                f"factorised: expected 'reconstructed' or 'factors', got {factorised!r}"
            )
        self.scale = _scale(scale)
        self.tau = not_negative("tau", tau)
        if self.tau == 0:
            raise ValueError("tau: expected a positive number, got 0")
        if factorised == "factors":
            if options.get("change") is not None:
                raise TypeError("change: expected None where factorised is 'factors'")
            options["change"] = factor_matrices
        options["evals_threshold"] = not_negative(
            "filter_zeros", 0.0 if filter_zeros is None else filter_zeros
        )
        super().__init__(model, sampling, xmin, min_evals=min_evals, **options)

    @property
    def settings(self) -> dict[str, object]:
        """Scale and slope."""
        return {"scale": list(self.scale), "tau": self.tau}

    def factors(self, scores: Sequence[float]) -> list[float]:
        """10^φ for each alpha.

        Args:
            scores: at least one alpha, or mean of a block's alphas.
        """
        low, high = self.scale
        mean = math.fsum(scores) / len(scores)
        # ½·tanh(x/2) is the sigmoid less one half, without an overflow far from the mean.
        sigmoids = [0.5 * math.tanh(0.5 * self.tau * (score - mean)) for score in scores]
        return [math.pow(10.0, (high if value > 0 else low) * value) for value in sigmoids]


def _scale(scale: object) -> tuple[float, float]:
    ends = (scale, scale) if isinstance(scale, Real) else scale
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise TypeError(f"scale: expected a number or a pair (s_low, s_high), got {scale!r}")
    low, high = (not_negative("scale", end) for end in ends)
    if max(low, high) > _MAX_SCALE:
        raise ValueError(f"scale: expected at most {_MAX_SCALE:g}, got {scale!r}")
    return low, high
