"""Writes the table that costs are predicted from: `python -m benchmarks.cost_table`.

Takes the saved runs of `benchmarks/saved` (`make bench` and `make bench-cuda` renew them) and
rewrites `farms_fast/engine/measured.json`, which `farms_fast.engine.cost` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import SAVED

TABLE = Path(__file__).parent.parent / "farms_fast/engine/measured.json"
LIBRARY = "XsyevBatched bare"
# One launch of `one_stage` takes about this for each unit of its order, however few its windows;
# NOTES.md has it from nine windows of 100. Up to the order that the solver takes.
ONE_STAGE_ORDER, ONE_STAGE_LATENCY = 160, 2.0e-6
# The many spectra of one size of the benchmarks.
SPECTRA = 37
NO_LIMIT = 2**31
Run = dict[str, Any]
Row = tuple[int, int, float]


def medians(run: Run, family: str, peer: str) -> Iterator[tuple[str, int, float]]:
    """Case, units and seconds of what a peer was measured on whole."""
    for entry in run["benchmarks"]:
        info = entry["extra_info"]
        if (info["family"], info["peer"], info["scale"]) == (family, peer, 1.0):
            yield info["case"], info["units"], entry["stats"]["median"]


def eigenvalue_rows(run: Run, peer: str) -> list[Row]:
    """(order, windows, seconds of them all), by order, then by windows."""
    rows = []
    for case, windows, seconds in medians(run, "eigenvalues", peer):
        found = re.match(r"k=(\d+) x", case)
        assert found, case
        rows.append((int(found[1]), windows, seconds))
    return sorted(rows)


def latency_of(rows: list[Row]) -> float:
    """Seconds that a call takes besides its windows', a unit of order.

    From the line through the two batches of the order that was measured with two.
    """
    orders = [order for order, _, _ in rows]
    (twice,) = {order for order in orders if orders.count(order) == 2}
    (_, few, short), (_, many, long) = (row for row in rows if row[0] == twice)
    return (short - few * (long - short) / (many - few)) / twice


def solver(rows: list[Row], latency: list[tuple[int, float]]) -> dict[str, Any]:
    """A solver's entry: largest batches only, and the latency a unit of order by order."""
    largest = {order: [order, windows, seconds] for order, windows, seconds in rows}
    return {"rows": list(largest.values()), "latency_per_order": latency}


def gram_rows(run: Run) -> list[Row]:
    """(order, windows, seconds) of square windows that share no work."""
    rows = []
    for case, windows, seconds in medians(run, "gram", "farms_fast"):
        found = re.search(r"windows of (\d+) side by side", case)
        if found:
            rows.append((int(found[1]), windows, seconds))
    return sorted(rows)


def fit_rows(run: Run, spectra: int = 1) -> dict[str, list[tuple[int, float]]]:
    """(values of one spectrum, seconds) of so many spectra in one call, by rule."""
    rows: dict[str, list[tuple[int, float]]] = {}
    for case, _, seconds in medians(run, "fit", "farms_fast"):
        found = re.fullmatch(r"(\w+) of (?:(\d+) x )?(\d+)", case)
        assert found, case
        if int(found[2] or 1) == spectra:
            rows.setdefault(found[1], []).append((int(found[3]), seconds))
    return {rule: sorted(found) for rule, found in rows.items()}


def crowded_fits(run: Run) -> dict[str, float]:
    """Seconds a value where one call has spectra enough to fill the device, by rule."""
    rows = fit_rows(run, SPECTRA)
    return {rule: seconds / (SPECTRA * size) for rule, ((size, seconds),) in rows.items()}


def entry_of(kind: str, run: Run, roofline: Run) -> dict[str, Any]:
    """What is kept of one machine."""
    machine = run["machine_info"]
    rows = eigenvalue_rows(run, "farms_fast")
    if kind == "cuda":
        latency = [(ONE_STAGE_ORDER, ONE_STAGE_LATENCY), (NO_LIMIT, latency_of(rows))]
        library = eigenvalue_rows(run, LIBRARY)
        solvers = {
            "own": solver(rows, latency),
            "library": solver(library, [(NO_LIMIT, latency_of(library))]),
        }
    else:
        # Whatever the batch, a core takes one matrix at a time.
        solvers = {"own": solver(rows, [(NO_LIMIT, 0.0)])}
    return {
        "measured_on": machine["gpu"]["name"] if kind == "cuda" else machine["cpu"],
        "cores": machine["cores"] if kind == "cpu" else 1,
        "copy_bytes_per_second": roofline["ceilings"]["copy"],
        "eigenvalues": solvers,
        "gram": gram_rows(run),
        "fit": fit_rows(run),
        "fits of many": crowded_fits(run),
    }


def main() -> None:
    """Rewrites the table."""
    table = {}
    for kind in ("cuda", "cpu"):
        run, roofline = (
            json.loads((SAVED / f"{kind}{suffix}.json").read_text()) for suffix in ("", "-roofline")
        )
        table[kind] = entry_of(kind, run, roofline)
    text = json.dumps(table, indent=1)
    # One row a line.
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
