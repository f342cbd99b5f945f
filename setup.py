"""Builds the two extension modules.

The ops use the stable ABI, one build for several versions of torch and Python; the other module
holds the host types.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
CSRC = Path("csrc")
# The oldest torch whose stable ABI the ops use; the headers leave out whatever is younger.
TORCH_TARGET = (2, 11)
# Architectures when neither the user nor a GPU of this machine names any: Turing to Blackwell, as
# far as the toolkit knows them, and PTX for what follows.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def wants_cuda() -> bool:
    """FARMS_FAST_CUDA decides where it is set; otherwise torch's own build and a toolkit do."""
    asked = os.environ.get("FARMS_FAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"FARMS_FAST_CUDA: expected 0 or 1, got {asked!r}")
    have_toolkit = cpp_extension.CUDA_HOME is not None and shutil.which(
        "nvcc", path=str(Path(cpp_extension.CUDA_HOME) / "bin")
    )
    possible = torch.version.cuda is not None and bool(have_toolkit)
    if possible and not asked and not has_cusolver_header():
        print("farms_fast: no CUDA ops, the toolkit has no cusolverDn.h; FARMS_FAST_CUDA=1 insists")
        return False
    if asked == "1" and not possible:
        raise SystemExit(
            "FARMS_FAST_CUDA=1: expected a CUDA build of torch and a CUDA toolkit with nvcc, "
            f"got torch {torch.__version__} and toolkit {cpp_extension.CUDA_HOME}"
        )
    return possible and asked != "0"


def has_cusolver_header() -> bool:
    """A toolkit may be the compiler alone."""
    folders = [str(Path(cpp_extension.CUDA_HOME) / "include")]
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        folders += os.environ.get(name, "").split(os.pathsep)
    return any(folder and (Path(folder) / "cusolverDn.h").exists() for folder in folders)


def default_architectures() -> str:
    """For TORCH_CUDA_ARCH_LIST."""
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin/nvcc"
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    names = listed.stdout.split()
    known = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in names]
    return ";".join(known) + "+PTX"


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / CSRC).glob(pattern))


def ops_extension(cuda: bool) -> Extension:
    major, minor = TORCH_TARGET
    macros = [("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000")]
    # Contracted products would give the CPU fit other bits on some architectures than on others.
    common = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off"]
    # Without OpenMP the parallel loops of the stable ABI would run on one thread.
    compile_args = {"cxx": [*common, "-fopenmp", "-Wall"]}
    files = [*sources("*.cpp"), *sources("cpu/*.cpp")]
    if not cuda:
        return cpp_extension.CppExtension(
            "farms_fast._C",
            files,
            include_dirs=[str(ROOT)],
            define_macros=macros,
            extra_compile_args=compile_args,
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
    compile_args["nvcc"] = ["-O3", "-std=c++17"]
    return cpp_extension.CUDAExtension(
        "farms_fast._C",
        [*files, *sources("cuda/**/*.cpp"), *sources("cuda/**/*.cu")],
        include_dirs=[str(ROOT)],
        define_macros=[*macros, ("USE_CUDA", "1")],
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp", "-lcusolver"],
        py_limited_api=True,
    )


def host_extension(cuda: bool) -> Extension:
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if cuda and not architectures:
        architectures = ";".join(
            sorted(
                {
                    "{}.{}".format(*torch.cuda.get_device_capability(i))
                    for i in range(torch.cuda.device_count())
                }
            )
        )
    macros = {
        "FARMS_FAST_TORCH_TARGET": "{}.{}".format(*TORCH_TARGET),
        "FARMS_FAST_CUDA_VERSION": (torch.version.cuda or "") if cuda else "",
        "FARMS_FAST_CUDA_ARCHITECTURES": architectures if cuda else "",
    }
    return Extension(
        "farms_fast._host",
        [str(CSRC / "pybind" / "host.cpp")],
        include_dirs=[pybind11.get_include(), str(ROOT)],
        define_macros=[(name, f'"{value}"') for name, value in macros.items()],
        extra_compile_args=["-O2", "-std=c++17", "-fvisibility=hidden"],
        language="c++",
    )


WITH_CUDA = wants_cuda()
OPS = ops_extension(WITH_CUDA)
setup(
    ext_modules=[OPS, host_extension(WITH_CUDA)],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
