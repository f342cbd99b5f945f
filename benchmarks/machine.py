"""What a result depends on besides the code: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from farms_fast import build_info

PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "cupy-cuda13x",
    "weightwatcher",
    "powerlaw",
    "pytest-benchmark",
)


def describe(device: torch.device) -> dict[str, object]:
    """The machine and the versions; neither names nor paths of this one machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts: dict[str, object] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch threads": torch.get_num_threads(),
        "versions": versions,
        "farms_fast": {k: v for k, v in build_info().items() if k in _BUILD},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    if threads := _blas_threads():
        facts["BLAS threads"] = threads
    return facts


_BUILD = ("version", "compiler", "cuda", "cuda_toolkit", "solvers")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _blas_threads() -> dict[str, int]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return {}
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return {str(pool["internal_api"]): int(pool["num_threads"]) for pool in pools}
