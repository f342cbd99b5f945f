"""Saves what the scripts in this folder have measured, and writes RESULTS.md from it.

python -m benchmarks.effect.report                       # from benchmarks/effect/saved/*.json
python -m benchmarks.effect.report save sciml OUT.json   # first saves a script's file
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.effect import cv_training, llm_pruning, sciml

ROOT = Path(__file__).parent

_BEGIN = """\
# What layer-wise decisions do

Written by `python -m benchmarks.effect.report` from the files in `benchmarks/effect/saved`; do not
edit. This page has every result, good or bad. The models and the data are small: compare the arms
of a table with each other, not with published figures.
"""


def _images(result: Mapping[str, Any]) -> list[str]:
    first = result["results"][0]["settings"]
    times = [cv_training.line_of(arm, found) for arm, found in result["times"].items()]
    return [
        f"{first['model']} on {result['data']}, {first['epochs']} epochs of batches of "
        f"{first['batch']}, base rate {first['lr']}, factors {first['lr_range'][0]} to "
        f"{first['lr_range'][1]}; {result['device']}, torch {result['torch']}, "
        f"{result['workers']} runs at a time.",
        "",
        *result["table"],
        *(["", *times] if times else []),
    ]


def _image_times(result: Mapping[str, Any]) -> list[str]:
    lines = [cv_training.line_of(name, found) for name, found in result["times"].items()]
    return [
        f"{result['device']}, torch {result['torch']}, batches of 128; medians and quartiles of "
        "rounds with and without an analysis, in turns.",
        "",
        *(f"- {line}" for line in lines),
    ]


def _operators(result: Mapping[str, Any]) -> list[str]:
    given = result["options"]
    lines = [
        f"Model {given['model']} on a {given['grid']} x {given['grid']} grid, windows of "
        f"{given['rows']}, scale {given['scale'][0]:g} and {given['scale'][1]:g}.",
    ]
    if result.get("runs"):
        for measure in ("rollout", "nrmse"):
            words = [line for line in sciml.table(dict(result), measure) if line[0] != "|"]
            rows = [line for line in sciml.table(dict(result), measure) if line[0] == "|"]
            lines += ["", *(f"{line}  " for line in words), "", *rows]
        if result["left_out"]:
            lines += ["", f"{result['left_out']} runs were left out for lack of time."]
    shares = [sciml.share_line(row, given["epoch"]) for row in result["share"]]
    return [
        *lines,
        *(["", "What an analysis takes:", ""] if shares else []),
        *(f"- {s}" for s in shares),
    ]


def _language_model(result: Mapping[str, Any]) -> list[str]:
    given = result["settings"]
    return [
        f"SmolLM2-135M-Instruct, calibrated with {given['samples']} x {given['seqlen']} tokens; "
        f"FARMS windows of {given['window']}, {given['per_dim']} per dimension. Text: "
        f"{result['tokens']}. {result['cells']} pruned models so far; groups that are not in a "
        "table have not been measured.",
        "",
        *result["table"],
    ]


_SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "cv_training": ("Image classification with TempBalance", _images),
    "cv_times": ("What TempBalance's analysis takes of an epoch", _image_times),
    "sciml": ("Fine-tuning of neural operators with TB_Sigmoid", _operators),
    "sciml_share": ("What TB_Sigmoid's analysis takes of an epoch", _operators),
    "llm_pruning": ("Pruning of small Llamas", llm_pruning.report_lines),
    "real_llm": ("Pruning of a trained language model", _language_model),
}


def results(folder: Path) -> str:
    """The text of RESULTS.md from the saved files of a folder."""
    parts = [_BEGIN]
    for name, (heading, lines) in _SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            saved = json.loads(path.read_text())
            text = "\n".join(lines(saved["result"]))
            result = saved["result"]
            machine = result.get("machine", {})
            where = machine.get("gpu", {}).get("name") or machine.get("cpu") or result["device"]
            parts.append(f"## {heading}\n\nMeasured on {saved['date']}, {where}.\n\n{text}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.effect.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=ROOT, help="of RESULTS.md and saved/")
    commands = parser.add_subparsers(dest="command")
    saving = commands.add_parser("save", help="take a script's file over")
    saving.add_argument("name", choices=list(_SECTIONS))
    saving.add_argument("file", type=Path)
    saving.add_argument("--date", required=True, help="of the measurement, as 2026-11-22")
    asked = parser.parse_args(arguments)
    folder = asked.folder / "saved"
    if asked.command == "save":
        folder.mkdir(exist_ok=True)
        kept = {"date": asked.date, "result": json.loads(asked.file.read_text())}
        (folder / f"{asked.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    (asked.folder / "RESULTS.md").write_text(results(folder))


if __name__ == "__main__":
    main()
