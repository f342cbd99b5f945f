#!/usr/bin/env bash
# Compiles csrc with warnings as errors and keeps nothing: compile.sh cpp|cuda PYTHON
#
# "cpp" takes what every build compiles, "cuda" what a build with CUDA compiles besides: all under
# csrc/cuda. It needs nvcc, but neither a GPU nor a CUDA build of torch: the ops see torch through its
# stable ABI only.
# CUDA_ARCHITECTURES: what to compile for, "90" by default, several with spaces. JOBS: at a time.
set -euo pipefail
part=$1 python=$2
cd "$(dirname "$0")/.."
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

# For CUDA 13; only the headers in them are used.
header_wheels=(nvidia-cusolver==12.0.4.66 nvidia-cublas==13.0.0.19)

packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# System headers: warnings count in our own files only.
torch=(-isystem "$packages/torch/include")
warnings=(-Wall -Wextra -Werror)
gxx=("${CXX:-g++}" -std=c++17 -I. -O3 -fopenmp -fPIC -fvisibility=hidden "${warnings[@]}"
  -DTORCH_TARGET_VERSION=0x020b000000000000)

compile_all() { # reads file names, appends each to the command given
  tr '\n' '\0' | xargs -0 -r -P "${JOBS:-$(nproc)}" -I{} \
    bash -c 'file=$1 to=$2; shift 2; echo "compile $file"
      "$@" -c "$file" -o "$to/$(tr / _ <<<"$file").o"' _ {} "$objects" "$@"
}

fetch_headers() { # cuSOLVER's and cuBLAS's, from their wheels
  local into=$1 wheels wheel
  echo "fetch the headers of cuSOLVER and cuBLAS, which the CUDA toolkit lacks"
  wheels=$(mktemp -d -p "$objects")
  "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" \
    "${header_wheels[@]}"
  for wheel in "$wheels"/*.whl; do
    "$python" - "$wheel" "$wheels/tree" <<'PYTHON'
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if "/include/" in name])
PYTHON
  done
  mkdir -p "$into"
  cp "$wheels"/tree/nvidia/*/include/*.h "$into"
}

case $part in
  cpp)
    python_headers=$("$python" -c 'import pybind11, sysconfig
print("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include"))')
    macros=(-DFARMS_FAST_TORCH_TARGET='"2.11"' -DFARMS_FAST_CUDA_VERSION='""' -DFARMS_FAST_CUDA_ARCHITECTURES='""')
    # shellcheck disable=SC2086
    find csrc -name '*.cpp' -not -path 'csrc/cuda/*' | sort |
      compile_all "${gxx[@]}" "${macros[@]}" "${torch[@]}" $python_headers
    ;;
  cuda)
    nvcc=${NVCC:-nvcc}
    toolkit=$(readlink -f "$("$nvcc" --dryrun -c csrc/cuda/none.cu 2>&1 | sed -n 's/^#\$ TOP=//p')")
    cuda=(-isystem "$toolkit/include")
    if [ ! -e "$toolkit/include/cusolverDn.h" ] || [ ! -e "$toolkit/include/cublas_v2.h" ]; then
      headers=.cache/cuda-headers
      if [ "$(cat "$headers/complete" 2>/dev/null)" != "${header_wheels[*]}" ]; then
        fetch_headers "$headers"
        echo "${header_wheels[*]}" >"$headers/complete"
      fi
      cuda+=(-isystem "$headers")
    fi
    targets=()
    for architecture in ${CUDA_ARCHITECTURES:-90}; do
      targets+=(-gencode "arch=compute_$architecture,code=sm_$architecture")
    done
    # As torch's build does, which takes the operators of the half types away.
    half=(-D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__ -D__CUDA_NO_BFLOAT16_CONVERSIONS__
      -D__CUDA_NO_HALF2_OPERATORS__ --expt-relaxed-constexpr)
    find csrc -name '*.cu' | sort |
      compile_all "$nvcc" -std=c++17 -O3 -I. "${half[@]}" "${targets[@]}" -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror
    find csrc/cuda -name '*.cpp' | sort |
      compile_all "${gxx[@]}" -DUSE_CUDA "${torch[@]}" "${cuda[@]}"
    ;;
  *)
    echo "compile.sh: expected cpp or cuda, got '$part'" >&2
    exit 2
    ;;
esac
