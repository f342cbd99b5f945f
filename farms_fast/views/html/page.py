"""The file of a page: template, styles, scripts and data in one, and nothing from elsewhere.

The page's content security policy allows the two scripts that are in it, by their digests, and no
request to anywhere. Names of layers come from files that anyone may have written: they reach the
page as data only, in JSON whose `<`, `>` and `&` are escapes, and are put into it as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from farms_fast.core.arguments import check_type, path_of
from farms_fast.core.extension import __version__
from farms_fast.core.files import write_text
from farms_fast.core.progress import Progress
from farms_fast.views.html.payload import comparison_payload, report_payload
from farms_fast.views.values import DifferenceValues, Side

_SCRIPTS = (
    *("data", "theme", "charts", "spectra", "overview", "differences"),
    *("table", "layer", "main"),
)


def write_report(
    path: str | os.PathLike[str],
    side: Side,
    title: str | None = None,
    progress: bool | Progress = False,
) -> None:
    """Writes a page of an analysis, as `Analysis.to_html` says."""
    _check(path, title)
    write_text(path, _page(*report_payload(side, title, progress)))


def write_comparison(
    path: str | os.PathLike[str],
    layers: Sequence[DifferenceValues],
    sides: tuple[Side, Side],
    notes: Sequence[str],
    settings_that_differ: Sequence[str],
    title: str | None = None,
    progress: bool | Progress = False,
) -> None:
    """Writes a page of two analyses compared, as `Comparison.to_html` says."""
    _check(path, title)
    page = comparison_payload(layers, sides, notes, settings_that_differ, title, progress)
    write_text(path, _page(*page))


def _check(path: object, title: object) -> None:
    """Before spectra are read, which may take a while."""
    path_of("path", path)
    if title is not None:
        check_type("title", title, str, "a string")


def script_json(value: Any) -> str:
    r"""JSON that can stand inside of a script element, in ASCII.

    Example:
        >>> script_json("</script> & \u2028")
        '"\\u003c/script\\u003e \\u0026 \\u2028"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page(page: dict[str, Any], curves: list[list[Any]]) -> str:
    library, style = _asset("vendor/echarts.min.js"), _asset("assets/style.css")
    script = _script()
    policy = (
        f"default-src 'none'; script-src {_digest(library)} {_digest(script)}; "
        f"style-src {_digest(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": escape(page["title"]),
        "style": style,
        "data": script_json({**page, "version": __version__}),
        "curves": script_json(curves),
        "library": library,
        "script": script,
    }
    # In one pass, so that nothing that was put in is taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("assets/page.html"))


@cache
def _asset(name: str) -> str:
    return files("farms_fast.views.html").joinpath(name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    parts = [_asset(f"assets/{name}.js") for name in _SCRIPTS]
    return "\n".join(['(function () {\n"use strict";', *parts, "})();\n"])


def _digest(text: str) -> str:
    """What the policy knows a script or a style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
