"""The divergences' Triton kernel behind `linear_divergence`, and its functions of one number.

`test_triton_divergence.py` runs these: on a GPU where there is one, else in a process with Triton's interpreter.
By hand: `TRITON_INTERPRET=1 pytest tests/triton_divergence_suite.py`.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from cases import DTYPES
from divergence_cases import (
    BOUNDED,
    KINDS,
    SIDES,
    assert_right,
    call,
    check_entries_that_one_side_lacks,
    check_logits_of_ten_thousand,
    divergence_calls,
    make,
    measure,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless.kernels.triton import divergence, tile
from logitless.types import DivergenceOptions, LogitTransform

HERE = dict(backend="triton", device="cuda" if torch.cuda.is_available() else "cpu")
BENT = LogitTransform(1.3, 3.0, 0.7)


def check(case, backward) -> None:
    assert_right(
        case.tensors,
        case.divergence,
        mask=case.mask,
        transforms=case.transforms,
        chunk_bytes=case.chunk_bytes,
        backward=backward,
        **HERE,
    )


@settings(max_examples=10)
@given(divergence_calls(DTYPES[1:]), st.sampled_from(["auto", "recompute"]))
def test_any_case_is_right_within_the_budget(case, backward):
    check(case, backward)


@pytest.mark.slow
@settings(max_examples=150)
@given(divergence_calls(DTYPES[1:]), st.sampled_from(["auto", "recompute"]))
def test_many_cases_are_right_within_the_budget(case, backward):
    check(case, backward)


@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_each_way(kind):
    """No size is a multiple of a block, and a part of the vocabulary is masked."""
    x = make((19,), (5, 7), 53, masked=3)
    assert_right(x, DivergenceOptions(kind), transforms=(BENT, None), reduction="none", **HERE)


@pytest.mark.parametrize("kind", BOUNDED)
def test_logits_of_ten_thousand(kind):
    check_logits_of_ten_thousand(kind, **HERE)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_one_side_lacks(kind):
    check_entries_that_one_side_lacks(kind, **HERE)


@pytest.mark.parametrize("side", [0, 3])
def test_a_nan_is_not_hidden(side):
    x = make(masked=1)
    with torch.no_grad():
        x[side][2, 1] = torch.nan
    for kind in KINDS:
        value = call(x, kind=kind, **HERE)
        assert value[2].isnan() and value[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_one_sweep(dtype):
    """If operands stay halves, one way rounds the gradient before the upstream factor and the other way after it.
    That is half an ulp of each term twice, and of the result twice. Terms may cancel to half their size."""
    x = make(trainable=SIDES, dtype=dtype)
    at_once = measure(lambda y: call(y, kind="js", reduction="sum", **HERE), x)
    later = measure(lambda y: call(y, kind="js", backward="recompute", **HERE).sum(), x)
    for name, value in later.items():
        rounding = 4 * torch.finfo(dtype).eps * value.abs().max().item()
        torch.testing.assert_close(at_once[name], value, rtol=0, atol=rounding)


@triton.jit
def functions_kernel(p_x, p_expm1, p_log1p, p_mixture, weight, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o)
    tl.store(p_expm1 + o, divergence.expm1(x))
    tl.store(p_log1p + o, tile.log1p(tl.where(x < -1.0, -1.0, x)))
    tl.store(p_mixture + o, divergence.log_mixture(weight, x))


@pytest.mark.parametrize("weight", [0.5, 1e-6, 0.9])
def test_functions_of_one_number(weight):
    """Within a few ulp of the result where it is small, too."""
    magnitudes = torch.logspace(-12, 1.9, 126)
    x = torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, -torch.inf, 1e3, torch.inf])]).to(HERE["device"])
    found = [torch.empty_like(x) for _ in range(3)]
    functions_kernel[(len(x) // 32,)](x, *found, weight, BLOCK=32)
    exact = x.double()
    mixture = torch.log1p(weight * torch.expm1(exact.clamp(max=500))) + (exact - 500).clamp(min=0)
    for value, truth in zip(found, (exact.expm1(), exact.clamp(min=-1).log1p(), mixture), strict=True):
        torch.testing.assert_close(value, truth.float(), rtol=2e-6, atol=0)
