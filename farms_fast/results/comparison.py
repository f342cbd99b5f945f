"""Two analyses side by side: what happened to every layer's alpha, and whether it says anything."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from farms_fast.core.arguments import check_type, first_repeated, resolve_device
from farms_fast.core.files import write_text
from farms_fast.core.jsonable import plain
from farms_fast.core.progress import Progress, reporter
from farms_fast.core.text import fixed
from farms_fast.results.analysis import Analysis, NamedLayers
from farms_fast.results.files import data_frame, write_rows
from farms_fast.results.paired_bootstrap import difference_error
from farms_fast.results.record import LayerRecord
from farms_fast.results.settings import COMPARABILITY_FIELDS, AnalysisSettings
from farms_fast.views.html import comparison_payload, write_page
from farms_fast.views.notebook import comparison_html

if TYPE_CHECKING:
    import pandas as pd

_SIGNIFICANT = 1.96
# Two ways to compute one alpha differ by far less, and nobody asks for more.
_RESOLUTION = 1e-6

_SIDE_COLUMNS = ("status", "alpha", "alpha_se", "alpha_low", "alpha_high", "D", "stable_rank")
_OWN_COLUMNS = ("present", "difference", "difference_se", "z", "paired", "intervals_overlap")
COMPARISON_COLUMNS = (
    *("name", "kind", "stack", "rows", "cols"),
    *_OWN_COLUMNS,
    *(f"{name}_{side}" for name in _SIDE_COLUMNS for side in "ab"),
    "note",
)
"""The columns of a comparison's tables."""


@dataclass(frozen=True, eq=False)
class LayerDifference:
    """One layer in both analyses, or in one of them.

    Attributes:
        a: its record in the first analysis; None if it is only in the second.
        b: its record in the second; None if it is only in the first.
        difference_se: standard error of `difference`; NaN where an alpha has none.
        paired: whether `difference_se` comes from resampling both by the same draws of windows;
            otherwise it is `sqrt(se_a^2 + se_b^2)`, that of independent alphas.

    Example:
        >>> a, b = (LayerRecord("fc", "linear", (1, 4, 4), "ok", alpha=alpha, alpha_se=0.03)
        ...         for alpha in (2.5, 2.7))
        >>> layer = LayerDifference(a, b, difference_se=0.05)
        >>> round(layer.difference, 3), round(layer.z, 3)
        (0.2, 4.0)
    """

    a: LayerRecord | None
    b: LayerRecord | None
    difference_se: float = math.nan
    paired: bool = False

    @property
    def record(self) -> LayerRecord:
        """The record of the first analysis, or of the second where the first has none."""
        record = self.a or self.b
        assert record is not None
        return record

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.record.name

    @property
    def present(self) -> str:
        """`"both"`, `"a"` or `"b"`."""
        return "b" if self.a is None else "a" if self.b is None else "both"

    @property
    def difference(self) -> float:
        """`alpha_b - alpha_a`; NaN unless both are there."""
        return math.nan if self.a is None or self.b is None else self.b.alpha - self.a.alpha

    @property
    def z(self) -> float:
        """`difference / difference_se`, NaN without an error.

        An error below 1e-6 counts as 1e-6: the rounding of another device or of scaled weights is
        no difference.
        """
        if math.isnan(self.difference_se):
            return math.nan
        return self.difference / max(self.difference_se, _RESOLUTION)

    @property
    def intervals_overlap(self) -> bool | None:
        """Whether the 95 % intervals of the two alphas overlap; None without intervals.

        Alphas may differ although their intervals overlap: `z` says more, above all where windows
        are paired.
        """
        if self.a is None or self.b is None:
            return None
        ends = self.a.alpha_low, self.a.alpha_high, self.b.alpha_low, self.b.alpha_high
        if any(math.isnan(end) for end in ends):
            return None
        return self.a.alpha_low <= self.b.alpha_high and self.b.alpha_low <= self.a.alpha_high

    @property
    def note(self) -> str:
        """What a reader has to know of the comparison; mostly empty."""
        if self.a is None or self.b is None:
            return f"only in {self.present.upper()}"
        notes = [
            f"{side}: {record.status}" + (f", {record.message}" if record.message else "")
            for side, record in (("A", self.a), ("B", self.b))
            if record.status != "ok"
        ]
        if self.a.shape != self.b.shape:
            shapes = ["x".join(map(str, record.shape)) for record in (self.a, self.b)]
            notes.append(f"shapes differ: {shapes[0]} and {shapes[1]}")
        return "; ".join(notes)

    def scalars(self) -> dict[str, str | int | float | bool | None]:
        """The values of `COMPARISON_COLUMNS`."""
        stack, rows, cols = self.record.shape
        row: dict[str, str | int | float | bool | None] = {
            "name": self.name,
            "kind": self.record.kind,
            **{"stack": stack, "rows": rows, "cols": cols},
            **{name: getattr(self, name) for name in _OWN_COLUMNS},
        }
        for name in _SIDE_COLUMNS:
            missing = "" if name == "status" else math.nan
            for side, record in (("a", self.a), ("b", self.b)):
                row[f"{name}_{side}"] = missing if record is None else getattr(record, name)
        return {**row, "note": self.note}


