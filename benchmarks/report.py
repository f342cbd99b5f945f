"""Writes RESULTS.md and README's table from the saved runs, and saves runs.

    python -m benchmarks.report                        # from benchmarks/saved/*.json
    python -m benchmarks.report save cpu RAW.json ...  # first takes pytest-benchmark's files over
    python -m benchmarks.report save cpu --update RAW.json   # only the cases that it has

A saved run is `NAME.json`; `NAME-roofline.json` has the roofline of the same machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import CONTENDER

ROOT = Path(__file__).parent
SAVED = ROOT / "saved"
RESULTS = ROOT / "RESULTS.md"
README = ROOT.parent / "README.md"
NOT_MEASURED = "—"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"

FAMILIES = {
    "eigenvalues": "Eigenvalues of windows",
    "gram": "Windows and their Gram matrices",
    "fit": "Power-law fits",
    "jobs": "Whole jobs",
    "drop_ins": "Drop-in functions",
    "details": "WeightWatcher's table",
}
_EXPLAIN = {
    "eigenvalues": "k is the order of the window, followed by how many windows there are; float64 "
    "in, all eigenvalues out.",
    "gram": "From a float32 weight to the float64 Gram matrix of every window.",
    "fit": "Ascending spectra, one or so many of a size in a call; the rule says where the tail "
    "may start.",
    "jobs": "From weights to alpha for every layer.",
    "drop_ins": "The functions of farms_fast.compat with the published defaults, from a module to "
    "a dict of lists.",
    "details": "farms_fast.compat.weightwatcher and WeightWatcher with the same options.",
}

Run = dict[str, Any]


def save(name: str, files: Sequence[Path], folder: Path = SAVED, *, update: bool = False) -> Path:
    """Merges pytest-benchmark's files of one machine into one that is small enough to keep.

    Args:
        name: of the saved run.
        files: pytest-benchmark's.
        folder: of the saved runs.
        update: keep what the saved run has of other cases than the files; the report gives the day
            of those that are not of the run's own.
    """
    runs = [json.loads(path.read_text()) for path in files]
    for run in runs:
        run["benchmarks"] = [
            {
                "group": entry["group"],
                "stats": {k: _short(v) for k, v in entry["stats"].items() if k != "data"},
                "extra_info": entry["extra_info"],
            }
            for entry in run["benchmarks"]
        ]
    merged = _merged(runs)
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    if update:
        merged = _updated(json.loads(path.read_text()), merged)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    return path


def _merged(runs: Sequence[Run]) -> Run:
    if len({(run["run"]["device"], run["run"]["profile"]) for run in runs}) != 1:
        raise ValueError("files: expected runs of one device and profile")
    merged: Run = {key: runs[0][key] for key in ("machine_info", "commit_info", "datetime")}
    merged["run"] = dict(runs[0]["run"])
    merged["benchmarks"] = [entry for run in runs for entry in run["benchmarks"]]
    for key in ("skipped", "failed"):
        merged["run"][key] = [entry for run in runs for entry in run["run"][key]]
    merged["run"]["seconds"] = sum(run["run"]["seconds"] for run in runs)
    return merged


def _updated(saved: Run, new: Run) -> Run:
    """The saved run with the cases of the new one in place of its own."""
    if title(saved) != title(new):
        raise ValueError(f"update: expected a run of {title(saved)}, got one of {title(new)}")

    def case(entry: Run) -> tuple[str, str]:
        return entry["family"], entry["case"]

    # A case is replaced with all of its peers: ratios are of times in one run.
    cases = {case(entry["extra_info"]) for entry in new["benchmarks"]}
    for key in ("skipped", "failed"):
        kept = [entry for entry in saved["run"][key] if case(entry) not in cases]
        saved["run"][key] = kept + [entry for entry in new["run"][key] if case(entry) in cases]
    kept = [e for e in saved["benchmarks"] if case(e["extra_info"]) not in cases]
    # In the order that they had, new ones last.
    cases_in_order = list(dict.fromkeys(case(e["extra_info"]) for e in saved["benchmarks"]))
    order = {name: index for index, name in enumerate(cases_in_order)}
    saved["benchmarks"] = sorted(
        kept + new["benchmarks"], key=lambda e: order.get(case(e["extra_info"]), len(order))
    )
    dates = saved["run"].setdefault("dates", {})
    for family, name in sorted(cases):
        dates.setdefault(family, {})[name] = new["datetime"]
    return saved


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def load(folder: Path = SAVED) -> list[tuple[Run, Run | None]]:
    """Saved runs, those of GPUs first, each with its roofline."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if not path.stem.endswith("-roofline"):
            roofline_path = path.with_name(f"{path.stem}-roofline.json")
            roofline = json.loads(roofline_path.read_text()) if roofline_path.exists() else None
            found.append((json.loads(path.read_text()), roofline))
    return sorted(found, key=lambda pair: pair[0]["run"]["device"] != "cuda")


