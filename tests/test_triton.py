"""Runs `triton_suite.py`: here on a GPU, or where Triton's interpreter is on; else in a process where it is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from interpreter import run_suite, runs_here

from logitless.backends.triton import TRITON

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

if runs_here():
    from triton_suite import *  # noqa: F403
else:

    @needs_triton
    def test_suite_in_the_interpreter():
        run_suite("triton_suite", "not slow")

    @needs_triton
    @pytest.mark.slow
    def test_slow_suite_in_the_interpreter():
        run_suite("triton_suite", "slow")

    @needs_triton
    @pytest.mark.slow
    def test_lists_of_ids_in_the_interpreter():
        run_suite("test_lists", "not slow")

    @needs_triton
    @pytest.mark.slow
    def test_gradients_added_to_a_buffer_in_the_interpreter():
        # The file's other tests measure memory at a model's sizes, which the interpreter takes many minutes for.
        run_suite("test_grad_out", "not slow", "what_is_added_is_the_gradient and triton")

    @needs_triton
    def test_a_cpu_is_refused_without_the_interpreter():
        hidden = torch.zeros(2, 3)
        assert "interpreter is off" in TRITON.supports(hidden.device, hidden.dtype)


@pytest.mark.parametrize("shape", [(2, 3)])
def test_triton_that_is_not_there_is_a_reason(monkeypatch, shape):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert TRITON.supports(torch.device("cpu"), torch.float32) == "triton is not installed"
