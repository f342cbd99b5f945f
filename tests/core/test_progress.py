"""The progress bar: its rate and the time left, by a clock that the test sets."""

from __future__ import annotations

import io
import re
import sys

import pytest

from farms_fast.core import progress

# Seconds since the last report, windows, and whether they had to be computed. The layers of a
# batch are reported within microseconds, after the minute that all of them took together.
REPORTS = [(0.0, 4000, False), (60.0, 600, True), (2e-6, 1200, True), (60.0, 1200, True)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("reports", "shown"),
    [
        (1, None),  # nothing was computed, so nothing is known
        (2, ("10/s", "0:09:00")),
        (3, ("30/s", "0:02:20")),
        (4, ("25/s", "0:02:00")),
    ],
)
def test_rate_is_of_all_computed_windows_since_the_start(
    monkeypatch: pytest.MonkeyPatch, reports: int, shown: tuple[str, str] | None
) -> None:
    terminal, now = Terminal(), 1000.0
    monkeypatch.setattr(progress, "_clock", lambda: now)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress.reporter(True, layers=6, windows=10_000) as report:
        for seconds, windows, computed in REPORTS[:reports]:
            now += seconds
            report("layer", windows, computed)
    # The bar is drawn anew when it ends.
    found = re.findall(r"([\d,.]+/s), (\d+:\d\d:\d\d) left", terminal.getvalue())
    assert (found[-1] if found else None) == shown


@pytest.mark.parametrize("wanted", [True, False])
def test_no_bar_where_stderr_was_closed(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress.reporter(wanted, layers=1, windows=1) as report:
        report("layer", 1, True)
