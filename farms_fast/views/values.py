# ruff: noqa: D102 - the classes say what their attributes are
"""What views draw, by its attributes: any object that has them will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from farms_fast.weights.stacks import Skipped


class LayerValues(Protocol):
    """One layer, with the attributes of `farms_fast.LayerRecord`."""

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
    def has_spectrum(self) -> bool: ...
    def read_window_evals(self) -> npt.NDArray[np.float64]: ...
    def scalars(self) -> dict[str, str | int | float]: ...


class DifferenceValues(Protocol):
    """One layer of two analyses, with those of `farms_fast.results.comparison.LayerDifference`."""

    @property
    def name(self) -> str: ...
    @property
    def a(self) -> LayerValues | None: ...
    @property
    def b(self) -> LayerValues | None: ...
    @property
    def difference(self) -> float: ...
    @property
    def difference_se(self) -> float: ...
    @property
    def z(self) -> float: ...
    @property
    def paired(self) -> bool: ...
    @property
    def intervals_overlap(self) -> bool | None: ...
    @property
    def note(self) -> str: ...


@dataclass(frozen=True)
class Side:
    """One analysis as a page shows it; its settings are empty where nobody can say."""

    layers: Sequence[LayerValues]
    skipped: Sequence[Skipped]
    settings: Mapping[str, object]
    mean_alpha: float