def results(runs: Sequence[tuple[Run, Run | None]]) -> str:
    """The text of RESULTS.md."""
    parts = [
        "# Results\n",
        "Written by `python -m benchmarks.report` from the files in `benchmarks/saved`; do not "
        "edit. `make bench` measures the CPU anew, `make bench-cuda` the GPU.\n",
        _HOW_TO_READ,
    ]
    for run, roofline in runs:
        parts += _section(run, roofline)
    return "\n".join(parts)


_HOW_TO_READ = """\
Each number is the peer's time over farms_fast's for the same case: at 2.00 the peer took twice as
long, below 1 it was faster. Times are medians. Every result was compared before anything was timed:
farms_fast's with LAPACK in float64 (at most 8 k 2^-52 λmax apart) or with an independent scan of
the definition of the fit, a peer's with the same to its own stated accuracy. Inputs are random and
rotated so that none comes from a cache. The times include waiting for the device.

- ~ marks a peer that was measured on a part of the case and extrapolated in proportion. The list
  below the table says which part.
- — marks a peer that was not measured. The list gives the reason.
"""


def _section(run: Run, roofline: Run | None) -> list[str]:
    gpu = run["run"]["device"] == "cuda"
    parts = [f"## {title(run)}\n", _machine(run)]
    for family, heading in FAMILIES.items():
        entries = [e["extra_info"] | {"stats": e["stats"]} for e in run["benchmarks"]]
        entries = [entry for entry in entries if entry["family"] == family]
        if entries:
            explained = _EXPLAIN[family] + _later(run, family)
            parts += [f"### {heading}\n", explained + "\n", _table(entries, family, gpu)]
            parts.append(_notes(entries, run["run"], family))
    if roofline is not None:
        parts += ["### Against the machine's limits\n", _roofline(roofline, gpu)]
    return parts


def _later(run: Run, family: str) -> str:
    """Which cases were measured anew on another day than the rest."""
    days: dict[str, list[str]] = {}
    for case, moment in run["run"].get("dates", {}).get(family, {}).items():
        if moment[:10] != run["datetime"][:10]:
            days.setdefault(moment[:10], []).append(case)
    told = [f" Measured on {day}: {'; '.join(cases)}." for day, cases in sorted(days.items())]
    return "".join(told)


def title(run: Run) -> str:
    info = run["machine_info"]
    if run["run"]["device"] == "cuda":
        return str(info["gpu"]["name"])
    return f"CPU, {info['cores']} cores ({info['cpu']})"


