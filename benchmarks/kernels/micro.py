"""Compiles and runs a micro-benchmark of this folder, one of its .cu files.

`python -m benchmarks.kernels.micro dmma_rate` needs nvcc and a GPU; all of them without a name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def programs() -> dict[str, Path]:
    """The programs by name."""
    return {path.stem: path for path in Path(__file__).parent.glob("*.cu")}


def compile_command(name: str, to: Path, architecture: str) -> list[str]:
    flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", f"-I{ROOT}"]
    return ["nvcc", *flags, "-o", str(to), str(programs()[name])]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.micro")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(sorted(programs())))
    parser.add_argument("--architecture", default="90", help="what to compile for")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    given = parser.parse_args(arguments)
    for name in given.names:
        if name not in programs():
            parser.error(f"expected one of {', '.join(sorted(programs()))}, got {name}")
    if given.list:
        print("\n".join(sorted(programs())))
        return 0
    folder = ROOT / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    for name in given.names or sorted(programs()):
        subprocess.run(compile_command(name, folder / name, given.architecture), check=True)
        print(f"{name}:", flush=True)
        subprocess.run([str(folder / name)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
