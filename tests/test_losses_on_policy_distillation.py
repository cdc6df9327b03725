"""Distillation by log-probs of the model's own samples: formulas, expectations over all samples, limits, peers."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import doubles, random_stats
from torch import Tensor

from logitless import linear_loss, losses
from logitless.losses.distillation.sampled import OnPolicyDistillation
from logitless.types import TokenStats

KL_ESTIMATES = {
    "k1": lambda kappa: -kappa,
    "k2": lambda kappa: kappa**2 / 2,
    "k3": lambda kappa: kappa.exp() - kappa - 1,
}
SLOPES = {"k1": lambda kappa: torch.ones_like(kappa), "k2": lambda kappa: -kappa, "k3": lambda kappa: 1 - kappa.exp()}

LOGPROB, REF, OLD = doubles(-0.2, -3.0, -1.5, -0.7), doubles(-1.0, -0.1, -1.5, -9.0), doubles(-0.3, -2.5, -1.5, -0.9)


def measured(loss: OnPolicyDistillation, logprob: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The values, and each one's derivative for its logprob."""
    logprob = logprob.clone().requires_grad_()
    value = loss(TokenStats(logprob=logprob), *inputs)
    return value.detach(), torch.autograd.grad(value.sum(), logprob)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The formulas


@pytest.mark.parametrize("estimator", KL_ESTIMATES)
@pytest.mark.parametrize("gradient", SLOPES)
@pytest.mark.parametrize("old", [None, OLD])
def test_value_and_gradient_are_those_of_the_estimators(estimator, gradient, old):
    inputs = (REF,) if old is None else (REF, old)
    value, slope = measured(OnPolicyDistillation(estimator, gradient), LOGPROB, *inputs)
    ratio = 1 if old is None else (LOGPROB - old).exp()
    torch.testing.assert_close(value, ratio * KL_ESTIMATES[estimator](REF - LOGPROB))
    torch.testing.assert_close(slope, ratio * SLOPES[gradient](REF - LOGPROB))


@pytest.mark.parametrize("estimator", KL_ESTIMATES)
@pytest.mark.parametrize("old", [None, OLD])
def test_gradcheck_of_the_values_own_gradient(estimator, old):
    loss = OnPolicyDistillation(estimator, gradient=None)
    inputs = (REF,) if old is None else (REF, old)
    logprob = LOGPROB.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(TokenStats(logprob=x), *inputs), logprob)


def test_by_default_it_is_the_policy_gradient_with_the_log_ratio_as_advantage():
    """REINFORCE's on-policy, the unclipped importance-weighted surrogate's off-policy."""
    _, slope = measured(OnPolicyDistillation(), LOGPROB, REF)
    logprob = LOGPROB.clone().requires_grad_()
    stats, advantages = TokenStats(logprob=logprob), REF - LOGPROB
    reinforce = losses.Reinforce()(stats, advantages=advantages)
    torch.testing.assert_close(slope, torch.autograd.grad(reinforce.sum(), logprob)[0])
    _, slope = measured(OnPolicyDistillation(), LOGPROB, REF, OLD)
    (expected,) = torch.autograd.grad((-(logprob - OLD).exp() * advantages).sum(), logprob)
    torch.testing.assert_close(slope, expected)


def test_a_policy_loss_adds_it_as_its_kl_to_the_teacher():
    advantages = doubles(1.0, -0.5, 0.3, 0.0)
    estimate = dict(kl="k1", kl_gradient="k2", kl_importance=True)
    alone, both = losses.DAPO(), losses.DAPO(beta=0.7, **estimate)
    logprob = LOGPROB.clone().requires_grad_()
    stats, shared = TokenStats(logprob=logprob), dict(advantages=advantages, old_logprob=OLD)
    added = both(stats, **shared, ref_logprob=REF) - alone(stats, **shared)
    value, slope = measured(OnPolicyDistillation(), LOGPROB, REF, OLD)
    torch.testing.assert_close(added, 0.7 * value)
    torch.testing.assert_close(torch.autograd.grad(added.sum(), logprob)[0], 0.7 * slope)


# ---------------------------------------------------------------------------------------------------------------------
# Expectations: every token of a small vocabulary is a sample, weighted by its probability


def expected_gradient(loss: OnPolicyDistillation, z: Tensor, teacher: Tensor, sampler: Tensor | None = None) -> Tensor:
    """The mean over the sampler's tokens (the model's without one) of the loss's gradient for the logits."""
    log_q = z.log_softmax(-1)
    inputs = (teacher,) if sampler is None else (teacher, sampler)
    weight = (log_q if sampler is None else sampler).detach().exp()
    (gradient,) = torch.autograd.grad((weight * loss(TokenStats(logprob=log_q), *inputs)).sum(), z)
    return gradient


def three_distributions() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    z, teacher, sampler = torch.randn(3, 5, 7, generator=draw, dtype=torch.float64)
    return z.requires_grad_(), teacher.log_softmax(-1), sampler.log_softmax(-1)


def test_the_mean_over_samples_is_the_gradient_of_the_reverse_kl():
    z, teacher, sampler = three_distributions()
    log_q = z.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - teacher)).sum(), z)
    torch.testing.assert_close(expected_gradient(OnPolicyDistillation(), z, teacher), exact)
    torch.testing.assert_close(expected_gradient(OnPolicyDistillation("k3"), z, teacher), exact)
    for loss in (
        OnPolicyDistillation(),
        OnPolicyDistillation(gradient=None),
        OnPolicyDistillation("k3", gradient=None),
    ):
        torch.testing.assert_close(expected_gradient(loss, z, teacher, sampler), exact)