def _machine(run: Run) -> str:
    info = run["machine_info"]
    versions = {k: v for k, v in info["versions"].items() if v is not None}
    threads = {"torch": info["torch threads"], **info.get("BLAS threads", {})}
    facts = {
        "Date": run["datetime"][:10],
        "System": f"{info['system']}, Python {info['python']}, {info['cores']} cores of "
        f"{info['cpu']}",
        "Threads": ", ".join(f"{name} {count}" for name, count in threads.items()),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "farms_fast": f"{info['farms_fast']['version']}, {info['farms_fast']['compiler']}",
    }
    if "gpu" in info:
        gpu = info["gpu"]
        facts["GPU"] = (
            f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
            f"{gpu['l2_bytes'] / 1e6:.0f} MB of L2, CUDA {gpu['cuda']}"
        )
    if note := run["run"].get("note"):
        facts["Note"] = note
    return "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n"


def _table(entries: Sequence[dict[str, Any]], family: str, gpu: bool) -> str:
    cases = list(dict.fromkeys(entry["case"] for entry in entries))
    peers = [p for p in dict.fromkeys(entry["peer"] for entry in entries) if p != CONTENDER]
    by_key = {(entry["case"], entry["peer"]): entry for entry in entries}
    header = ["case", *peers]
    if gpu:
        unit = "farms_fast, µs a window" if family in ("eigenvalues", "gram") else "farms_fast, ms"
        header += [unit, "memory, of budget"]
    rows = []
    for case in cases:
        mine = by_key.get((case, CONTENDER))
        row = [case]
        for peer in peers:
            row.append(ratio(mine, by_key.get((case, peer))))
        if gpu:
            row += _absolute(mine, family)
        rows.append(row)
    return _markdown(header, rows)


def ratio(mine: dict[str, Any] | None, peer: dict[str, Any] | None) -> str:
    """A peer's time over farms_fast's, as the tables show it."""
    if mine is None or peer is None:
        return NOT_MEASURED
    factor = peer["stats"]["median"] / mine["stats"]["median"]
    return ("~" if peer["sample"] else "") + significant(factor)


