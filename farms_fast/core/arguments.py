"""Checks of arguments that several functions share: one clear error each, naming the argument."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from farms_fast.core.extension import has_cuda

T = TypeVar("T")
DTypeLike = torch.dtype | npt.DTypeLike

MOST_BINS = 2**20
"""Bins of a histogram: more than any spectrum has values to fill."""
MOST_RESAMPLES = 10**5
"""Of a bootstrap: its error is then known to a fifth of a percent."""

# A size in bytes beyond this is no memory, and the ops take them as int64.
_MOST_BYTES = 2**63 - 1
_COMPARED_NAMES = 2000
_COMPARED_LENGTH = 200
_UNITS = {
    "": 1,
    **{unit: 1000**i for i, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**i for i, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}


def check_type(argument: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError unless the value is of one of these types, which the message calls so."""
    if not isinstance(value, kinds):
        raise TypeError(f"{argument}: expected {expected}, got {type(value).__name__}")


def check_module(argument: str, value: object) -> None:
    """Raises TypeError unless the value is a module of Python code, whose parts have types."""
    check_type(argument, value, torch.nn.Module, "a torch.nn.Module")
    if isinstance(value, torch.jit.ScriptModule):
        raise TypeError(
            f"{argument}: expected a torch.nn.Module of Python code, got {type(value).__name__}, "
            "whose submodules have lost their types: give the module that it was made of, or its "
            "state_dict()"
        )


def list_of(argument: str, values: object, kind: type[T], expected: str) -> list[T]:
    """The values as a list; TypeError unless all are of the type, which the message calls so."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{argument}: expected {expected}, got {type(values).__name__}")
    items = list(values)
    for value in items:
        if not isinstance(value, kind):
            raise TypeError(
                f"{argument}: expected {expected}, got {type(values).__name__} with "
                f"{type(value).__name__} in it"
            )
    return items


def path_of(argument: str, value: object) -> Path:
    """The value as a path; TypeError unless it is text, or what stands for a path in text."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{argument}: expected a path, got {type(value).__name__}")
    return Path(value)


def check_dtype(dtype: object) -> None:
    """Raises ValueError unless it is one of the precisions to compute in."""
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype!r}")


def dtype_of(dtype: object) -> torch.dtype:
    """The precision to compute in, also where its name or NumPy's type of it is given."""
    resolved = dtype
    if isinstance(dtype, (str, type, np.dtype)):
        try:
            name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
            resolved = {"float64": torch.float64, "float32": torch.float32}[np.dtype(name).name]
        except (TypeError, ValueError, KeyError):
            resolved = dtype
    check_dtype(resolved)
    assert isinstance(resolved, torch.dtype)
    return resolved


def check_sampling(sampling: object) -> None:
    """Raises TypeError for anything that lays no grid of windows."""
    if not hasattr(sampling, "grid"):
        raise TypeError(
            "sampling: expected FixedAspectSampling(...) or FullMatrix(), "
            f"got {type(sampling).__name__}"
        )


def check_int(argument: str, value: object, least: int = 0, most: int | None = None) -> int:
    """The value as an int; TypeError unless it is an integer, ValueError beyond least and most."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{argument}: expected an integer of at most {most}, got {value!r}")
    return number


def parse_memory(text: str) -> int:
    """Bytes of a size such as `40GiB`, `500 MB` or `1073741824`, its unit in any case."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(match[2].lower()) if match else None
    # Infinite where there are hundreds of digits.
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size < _MOST_BYTES:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(
            f"memory: expected a size such as 40GiB, 500MB or a number of bytes, got {shown!r}"
        )
    return int(size)


def memory_bytes(memory: object) -> int:
    """Bytes of a device: an integer of at least 1, or a text as of `parse_memory`."""
    if isinstance(memory, str):
        return parse_memory(memory)
    return check_int("memory", memory, least=1, most=_MOST_BYTES)


def first_repeated(names: Iterable[T]) -> T | None:
    """The first of the names that has come before; None where all differ."""
    seen: set[T] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def near_names(name: str, names: Sequence[str], most: int) -> list[str]:
    """The names nearest to one, most similar first: of a large model's, those of its beginning."""
    # Comparing takes as long as the product of the lengths.
    short = [known for known in names[:_COMPARED_NAMES] if len(known) <= _COMPARED_LENGTH]
    return difflib.get_close_matches(name[:_COMPARED_LENGTH], short, n=most, cutoff=0.5)


def unmatched_pattern(argument: str, pattern: str, names: Sequence[str]) -> ValueError:
    """The error of a glob that matches no name; it suggests one that does, or a near name."""
    if any(pattern in name for name in names):
        hint = f": '*{pattern}*'?"
    else:
        near = near_names(pattern, names, 1)
        hint = f": {near[0]!r}?" if near else ""
    first = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return ValueError(
        f"{argument}: expected patterns that match a whole name, {pattern!r} matches none of the "
        f"{len(names)} names{hint}" + (f" (names: {first})" if names else "")
    )


def check_flag(argument: str, value: object) -> bool:
    """The value; TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False, got {value!r}")
    return value


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a real number, of Python's or NumPy's, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def not_negative(argument: str, value: object) -> float:
    """The value as a float; TypeError unless it is a number, ValueError below 0 or not finite."""
    if not is_real(value):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{argument}: expected a finite number that is not negative, got {value!r}"
        )
    return number


def default_device() -> torch.device:
    """CUDA where there is a device and the build has it, else the CPU."""
    return torch.device("cuda" if has_cuda() and torch.cuda.is_available() else "cpu")


def check_solver(solver: str | None, device: torch.device) -> None:
    """Raises ValueError unless the solver is None, "auto" or one of the device's."""
    known = ["auto", *torch.ops.farms_fast.solver_names(device.type)]
    if solver is not None and solver not in known:
        raise ValueError(
            f"solver: expected one of {', '.join(known)} on {device.type}, got {solver!r}"
        )


def resolve_device(device: str | torch.device | None, default: torch.device) -> torch.device:
    """The device that an argument names, the default for None, checked to be there."""
    try:
        chosen = default if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type == "cpu":
        return chosen
    if chosen.type != "cuda":
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(chosen)!r}")
    if not has_cuda():
        raise ValueError(
            f"device: got {str(chosen)!r}, but this installation was built without CUDA "
            "(see farms_fast.build_info(), or the command farms-fast info)"
        )
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {str(chosen)!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return chosen
