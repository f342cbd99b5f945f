"""Tables of rates: what every layer got at one call, and from which alpha."""

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

Row = TypeVar("Row")


@dataclass(frozen=True)
class LayerRate:
    """The rate of one layer.

    Attributes:
        name: the layer's name.
        alpha: its power-law exponent, the mean over its parts where it has several (q, k and v of
            one projection); NaN unless all fits are ok.
        D: the Kolmogorov-Smirnov distance of the fit, likewise.
        n_evals: how many eigenvalues are positive and not below the threshold.
        status: `"ok"`; the status of a failed fit, `"nonfinite"` or `"error"`; `"collapsed"` for a
            layer with too few eigenvalues that had enough before; `"frozen"` or `"skipped"` for a
            layer that is left alone.
        message: why it keeps the base rate or takes its block's; empty if it has its own.
        block: its block, all of whose layers have one score; its own name unless rates are per
            block.
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


# The columns of a table as rows: first those of the call, then those of the layer.
COLUMNS = ("call", "base_lr", *(field.name for field in fields(LayerRate)))


@dataclass(frozen=True)
class RateTable:
    """The rates of all layers of a model, in its order.

    Attributes:
        call: how many calls of `step` there were; 0 for the initial rates.
        base_lr: the rate of what is not tuned.
        rows: one for each layer.

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
        """Returns the row of a layer; KeyError if no layer has that name."""
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
                outcome = f"alpha {fixed(row.alpha)}, D {fixed(row.D)}"
            else:
                outcome = f"{row.status}: {printable(row.message)}"
            rate = f"rate {row.lr:.4g} = {row.factor:.3f} x base"
            lines.append(f"  {printable(row.name)}  {rate}, {outcome}")
        return "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """Returns a frame with the columns of `CsvLog`; ImportError without pandas."""
        call = {"call": self.call, "base_lr": self.base_lr}
        return data_frame(COLUMNS, [call | asdict(row) for row in self.rows], instead="")

    @property
    def failed(self) -> list[LayerRate]:
        """The layers that should have a rate of their own but have no alpha."""
        expected = ("ok", "skipped", "frozen", "too_few")
        return [row for row in self.rows if row.status not in expected]

    def at(self, base_lr: float, call: int | None = None) -> RateTable:
        """Returns the same factors at another base rate."""
        rows = tuple(replace(row, lr=base_lr * row.factor) for row in self.rows)
        return RateTable(self.call if call is None else call, base_lr, rows)

    def to_state(self) -> dict[str, Any]:
        """Returns numbers, text and None, which stands for NaN: JSON has none."""
        base_lr = None if math.isnan(self.base_lr) else self.base_lr
        return {"call": self.call, "base_lr": base_lr, "rows": [row_state(r) for r in self.rows]}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RateTable:
        """Returns the table of a state; TypeError or KeyError if it is none."""
        rows = tuple(row_of(LayerRate, row) for row in state["rows"])
        call = _checked("call", state["call"], "int")
        return RateTable(call, _checked("base_lr", state["base_lr"], "float"), rows)


def row_state(row: Any) -> dict[str, Any]:
    """Returns the fields of a row, with None for NaN."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in values.items()}


def row_of(kind: type[Row], entry: Mapping[str, Any]) -> Row:
    """Undoes `row_state`; TypeError if a field is missing, unknown, or of another type."""
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
    """The value of a field with this annotation; TypeError if it is of another type."""
    if kind == "float" and (value is None or is_real(value)):
        return math.nan if value is None else float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise TypeError(f"expected {kind} for {name!r}, got {value!r}")
