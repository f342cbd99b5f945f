"""Damaged files of every format, and what the commands answer: `python -m tests.fuzz --count 2000`.

A good answer is exit code 0, 1 or 2, the last with one line that says why, within 20 s and 1 GiB of
memory beyond the file's size, with nothing of the file run and no control character printed. The
cases depend on `--seed` and their numbers alone; `--only N --keep FOLDER` makes one again.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.workers import Case, answers, folder_of, make_seeds


def main() -> int:
    """Runs the cases and prints the bad answers and counts; 1 if there was a bad one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path, help="Where to leave the file of --only.")
    given = parser.parse_args()
    # Threads of a parallel loop do not survive a fork.
    torch.set_num_threads(1)
    os.environ.update(COLUMNS="100", TERM="dumb", HF_HUB_OFFLINE="1")
    start = time.monotonic()
    numbers = range(given.first, given.first + given.count) if given.only is None else [given.only]
    codes: collections.Counter[tuple[str, int]] = collections.Counter()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for line in make_seeds(root):
            print("not read:", line)
        if given.only is not None and given.keep is not None:
            case = Case.of(given.only, given.seed)
            print(*case.write(root / folder_of(case.kind), given.keep.absolute()))
        for answer in answers(numbers, given.seed, root):
            codes[answer.kind, answer.code] += 1
            if answer.wrong:
                bad += 1
                print(f"{answer.number} {answer.kind}: {answer.wrong}", flush=True)
            elif given.only is not None:
                print(answer)
    for kind in dict.fromkeys(kind for kind, _ in codes):
        counts = ", ".join(f"{n} x {code}" for (k, code), n in sorted(codes.items()) if k == kind)
        print(f"{kind}: exit codes {counts}")
    seconds = time.monotonic() - start
    print(f"{sum(codes.values())} cases, {bad} badly answered, {seconds:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
