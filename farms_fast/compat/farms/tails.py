"""Which eigenvalues enter a published fit, and where its tail starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.compat.arguments import choice, number
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.power_law import XMIN_RULES, PowerLawFits


@dataclass(frozen=True)
class TailRule:
    """Where a tail starts; only eigenvalues above the threshold enter the fit, unless none is."""

    rule: FitRule
    threshold: float | None

    @classmethod
    def published(
        cls,
        fix_fingers: str | None,
        xmin_pos: float,
        bins: int,
        EVALS_THRESH: float,
        filter_zeros: bool,
    ) -> TailRule:
        """From the published arguments, checked."""
        if fix_fingers is not None:
            choice("fix_fingers", fix_fingers, (None, *XMIN_RULES))
        threshold = number("EVALS_THRESH", EVALS_THRESH)
        rule = FitRule.checked(fix_fingers or "ks", xmin_pos, bins, "farms")
        return cls(rule, threshold if filter_zeros else None)

    def fit_at(self, evals: Tensor, offsets: Tensor) -> PowerLawFits:
        """Fits of packed spectra, each ascending with NaN last, as `FitRule.fit_at`."""
        return self.rule.fit_at(self._entering(evals, offsets), offsets)

    def _entering(self, evals: Tensor, offsets: Tensor) -> Tensor:
        """The spectra with 0, which no fit counts, for what does not enter."""
        lengths, begins = offsets.diff(), offsets[:-1]
        numbers = torch.arange(lengths.numel(), device=evals.device)
        owners = numbers.repeat_interleave(lengths, output_size=evals.numel())
        left_out = torch.zeros_like(lengths)
        if self.threshold is not None:
            left_out.index_add_(0, owners, (evals <= self.threshold).to(torch.int64))
            left_out = torch.where(left_out < lengths, left_out, 0)
        # Ascending spectra begin with what is left out.
        indices = torch.arange(evals.numel(), device=evals.device) - begins[owners]
        out = indices < left_out[owners]
        entering = evals.masked_fill(out, 0.0)
        if self.rule.xmin == "median":
            # A zero has its place below the median as any eigenvalue has. At or above it there is
            # no tail with zeros, and then it starts at the median of the positive ones.
            counts = (lengths - left_out).to(torch.float64)
            start = left_out + (counts / self.rule.xmin_pos).long()
            positive = entering[begins + torch.minimum(start, lengths - 1)] > 0
            zero = (evals == 0) & ~out & positive[owners]
            entering = entering.masked_fill(zero, torch.finfo(torch.float64).tiny)
        return entering
