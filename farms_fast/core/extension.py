"""Loads the compiled modules and says how they were built."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from pathlib import Path

import torch

__version__ = "0.1.0"

_FOLDER = Path(__file__).parents[1]
_spec = importlib.util.find_spec("farms_fast._C")
# That of another folder, which an editable install may offer, belongs to other code.
if _spec is None or Path(str(_spec.origin)).parent != _FOLDER:
    raise ImportError(
        f"farms_fast: {_FOLDER.parent} has no compiled modules: build this clone with "
        "`make build` or `pip install -e .`, or leave its folder to import an installed package"
    )
# Registers torch.ops.farms_fast.
importlib.import_module("farms_fast._C")

from farms_fast._host import build_settings  # noqa: E402  (says how it was built)


def has_cuda() -> bool:
    """Whether this build carries the CUDA ops."""
    return bool(build_settings()["cuda_toolkit"])


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
    settings = build_settings()
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
