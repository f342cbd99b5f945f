"""Checks of the arguments that rules hand on to `LayerRates`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

__all__ = ["check_options", "flag"]


def check_options(rule: type, base: type, options: Mapping[str, object]) -> None:
    """Raises TypeError, naming the rule, for an option that the base does not take."""
    known = set(inspect.signature(base).parameters)
    for name in options:
        if name not in known:
            takes = known | set(inspect.signature(rule).parameters) - {"options"}
            raise TypeError(
                f"{name}: no argument of {rule.__name__}, which takes {', '.join(sorted(takes))}"
            )


def flag(argument: str, value: object) -> bool:
    """Returns the value; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False, got {value!r}")
    return value
