"""Reads the state of a `LayerRates` and checks it as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from farms_fast.adapters.layer_rates.rate_table import RateTable, row_of
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.live import LayerAlpha

_NO_STATE = "state: expected what state_dict() gave"
_KEYS = {"rule", "calls", "layers", "last"}


def read_state(
    state: object, rule: str, settings: Mapping[str, object], layers: Sequence[TunedLayer]
) -> tuple[int, RateTable | None, list[LayerAlpha] | None]:
    """The calls, the table and the alphas under way of a state of this rule on these layers.

    TypeError if it is no state, ValueError if it is of something else, or damaged.
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
        rows = None if ahead is None else [row_of(LayerAlpha, row) for row in ahead]
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
