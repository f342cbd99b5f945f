"""JSON and values of files of anyone: one error in plain words for whatever is wrong with them."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farms_fast.core.arguments import first_repeated

Array = npt.NDArray[np.float64]

# SQLite and the ops count in 64 bits.
_MOST = 2**63 - 1
# JSON has no form for them, so files have these texts.
_INFINITIES = ("inf", "-inf")


def decode_json(text: str | bytes, **hooks: Any) -> Any:
    """As `json.loads`, whose errors it makes a ValueError each: nested too deeply is one too."""
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json(path: Path, text: bytes) -> Any:
    """The content of a JSON file, None where it has none; ValueError for a name given twice."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            repeated.append(first_repeated([name for name, _ in pairs]) or "")
        return entries

    try:
        content = decode_json(text.decode(), object_pairs_hook=unique)
    except ValueError:
        content = None
    if repeated:
        raise ValueError(f"{path}: expected each name once, got {repeated[0]!r} more than once")
    return content


def shown(value: object) -> str:
    """The value's repr, cut where it is long or deep."""
    return reprlib.repr(value)


def text_value(name: str, value: object) -> str:
    """The value of a field of text; ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {shown(value)}")
    return value


def count_value(name: str, value: object) -> int:
    """The value of a field that counts something: 0 to 2^63 - 1; ValueError for anything else."""
    count = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(count) is not int or not 0 <= count <= _MOST:
        raise ValueError(f"{name}: expected an integer of 0 to 2^63 - 1, got {shown(value)}")
    return count


def shape_value(name: str, value: object) -> tuple[int, ...]:
    """The value of a field that is a shape; ValueError for anything but a list of counts."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list of integers, got {shown(value)}")
    return tuple(count_value(name, extent) for extent in value)


def float_value(name: str, value: object) -> float:
    """The value of a field that is a number, NaN for null; ValueError for anything else."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in _INFINITIES):
        raise ValueError(f"{name}: expected a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number of float64, got {shown(value)}") from None


def array_value(name: str, value: object, dims: int) -> Array:
    """The value of a field that is an array of so many dimensions; ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list of numbers, got {shown(value)}")
    try:
        # NumPy reads null as NaN, and the infinities from their texts.
        array: Array = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: expected numbers of float64 ({error})") from None
    if not value:
        # An empty list says nothing of its second dimension.
        array = array.reshape((0,) * dims)
    if array.ndim != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got {array.ndim}")
    return array
