"""Loads the compiled modules and says how they were built."""

from __future__ import annotations

import platform

import torch

from farms_fast import _C, _host  # noqa: F401  (importing _C registers torch.ops.farms_fast)

__version__ = "0.1.0"


def has_cuda() -> bool:
    """Whether this build carries the CUDA ops."""
    return bool(_host.build_settings()["cuda_toolkit"])


def build_info() -> dict[str, object]:
    """Versions, ABI, architectures and solvers of this installation.

    Returns:
        A dict with `version` (of farms_fast), `python`, `torch` (the running one), `torch_target`
        (the oldest torch whose stable ABI the ops were compiled for), `abi` (of the ops' library),
        `compiler`, `cxx_standard`, `cuda` (whether the CUDA ops are there), `cuda_toolkit` and
        `cuda_architectures` (empty without CUDA), and `solvers`, a dict from `cpu` and `cuda` to
        the names that `solver=` takes there besides "auto".

    Example:
        >>> import farms_fast
        >>> farms_fast.build_info()["solvers"]["cpu"]
        ['lapack', 'two_stage']
    """
    settings = _host.build_settings()
    names = torch.ops.farms_fast.solver_names
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_target": settings["torch_target"],
        "abi": f"libtorch stable ABI {settings['torch_target']}, Python abi3",
        "compiler": settings["compiler"],
        "cxx_standard": settings["cxx_standard"],
        "cuda": has_cuda(),
        "cuda_toolkit": settings["cuda_toolkit"],
        "cuda_architectures": settings["cuda_architectures"],
        "solvers": {"cpu": list(names("cpu")), "cuda": list(names("cuda"))},
    }
