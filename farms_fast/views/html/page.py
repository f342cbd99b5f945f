"""The file of a page: template, styles, scripts and data in one, and nothing from elsewhere.

The page's content security policy allows the two scripts that are in it, by their digests, and no
request to anywhere. Names of layers come from files that anyone may have written: they reach the
page as data only, in JSON whose `<`, `>` and `&` are escapes, and are put into it as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from farms_fast.core.arguments import check_type, path_of
from farms_fast.core.extension import __version__
from farms_fast.core.files import FilePath, write_text
from farms_fast.views.html.payload import Payload

_SCRIPTS = (
    *("data", "theme", "charts", "spectra", "overview", "differences"),
    *("table", "layer", "main"),
)


def write_page(path: FilePath, title: str | None, read: Callable[[], Payload]) -> None:
    """Writes a page, whose payload is read when path and title are found to be right."""
    path_of("path", path)
    check_type("title", title, (str, type(None)), "a string")
    write_text(path, _page(*read()))


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
