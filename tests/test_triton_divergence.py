"""Runs `triton_divergence_suite.py`: here on a GPU or with Triton's interpreter on, else in a process where it is."""

from __future__ import annotations

import pytest
from interpreter import run_suite, runs_here

pytest.importorskip("triton")

if runs_here():
    from triton_divergence_suite import *  # noqa: F403
else:

    def test_suite_in_the_interpreter():
        run_suite("triton_divergence_suite", "not slow")

    @pytest.mark.slow
    def test_slow_suite_in_the_interpreter():
        run_suite("triton_divergence_suite", "slow")
