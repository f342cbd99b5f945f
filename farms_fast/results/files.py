"""Files of an analysis: tables, JSON and spectra, each written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from farms_fast.core.arguments import path_of
from farms_fast.core.files import FilePath, atomic_file, utf8, write_text
from farms_fast.core.json_files import array_value, decode_json
from farms_fast.core.jsonable import plain
from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import read_limited
from farms_fast.core.text import csv_cell
from farms_fast.results.record import (
    CSV_COLUMNS,
    INT_COLUMNS,
    SCALAR_FIELDS,
    TEXT_FIELDS,
    LayerRecord,
    field_value,
    skipped_from,
)
from farms_fast.results.settings import AnalysisSettings
from farms_fast.weights.stacks import Skipped

if TYPE_CHECKING:
    import pandas as pd

_FORMAT = "farms_fast.analysis"
_FORMAT_VERSION = 2
_INSTEAD = "use to_csv or to_json"

# An analysis with its spectra may be larger than other JSON files.
_MOST_BYTES = 2**32

Array = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------- tables


def write_rows(
    path: FilePath, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> None:
    """Writes a heading and a line per row as CSV, UTF-8; floats to the bit, text as `csv_cell`."""
    lines: list[str] = []
    # With its own ends of lines the writer quotes both of their characters; the file has one.
    writer = csv.writer(SimpleNamespace(write=lines.append))
    writer.writerow(columns)
    writer.writerows([csv_cell(row[name]) for name in columns] for row in rows)
    write_text(path, "".join(line.removesuffix("\r\n") + "\n" for line in lines))


def data_frame(
    columns: Sequence[str], rows: Sequence[Mapping[str, object]], instead: str = _INSTEAD
) -> pd.DataFrame:
    """The rows as pandas has them; ImportError, with what to do instead, if it is not installed."""
    with optional_import("pandas", extra="pandas", needed_for="to_pandas", instead=instead):
        import pandas as pd
    return pd.DataFrame(list(rows), columns=list(columns))


def write_parquet(
    path: FilePath, layers: Sequence[LayerRecord], settings: AnalysisSettings | None
) -> None:
    """As `Analysis.to_parquet` says."""
    with optional_import("pyarrow", extra="parquet", needed_for="to_parquet", instead=_INSTEAD):
        import pyarrow
        import pyarrow.parquet
    rows = [layer.scalars() for layer in layers]
    columns = {}
    for name in CSV_COLUMNS:
        values: list[Any] = [row[name] for row in rows]
        if name in TEXT_FIELDS:
            columns[name] = pyarrow.array([utf8(v).decode() for v in values], pyarrow.string())
        elif name in INT_COLUMNS:
            columns[name] = pyarrow.array(values, pyarrow.int64())
        else:
            columns[name] = pyarrow.array(list(map(float, values)), pyarrow.float64())
    table = pyarrow.table(columns).replace_schema_metadata(
        {"farms_fast.settings": _settings_json(settings)}
    )
    # Whole in memory first: pyarrow asks a stream for its position, which a pipe does not have.
    data = io.BytesIO()
    pyarrow.parquet.write_table(table, data)
    with atomic_file(path) as stream:
        stream.write(data.getvalue())


def _settings_json(settings: AnalysisSettings | None) -> str:
    return "null" if settings is None else settings.to_json()


# --------------------------------------------------------------------------------------------- JSON


def write_json(
    path: FilePath,
    layers: Sequence[LayerRecord],
    skipped: Sequence[Skipped],
    settings: AnalysisSettings | None,
    spectra: bool,
) -> None:
    """As `Analysis.to_json` says."""
    document = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "settings": settings and settings.to_plain(),
        "layers": [_layer_to_plain(layer, spectra) for layer in layers],
        "skipped": [plain(dataclasses.asdict(tensor)) for tensor in skipped],
    }
    write_text(path, json.dumps(document, allow_nan=False, indent=None if spectra else 1) + "\n")


def read_json(path: FilePath) -> tuple[list[LayerRecord], list[Skipped], AnalysisSettings | None]:
    """The layers, skipped tensors and settings of a file of `write_json`; ValueError of another."""
    file = path_of("path", path)
    named = f"path: {os.fspath(path)!r}"
    content = read_limited(file, _MOST_BYTES)
    try:
        document = decode_json(content.decode())
    except ValueError as error:
        raise ValueError(f"{named} is not a JSON file ({error})") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f'{named} was not written by Analysis.to_json (no "format": "{_FORMAT}")')
    if document.get("version") != _FORMAT_VERSION:
        raise ValueError(
            f"{named} has format version {document.get('version')!r}, "
            f"this release reads version {_FORMAT_VERSION}: write it anew from its store, or use "
            "the release that wrote it"
        )
    try:
        layers = [_layer_from_plain(layer) for layer in document["layers"]]
        skipped = [skipped_from(s["name"], s["shape"], s["reason"]) for s in document["skipped"]]
        settings = document["settings"]
        return layers, skipped, None if settings is None else AnalysisSettings.from_plain(settings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{named} has a damaged record ({type(error).__name__}: {error})"
        ) from error


def _layer_to_plain(layer: LayerRecord, spectra: bool) -> dict[str, Any]:
    values = {name: plain(getattr(layer, name)) for name in SCALAR_FIELDS}
    values["window_alphas"] = plain(layer.window_alphas)
    if spectra:
        per_window = layer.read_window_evals()
        values["evals"] = plain(np.sort(per_window, axis=None))
        values["window_evals"] = plain(per_window)
    return values


def _layer_from_plain(given: Mapping[str, Any]) -> LayerRecord:
    values = {name: field_value(name, given[name]) for name in SCALAR_FIELDS}
    values["window_alphas"] = array_value("window_alphas", given["window_alphas"], 1)
    if "evals" in given:
        values["window_evals"] = array_value("window_evals", given["window_evals"], 2)
        pooled = array_value("evals", given["evals"], 1)
        if not np.array_equal(pooled, np.sort(values["window_evals"], axis=None), equal_nan=True):
            raise ValueError(f"evals of {values['name']!r} are not its window_evals in order")
    return LayerRecord(**values)


# ------------------------------------------------------------------------------------------ spectra


def array_name(layer: str) -> str:
    """A layer's name as the files of spectra have it; `urllib.parse.unquote` undoes it.

    Percent-encoded is what a zip file or safetensors would misunderstand: slashes, characters that
    do not print, `.npy` at the end and the name `__metadata__`. Any other name stays.
    """
    name = "".join(
        c if c.isprintable() and c not in "%/\\" else quote(c.encode("utf-8", "surrogatepass"), "")
        for c in layer
    )
    if name.endswith(".npy"):
        name = name[: -len(".npy")] + "%2Enpy"
    return "%5F_metadata__" if name == "__metadata__" else name


def write_npz(path: FilePath, layers: Sequence[LayerRecord]) -> None:
    """As `Analysis.spectra_to_npz` says."""
    with atomic_file(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for layer in layers:
            # A fixed date: the same analysis gives the same file.
            entry = zipfile.ZipInfo(f"{array_name(layer.name)}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, _spectrum(layer), allow_pickle=False)


def write_safetensors(
    path: FilePath, layers: Sequence[LayerRecord], settings: AnalysisSettings | None
) -> None:
    """As `Analysis.spectra_to_safetensors` says."""
    # By hand, because the library wants all tensors in memory at once.
    metadata = {"format": "farms_fast.spectra", "settings": _settings_json(settings)}
    header: dict[str, object] = {"__metadata__": metadata}
    shapes = [_spectrum(layer).shape for layer in layers]
    end = 0
    for layer, shape in zip(layers, shapes, strict=True):
        begin, end = end, end + 8 * math.prod(shape)
        entry = {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}
        header[array_name(layer.name)] = entry
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    # Padded so that the numbers are aligned when the file is mapped into memory.
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for layer, shape in zip(layers, shapes, strict=True):
            per_window = _spectrum(layer)
            if per_window.shape != shape:
                raise ValueError(f"the spectrum of layer {layer.name!r} changed while writing it")
            stream.write(per_window.astype("<f8", copy=False).tobytes())


def _spectrum(layer: LayerRecord) -> Array:
    per_window = layer.read_window_evals()
    if per_window.size == 0 and layer.num_evals:
        raise ValueError(
            f"layer {layer.name!r} has no spectrum to write: "
            "the analysis was read from a file without spectra"
        )
    return per_window
