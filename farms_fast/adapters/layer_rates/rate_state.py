"""The state of a `LayerRates`: numbers and text, and what they say when they are read again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farms_fast.adapters.layer_rates.rate_table import RateTable, row_of, row_state
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.live import LayerAlpha

__all__ = ["Restored", "restored", "state_of"]

_NO_STATE = "state: expected what state_dict() gave"
_KEYS = {"rule", "calls", "layers", "last"}


@dataclass(frozen=True)
class Restored:
    """What a state says, checked as a whole.

    Attributes:
        calls: how often `step` had been called.
        last: the table that it acted on.
        ahead: alphas of an analysis that was under way.
    """

    calls: int
    last: RateTable | None
    ahead: list[LayerAlpha] | None


def state_of(
    rule: str,
    settings: Mapping[str, object],
    layers: Sequence[TunedLayer],
    calls: int,
    last: RateTable | None,
    ahead: Sequence[LayerAlpha] | None,
) -> dict[str, Any]:
    """The state as `restored` reads it; a number that is NaN is None in it, as in JSON.

    Args:
        rule: the name of the class.
        settings: what its factors depend on, besides the alphas.
        layers: the model's.
        calls: as in `Restored`, and so are the others.
        last: see there.
        ahead: see there.
    """
    return {
        "rule": rule,
        "settings": dict(settings),
        "calls": calls,
        "layers": {layer.name: _shapes_of(layer) for layer in layers},
        "last": None if last is None else last.to_state(),
        "ahead": None if ahead is None else [row_state(row) for row in ahead],
    }


def restored(
    state: object, rule: str, settings: Mapping[str, object], layers: Sequence[TunedLayer]
) -> Restored:
    """Reads a state of the same rule on a model of the same layers.

    Raises:
        TypeError: it is no state.
        ValueError: it is of another rule, other settings or another model, or damaged.
    """
    if not isinstance(state, Mapping) or not state.keys() >= _KEYS:
        raise TypeError(_NO_STATE)
    if state["rule"] != rule:
        raise ValueError(f"state: expected one of {rule}, got {state['rule']}")
    try:
        theirs = dict(state.get("settings", settings))  # older states have none
        shapes = {name: [list(shape) for shape in s] for name, s in state["layers"].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{_NO_STATE}, got 'settings' or 'layers' of another kind") from error
    for name in {**settings, **theirs}:
        if settings.get(name) != theirs.get(name):
            raise ValueError(
                f"state: expected one of {name}={settings.get(name)!r}, "
                f"got {name}={theirs.get(name)!r}"
            )
    ours = {layer.name: _shapes_of(layer) for layer in layers}
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
        rows = None if ahead is None else [row_of(LayerAlpha, row) for row in ahead]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_NO_STATE}, got rows of another kind ({error})") from error
    if last is not None:
        _check_names("last", [row.name for row in last], [layer.name for layer in layers])
        wrong = next((r for r in last if not (math.isfinite(r.factor) and r.factor > 0)), None)
        if wrong is not None:
            raise ValueError(f"{_NO_STATE}, got the factor {wrong.factor} for {wrong.name!r}")
    if rows:  # none on the ranks that did not analyse
        known = {spec.name for layer in layers for spec in layer.specs}
        named = [row.name for row in rows]
        _check_names("ahead", named, [name for name in named if name in known])
    return Restored(calls, last, rows)


def _check_names(entry: str, got: Sequence[str], expected: Sequence[str]) -> None:
    if list(got) != list(expected):
        odd = next((n for n in [*got, *expected] if got.count(n) != expected.count(n)), got[:1])
        raise ValueError(
            f"{_NO_STATE}, got rows of other layers in {entry!r}: the first difference is {odd!r}"
        )


def _shapes_of(layer: TunedLayer) -> list[list[int]]:
    return [list(spec.shape) for spec in layer.specs]
