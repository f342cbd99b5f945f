"""What a notebook shows of an analysis, a record or a comparison: tables of plain HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from farms_fast.core.text import fixed, printable, significant
from farms_fast.views.values import DifferenceValues, LayerValues

_MOST_ROWS = 40
# What a person wants to know of a layer first, and the digits that it deserves.
_RECORD_ROWS = (
    ("alpha", "alpha"),
    ("alpha_se", "standard error over windows"),
    ("alpha_low", "95 % interval from"),
    ("alpha_high", "to"),
    ("split_half", "difference of even and odd windows"),
    ("D", "D"),
    ("xmin", "xmin"),
    ("num_pl_spikes", "eigenvalues in the tail"),
    ("num_evals", "eigenvalues"),
    ("windows", "windows"),
    ("stable_rank", "stable rank"),
    ("spectral_norm", "largest eigenvalue"),
    ("log_alpha_norm", "log_alpha_norm"),
    ("mp_softrank", "mp_softrank"),
)


def analysis_html(caption: str, layers: Sequence[LayerValues]) -> str:
    """A table of the layers, the first and last of them where they are many."""
    heads = ("layer", "shape", "windows", "alpha", "±", "split", "D", "stable rank", "status")
    rows = [
        (
            printable(layer.name),
            "x".join(map(str, layer.shape[layer.shape[0] == 1 :])),
            str(layer.windows),
            fixed(layer.alpha),
            fixed(layer.alpha_se),
            fixed(layer.split_half),
            fixed(layer.D),
            fixed(layer.stable_rank, 1),
            printable(layer.status if not layer.message else f"{layer.status}: {layer.message}"),
        )
        for layer in layers
    ]
    return _table(caption, heads, rows)


def record_html(record: LayerValues) -> str:
    """A layer's metrics, one to a line."""
    rows = [("kind", printable(record.kind)), ("status", printable(record.status))]
    if record.message:
        rows.append(("message", printable(record.message)))
    rows.append(("shape", "x".join(map(str, record.shape))))
    for name, text in _RECORD_ROWS:
        value = getattr(record, name)
        rows.append((text, str(value) if isinstance(value, int) else significant(value)))
    return _table(printable(record.name), ("", ""), rows)


def comparison_html(caption: str, layers: Sequence[DifferenceValues]) -> str:
    """A table of the differences."""
    heads = ("layer", "alpha A", "alpha B", "difference", "±", "z", "note")
    rows = [
        (
            printable(layer.name),
            fixed(math.nan if layer.a is None else layer.a.alpha),
            fixed(math.nan if layer.b is None else layer.b.alpha),
            fixed(layer.difference, sign=True),
            fixed(layer.difference_se),
            fixed(layer.z, 1, sign=True),
            printable(layer.note),
        )
        for layer in layers
    ]
    return _table(caption, heads, rows)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = "text-align:left"
    lines = ["<table>", f'<caption style="{left};caption-side:top">{_text(caption)}</caption>']
    if any(heads):
        lines.append(_row(heads, "th"))
    cut = len(rows) - _MOST_ROWS
    half = _MOST_ROWS // 2
    shown = rows if cut <= 0 else [*rows[:half], (f"… {cut} more …",), *rows[-half:]]
    lines += [_row(row, "td") for row in shown]
    return "\n".join([*lines, "</table>"])


def _row(texts: Iterable[str], tag: str) -> str:
    first, *others = texts
    cells = f'<{tag} style="text-align:left"><bdi>{_text(first)}</bdi></{tag}>'
    return f"<tr>{cells}{''.join(f'<{tag}>{_text(text)}</{tag}>' for text in others)}</tr>"


def _text(text: str) -> str:
    # What UTF-8 has no form for would break the notebook's file.
    return escape(text.encode("utf-8", "backslashreplace").decode("utf-8"))
