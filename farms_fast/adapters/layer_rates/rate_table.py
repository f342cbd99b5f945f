"""The rates of one moment: what every layer got, and from which alpha."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from farms_fast.core.arguments import is_real
from farms_fast.core.text import fixed, printable
from farms_fast.results.files import data_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "LayerRate", "RateTable", "row_of", "row_state"]

Row = TypeVar("Row")


@dataclass(frozen=True)
class LayerRate:
    """The rate of one layer.

    Attributes:
        name: the layer's.
        alpha: its power-law exponent, the mean over its parts where it has several (q, k and v of
            one projection); NaN unless its fits are ok.
        D: Kolmogorov-Smirnov distance of the fit, likewise.
        n_evals: positive eigenvalues of the spectrum, none below the threshold.
        status: `"ok"`; a fit's status, `"nonfinite"` or `"error"`; `"collapsed"` for a
            layer with too few eigenvalues that had enough before; `"frozen"` or `"skipped"`
            for a layer that is left alone.
        message: why it keeps the base rate, or takes its block's; empty when it has a rate of its
            own.
        block: the layers of one block have one score; its own name unless rates are per block.
        score: what the factor was made from, the mean alpha of the block; NaN where there is none.
        factor: rate over base rate.
        lr: the learning rate.
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


#: Of a table as rows: those of the call, then those of each layer.
COLUMNS = ("call", "base_lr", *(field.name for field in fields(LayerRate)))


@dataclass(frozen=True)
class RateTable:
    """The rates of all layers of a model, in its order.

    Attributes:
        call: how often rates had been asked for: 0 for those that training began with.
        base_lr: the rate of what is not tuned.
        rows: one a layer.

    Example:
        >>> table = RateTable(1, 0.1, (LayerRate("fc", alpha=2.5, factor=1.5),)).at(0.2)
        >>> [(row.name, round(row.lr, 3)) for row in table]
        [('fc', 0.3)]
        >>> table["fc"].alpha
        2.5
        >>> print(table)
        RateTable(call 1, base rate 0.2, 1 layer, 0 failed)
          fc  rate 0.3 = 1.500 x base, alpha 2.500, D -
    """

    call: int
    base_lr: float
    rows: tuple[LayerRate, ...]

    def __iter__(self) -> Iterator[LayerRate]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> LayerRate:
        """The row of a layer; KeyError if there is none of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no layer named {name!r} among {len(self.rows)}")

    def __str__(self) -> str:
        """Counts and the base rate, then one line per layer."""
        layers = "layer" if len(self.rows) == 1 else "layers"
        lines = [
            f"RateTable(call {self.call}, base rate {self.base_lr:.4g}, {len(self.rows)} {layers}, "
            f"{len(self.failed)} failed)"
        ]
        for row in self.rows:
            if row.status == "ok":
                found = f"alpha {fixed(row.alpha)}, D {fixed(row.D)}"
            else:
                found = f"{row.status}: {printable(row.message)}"
            rate = f"rate {row.lr:.4g} = {row.factor:.3f} x base"
            lines.append(f"  {printable(row.name)}  {rate}, {found}")
        return "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """A frame with one row per layer, and the columns of `CsvLog`.

        Raises:
            ImportError: if pandas is not installed.
        """
        call = {"call": self.call, "base_lr": self.base_lr}
        return data_frame(COLUMNS, [call | asdict(row) for row in self.rows], instead="")

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
        """Numbers and text alone, as state dicts are kept; None for NaN, which JSON has not."""
        return {
            "call": self.call,
            "base_lr": _number(self.base_lr),
            "rows": [row_state(row) for row in self.rows],
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RateTable:
        """What `to_state` gave; TypeError or KeyError for anything else."""
        rows = tuple(row_of(LayerRate, row) for row in state["rows"])
        call, base_lr = state["call"], state["base_lr"]
        return RateTable(_checked("call", call, "int"), _checked("base_lr", base_lr, "float"), rows)


def row_state(row: Any) -> dict[str, Any]:
    """The fields of a row, with None for NaN."""
    return {field.name: _number(getattr(row, field.name)) for field in fields(row)}


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def row_of(kind: type[Row], entry: Mapping[str, Any]) -> Row:
    """A row from its fields, None standing for NaN.

    Args:
        kind: a dataclass of texts and numbers.
        entry: as `row_state` gave it.

    Raises:
        TypeError: a field is missing, of another kind, or none of the row's.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"expected the fields of a {kind.__name__}, got {entry!r}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in entry if name not in known]
    missing = [n for n, field in known.items() if field.default is MISSING and n not in entry]
    if unknown or missing:
        what = f"no {missing[0]!r}" if missing else f"{unknown[0]!r}"
        raise TypeError(f"expected the fields of a {kind.__name__}, got {what}")
    return kind(**{n: _checked(n, value, str(known[n].type)) for n, value in entry.items()})


def _checked(name: str, value: Any, kind: str) -> Any:
    """The value of a field whose type is annotated so; TypeError if it is of another."""
    if kind == "float" and value is None:
        return math.nan
    if kind == "float" and is_real(value):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise TypeError(f"expected {kind} for {name!r}, got {value!r}")
