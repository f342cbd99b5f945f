"""Checks of arguments that several functions share: one clear error each, naming the argument."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import TypeVar

import torch

from farms_fast._extension import has_cuda

T = TypeVar("T")


def check_type(argument: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError unless the value is of one of these types, which the message calls so."""
    if not isinstance(value, kinds):
        raise TypeError(f"{argument}: expected {expected}, got {type(value).__name__}")


def check_module(argument: str, value: object) -> None:
    """Raises TypeError unless the value is a module."""
    check_type(argument, value, torch.nn.Module, "a torch.nn.Module")


def list_of(argument: str, values: object, kind: type[T], expected: str) -> list[T]:
    """The values as a list; TypeError unless all are of the type, which the message calls so."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{argument}: expected {expected}, got {type(values).__name__}")
    found = list(values)
    for value in found:
        if not isinstance(value, kind):
            raise TypeError(
                f"{argument}: expected {expected}, got {type(values).__name__} with "
                f"{type(value).__name__} in it"
            )
    return found


def path_of(argument: str, value: object) -> Path:
    """The value as a path; TypeError unless it is text, or what stands for a path in text."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{argument}: expected a path, got {type(value).__name__}")
    return Path(value)


def check_dtype(dtype: object) -> None:
    """Raises ValueError unless it is one of the precisions to compute in."""
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype!r}")


def check_sampling(sampling: object) -> None:
    """Raises TypeError for anything that lays no grid of windows."""
    if not hasattr(sampling, "grid"):
        raise TypeError(
            "sampling: expected FixedAspectSampling(...) or FullMatrix(), "
            f"got {type(sampling).__name__}"
        )


def natural(argument: str, value: object, least: int = 0) -> int:
    """The value as an int; TypeError unless it is an integer, ValueError below the least."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{argument}: expected an integer of at least {least}, got {value!r}")
    return number


def not_negative(argument: str, value: object) -> float:
    """The value as a float; TypeError unless it is a number, ValueError below 0 or not finite."""
    if not isinstance(value, Real) or isinstance(value, bool):
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
    """The device that an argument names, checked to be there.

    Args:
        device: "cpu", "cuda", "cuda:1", a `torch.device`, or None for the default.
        default: what None stands for.

    Raises:
        ValueError: an unknown device, a CUDA device that is not there, or a build without CUDA.
    """
    try:
        found = default if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(found)!r}")
    if not has_cuda():
        raise ValueError(
            f"device: got {str(found)!r}, but this installation was built without CUDA "
            "(see farms_fast.build_info())"
        )
    if not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {str(found)!r}, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return found
