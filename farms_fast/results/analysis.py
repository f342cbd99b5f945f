"""What an analysis gives back: one record per layer, the tensors left out, and files of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from farms_fast.core.arguments import check_type, list_of, near_names
from farms_fast.core.progress import Progress
from farms_fast.core.text import printable
from farms_fast.results.files import (
    data_frame,
    read_json,
    write_json,
    write_npz,
    write_parquet,
    write_rows,
    write_safetensors,
)
from farms_fast.results.record import CSV_COLUMNS, LayerRecord
from farms_fast.results.settings import AnalysisSettings
from farms_fast.results.store import ResultsStore
from farms_fast.views.html import report_payload, write_page
from farms_fast.views.notebook import analysis_html
from farms_fast.views.plots import plot_alpha
from farms_fast.views.values import Side
from farms_fast.weights.stacks import Skipped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Layer = TypeVar("_Layer", bound=_Named)


class NamedLayers(Generic[_Layer]):
    """Layers in order, which are also had by their names."""

    layers: list[_Layer]
    # Where the layers were when their names were last read: the list may have changed since.
    _positions: Mapping[str, int] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[_Layer]:
        return iter(self.layers)

    def __getitem__(self, name: str) -> _Layer:
        """The layer of that name; a KeyError that suggests near names if there is none."""
        if not isinstance(name, str):
            known = f" ({self.layers[0].name!r})" if self.layers else ""
            raise KeyError(
                f"no layer named {name!r}: names are text{known}; .layers[0] is the first layer"
            )
        position = self._positions.get(name, -1)
        if 0 <= position < len(self.layers) and self.layers[position].name == name:
            return self.layers[position]
        names = [layer.name for layer in self.layers]
        # Reversed, so that the first of several layers of one name counts.
        self._positions = {names[i]: i for i in reversed(range(len(names)))}
        if name in self._positions:
            return self.layers[self._positions[name]]
        near = near_names(name, names, 3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"{len(names)} layers"
        raise KeyError(f"no layer named {name!r} ({hint})")


class Analysis(NamedLayers[LayerRecord]):
    """The records of a model's layers, in the model's order, and what was left out.

    `len(analysis)`, iteration and `analysis[name]` go over the layers.

    Args:
        layers: the records.
        skipped: the tensors that are not layers.
        settings: how the analysis was made; None for one made by hand.

    Attributes:
        layers: one `LayerRecord` per layer.
        skipped: the tensors that are not layers, each with its reason.
        settings: how it was made (`AnalysisSettings`); None for one made by hand.

    Example:
        >>> record = LayerRecord("encoder.fc", "linear", (1, 4, 4), "ok", alpha=2.5)
        >>> analysis = Analysis([record])
        >>> analysis
        Analysis(1 layer, 0 failed, 0 tensors skipped, mean alpha 2.5)
        >>> analysis["encoder.fc"].alpha
        2.5
        >>> [layer.name for layer in analysis]
        ['encoder.fc']
    """

    def __init__(
        self,
        layers: Sequence[LayerRecord],
        skipped: Sequence[Skipped] = (),
        settings: AnalysisSettings | None = None,
    ) -> None:
        self.layers = list_of("layers", layers, LayerRecord, "LayerRecords")
        self.skipped = list_of("skipped", skipped, Skipped, "Skipped tensors")
        if settings is not None:
            check_type("settings", settings, AnalysisSettings, "AnalysisSettings")
        self.settings = settings

    @property
    def failed(self) -> list[LayerRecord]:
        """The layers whose status is not "ok"."""
        return [layer for layer in self.layers if layer.status != "ok"]

    @property
    def mean_alpha(self) -> float:
        """Mean alpha of the layers that are "ok"; NaN if none is."""
        alphas = [layer.alpha for layer in self.layers if layer.status == "ok"]
        return math.fsum(alphas) / len(alphas) if alphas else math.nan

    def __repr__(self) -> str:
        """Counts and the mean alpha, on one line."""
        layers = "layer" if len(self.layers) == 1 else "layers"
        tensors = "tensor" if len(self.skipped) == 1 else "tensors"
        return (
            f"Analysis({len(self.layers)} {layers}, {len(self.failed)} failed, "
            f"{len(self.skipped)} {tensors} skipped, mean alpha {self.mean_alpha:.4g})"
        )

    def __str__(self) -> str:
        """The first line of repr, then one line per layer."""
        lines = [repr(self)]
        for layer in self.layers:
            size = "x".join(map(str, layer.shape))
            if layer.status == "ok":
                spread = "" if math.isnan(layer.alpha_se) else f" +- {layer.alpha_se:.3f}"
                outcome = f"alpha {layer.alpha:.3f}{spread}, D {layer.D:.3f}"
            else:
                outcome = f"{layer.status}: {printable(layer.message)}"
            lines.append(f"  {printable(layer.name)}  {size}  {outcome}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return analysis_html(repr(self), self.layers)

    def plot_alpha(self, ax: Axes | None = None) -> Axes:
        """Draws alpha against depth with its interval over windows; see `farms_fast.views.plots`.

        Args:
            ax: where to draw; None is a figure of its own.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        return plot_alpha(self.layers, ax)

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        progress: bool | Progress = False,
    ) -> None:
        """Writes a page to look at: summary, plots, a table, and every layer's spectrum.

        The page is one file that asks for nothing else.

        Args:
            path: the file.
            title: heading of the page; None is the name of the source.
            progress: as of `farms_fast.analyze`.
        """
        write_page(path, title, lambda: report_payload(self.as_side(), title, progress))

    def as_side(self) -> Side:
        """The values that a page shows."""
        settings = self.settings.values() if self.settings else {}
        return Side(self.layers, self.skipped, settings, self.mean_alpha)

    def to_pandas(self) -> pd.DataFrame:
        """One row per layer, in order, with the scalars of the records as columns.

        Raises:
            ImportError: if pandas is not installed.
        """
        return data_frame(CSV_COLUMNS, [layer.scalars() for layer in self.layers])

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per layer, UTF-8, with the columns of `to_pandas`.

        Floats are written so that reading them gives the same bits, NaN as `nan`. A name of a
        layer may come from anyone: text that begins as a formula of a spreadsheet does (`=`, `+`,
        `-`, `@`), or with a `'`, has a `'` in front. The file appears whole or not at all.

        Args:
            path: the file, replaced if it exists.

        Raises:
            OSError: if it cannot be written.
        """
        write_rows(path, CSV_COLUMNS, [layer.scalars() for layer in self.layers])

    def to_json(self, path: str | os.PathLike[str], spectra: bool = False) -> None:
        """Writes everything that `from_json` reads back; NaN as null.

        The file appears whole or not at all.

        Args:
            path: the file, replaced if it exists.
            spectra: whether to write the eigenvalues too (about 20 bytes each).

        Raises:
            OSError: if it cannot be written.
        """
        write_json(path, self.layers, self.skipped, self.settings, spectra)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Analysis:
        """Reads what `to_json` wrote; null becomes NaN.

        Args:
            path: the file. Without spectra in it, the records' `evals` and `window_evals` are
                empty.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not such a file.
        """
        return cls(*read_json(path))

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per layer with the columns of `to_pandas`.

        Floats keep their bits and NaN stays NaN; `matrix_rank` is a float. The settings are in
        the schema's metadata as JSON, `farms_fast.settings`. The file appears whole or not at
        all.

        Args:
            path: the file, replaced if it exists.

        Raises:
            ImportError: if pyarrow is not installed.
            OSError: if it cannot be written.
        """
        write_parquet(path, self.layers, self.settings)

    def spectra_to_npz(self, path: str | os.PathLike[str]) -> None:
        """Writes the eigenvalues of every layer for `numpy.load`.

        Each array is named after its layer (`array_name`), float64 (windows, k), ascending in
        each window; (0, 0) for a layer that failed. One layer at a time is held in memory.

        Args:
            path: the file; nothing is appended to its name.

        Raises:
            ValueError: if the analysis was read from a JSON file without spectra.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> record = LayerRecord(
            ...     "fc", "linear", (1, 4, 4), "ok", window_evals=np.array([[1.0, 2.0]]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Analysis([record]).spectra_to_npz(folder + "/spectra.npz")
            ...     with np.load(folder + "/spectra.npz") as spectra:
            ...         spectra["fc"].tolist()
            [[1.0, 2.0]]
        """
        write_npz(path, self.layers)

    def spectra_to_safetensors(self, path: str | os.PathLike[str]) -> None:
        """Writes the eigenvalues of every layer for `safetensors`.

        The tensors are those of `spectra_to_npz`; the settings are in the metadata as JSON,
        `settings`.

        Args:
            path: the file, replaced if it exists.

        Raises:
            OSError: if it cannot be written.
            ValueError: if the analysis was read from a JSON file without spectra.
        """
        write_safetensors(path, self.layers, self.settings)

    @classmethod
    def from_store(cls, path: str | os.PathLike[str], run: int | None = None) -> Analysis:
        """Reads a run of a results store (`ResultsStore`).

        Spectra are read from the file when a record is first asked for them.

        Args:
            path: the store.
            run: the run's number; None is the newest.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a results store or has no such run.
        """
        with ResultsStore(path, create=False) as store:
            return cls(*store.read(run))