def significant(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _absolute(mine: dict[str, Any] | None, family: str) -> list[str]:
    if mine is None:
        return [NOT_MEASURED, NOT_MEASURED]
    seconds = mine["stats"]["median"]
    per_window = family in ("eigenvalues", "gram")
    time = significant(seconds / mine["units"] * 1e6 if per_window else seconds * 1e3)
    peak, budget = mine.get("peak_bytes"), mine.get("budget_bytes")
    memory = NOT_MEASURED if peak is None else _bytes(peak)
    return [time, memory + (f" of {_bytes(budget)}" if budget else "")]


def _bytes(count: float) -> str:
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{significant(count / unit)} {name}"


def _notes(entries: Sequence[dict[str, Any]], run: Run, family: str) -> str:
    lines = []
    peers = list(dict.fromkeys(entry["peer"] for entry in entries))
    for peer in peers:
        own = [entry for entry in entries if entry["peer"] == peer]
        errors = [entry["error"] for entry in own if entry["error"] is not None]
        bounds = ", ".join(dict.fromkeys(entry["accuracy"] for entry in own))
        text = f"- {peer}: {own[0]['note']}. Largest error {max(errors, default=0):.2g} of the "
        text += f"accepted ({bounds})"
        if sampled := [entry for entry in own if entry["sample"]]:
            parts = "; ".join(f"{entry['sample']} ({entry['case']})" for entry in sampled)
            text += f". Measured in part: {parts}"
        lines.append(text + ".")
    for outcome, word in (("skipped", "Not measured"), ("failed", "Failed")):
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in run[outcome]:
            if entry["family"] == family:
                reasons.setdefault((entry["peer"], entry["reason"]), []).append(entry["case"])
        for (peer, reason), cases in reasons.items():
            lines.append(f"- {word}: {peer}, {reason} ({'; '.join(dict.fromkeys(cases))}).")
    return "\n".join(lines) + "\n"


def _roofline(roofline: Run, gpu: bool) -> str:
    ceilings = roofline["ceilings"]
    lines = []
    if gpu:
        lines.append(
            f"Measured in the same run: products {ceilings['gemm_float64'] / 1e12:.1f} TFLOP/s in "
            f"float64 and {ceilings['gemm_float32'] / 1e12:.1f} in float32, copies "
            f"{ceilings['copy'] / 1e12:.2f} TB/s."
        )
    lines.append(
        "A limit is the least operations of each stage at the float64 rate of matrix products, or "
        "its least bytes at the rate of copies; the last column is the measured time over it. "
        "For fits it counts one look at each value, not the scan.\n"
    )
    header = ["case", "GFLOP", "GB", *(["limit, ms"] if gpu else []), "time over limit"]
    rows = []
    for case in roofline["cases"]:
        row = [
            f"{FAMILIES[case['family']]}: {case['case']}",
            f"{case['flops'] / 1e9:.3g}",
            f"{case['bytes'] / 1e9:.2g}",
        ]
        if gpu:
            row.append(f"{case['limit_seconds'] * 1e3:.3g}")
        rows.append([*row, significant(case["ratio"])])
    return "\n".join(lines) + "\n" + _markdown(header, rows)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# README shows these cases and peers, where they were measured.
_README_CASES = re.compile(
    r"k=512 x 9$|k=2000 x|ks of 450000|LLaMA.*4096x11008,|MiniLM checkpoint, whole"
    r"|ResNet-18 \(CIFAR\)($|, one|, net_esd_estimator_farms)"
)
_README_PEERS = (
    "published FARMS",
    "torch svdvals",
    "XsyevBatched bare",
    "numpy svd",
    "numpy eigvalsh",
    "torch eigvalsh",
    "WeightWatcher",
)


def readme_block(runs: Sequence[tuple[Run, Run | None]]) -> str:
    """What stands between the markers in README."""
    parts = [BEGIN]
    for run, _ in runs:
        entries = [e["extra_info"] | {"stats": e["stats"]} for e in run["benchmarks"]]
        shown = [e for e in entries if _README_CASES.search(e["case"])]
        peers = [p for p in _README_PEERS if any(e["peer"] == p for e in shown)]
        by_key = {(entry["case"], entry["peer"]): entry for entry in shown}
        rows = []
        for case, family in dict.fromkeys((entry["case"], entry["family"]) for entry in shown):
            mine = by_key.get((case, CONTENDER))
            ratios = [ratio(mine, by_key.get((case, peer))) for peer in peers]
            if any(shown != NOT_MEASURED for shown in ratios):
                heading = f"{FAMILIES[family]}, " if family == "details" else ""
                rows.append([heading + case, *ratios])
        parts += [f"{title(run)}:\n", _markdown(["case", *peers], rows)]
    return "\n".join([*parts, END])


def write_readme(block: str, path: Path = README) -> bool:
    """Replaces the marked block; False where README has none."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        return False
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + block + rest.partition(END)[2])
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    saving = commands.add_parser("save", help="take pytest-benchmark's files over")
    saving.add_argument("name", help="of the file in benchmarks/saved")
    saving.add_argument("files", nargs="+", type=Path)
    saving.add_argument("--roofline", type=Path, help="of the same machine")
    saving.add_argument("--update", action="store_true", help="keep the saved run's other cases")
    saving.add_argument("--note", help="what a reader has to know about the run")
    asked = parser.parse_args(arguments)
    if asked.command == "save":
        path = save(asked.name, asked.files, update=asked.update)
        if asked.note:
            run = json.loads(path.read_text())
            run["run"]["note"] = asked.note
            path.write_text(json.dumps(run, indent=1) + "\n")
        if asked.roofline:
            path.with_name(f"{asked.name}-roofline.json").write_text(asked.roofline.read_text())
    runs = load()
    if not runs:
        raise SystemExit(f"no saved run in {SAVED}")
    RESULTS.write_text(results(runs))
    shown = write_readme(readme_block(runs))
    print(f"wrote {RESULTS.name}" + (" and README's table" if shown else "; README has no markers"))


if __name__ == "__main__":
    main()
