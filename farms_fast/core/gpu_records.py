"""What was found out about a GPU of this machine, kept in the user's cache folder.

A record counts for the GPU, driver, libraries and release that it was made with, and for no other.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import platformdirs
import torch

from farms_fast.core.extension import __version__
from farms_fast.core.files import write_text
from farms_fast.core.json_files import parse_json
from farms_fast.core.regular_files import read_limited

_RECORD_BYTES = 2**20
_KERNEL_MODULE = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU with what decides how fast, and how right, its solvers are.

    Attributes:
        name: as the driver tells it.
        compute_capability: 10·major + minor that the running code was built for.
        processors: multiprocessors.
        driver: version of the driver.
        cuda: version of the CUDA runtime.
        cusolver: version of cuSOLVER.
        farms_fast: this release.
    """

    name: str
    compute_capability: int
    processors: int
    driver: str
    cuda: str
    cusolver: str
    farms_fast: str = __version__

    @classmethod
    def at(cls, index: int) -> Gpu:
        """The GPU of this index, which must be there, in a build with CUDA."""
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            capability = torch.ops.farms_fast.compute_capability()
            driver, runtime, cusolver = torch.ops.farms_fast.cuda_versions()
        try:
            module = f" ({_KERNEL_MODULE.read_text().strip()})"
        except OSError:
            module = ""
        return cls(
            properties.name,
            capability,
            properties.multi_processor_count,
            f"{driver}{module}",
            str(runtime),
            str(cusolver),
        )

    def difference(self, other: Gpu) -> str:
        """The first fact in which the other differs: "driver 13000, not 12080"; empty if none."""
        for field in fields(self):
            mine, others = getattr(self, field.name), getattr(other, field.name)
            if mine != others:
                return f"{field.name} {others}, not {mine}"
        return ""


def cache_folder() -> Path:
    """`FARMS_FAST_CACHE_DIR` if that is set, else the user's cache folder of this package."""
    named = os.environ.get("FARMS_FAST_CACHE_DIR", "")
    return Path(named) if named else platformdirs.user_cache_path("farms_fast", appauthor=False)


def record_path(gpu: Gpu, kind: str) -> Path:
    """The file of a kind of record: one for each model of GPU and architecture of the code."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return cache_folder() / f"{name}-{gpu.compute_capability}.{kind}.json"


def write_record(gpu: Gpu, kind: str, content: dict[str, Any]) -> Path:
    """Writes a record, whole or not at all, in place of a former one.

    Raises:
        OSError: the cache folder cannot be made or written.
    """
    path = record_path(gpu, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = datetime.date.today().isoformat()
    write_text(path, json.dumps({"made": made, "gpu": asdict(gpu), **content}, indent=1) + "\n")
    return path


def read_record(gpu: Gpu, kind: str) -> tuple[Gpu, dict[str, Any]] | None:
    """The GPU that a record was made for and the whole of it; None where there is none.

    Raises:
        ValueError: the file is no such record.
        OSError: the file cannot be read.
    """
    path = record_path(gpu, kind)
    try:
        record = parse_json(path, read_limited(path, _RECORD_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    facts = record.get("gpu") if isinstance(record, dict) else None
    types = {field.name: int if field.type == "int" else str for field in fields(Gpu)}
    if not isinstance(facts, dict) or {k: type(v) for k, v in facts.items()} != types:
        raise ValueError(f"{path}: expected the facts of a GPU under 'gpu', got {facts!r:.80}")
    if not isinstance(record.get("made"), str):
        raise ValueError(f"{path}: expected a date under 'made', got {record.get('made')!r:.80}")
    return Gpu(**facts), record
