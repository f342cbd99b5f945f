"""Numbers and text of unknown origin as a terminal or a page may show them."""

from __future__ import annotations

import math


def fixed(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number with so many digits after its point; a dash for what is not finite.

    Example:
        >>> fixed(2.5), fixed(-0.0001, 2, sign=True), fixed(math.nan)
        ('2.500', '+0.00', '-')
    """
    if not math.isfinite(value):
        return "-"
    # Rounded first: what is nearly nothing has no sign.
    return f"{round(float(value), digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def significant(value: float) -> str:
    """A number with four digits; a dash for what is not finite."""
    return f"{value:.4g}" if math.isfinite(value) else "-"


# What spreadsheets take for a formula, wide forms included, and the sign that stops them.
_FORMULA_STARTS = frozenset("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20'")


def csv_cell(value: object) -> object:
    """The value for a CSV file: text that a spreadsheet would compute has a `'` in front.

    Text that begins with a `'` gets one too, so that without one in front a cell is the text again.

    Example:
        >>> csv_cell("fc"), csv_cell("=1+1"), csv_cell("'a"), csv_cell(-1.5)
        ('fc', "'=1+1", "''a", -1.5)
    """
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA_STARTS else value


def printable(text: str) -> str:
    r"""Text of unknown origin with everything that a terminal would act on written as escapes.

    Example:
        >>> print(printable("a\x1b[31mb\u202e"))
        a\x1b[31mb\u202e
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
