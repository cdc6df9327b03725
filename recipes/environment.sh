#!/usr/bin/env bash
# Makes (or brings up to date) a virtual environment that holds this checkout, editable, with some of its extras.
#
#   bash recipes/environment.sh VENV EXTRAS        e.g. bash recipes/environment.sh .venv recipes
#
# A second run does nothing until pyproject.toml or what is compiled changes. Four variables steer it:
#   PYTHON           the interpreter to make it with (default: the first of python3, python3.14 .. python3.11 that will do)
#   LOGITLESS_TORCH  pip's arguments for PyTorch, e.g. "torch --index-url <the index of the build you want>"
#   LOGITLESS_CPU    auto (the default), require or off, as setup.py says
#   LOGITLESS_CUDA   auto, require or off, as setup.py says (default: auto where there is an NVIDIA GPU, else off, as nvcc
#                    would take minutes over kernels that cannot run here; the tests build their own)
set -euo pipefail

TESTED_TORCH=2.13.0

venv=${1:?usage: bash recipes/environment.sh VENV EXTRAS}
extras=${2:?usage: bash recipes/environment.sh VENV EXTRAS}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "logitless needs Python 3.11 or newer; set PYTHON to one" >&2
    return 1
}

# Without an NVIDIA GPU the CPU build is wanted, which is a tenth of the size; but only a package index of PyTorch's own,
# or a folder of wheels, names it apart. Where pip is set up with neither, the general build does the same work.
install_torch() {
    if [ -n "${LOGITLESS_TORCH:-}" ]; then
        # shellcheck disable=SC2086 # several arguments on purpose
        pip_install $LOGITLESS_TORCH
    elif nvidia-smi >/dev/null 2>&1 || ! pip_install "torch==$TESTED_TORCH+cpu" 2>/dev/null; then
        pip_install "torch==$TESTED_TORCH"
    fi
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}

if [ -z "${LOGITLESS_CUDA:-}" ]; then
    LOGITLESS_CUDA=off
    if nvidia-smi >/dev/null 2>&1; then LOGITLESS_CUDA=auto; fi
fi
export LOGITLESS_CUDA

sources=("$root"/pyproject.toml "$root"/setup.py "$root"/kernels/rows.h "$root"/kernels/cpu/{CMakeLists.txt,*.cpp,*.h})
key="$(cat "${sources[@]}" | cksum) ${LOGITLESS_TORCH:-} $LOGITLESS_CUDA ${LOGITLESS_CPU:-}"
stamp="$venv/logitless-${extras//[^a-z]/-}.stamp"
if [ "$(cat "$stamp" 2>/dev/null)" = "$root $key" ]; then
    exit 0
fi
if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv" || {
        echo "cannot make a virtual environment; on Debian and Ubuntu 'apt install python3-venv' brings what it needs" >&2
        exit 1
    }
fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "environment: installing PyTorch into $venv" >&2
    install_torch
fi
echo "environment: installing logitless[$extras] into $venv" >&2
pip_install --editable "$root[$extras]"
echo "$root $key" >"$stamp"
