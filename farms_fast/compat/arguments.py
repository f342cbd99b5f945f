"""Checks of arguments that the published functions share."""

from __future__ import annotations

import math

from farms_fast.core.arguments import is_real


def number(argument: str, value: object) -> float:
    """The value as a float; TypeError unless it is a number, ValueError for NaN."""
    if not is_real(value):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{argument}: expected a number, got {value!r}")
    return float(value)


def finite(argument: str, value: object) -> float:
    """The value as a float; an error unless it is a finite number."""
    if not math.isfinite(real := number(argument, value)):
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    return real


def positive(argument: str, value: object) -> float:
    """The value as a float; an error unless it is a positive finite number."""
    if not 0 < (real := number(argument, value)) < math.inf:
        raise ValueError(f"{argument}: expected a positive finite number, got {value!r}")
    return real


def choice(argument: str, value: object, choices: tuple[object, ...]) -> str:
    """The value; ValueError unless it is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{argument}: expected one of {known}; got {value!r}")
    return value