@dataclass(eq=False, repr=False)
class Comparison(NamedLayers[LayerDifference]):
    """Two analyses, layer by layer, as `compare` makes them.

    `len(comparison)`, iteration and `comparison[name]` go over the layers of both, in the order
    of the first; a layer that only the second has comes after the one before it there. Files are
    written as by `Analysis`.

    Attributes:
        a: the first analysis.
        b: the second.
        layers: one `LayerDifference` per name.
    """

    a: Analysis
    b: Analysis
    layers: list[LayerDifference]

    @property
    def only_a(self) -> list[LayerDifference]:
        """The layers that the second analysis does not have."""
        return [layer for layer in self.layers if layer.present == "a"]

    @property
    def only_b(self) -> list[LayerDifference]:
        """The layers that the first analysis does not have."""
        return [layer for layer in self.layers if layer.present == "b"]

    @property
    def compared(self) -> list[LayerDifference]:
        """The layers with an alpha in both."""
        return [layer for layer in self.layers if not math.isnan(layer.difference)]

    @property
    def different(self) -> list[LayerDifference]:
        """Those whose difference is beyond 1.96 standard errors: by chance alone one in twenty."""
        return [layer for layer in self.compared if abs(layer.z) > _SIGNIFICANT]

    @property
    def mean_difference(self) -> float:
        """Mean of `alpha_b - alpha_a` over the layers that have both; NaN if none has."""
        differences = [layer.difference for layer in self.compared]
        return math.fsum(differences) / len(differences) if differences else math.nan

    @property
    def settings_that_differ(self) -> dict[str, tuple[object, object]]:
        """Settings of the two analyses that are not the same, but for where the weights are.

        Those of an analysis without settings are None.
        """
        a, b = (side.settings.values() if side.settings else {} for side in (self.a, self.b))
        return {
            name: (a.get(name), b.get(name))
            for name in a or b
            if name not in ("source", "base") and a.get(name) != b.get(name)
        }

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers has to know, one sentence each; mostly empty."""
        notes = []
        changed = [name for name in self.settings_that_differ if name in COMPARABILITY_FIELDS]
        if changed:
            notes.append(
                f"the analyses were made with different settings ({', '.join(changed)}), so their "
                "alphas do not mean the same"
            )
        if reason := nothing_in_common(self.a, self.b):
            notes.append(reason)
        elif not self.compared:
            notes.append("no layer has an alpha in both analyses")
        careful = sum(not layer.paired and not math.isnan(layer.z) for layer in self.compared)
        if careful:
            notes.append(
                f"{careful} of {len(self.compared)} differences take the errors of A and B as "
                "independent, which overstates them where B was made from A"
            )
        return notes

    def __repr__(self) -> str:
        """Counts and the mean difference, on one line."""
        return (
            f"Comparison(compared {len(self.compared)}, only in A {len(self.only_a)}, "
            f"only in B {len(self.only_b)}, beyond 1.96 standard errors {len(self.different)}, "
            f"mean difference {fixed(self.mean_difference, 4, sign=True)})"
        )

    def _repr_html_(self) -> str:
        return comparison_html(". ".join([repr(self), *self.notes]), self.layers)

    def to_pandas(self) -> pd.DataFrame:
        """One row per layer with `COMPARISON_COLUMNS`.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame(COMPARISON_COLUMNS, [layer.scalars() for layer in self.layers])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per layer with the columns of `to_pandas`, as `Analysis.to_csv` does.

        Args:
            path: the file, replaced if it exists; it appears whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        write_rows(path, COMPARISON_COLUMNS, [layer.scalars() for layer in self.layers])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows of `to_pandas`, the settings of both and the notes; NaN as null.

        Args:
            path: the file, replaced if it exists; it appears whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        document = {
            "format": "farms_fast.comparison",
            "version": 2,
            "settings_a": self.a.settings and self.a.settings.to_plain(),
            "settings_b": self.b.settings and self.b.settings.to_plain(),
            "notes": self.notes,
            "layers": [plain(layer.scalars()) for layer in self.layers],
        }
        write_text(path, json.dumps(document, allow_nan=False, indent=1) + "\n")

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        progress: bool | Progress = False,
    ) -> None:
        """Writes a page to look at; everything as of `Analysis.to_html`."""
        sides = self.a.as_side(), self.b.as_side()
        about = sides, self.notes, list(self.settings_that_differ)
        write_page(path, title, lambda: comparison_payload(self.layers, *about, title, progress))


