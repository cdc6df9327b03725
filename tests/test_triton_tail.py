"""Runs `triton_tail_suite.py`: here on a GPU, or where Triton's interpreter is on; else in a process where it is."""

from __future__ import annotations

import pytest
from interpreter import run_suite, runs_here

pytest.importorskip("triton")

if runs_here():
    from triton_tail_suite import *  # noqa: F403
else:

    def test_suite_in_the_interpreter():
        run_suite("triton_tail_suite", "not slow")

    @pytest.mark.slow
    def test_slow_suite_in_the_interpreter():
        run_suite("triton_tail_suite", "slow")
