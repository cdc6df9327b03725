"""Suites of Triton kernels in processes where Triton's interpreter is on.

TRITON_INTERPRET must be set before Triton is imported, and a test's own process may have imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def runs_here() -> bool:
    """Whether this process can run the kernels: on a GPU, or in the interpreter."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def run_suite(name: str, marker: str) -> None:
    """The tests of `tests/<name>.py` with that marker, which must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, f"tests/{name}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
