"""Layer records as rows of a results store, and back to the same bits."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farms_fast.core.json_files import count_value, shown
from farms_fast.results.record import CSV_COLUMNS, SCALAR_FIELDS, LayerRecord, field_value
from farms_fast.results.store.file import StoreFile

Array = npt.NDArray[np.float64]

# A value of SQLite is below 1 GB, and one part at a time is what reading and writing hold.
_PART_BYTES = 16 * 2**20
_CRC_BYTES = 4

LAYER_COLUMNS = ("digest", *CSV_COLUMNS, "window_alphas")
"""The columns of a layer that are the same in every store: all but id, run and position."""


@dataclass(frozen=True)
class LayerRow:
    """A layer as it goes into the tables.

    Attributes:
        values: one value per name of LAYER_COLUMNS.
        parts: per part of the spectrum its windows, their order k and the encoded eigenvalues.
    """

    values: tuple[object, ...]
    parts: Sequence[tuple[int, int, bytes]]


def encode(values: Array) -> bytes:
    """CRC-32 and the bits of the numbers, little-endian; the shape is not kept."""
    bits = np.ascontiguousarray(values, dtype="<f8").tobytes()
    return zlib.crc32(bits).to_bytes(_CRC_BYTES, "little") + bits


def decode(packed: bytes) -> Array:
    """The numbers that `encode` was given, float64 (n,), to the bit; ValueError if damaged."""
    crc, bits = packed[:_CRC_BYTES], memoryview(packed)[_CRC_BYTES:]
    if zlib.crc32(bits).to_bytes(_CRC_BYTES, "little") != crc:
        raise ValueError("the checksum does not match")
    return np.frombuffer(bits, dtype="<f8").astype(np.float64)


def sql_text(text: str) -> str | bytes:
    """The text, or its bytes where UTF-8 has no form for it (lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def pack(record: LayerRecord, digest: str) -> LayerRow:
    """Turns a record into a row: the work that needs no access to the file."""
    scalars = [_sql(value) for value in record.scalars().values()]
    alphas = encode(np.asarray(record.window_alphas, dtype=np.float64))
    per_window = np.asarray(record.read_window_evals(), dtype=np.float64)
    windows, k = per_window.shape
    step = max(1, _PART_BYTES // (8 * max(1, k)))
    parts = [
        (min(step, windows - begin), k, encode(per_window[begin : begin + step]))
        for begin in range(0, windows, step)
    ]
    if not parts and k:
        parts = [(0, k, encode(per_window))]
    return LayerRow((digest, *scalars, alphas), parts)


def unpack(row: Sequence[Any], path: str) -> LayerRecord:
    """Turns CSV_COLUMNS and window_alphas into a record whose spectrum is still to be set."""
    *scalars, alphas = row
    columns = dict(zip(CSV_COLUMNS, scalars, strict=True))
    try:
        columns["shape"] = [columns[name] for name in ("stack", "rows", "cols")]
        values = {name: field_value(name, _text(columns[name])) for name in SCALAR_FIELDS}
        values["window_alphas"] = decode(alphas)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"store: {path!r} has a damaged record of layer {shown(columns['name'])} ({error})"
        ) from error
    return LayerRecord(**values)


def read_stored_evals(path: str, timeout: float, layer: int, name: str) -> Array:
    """The eigenvalues of a layer, by its row in the store of that path, float64 (windows, k)."""
    with closing(StoreFile(path, timeout, create=False)) as file, file.reading() as connection:
        there = connection.execute("SELECT 1 FROM layers WHERE id = ?", (layer,))
        if there.fetchone() is None:
            raise ValueError(
                f"store: {path!r} no longer has this spectrum of layer {name!r}, "
                "which has been computed again since"
            )
        parts = connection.execute(
            "SELECT windows, k, evals FROM spectra WHERE layer = ? ORDER BY part", (layer,)
        )
        try:
            arrays = [
                decode(packed).reshape(count_value("windows", windows), count_value("k", k))
                for windows, k, packed in parts
            ]
            if len(arrays) == 1:
                return arrays[0]
            return np.concatenate(arrays) if arrays else np.empty((0, 0), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"store: {path!r} has a damaged spectrum of layer {name!r} ({error})"
            ) from error


def _sql(value: str | int | float) -> object:
    if isinstance(value, str):
        return sql_text(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    return None if math.isnan(value) else float(value)


def _text(value: Any) -> Any:
    """Undoes `sql_text`."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
