"""Checks of the arguments that rules hand on to `LayerRates`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

__all__ = ["check_options", "flag"]


def check_options(rule: type, base: type, options: Mapping[str, object]) -> None:
    """Raises TypeError, naming the rule, for a keyword that neither it nor its base takes.

    Args:
        rule: the class that was called.
        base: whose arguments the options are.
        options: what the rule's own arguments have left over.
    """
    known = set(inspect.signature(base).parameters)
    for name in options:
        if name not in known:
            takes = known | set(inspect.signature(rule).parameters) - {"options"}
            raise TypeError(
                f"{name}: no argument of {rule.__name__}, which takes {', '.join(sorted(takes))}"
            )


def flag(argument: str, value: object) -> bool:
    """The value; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False, got {value!r}")
    return value
