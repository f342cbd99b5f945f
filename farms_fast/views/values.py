"""What views draw, by its attributes: any object that has them will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["DifferenceValues", "LayerValues", "Side", "SkippedValues"]


class LayerValues(Protocol):
    """One layer; `farms_fast.LayerRecord` says what each value means."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    status: str
    message: str
    windows: int
    alpha: float
    alpha_se: float
    alpha_low: float
    alpha_high: float
    split_half: float
    D: float
    xmin: float
    num_pl_spikes: int
    num_evals: int
    log_spectral_norm: float
    stable_rank: float
    M: int
    N: int
    window_alphas: npt.NDArray[np.float64]

    @property
    def has_spectrum(self) -> bool:
        """Whether there are eigenvalues."""

    def read_window_evals(self) -> npt.NDArray[np.float64]:
        """The eigenvalues, (windows, k), each row ascending."""

    def scalars(self) -> dict[str, str | int | float]:
        """All values but the arrays, by name."""


class SkippedValues(Protocol):
    """A tensor that is no layer."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""

    @property
    def reason(self) -> str:
        """Why it is no layer."""


class DifferenceValues(Protocol):
    """One layer of two analyses; `farms_fast.results.comparison.LayerDifference` says more."""

    @property
    def name(self) -> str:
        """The layer's name."""

    @property
    def a(self) -> LayerValues | None:
        """The layer in the first analysis."""

    @property
    def b(self) -> LayerValues | None:
        """The layer in the second analysis."""

    @property
    def difference(self) -> float:
        """Alpha in the second analysis less alpha in the first."""

    @property
    def difference_se(self) -> float:
        """Standard error of the difference."""

    @property
    def z(self) -> float:
        """The difference in standard errors."""

    @property
    def paired(self) -> bool:
        """Whether the error comes from resampling both by the same draws."""

    @property
    def intervals_overlap(self) -> bool | None:
        """Whether the two intervals overlap."""

    @property
    def note(self) -> str:
        """What keeps the two from being compared."""


@dataclass(frozen=True)
class Side:
    """One analysis as a page shows it.

    Attributes:
        layers: the layers in the model's order.
        skipped: the tensors that are no layers.
        settings: how it was made, in plain values.
        mean_alpha: over the layers that are "ok".
    """

    layers: Sequence[LayerValues]
    skipped: Sequence[SkippedValues]
    settings: Mapping[str, object]
    mean_alpha: float
