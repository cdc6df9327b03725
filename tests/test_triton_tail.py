"""Runs `triton_tail_suite.py`: here on a GPU, or where Triton's interpreter is on; else in a process where it is.

TRITON_INTERPRET must be set before Triton is imported, and this process may have imported it already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    from triton_tail_suite import *  # noqa: F403
else:

    def in_the_interpreter(marker: str) -> None:
        suite = "tests/triton_tail_suite.py"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, suite]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]

    def test_suite_in_the_interpreter():
        in_the_interpreter("not slow")

    @pytest.mark.slow
    def test_slow_suite_in_the_interpreter():
        in_the_interpreter("slow")
