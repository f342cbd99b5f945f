"""Which eigenvalues enter a published fit, and where its tail starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farms_fast.spectra.power_law import XMIN_RULES, fit_power_laws

__all__ = ["TailRule", "number", "positive"]


@dataclass(frozen=True)
class TailRule:
    """Where a tail starts, and which eigenvalues there are at all.

    Attributes:
        xmin: "median", "ks" or "peak".
        xmin_pos: for the median rule.
        bins: for the peak rule.
        threshold: only eigenvalues above it enter the fit, unless none is; None for all.
    """

    xmin: str
    xmin_pos: float
    bins: int
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
        """From the published arguments, checked.

        Raises:
            TypeError: an argument of another kind.
            ValueError: an unknown rule or a number out of range.
        """
        # A list compares where a mapping would hash, which not everything can be.
        if fix_fingers is not None and fix_fingers not in list(XMIN_RULES):
            choices = ", ".join(repr(choice) for choice in (None, *XMIN_RULES))
            raise ValueError(f"fix_fingers: expected one of {choices}; got {fix_fingers!r}")
        number("EVALS_THRESH", EVALS_THRESH)
        xmin = "ks" if fix_fingers is None else XMIN_RULES[fix_fingers]
        rule = cls(xmin, xmin_pos, bins, float(EVALS_THRESH) if filter_zeros else None)
        # A fit of nothing checks the rest.
        rule.fit(torch.empty(0, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
        return rule

    def fit(self, evals: Tensor, offsets: Tensor) -> Tensor:
        """Alpha, D and status of packed spectra.

        Args:
            evals: (total,), float64, each spectrum ascending with NaN last.
            offsets: (spectra + 1,), int64, as for `farms_fast.spectra.power_law.fit_power_laws`.

        Returns:
            (spectra, 3), float64, on the same device.
        """
        fits = fit_power_laws(
            self._entering(evals, offsets),
            offsets,
            self.xmin,
            self.xmin_pos,
            self.bins,
            compat="farms",
        )
        return torch.stack([fits.alpha, fits.D, fits.status.to(torch.float64)], dim=1)

    def _entering(self, evals: Tensor, offsets: Tensor) -> Tensor:
        """The spectra with 0, which no fit counts, for what does not enter."""
        if not evals.numel():
            return evals
        lengths, begins = offsets.diff(), offsets[:-1]
        numbers = torch.arange(lengths.numel(), device=evals.device)
        owners = numbers.repeat_interleave(lengths, output_size=evals.numel())
        left_out = torch.zeros_like(lengths)
        if self.threshold is not None:
            left_out.index_add_(0, owners, (evals <= self.threshold).to(torch.int64))
            left_out = torch.where(left_out < lengths, left_out, 0)
        # Ascending spectra begin with what is left out.
        places = torch.arange(evals.numel(), device=evals.device) - begins[owners]
        out = places < left_out[owners]
        found = evals.masked_fill(out, 0.0)
        if self.xmin == "median":
            # A zero has its place below the median as any eigenvalue has. At or above it there is
            # no tail with zeros, and then it starts at the median of the positive ones.
            entering = (lengths - left_out).to(torch.float64)
            start = left_out + (entering / self.xmin_pos).long()
            counts = found[begins + torch.minimum(start, lengths - 1)] > 0
            zero = (evals == 0) & ~out & counts[owners]
            found = found.masked_fill(zero, torch.finfo(torch.float64).tiny)
        return found


def number(argument: str, value: object) -> float:
    """The value as a float; TypeError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{argument}: expected a number, got {value!r}")
    return float(value)


def positive(argument: str, value: object) -> float:
    """The value as a float; an error unless it is a positive finite number."""
    found = number(argument, value)
    if not 0 < found < math.inf:
        raise ValueError(f"{argument}: expected a positive finite number, got {value!r}")
    return found
