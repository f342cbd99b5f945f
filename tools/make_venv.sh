#!/usr/bin/env bash
# Makes the virtual environment, or says what the machine lacks: make_venv.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2

fail() {
  echo "make: $*" >&2
  exit 1
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "'$python' does not run. Name a Python 3.10 to 3.13: make PYTHON=python3.12 ..."
case $version in
  3.10 | 3.11 | 3.12 | 3.13) ;;
  *) fail "'$python' is Python $version, needed is 3.10 to 3.13. Name one: make PYTHON=python3.12 ..." ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "Python $version comes without venv. On Debian and Ubuntu: apt install python$version-venv"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] ||
  fail "Python $version comes without its C headers. On Debian and Ubuntu: apt install python$version-dev"
compiler=${CXX:-g++}
# CXX may hold a launcher or options after the name.
command -v "${compiler%% *}" >/dev/null ||
  fail "the C++ compiler '$compiler' is not there. On Debian and Ubuntu: apt install g++"
probe='#include <omp.h>
#include <optional>
int main() { return std::optional<int>(omp_get_num_threads()).value() - 1; }'
$compiler -std=c++17 -fopenmp -x c++ -o /dev/null - <<<"$probe" 2>/dev/null ||
  fail "'$compiler' does not compile C++17 with OpenMP; g++ 9 or later does"

echo "make: virtual environment $folder with Python $version"
"$python" -m venv --clear "$folder"
