"""The rates of one moment: what every layer got, and from which alpha."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["LayerRate", "RateTable"]


@dataclass(frozen=True)
class LayerRate:
    """The rate of one layer.

    Attributes:
        name: The layer's.
        alpha: Its power-law exponent, the mean over its parts where it has several (q, k and v of
            one projection); NaN unless its fits are ok.
        D: Kolmogorov-Smirnov distance of the fit, likewise.
        n_evals: Eigenvalues of the spectrum.
        status: ``"ok"``; a fit's status, ``"nonfinite"`` or ``"error"``; ``"frozen"`` or
            ``"skipped"`` for a layer that is left alone.
        message: Why it keeps the base rate; empty when it has a rate of its own.
        block: The layers of one block have one score; its own name unless rates are per block.
        score: What the factor was made from, the mean alpha of the block; NaN where there is none.
        factor: Rate over base rate.
        lr: The learning rate.
    """

    name: str
    alpha: float = math.nan
    D: float = math.nan
    n_evals: int = 0
    status: str = "ok"
    message: str = ""
    block: str = ""
    score: float = math.nan
    factor: float = 1.0
    lr: float = math.nan

    @property
    def tuned(self) -> bool:
        """Whether the factor was made from a score."""
        return not math.isnan(self.score)


@dataclass(frozen=True)
class RateTable:
    """The rates of all layers of a model, in its order.

    Attributes:
        call: How often rates had been asked for: 0 for those that training began with.
        base_lr: The rate of what is not tuned.
        rows: One a layer.

    Example:
        >>> table = RateTable(1, 0.1, (LayerRate("fc", alpha=2.5, factor=1.5),)).at(0.2)
        >>> [(row.name, round(row.lr, 3)) for row in table]
        [('fc', 0.3)]
        >>> table["fc"].alpha
        2.5
    """

    call: int
    base_lr: float
    rows: tuple[LayerRate, ...]

    def __iter__(self) -> Iterator[LayerRate]:
        """The rows in order."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRate:
        """The row of a layer; KeyError if there is none of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer named {name!r} among {len(self.rows)}")

    @property
    def failed(self) -> list[LayerRate]:
        """The layers that keep the base rate though they should have one of their own."""
        left_alone = ("ok", "skipped", "frozen", "too_few")
        return [row for row in self.rows if row.status not in left_alone]

    def at(self, base_lr: float, call: int | None = None) -> RateTable:
        """The same factors at another base rate."""
        rows = tuple(replace(row, lr=base_lr * row.factor) for row in self.rows)
        return RateTable(self.call if call is None else call, base_lr, rows)

    def to_state(self) -> dict[str, Any]:
        """Numbers and text alone, as state dicts are kept."""
        return {
            "call": self.call,
            "base_lr": self.base_lr,
            "rows": [asdict(row) for row in self.rows],
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> RateTable:
        """What `to_state` gave."""
        rows = tuple(LayerRate(**row) for row in state["rows"])
        return RateTable(int(state["call"]), float(state["base_lr"]), rows)
