"""Packages that only an extra of farms_fast brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["optional_import"]


@contextmanager
def optional_import(
    package: str, *, extra: str, needed_for: str, instead: str = ""
) -> Iterator[None]:
    """An import that fails inside says who needs the package, and which extra brings it.

    The import itself stays a statement, so that its types are known.

    Args:
        package: what is imported, by the name that people know.
        extra: of this package, as in `pip install 'farms-fast[extra]'`.
        needed_for: what cannot be had without it.
        instead: what can be done without it.

    Raises:
        ImportError: the import failed; the message names its reason too, which for a package that
            is there is another one than that it is not.

    Example:
        >>> with optional_import("frobnicate", extra="plot", needed_for="frobnication"):
        ...     import frobnicate
        Traceback (most recent call last):
            ...
        ImportError: frobnication: frobnicate is needed, but cannot be imported (No module named \
'frobnicate'): pip install 'farms-fast[plot]'
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{needed_for}: {package} is needed, but cannot be imported ({error}): "
            f"pip install 'farms-fast[{extra}]'" + (f", or {instead}" if instead else "")
        ) from error