def compare(
    a: Analysis,
    b: Analysis,
    *,
    paired: bool = True,
    device: str | torch.device = "cpu",
    progress: bool | Progress = False,
) -> Comparison:
    """Compares the layers of two analyses that have the same name.

    Args:
        a: the first, say before fine-tuning or pruning.
        b: the second, say after.
        paired: whether one bootstrap of both spectra gives the standard error of a difference,
            wherever both analyses took the same windows and have their spectra. That is right
            where b's weights come from a's, and does no harm where they do not. It takes as long
            as the bootstrap of the analyses did.
        device: where that bootstrap runs: a GPU is worth it for hundreds of thousands of
            eigenvalues a layer.
        progress: as of `analyze`.

    Returns:
        The layers of both, with their differences.

    Raises:
        TypeError: an argument is no analysis.
        ValueError: an analysis has two layers of one name, or the device cannot be had.

    Example:
        >>> import torch
        >>> import farms_fast
        >>> _ = torch.manual_seed(0)
        >>> before = {"fc.weight": torch.randn(64, 64)}
        >>> after = {"fc.weight": before["fc.weight"] @ torch.randn(64, 64)}
        >>> windows = farms_fast.FixedAspectSampling(rows=32, per_dim=4)
        >>> a, b = (farms_fast.analyze(weights, windows) for weights in (before, after))
        >>> layer = farms_fast.compare(a, b)["fc"]
        >>> round(layer.difference, 2), layer.paired, layer.z < -1.96
        (-0.34, True, True)
    """
    check_type("a", a, Analysis, "an Analysis")
    check_type("b", b, Analysis, "an Analysis")
    records_a, records_b = _by_name("a", a), _by_name("b", b)
    names = _in_order(list(records_a), list(records_b))
    where = resolve_device(device, torch.device("cpu"))
    settings = a.settings
    if not (paired and settings and b.settings and settings.is_comparable_with(b.settings)):
        settings = None
    layers = []
    windows = sum(record.windows for record in a)
    with reporter(progress, len(names), windows) as report:
        for name in names:
            layer = _difference(records_a.get(name), records_b.get(name), settings, where)
            layers.append(layer)
            report(name, 0 if layer.a is None else layer.a.windows, True)
    return Comparison(a, b, layers)


def nothing_in_common(a: Analysis, b: Analysis) -> str:
    """Why no layer of one analysis has the name of one of the other; empty where one has."""
    names_a, names_b = ([layer.name for layer in analysis] for analysis in (a, b))
    if not set(names_a).isdisjoint(names_b):
        return ""
    shown_a, shown_b = (
        f"{names[0]!r}{', ...' if len(names) > 1 else ''}" if names else "no layer"
        for names in (names_a, names_b)
    )
    # A checkpoint's names may lack a prefix that the model's class adds.
    return (
        f"no layer has the same name in A ({shown_a}) and B ({shown_b}): analyse both from a "
        "checkpoint or both from the same class"
    )


def _difference(
    a: LayerRecord | None,
    b: LayerRecord | None,
    settings: AnalysisSettings | None,
    device: torch.device,
) -> LayerDifference:
    """The difference; the settings are those of both analyses, None where they differ."""
    if a is None or b is None or math.isnan(a.alpha) or math.isnan(b.alpha):
        return LayerDifference(a, b)
    error = difference_error(a, b, settings, device) if settings else None
    if error is not None:
        return LayerDifference(a, b, error, paired=True)
    return LayerDifference(a, b, math.hypot(a.alpha_se, b.alpha_se))


def _by_name(argument: str, analysis: Analysis) -> dict[str, LayerRecord]:
    records = {record.name: record for record in analysis}
    if len(records) != len(analysis):
        twice = first_repeated(record.name for record in analysis)
        raise ValueError(f"{argument}: expected layers of different names, got {twice!r} twice")
    return records


def _in_order(first: list[str], second: list[str]) -> list[str]:
    """The names of both: the first in its order, each further one after its predecessor."""
    known = set(first)
    followers: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for name in second:
        if name in known:
            anchor = name
        else:
            followers.setdefault(anchor, []).append(name)
    merged = list(followers.get(None, ()))
    for name in first:
        merged += [name, *followers.get(name, ())]
    return merged
