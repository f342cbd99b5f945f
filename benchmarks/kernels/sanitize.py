"""Runs every kernel on small inputs under compute-sanitizer, with a line for each case.

`python -m benchmarks.kernels.sanitize` checks memory; `--tool racecheck`, `synccheck` or
`initcheck` the rest. The program runs itself under the sanitizer, which looks at the library's own
kernels only. It ends with 1 if anything was reported.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from benchmarks.kernels.cases import KernelCase, cases, use_ops

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# What a sanitizer says begins so; a report has one line with one of these words, and its details.
PREFIX = "========="
REPORT = re.compile(
    PREFIX
    + r"\s+(?:Error:|Warning: Race|Invalid|Uninitialized|Misaligned|Barrier error|Program hit)"
)


def chosen_cases(parts: Sequence[str], long: bool) -> list[KernelCase]:
    """The cases whose names contain one of the parts, all without any."""
    named = [c for c in cases() if not parts or any(part in c.name for part in parts)]
    return [c for c in named if long or not c.long]


def run_cases(chosen: Iterable[KernelCase]) -> None:
    """Under the sanitizer: a line before each case and one after it."""
    use_ops()
    for case in chosen:
        print(f"case {case.name}", flush=True)
        began = time.perf_counter()
        case.run()
        torch.cuda.synchronize()
        print(f"done {time.perf_counter() - began:.1f}", flush=True)


def print_reports(lines: Iterable[str], verbose: bool = False) -> int:
    """Prints a line a case from a run's output, and how many reports there were in all."""
    name, reports, total, finished = "", 0, 0, True
    details: list[str] = []
    for line in lines:
        if line.startswith("case "):
            name, reports, finished = line.removeprefix("case ").strip(), 0, False
        elif line.startswith("done ") and name:
            seconds = line.removeprefix("done ").strip()
            said = "ok" if reports == 0 else f"{reports} reported"
            print(f"{name:<44} {seconds:>7} s  {said}", flush=True)
            finished = True
        elif REPORT.match(line):
            reports += 1
            total += 1
        elif not line.startswith(PREFIX):
            print(line.rstrip(), flush=True)
        if line.startswith(PREFIX) and (total or verbose):
            details.append(line.rstrip())
    if not finished:
        print(f"{name:<44} did not end")
        total += 1
    print("\n".join(details))
    return total


def sanitizer_command(tool: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs this program under the sanitizer."""
    here = [sys.executable, "-m", "benchmarks.kernels.sanitize", "--run", *arguments]
    options = ["--tool", tool, "--kernel-name", "kernel_substring=farms_fast"]
    return ["compute-sanitizer", *options, "--error-exitcode", "1", *here]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.kernels.sanitize")
    made.add_argument("only", nargs="*", help="parts of names of cases; all cases without")
    made.add_argument("--tool", choices=TOOLS, default="memcheck")
    made.add_argument("--long", action="store_true", help="also orders that take minutes")
    made.add_argument("--list", action="store_true", help="print the cases' names alone")
    made.add_argument("--verbose", action="store_true", help="print all that the sanitizer says")
    made.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    chosen = chosen_cases(given.only, given.long)
    if given.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if given.run:
        run_cases(chosen)
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("sanitize: expected compute-sanitizer on the PATH", file=sys.stderr)
        return 2
    passed_on = [*given.only, *(["--long"] if given.long else [])]
    # Every tensor in an allocation of its own, so that its end is known.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with subprocess.Popen(
        sanitizer_command(given.tool, passed_on),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        reports = print_reports(process.stdout, given.verbose)
    print(
        f"{given.tool}: {len(chosen)} cases, {reports} reported, exit status {process.returncode}"
    )
    return 1 if reports or process.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
