"""What is measured: sizes by device, chosen so that a CPU run ends in minutes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from farms_fast import FixedAspectSampling


@dataclass(frozen=True)
class EigenCase:
    """All eigenvalues of the Gram matrices of `batch` square windows of `order`."""

    order: int
    batch: int

    @property
    def id(self) -> str:
        return f"k={self.order} x {self.batch}"


@dataclass(frozen=True)
class GramCase:
    """Gram matrices of the windows of one float32 weight."""

    rows: int
    columns: int
    window: int
    per_dim: int

    @property
    def sampling(self) -> FixedAspectSampling:
        return FixedAspectSampling(rows=self.window, per_dim=self.per_dim)

    @property
    def id(self) -> str:
        grid = self.sampling.grid(self.rows, self.columns)
        starts = [grid.row_starts, grid.column_starts]
        apart = all(b - a >= self.window for s in starts for a, b in pairwise(s))
        how = "side by side" if apart else "overlapping"
        return f"{self.rows}x{self.columns}, {grid.count} windows of {self.window} {how}"


@dataclass(frozen=True)
class FitCase:
    """The fits of so many spectra of one size in one call."""

    size: int
    rule: str
    spectra: int = 1

    @property
    def id(self) -> str:
        return f"{self.rule} of {'' if self.spectra == 1 else f'{self.spectra} x '}{self.size}"


# Keys are "cpu", "cuda" and "quick"; the quick set checks the harness and measures nothing.
EIGENVALUES: dict[str, tuple[tuple[int, int], ...]] = {
    "cuda": (
        (32, 4096),
        (64, 2048),
        (100, 10_000),
        (128, 2048),
        (256, 512),
        (512, 512),
        (512, 9),
        (1000, 100),
        (2000, 225),
        (4096, 16),
    ),
    # k = 4096 would take minutes for every peer here.
    "cpu": (
        (32, 1024),
        (64, 512),
        (100, 512),
        (128, 256),
        (256, 64),
        (512, 16),
        (512, 9),
        (1000, 4),
        (2000, 2),
    ),
    "quick": ((1, 3), (5, 7), (32, 9), (100, 4)),
}
GRAM: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "cuda": ((4000, 10_000, 2000, 2), (4096, 11_008, 2000, 15), (512, 512, 100, 15)),
    "cpu": ((1024, 2560, 512, 2), (512, 1376, 250, 15)),
    "quick": ((32, 80, 16, 2), (30, 50, 10, 5)),
}
# Sizes of one spectrum, or how many of a size; as many as a call of a bootstrap takes.
FIT: dict[str, tuple[tuple[int, ...], ...]] = {
    "cuda": ((2000,), (20_000,), (45_000,), (450_000,), (450_000, 37)),
    "cpu": ((2000,), (20_000,), (45_000,), (450_000,)),
    "quick": ((300,), (200, 3)),
}
RULES = ("median", "peak", "ks")


def eigen_cases(profile: str) -> list[EigenCase]:
    return [EigenCase(*sizes) for sizes in EIGENVALUES[profile]]


def gram_cases(profile: str) -> list[GramCase]:
    return [GramCase(*sizes) for sizes in GRAM[profile]]


def fit_cases(profile: str) -> list[FitCase]:
    return [FitCase(size, rule, *count) for size, *count in FIT[profile] for rule in RULES]
