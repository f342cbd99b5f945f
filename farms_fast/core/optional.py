"""Packages that only an extra of farms_fast brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def optional_import(
    package: str, *, extra: str, needed_for: str, instead: str = ""
) -> Iterator[None]:
    """An import that fails inside says who needs the package, and which extra brings it.

    The import itself stays a statement, so that its types are known. The message names the reason:
    a package that is there may fail too.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{needed_for}: {package} is needed, but cannot be imported ({error}): "
            f"pip install 'farms-fast[{extra}]'" + (f", or {instead}" if instead else "")
        ) from error
