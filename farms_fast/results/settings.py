"""How an analysis was made: typed values with one canonical JSON, which tells runs apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farms_fast.core.arguments import MOST_BINS, MOST_RESAMPLES
from farms_fast.core.extension import __version__
from farms_fast.core.json_files import decode_json, shown
from farms_fast.core.jsonable import canonical_json
from farms_fast.spectra.bootstrap import FitRule
from farms_fast.spectra.power_law import XMIN_RULES
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix, Sampling
from farms_fast.weights.stacks import LAYOUTS

RUN_KEY_FIELDS = (
    *("source", "base", "key", "include", "exclude", "layout", "sampling"),
    *("xmin", "xmin_pos", "bins", "bootstrap", "dtype", "solver", "farms_fast"),
)
"""What makes two runs the same: the settings that decide the layers and their numbers.

Another release may compute them otherwise. Devices agree to within the error of the eigenvalues,
so a run may go on on another one.
"""

COMPARABILITY_FIELDS = ("sampling", "xmin", "xmin_pos", "bins")
"""What makes alphas comparable: where one of these differs, they mean something else."""


@dataclass(frozen=True)
class OtherSampling:
    """A sampling that this package does not have.

    Attributes:
        identity: the sampling's own `identity`, a text that says which windows it takes; empty
            where it has none, and then no store can hold its runs.
    """

    identity: str


_DeclaredSampling = FixedAspectSampling | FullMatrix | OtherSampling
# What a kind of sampling is called in files, whatever its class is called.
_SAMPLINGS: dict[str, type[_DeclaredSampling]] = {
    "fixed_aspect": FixedAspectSampling,
    "full_matrix": FullMatrix,
    "other": OtherSampling,
}
_FARMS = FixedAspectSampling()


def declared_sampling(sampling: Sampling) -> _DeclaredSampling:
    """The sampling as settings have it."""
    # Exactly these: a subclass may take other windows.
    if type(sampling) is FixedAspectSampling or type(sampling) is FullMatrix:
        return sampling
    identity = getattr(sampling, "identity", "")
    return OtherSampling(identity if isinstance(identity, str) else "")


@dataclass(frozen=True)
class AnalysisSettings:
    """How an analysis was made.

    Attributes:
        source: the model, by its path or a description.
        base: the model that an adapter changes; None where there is no adapter.
        key: path of the mapping that holds the weights in a checkpoint; None where it was found.
        include: globs of the layers to analyse; empty for all but embeddings.
        exclude: globs of the layers to leave out.
        layout: how kernels are stored: "auto", "torch" or "channels_last".
        sampling: the windows, as of `declared_sampling`.
        xmin: the rule for the start of the tail: "median", "ks" or "peak".
        xmin_pos: for the median rule.
        bins: for the peak rule.
        bootstrap: resamples for the standard error of alpha.
        dtype: precision of the eigenvalues, "float64" or "float32".
        device: where they were computed.
        solver: the eigensolver's name, "auto" for a choice by order.
        farms_fast: the release.
        torch: torch's version.
        numpy: NumPy's version.

    Raises:
        ValueError: a field has a value that it cannot have.

    Example:
        >>> settings = AnalysisSettings("model.safetensors", sampling=FullMatrix())
        >>> AnalysisSettings.from_json(settings.to_json()) == settings
        True
        >>> settings.to_plain()["sampling"]
        {'kind': 'full_matrix'}
    """

    source: str
    base: str | None = None
    key: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layout: str = "auto"
    sampling: _DeclaredSampling = _FARMS
    xmin: str = "median"
    xmin_pos: float = 2.0
    bins: int = 100
    bootstrap: int = 100
    dtype: str = "float64"
    device: str = "cpu"
    solver: str = "auto"
    farms_fast: str = __version__
    torch: str = str(torch.__version__)
    numpy: str = np.__version__

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            expected, is_right = _EXPECTED.get(name, _TEXT)
            if not is_right(value):
                raise ValueError(f"settings: {name}: expected {expected}, got {shown(value)}")

    def values(self) -> dict[str, object]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def rule(self) -> FitRule:
        """How spectra were fitted."""
        compat = getattr(self.sampling, "compat", None)
        return FitRule(self.xmin, self.xmin_pos, self.bins, compat)

    @property
    def run_key(self) -> str:
        """Canonical JSON of `RUN_KEY_FIELDS`: equal where two runs are the same."""
        if self.sampling == OtherSampling(""):
            raise ValueError(
                "sampling: a store tells runs apart by their windows, so it expects "
                "FixedAspectSampling, FullMatrix or a sampling with an `identity` of text"
            )
        plain = self.to_plain()
        return canonical_json({name: plain[name] for name in RUN_KEY_FIELDS})

    def is_comparable_with(self, other: AnalysisSettings) -> bool:
        """Whether alphas of the two mean the same."""
        return all(getattr(self, name) == getattr(other, name) for name in COMPARABILITY_FIELDS)

    def to_plain(self) -> dict[str, Any]:
        """The fields by name, in values that JSON has a form for."""
        lists = {"include": list(self.include), "exclude": list(self.exclude)}
        return {**self.values(), **lists, "sampling": _sampling_to_plain(self.sampling)}

    def to_json(self) -> str:
        """Canonical JSON: equal settings have equal text."""
        return canonical_json(self.to_plain())

    @classmethod
    def from_plain(cls, plain: object) -> AnalysisSettings:
        """Undoes `to_plain`; ValueError for a field that is missing, unknown or wrong."""
        if isinstance(plain, Mapping):
            # Settings that were written before these were any.
            plain = {"key": None, "layout": "auto", **plain}
        values = _fields_of(cls, "settings", plain)
        for name in ("include", "exclude"):
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        return cls(**{**values, "sampling": _sampling_from_plain(values["sampling"])})

    @classmethod
    def from_json(cls, text: str) -> AnalysisSettings:
        """Undoes `to_json`; errors as of `from_plain`."""
        try:
            plain = decode_json(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings: expected JSON ({error})") from error
        return cls.from_plain(plain)


_Expected = tuple[str, Callable[[Any], bool]]
_TEXT: _Expected = "text", lambda value: isinstance(value, str)
_TEXTS: _Expected = (
    "a list of texts",
    lambda value: isinstance(value, tuple) and all(isinstance(text, str) for text in value),
)
_OPTIONAL_TEXT: _Expected = (
    "text or nothing",
    lambda value: value is None or isinstance(value, str),
)


def _count(most: int) -> _Expected:
    return f"an integer of 0 to {most}", lambda n: type(n) is int and 0 <= n <= most


_EXPECTED: Mapping[str, _Expected] = {
    "base": _OPTIONAL_TEXT,
    "key": _OPTIONAL_TEXT,
    "include": _TEXTS,
    "exclude": _TEXTS,
    "layout": (", ".join(LAYOUTS), lambda value: value in LAYOUTS),
    "sampling": (
        "FixedAspectSampling, FullMatrix or OtherSampling",
        lambda value: isinstance(value, _DeclaredSampling),
    ),
    "xmin": ("median, ks or peak", lambda value: value in list(XMIN_RULES.values())),
    "xmin_pos": ("a finite float", lambda x: isinstance(x, float) and math.isfinite(x)),
    "bins": _count(MOST_BINS),
    "bootstrap": _count(MOST_RESAMPLES),
    "dtype": ("float64 or float32", lambda value: value in ("float64", "float32")),
}


def _fields_of(made: type[Any], what: str, plain: object) -> dict[str, Any]:
    """The values of an object that has exactly the fields of a dataclass."""
    names = [field.name for field in dataclasses.fields(made)]
    if not isinstance(plain, Mapping):
        raise ValueError(f"{what}: expected an object, got {shown(plain)}")
    if wrong := [name for name in (*names, *plain) if name not in names or name not in plain]:
        kind = "no" if wrong[0] in names else "unknown"
        raise ValueError(
            f"{what}: {kind} field {shown(wrong[0])}, expected {', '.join(names) or 'none'}"
        )
    return dict(plain)


def _sampling_to_plain(sampling: _DeclaredSampling) -> dict[str, object]:
    kind = next(kind for kind, made in _SAMPLINGS.items() if isinstance(sampling, made))
    plain = {"kind": kind, **dataclasses.asdict(sampling)}
    if isinstance(sampling, FixedAspectSampling):
        # NumPy's numbers become Python's.
        plain |= {name: int(plain[name]) for name in ("rows", "per_dim")}
        plain["q"] = float(sampling.q)
    return plain


def _sampling_from_plain(plain: object) -> _DeclaredSampling:
    values = dict(plain) if isinstance(plain, Mapping) else {}
    kind = values.pop("kind", None)
    if kind not in list(_SAMPLINGS):
        kinds = ", ".join(_SAMPLINGS)
        raise ValueError(
            f"settings: sampling: expected an object with a kind of {kinds}, got {shown(plain)}"
        )
    made = _SAMPLINGS[kind]
    values = _fields_of(made, "settings: sampling", values)
    try:
        return made(**values)
    # Numbers beyond float64 and deeply nested lists have errors of their own.
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"settings: sampling: {error}") from error