def test_the_mean_of_the_value_is_the_reverse_kl():
    z, teacher, _ = three_distributions()
    log_q = z.detach().log_softmax(-1)
    kl = (log_q.exp() * (log_q - teacher)).sum(-1)
    for estimator in ("k1", "k3"):
        each = OnPolicyDistillation(estimator)(TokenStats(logprob=log_q), teacher)
        torch.testing.assert_close((log_q.exp() * each).sum(-1), kl)


def test_the_other_gradients_mean_something_else():
    z, teacher, _ = three_distributions()
    log_q = z.log_softmax(-1)
    nothing = expected_gradient(OnPolicyDistillation(gradient="k1"), z, teacher)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-12)
    (forward,) = torch.autograd.grad((teacher.exp() * (teacher - log_q)).sum(), z)
    torch.testing.assert_close(expected_gradient(OnPolicyDistillation(gradient="k3"), z, teacher), forward)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds and constants


@pytest.mark.parametrize("estimator", KL_ESTIMATES)
def test_the_log_ratio_is_bounded_in_value_and_as_advantage(estimator):
    loss = OnPolicyDistillation(estimator, max_log_ratio=0.5)
    value, slope = measured(loss, LOGPROB, REF)
    kappa = (REF - LOGPROB).clamp(-0.5, 0.5)
    torch.testing.assert_close(value, KL_ESTIMATES[estimator](kappa))
    torch.testing.assert_close(slope, -kappa)


def test_a_token_that_the_teacher_excludes():
    """The least log-probability, or the bound, says how hard it is pushed down."""
    logprob, ref = doubles(-0.5), doubles(-math.inf)
    value, slope = measured(OnPolicyDistillation(), logprob, ref)
    torch.testing.assert_close((value, slope), (doubles(1e6 - 0.5), doubles(1e6 - 0.5)))
    value, slope = measured(OnPolicyDistillation(max_log_ratio=5.0), logprob, ref)
    torch.testing.assert_close((value, slope), (doubles(5.0), doubles(5.0)))


def test_the_teacher_that_agrees_and_the_teacher_far_off():
    value, slope = measured(OnPolicyDistillation(), LOGPROB, LOGPROB)
    assert not value.any() and not slope.any()
    logprob, ref = doubles(-1e3, 0.0, -math.inf, -math.inf).float(), doubles(0.0, -1e3, -1.0, -math.inf)
    for estimator in KL_ESTIMATES:
        value, slope = measured(OnPolicyDistillation(estimator, None), logprob, ref, OLD)
        assert value.isfinite().all() and slope.isfinite().all()


def test_the_inputs_are_constants():
    ref, old = (x.clone().requires_grad_() for x in (REF, OLD))
    logprob = LOGPROB.clone().requires_grad_()
    OnPolicyDistillation(gradient=None)(TokenStats(logprob=logprob), ref, old).sum().backward()
    assert logprob.grad is not None and ref.grad is None and old.grad is None


WRONG = [
    (dict(estimator="k4"), ValueError, "estimator must be one of k1, k2, k3"),
    (dict(gradient="k0"), ValueError, "gradient must be one of"),
    (dict(max_log_ratio=0.0), ValueError, "max_log_ratio must be a finite number in"),
    (dict(max_log_ratio="5"), TypeError, "max_log_ratio must be a number"),
]


@pytest.mark.parametrize(("fields", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_hyper_parameters_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        OnPolicyDistillation(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Peers, and MiniLLM's advantages


def test_trl_sdft_on_sampled_tokens(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    sdft = pytest.importorskip("trl.experimental.sdft.loss_utils")
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64).requires_grad_()
    weight, teacher = (torch.randn(9, n, generator=draw, dtype=torch.float64) for n in (5, 5))
    targets = torch.randint(9, (2, 4), generator=draw)
    theirs = sdft.compute_sampled_token_self_distillation_loss(
        hidden @ weight.T, (hidden @ teacher.T).detach(), targets, distillation_alpha=1.0
    ).mean()
    ours = linear_loss("on_policy_distillation", hidden, weight, targets, ref_hidden=hidden.detach(), ref_head=teacher)
    found, expected = (torch.autograd.grad(x, hidden)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_minillm_advantages_are_the_mean_of_what_follows(gamma):
    old, ref = (random_stats(3, 6, seed=seed)[0].logprob.detach() for seed in (1, 2))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for row in range(3):
        counted = [t for t in range(6) if mask[row, t]]
        for i, t in enumerate(counted):
            terms = [gamma**k * (ref[row, s] - old[row, s]).item() for k, s in enumerate(counted[i:])]
            expected[row, t] = sum(terms) / len(terms)
    torch.testing.assert_close(losses.minillm_advantages(old, ref, gamma=gamma, mask=mask), expected)
    sequence = torch.arange(3).repeat_interleave(6)
    flat = losses.minillm_advantages(old.flatten(), ref.flatten(), gamma=gamma, mask=mask.flatten(), sequence=sequence)
    torch.testing.assert_close(flat.view(3, 6), expected)


def test_minillm_advantages_are_detached_and_checked():
    old, ref = LOGPROB.view(1, -1).requires_grad_(), REF.view(1, -1).requires_grad_()
    assert not losses.minillm_advantages(old, ref).requires_grad
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], got 1.5"):
        losses.minillm_advantages(old, ref, gamma=1.5)
    with pytest.raises(ValueError, match=r"ref_logprob: expected shape \[1, 4\], got \[4\]"):
        losses.minillm_advantages(old, REF)
