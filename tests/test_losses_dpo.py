"""DPO against its formula in float64, its limits, extremes and metrics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DPO_LOSSES, doubles, ident
from torch import Tensor

from logitless.losses import DPO


def score(name: str, v: float, alpha: float) -> float:
    if name == "reverse_kl" or (name == "alpha" and alpha == 0):
        return v
    if name == "js":
        return math.log(2 * math.exp(v) / (1 + math.exp(v)))
    alpha = 1.0 if name == "forward_kl" else alpha
    return (1 - math.exp(-alpha * v)) / alpha


def link(loss: DPO, h: float) -> float:
    if loss.loss_type == "ipo":
        return (h - 1 / (2 * loss.beta)) ** 2
    u = loss.beta * h
    if loss.loss_type == "hinge":
        return max(0.0, 1 - u)
    eps = loss.label_smoothing
    return (1 - eps) * math.log1p(math.exp(-u)) + eps * math.log1p(math.exp(u))


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
@settings(max_examples=30)
@given(v=st.tuples(st.floats(-5, 5), st.floats(-5, 5)), ref=st.tuples(st.floats(-90, -1), st.floats(-90, -1)))
def test_dpo_is_its_formula(loss: DPO, v: tuple[float, float], ref: tuple[float, float]) -> None:
    h = score(loss.divergence, v[0], loss.alpha) - score(loss.divergence, v[1], loss.alpha)
    result = loss(doubles(ref[0] + v[0]), doubles(ref[1] + v[1]), doubles(ref[0]), doubles(ref[1]))
    torch.testing.assert_close(result.loss, doubles(link(loss, h)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.chosen_reward, doubles(loss.beta * v[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.rejected_reward, doubles(loss.beta * v[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
def test_dpo_gradcheck(loss: DPO) -> None:
    chosen, rejected = doubles(-5.0, -9.0, -30.0, grad=True), doubles(-4.0, -11.0, -2.5, grad=True)
    ref = doubles(-5.5, -8.0, -3.0), doubles(-4.4, -9.0, -3.5)
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *ref).loss, (chosen, rejected), rtol=1e-4)


def test_dpo_gradient_weights() -> None:
    """d loss / d chosen: -beta sigmoid(-beta h) for the sigmoid, scaled by s'(v) for the divergences."""
    chosen, rejected, ref = doubles(-5.0, grad=True), doubles(-4.0, grad=True), doubles(-5.5)
    v = doubles(0.5), doubles(1.5)

    def gradient(loss: DPO) -> tuple[Tensor, Tensor]:
        c, r = torch.autograd.grad(loss(chosen, rejected, ref, ref).loss.sum(), (chosen, rejected))
        return c, r

    push = 0.1 * torch.sigmoid(doubles(0.1))
    torch.testing.assert_close(gradient(DPO()), (-push, push))
    for loss, slope in (
        (DPO(divergence="forward_kl"), lambda x: torch.exp(-x)),
        (DPO(divergence="js"), lambda x: torch.sigmoid(-x)),
        (DPO(divergence="alpha", alpha=0.3), lambda x: torch.exp(-0.3 * x)),
    ):
        h = score(loss.divergence, 0.5, loss.alpha) - score(loss.divergence, 1.5, loss.alpha)
        push = 0.1 * torch.sigmoid(doubles(-0.1 * h))
        torch.testing.assert_close(gradient(loss), (-push * slope(v[0]), push * slope(v[1])))
    torch.testing.assert_close(gradient(DPO(loss_type="hinge")), (doubles(-0.1), doubles(0.1)))
    torch.testing.assert_close(gradient(DPO(loss_type="ipo")), (doubles(-12.0), doubles(12.0)))


def test_label_smoothing_takes_effect_and_has_its_minimum() -> None:
    eps, beta, zero = 0.2, 0.5, doubles(0.0)
    loss = DPO(beta=beta, label_smoothing=eps)
    best = doubles(math.log((1 - eps) / eps) / beta, grad=True)
    result = loss(best, zero, zero, zero)
    result.loss.sum().backward()
    assert best.grad is not None and best.grad.abs().item() < 1e-15
    assert result.loss.item() > DPO(beta=beta)(best, zero, zero, zero).loss.item()


