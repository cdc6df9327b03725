"""Runs `triton_suite.py`: here on a GPU, or where Triton's interpreter is on; else in a process where it is.

TRITON_INTERPRET must be set before Triton is imported, and this process may have imported it already.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from logitless.backends import triton as backend

ROOT = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    from triton_suite import *  # noqa: F403
else:

    def in_the_interpreter(marker: str) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            marker,
            "tests/triton_suite.py",
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]

    @needs_triton
    def test_suite_in_the_interpreter():
        in_the_interpreter("not slow")

    @needs_triton
    @pytest.mark.slow
    def test_slow_suite_in_the_interpreter():
        in_the_interpreter("slow")

    @needs_triton
    def test_a_cpu_is_refused_without_the_interpreter():
        hidden = torch.zeros(2, 3)
        assert "interpreter is off" in backend.supports(hidden.device, hidden.dtype)


@pytest.mark.parametrize("shape", [(2, 3)])
def test_triton_that_is_not_there_is_a_reason(monkeypatch, shape):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.supports(torch.device("cpu"), torch.float32) == "triton is not installed"
