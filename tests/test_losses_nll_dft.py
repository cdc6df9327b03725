"""NLL and DFT against their formulas in float64, their limits and extremes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import doubles, random_stats, weight_of

from logitless.losses import DFT, NLL
from logitless.types import TokenStats

# NLL


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_nll_is_torch_cross_entropy(label_smoothing: float) -> None:
    stats, logits, targets = random_stats(11)
    upstream = torch.linspace(-1, 2, 11, dtype=torch.float64)
    loss = NLL(label_smoothing=label_smoothing)(stats)
    expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


def test_nll_z_loss_adds_the_squared_lse() -> None:
    stats, _, _ = random_stats(5)
    assert stats.logprob is not None and stats.lse is not None
    torch.testing.assert_close(NLL(z_loss=1e-2)(stats), -stats.logprob + 1e-2 * stats.lse**2)


def test_nll_reads_only_what_it_needs() -> None:
    assert NLL().outputs == ("logprob",)
    assert NLL(z_loss=1e-4).outputs == ("logprob", "lse")
    assert NLL(label_smoothing=0.1).outputs == ("logprob", "lse", "mean_logit")
    assert NLL(label_smoothing=0.1, z_loss=1e-4).outputs == ("logprob", "lse", "mean_logit")


def test_nll_of_an_impossible_target_is_inf_with_gradient_minus_one() -> None:
    logprob = doubles(-math.inf, -1e4, 0.0, grad=True)
    loss = NLL()(TokenStats(logprob=logprob))
    loss.sum().backward()
    assert loss.tolist() == [math.inf, 1e4, 0.0]
    assert logprob.grad is not None and logprob.grad.tolist() == [-1, -1, -1]


# DFT


@given(st.floats(-30, 0), st.floats(0, 3))
def test_dft_value_and_weight(logprob: float, power: float) -> None:
    p = math.exp(power * logprob)
    value = DFT(power=power)(TokenStats(logprob=doubles(logprob)))
    torch.testing.assert_close(value, doubles(-p * logprob))
    torch.testing.assert_close(weight_of(DFT(power=power), doubles(logprob)), doubles(p))


def test_dft_gradient_is_that_of_the_probability() -> None:
    logprob = doubles(-0.1, -1.0, -5.0)
    torch.testing.assert_close(weight_of(DFT(), logprob), logprob.exp())
    torch.testing.assert_close(weight_of(DFT(power=0), logprob), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_dft_of_an_impossible_target_is_zero(dtype: torch.dtype, power: float) -> None:
    logprob = torch.tensor([-math.inf, -1e4, 0.0], dtype=dtype)
    assert DFT(power=power)(TokenStats(logprob=logprob)).tolist() == [0, 0, 0]
    assert weight_of(DFT(power=power), logprob).tolist() == [0, 0, 1]


def test_dft_power_zero_is_nll_at_infinity_and_nan_stays_visible() -> None:
    logprob = doubles(-math.inf, -2.0)
    assert DFT(power=0)(TokenStats(logprob=logprob)).tolist() == [math.inf, 2.0]
    assert weight_of(DFT(power=0), logprob).tolist() == [1, 1]
    assert DFT()(TokenStats(logprob=doubles(math.nan))).isnan().all()
