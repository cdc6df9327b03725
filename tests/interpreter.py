"""Suites of Triton kernels in processes where Triton's interpreter is on.

TRITON_INTERPRET must be set before Triton is imported, and a test's own process may have imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def runs_here() -> bool:
    """Whether this process can run the kernels: on a GPU, or in the interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def fits_numpy() -> bool:
    """Whether Triton's interpreter takes this NumPy: that of 3.6 makes an int of an array of one element, which NumPy
    2.4 refuses."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return triton > (3, 6) or numpy < (2, 4)


def run_suite(name: str, marker: str, keyword: str = "") -> None:
    """The tests of `tests/<name>.py` with that marker, and those words in their names, which must pass."""
    if not fits_numpy():
        pytest.skip(f"the interpreter of Triton {version('triton')} needs NumPy < 2.4, got {version('numpy')}")
    selection = ["-m", marker, "-k", keyword, f"tests/{name}.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
