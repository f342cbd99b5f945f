"""What an analysis gives back: one record per layer, the tensors left out, and files of them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from farms_fast.layers import Skipped
from farms_fast.records import CSV_COLUMNS, INT_FIELDS, SCALAR_FIELDS, LayerRecord

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Analysis"]

_FORMAT = "farms_fast.analysis"
_FORMAT_VERSION = 1


class Analysis:
    """The records of a model's layers, in the model's order, and what was left out.

    ``len(analysis)``, iteration and ``analysis[name]`` go over the layers.

    Args:
        layers: The records.
        skipped: The tensors that are not layers.
        settings: How the analysis was made, best in values that JSON has a form for.

    Attributes:
        layers: One :class:`LayerRecord` per layer.
        skipped: The tensors that are not layers, each with its reason.
        settings: How it was made: sampling, rule, dtype, device, solver, versions, source.

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
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Copies the sequences and the mapping."""
        self.layers: list[LayerRecord] = list(layers)
        self.skipped: list[Skipped] = list(skipped)
        self.settings: dict[str, object] = dict(settings or {})

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerRecord]:
        """The layers in order."""
        return iter(self.layers)

    def __getitem__(self, name: str) -> LayerRecord:
        """The layer of that name; a KeyError that suggests near names if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"{len(names)} layers"
        raise KeyError(f"no layer named {name!r} ({hint})")

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
                found = f"alpha {layer.alpha:.3f}{spread}, D {layer.D:.3f}"
            else:
                found = f"{layer.status}: {printable(layer.message)}"
            lines.append(f"  {printable(layer.name)}  {size}  {found}")
        return "\n".join(lines)

    def to_pandas(self) -> pd.DataFrame:
        """One row per layer, in order, with the scalars of the records as columns.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas, which is not installed: pip install pandas "
                "(to_csv and to_json work without it)"
            ) from error
        return pd.DataFrame([layer.scalars() for layer in self.layers], columns=list(CSV_COLUMNS))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per layer, UTF-8, with the columns of :meth:`to_pandas`.

        Floats are written so that reading them gives the same bits, NaN as ``nan``. The file
        appears whole or not at all.

        Args:
            path: The file, replaced if it exists.

        Raises:
            OSError: If it cannot be written.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(layer.scalars().values() for layer in self.layers)
        _write_whole(Path(path), text.getvalue())

    def to_json(self, path: str | os.PathLike[str], spectra: bool = False) -> None:
        """Writes everything that :meth:`from_json` reads back; NaN as null.

        The file appears whole or not at all. Settings that JSON has no form for are written as
        their ``str``, tuples as lists.

        Args:
            path: The file, replaced if it exists.
            spectra: Whether to write the eigenvalues too (about 20 bytes each).

        Raises:
            OSError: If it cannot be written.
        """
        document = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "settings": _plain(self.settings),
            "layers": [_layer_to_plain(layer, spectra) for layer in self.layers],
            "skipped": [_plain(dataclasses.asdict(tensor)) for tensor in self.skipped],
        }
        indent = None if spectra else 1
        _write_whole(Path(path), json.dumps(document, allow_nan=False, indent=indent) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Analysis:
        """Reads what :meth:`to_json` wrote; null becomes NaN.

        Args:
            path: The file. Without spectra in it, the records' ``evals`` and ``window_evals`` are
                empty.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"path: {os.fspath(path)!r} is not a JSON file ({error})") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(
                f"path: {os.fspath(path)!r} was not written by Analysis.to_json "
                f'(no "format": "{_FORMAT}")'
            )
        if document.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"path: {os.fspath(path)!r} has format version {document.get('version')!r}, "
                f"this release reads version {_FORMAT_VERSION}"
            )
        try:
            return cls(
                [_layer_from_plain(layer) for layer in document["layers"]],
                [
                    Skipped(name=s["name"], shape=tuple(s["shape"]), reason=s["reason"])
                    for s in document["skipped"]
                ],
                document["settings"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"path: {os.fspath(path)!r} has a damaged record ({type(error).__name__}: {error})"
            ) from error


def printable(text: str) -> str:
    r"""Text of unknown origin with everything that a terminal would act on written as escapes.

    Example:
        >>> print(printable("a\x1b[31mb\u202e"))
        a\x1b[31mb\u202e
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _plain(value: object) -> Any:
    """The value as JSON has it, with null for NaN and strings for the infinities."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if math.isnan(number):
            return None
        return number if math.isfinite(number) else str(number)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _layer_to_plain(layer: LayerRecord, spectra: bool) -> dict[str, Any]:
    plain = {name: _plain(getattr(layer, name)) for name in SCALAR_FIELDS}
    plain["window_alphas"] = _plain(layer.window_alphas)
    if spectra:
        plain["evals"] = _plain(layer.evals)
        plain["window_evals"] = _plain(layer.window_evals)
    return plain


def _layer_from_plain(plain: Mapping[str, Any]) -> LayerRecord:
    values: dict[str, Any] = {}
    for name in SCALAR_FIELDS:
        value = plain[name]
        if name == "shape":
            stack, rows, cols = value
            values[name] = (int(stack), int(rows), int(cols))
        elif name in ("name", "kind", "status", "message"):
            values[name] = str(value)
        elif name in INT_FIELDS or (name == "matrix_rank" and value is not None):
            values[name] = int(value)
        else:
            values[name] = _number(value)
    values["window_alphas"] = np.array([_number(x) for x in plain["window_alphas"]], np.float64)
    if "evals" in plain:
        values["evals"] = np.array([_number(x) for x in plain["evals"]], np.float64)
        per_window = [[_number(x) for x in row] for row in plain["window_evals"]]
        # The shape is given because an empty list says nothing of its second dimension.
        shape = (len(per_window), len(per_window[0]) if per_window else 0)
        values["window_evals"] = np.array(per_window, np.float64).reshape(shape)
    return LayerRecord(**values)


def _write_whole(path: Path, text: str) -> None:
    """Writes beside the target and renames, so that no reader ever sees half a file."""
    data = text.encode("utf-8", errors="backslashreplace")
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            # A directory is an error of open; a pipe or a device cannot be replaced by a file.
            with path.open("wb") as stream:
                stream.write(data)
            return
    # Replacing a link would cut it off from the file that it stands for.
    target = path.resolve()
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