def test_dpo_alpha_limits() -> None:
    inputs = doubles(-5.0, -2.0), doubles(-4.0, -6.0), doubles(-5.5, -3.0), doubles(-4.4, -5.0)
    for alpha, name in ((1.0, "forward_kl"), (0.0, "reverse_kl"), (1e-9, "reverse_kl"), (1e-300, "reverse_kl")):
        loss = DPO(divergence="alpha", alpha=alpha)(*inputs).loss
        torch.testing.assert_close(loss, DPO(divergence=name)(*inputs).loss, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", DPO_LOSSES, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_is_finite_for_finite_input(loss: DPO, dtype: torch.dtype) -> None:
    v = torch.tensor([-1e4, -1e3, -200, -100, 0, 100, 1e3, 1e4], dtype=dtype)
    chosen, rejected = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(v, v, indexing="ij"))
    zero = torch.zeros_like(chosen)
    result = loss(chosen, rejected, zero, zero)
    assert all(x.isfinite().all() for x in result)
    gradient = torch.autograd.grad(result.loss.sum(), (chosen, rejected))
    assert all(x.isfinite().all() for x in gradient)
    if loss.loss_type == "sigmoid" and loss.label_smoothing == 0:
        assert (gradient[0] <= 0).all() and (gradient[1] >= 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_dpo_keeps_a_useful_gradient_far_below_the_reference(divergence: str) -> None:
    """A drifted chosen sequence is pulled back, at most beta e^10 hard; torch's exp would have overflowed."""
    for drift in (-30.0, -1e3, -math.inf):
        chosen, zero = torch.tensor([drift], requires_grad=True), torch.zeros(1)
        result = DPO(divergence=divergence)(chosen, zero, zero, zero)
        result.loss.sum().backward()
        assert chosen.grad is not None and -0.1 * math.exp(10) * 1.001 < chosen.grad.item() < -0.05
        assert result.loss.item() == math.inf if math.isinf(drift) else math.isfinite(result.loss.item())


def test_power_scores_are_exact_down_to_the_continuation_and_linear_below() -> None:
    zero = doubles(0.0)

    def h(v: float) -> float:
        return -DPO(divergence="forward_kl", loss_type="hinge", beta=1.0)(doubles(v), zero, zero, zero).loss.item() + 1

    assert h(-9.99) == pytest.approx(1 - math.exp(9.99), rel=1e-12)
    assert h(-13.0) == pytest.approx(1 - math.exp(10) - 3 * math.exp(10), rel=1e-12)


def test_dpo_metrics() -> None:
    chosen, rejected, ref = (
        doubles(-5.0, -4.0, -3.0, grad=True),
        doubles(-6.0, -4.0, -2.0, grad=True),
        doubles(-5, -4, -3),
    )
    for loss in (DPO(beta=0.2), DPO(beta=0.2, loss_type="ipo"), DPO(beta=0.2, divergence="js")):
        result = loss(chosen, rejected, ref, ref)
        torch.testing.assert_close(result.chosen_reward, doubles(0.0, 0.0, 0.0))
        torch.testing.assert_close(result.rejected_reward, doubles(-0.2, 0.0, 0.2))
        torch.testing.assert_close(result.margin, doubles(0.2, 0.0, -0.2))
        assert result.accuracy.tolist() == [1, 0, 0]  # a tie is wrong
        assert torch.equal(result.chosen_logprob, chosen) and torch.equal(result.rejected_logprob, rejected)
        assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
        assert result.loss.shape == (3,)


def test_dpo_reference_is_a_constant() -> None:
    inputs = [doubles(-1.0 - i, grad=True) for i in range(4)]
    for loss in DPO_LOSSES:
        gradients = torch.autograd.grad(loss(*inputs).loss.sum(), inputs, allow_unused=True)
        assert gradients[2] is None and gradients[3] is None
    assert [DPO(loss_type=name).average_logprob for name in ("sigmoid", "hinge", "ipo")] == [False, False, True]
    assert (DPO().level, DPO().inputs, DPO().outputs) == ("pair", ("ref_logprob",), ("logprob",))
