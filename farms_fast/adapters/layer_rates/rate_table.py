"""Tables of rates: what every layer got at one call, from which alpha, and how runs resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.core.arguments import is_real
from farms_fast.core.jsonable import plain
from farms_fast.core.text import fixed, printable
from farms_fast.live import LayerAlpha
from farms_fast.results.files import data_frame

if TYPE_CHECKING:
    import pandas as pd

Row = TypeVar("Row")

_NO_STATE = "state: expected what state_dict() gave"


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
        """A frame with one row per layer, and the columns of `CsvLog`.

        Raises:
            ImportError: if pandas is not installed.
        """
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
        state: dict[str, Any] = plain(asdict(self))
        return state

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RateTable:
        """Returns the table of a state; TypeError or KeyError if it is none."""
        rows = tuple(_row_of(LayerRate, row) for row in state["rows"])
        call = _checked("call", state["call"], "int")
        return RateTable(call, _checked("base_lr", state["base_lr"], "float"), rows)


def _row_of(kind: type[Row], entry: Mapping[str, Any]) -> Row:
    """A row of its fields, None being NaN; TypeError if one is missing, unknown or mistyped."""
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


def read_state(
    state: object, rule: str, settings: Mapping[str, object], layers: Sequence[TunedLayer]
) -> tuple[int, RateTable | None, list[LayerAlpha] | None]:
    """The calls, the table and the alphas under way of a state of this rule on these layers.

    TypeError if it is no state, ValueError if it is of something else, or damaged.
    """
    if not isinstance(state, Mapping) or not state.keys() >= {"rule", "calls", "layers", "last"}:
        raise TypeError(_NO_STATE)
    if state["rule"] != rule:
        raise ValueError(f"state: expected one of {rule}, got {state['rule']}")
    try:
        theirs = dict(state.get("settings", settings))  # older states have none
        shapes = {name: [list(shape) for shape in s] for name, s in state["layers"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{_NO_STATE}, got 'settings' or 'layers' of another kind") from error
    for name in {**settings, **theirs}:
        mine, other = settings.get(name), theirs.get(name)
        if mine != other:
            raise ValueError(f"state: expected one of {name}={mine!r}, got {name}={other!r}")
    ours = shapes_of(layers)
    for name in [*ours, *shapes]:
        if ours.get(name) != shapes.get(name):
            raise ValueError(
                f"state: expected the layers of this model, got another {name!r}: "
                f"{shapes.get(name, 'missing')} in the state, "
                f"{ours.get(name, 'missing')} in the model"
            )
    calls, ahead = state["calls"], state.get("ahead")
    if not isinstance(calls, int) or isinstance(calls, bool) or calls < 0:
        raise ValueError(f"{_NO_STATE}, got calls={calls!r}")
    try:
        last = None if state["last"] is None else RateTable.from_state(state["last"])
        rows = None if ahead is None else [_row_of(LayerAlpha, row) for row in ahead]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_NO_STATE}, got rows of another kind ({error})") from error
    if last is not None:
        _check_names("last", [row.name for row in last], list(ours))
        wrong = next((r for r in last if not (math.isfinite(r.factor) and r.factor > 0)), None)
        if wrong is not None:
            raise ValueError(f"{_NO_STATE}, got the factor {wrong.factor} for {wrong.name!r}")
    if rows:  # empty on the ranks that did not analyse
        known = {spec.name for layer in layers for spec in layer.specs}
        names = [row.name for row in rows]
        _check_names("ahead", names, [name for name in names if name in known])
    return calls, last, rows


def _check_names(entry: str, got: list[str], expected: list[str]) -> None:
    if got != expected:
        odd = next((n for n in [*got, *expected] if got.count(n) != expected.count(n)), got[:1])
        raise ValueError(
            f"{_NO_STATE}, got rows of other layers in {entry!r}: the first difference is {odd!r}"
        )


def shapes_of(layers: Sequence[TunedLayer]) -> dict[str, list[list[int]]]:
    """Returns the shapes of the stacks of each layer, by name."""
    return {layer.name: [list(spec.shape) for spec in layer.specs] for layer in layers}
