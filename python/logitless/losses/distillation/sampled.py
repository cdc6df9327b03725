"""Distillation by the teacher's log-probabilities of the tokens that the model sampled.

With `kappa = ref_logprob - logprob` of a sampled token, `-kappa` is one sample of KL(model || teacher). Its gradient is
a policy gradient whose advantage is kappa itself, constant: `-sg(kappa) logprob`. So every policy loss distils, given
`advantages=ref_logprob - old_logprob`, and `discounted_sum` of these is the return of what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...types import TokenStats
from ..catalogue import register
from ..checks import check_number, check_one_of, constant, statistic
from ..formulas import ESTIMATORS, bounded_exp, kl_estimate
from ..loss import TokenLoss
from ..policy.advantages import discounted_sum
from ..policy.policy_loss import LEAST_LOGPROB

__all__ = ["minillm_advantages"]


@register
@dataclass(frozen=True)
class OnPolicyDistillation(TokenLoss):
    """`r k(kappa)` per sampled token, `kappa = ref_logprob - logprob`: an estimate of KL(model || teacher).

    k1 is `-kappa`, k2 `kappa^2 / 2`, k3 `exp(kappa) - kappa - 1`; r = exp(logprob - old_logprob), 1 without
    `old_logprob`. Value and gradient have an estimator each. By default the value is k1, unbiased, and the gradient
    that of k2: `-r sg(kappa)` times that of logprob, the policy gradient with advantage kappa, whose mean over the
    model's own samples is the gradient of KL(model || teacher).

    The other estimators' gradients are not that one: k1's is logprob's own, 0 on average, and teaches nothing; k3's is
    on average that of the forward KL. With `gradient=None` and `old_logprob`, r is differentiated too: then the
    gradients of `r k1` and `r k3` are unbiased for the reverse KL.

    Detached: the teacher's values, `old_logprob`, and kappa where it is an advantage.

    When to use: the model samples, and a teacher, served elsewhere perhaps, scores the samples: one number a token, no
    top-k and no hidden states. Rewards beside the teacher: any policy loss whose `ref_logprob` is the teacher's adds
    this loss with `beta=..., kl="k1", kl_gradient="k2", kl_importance=True`. A clipped ratio is a policy loss as well:
    `PPO` or `CISPO` with `advantages=ref_logprob - old_logprob`.

    Limits: a token to which the teacher gives nothing has an advantage of -1e6, as log-probabilities count as that at
    least, with no gradient below: bound it with `max_log_ratio`. Beyond kappa = 20, k3 and r follow their tangent.

    Args:
        estimator: "k1" (default), "k2" or "k3": the value.
        gradient: whose gradient it has, with r constant: "k2" by default, the policy gradient; "k1" or "k3". None: the
            value's own, through r as well.
        max_log_ratio: bounds kappa to [-max_log_ratio, max_log_ratio] in value and as advantage; the gradient goes on
            beyond. None, off, by default, as in Trinity-RFT; rLLM's recipes take 5. verl bounds its estimate instead,
            at 10.

    Left open: how the model samples, whether rewards are added, and their weight. verl's default takes k3 as the
    advantage, which is never positive: `advantages=-kl_estimate(old_logprob, ref_logprob)` for a policy loss.

    Source: Thinking Machines, "On-Policy Distillation" (2025; unverified source, known through code that follows it);
    Trinity-RFT (on_policy_distill), verl (trainer/distillation/losses.py) and TRL (experimental/sdft, `sampled_token`),
    read: the same gradient. k1, k2, k3: J. Schulman's note (2020).
    """

    estimator: str = "k1"
    gradient: str | None = "k2"
    max_log_ratio: float | None = None
    name: ClassVar[str] = "on_policy_distillation"
    inputs: ClassVar[tuple[str, ...]] = ("ref_logprob",)
    optional_inputs: ClassVar[tuple[str, ...]] = ("old_logprob",)

    def __post_init__(self) -> None:
        check_one_of(self, "estimator", ESTIMATORS)
        if self.gradient is not None:
            check_one_of(self, "gradient", ESTIMATORS)
        if self.max_log_ratio is not None:
            check_number(self, "max_log_ratio", low=0.0, low_open=True)

    def __call__(self, stats: TokenStats, ref_logprob: Tensor, old_logprob: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]` from `stats.logprob`, the teacher's log-probabilities and the sampler's."""
        logprob = statistic(self, stats, "logprob").clamp(min=LEAST_LOGPROB)
        ref = constant(self, "ref_logprob", ref_logprob, logprob).clamp(min=LEAST_LOGPROB)
        if self.max_log_ratio is not None:
            here = logprob.detach()
            ref = here + (ref - here).clamp(-self.max_log_ratio, self.max_log_ratio)
        ratio = None
        if old_logprob is not None:
            old = constant(self, "old_logprob", old_logprob, logprob).clamp(min=LEAST_LOGPROB)
            ratio = bounded_exp(logprob - old)
        return kl_estimate(logprob, ref, estimator=self.estimator, gradient=self.gradient, ratio=ratio)


def minillm_advantages(
    old_logprob: Tensor,
    ref_logprob: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """MiniLLM's advantages: the mean over k >= t of `gamma^(k-t) (ref_logprob_k - old_logprob_k)`, token by token.

    The division by the number of tokens from t on takes away what favours short answers. The whole method is
    `PPO` with these advantages (`whiten` first, as the authors do), plus `Distillation("reverse_kl")` on the same
    samples, a single step's exact gradient. The authors' code leaves the token's own term in the sum as well, as here.

    Args:
        old_logprob: `[B, T]`, of the model that sampled.
        ref_logprob: the same shape, the teacher's.
        gamma: in [0, 1]; 1, the undiscounted sum, by default. TRL's default is 0, the token's own term alone, and it
            divides by the discounted count.
        mask: bool, the tokens that count. All by default.
        sequence: int64, as `discounted_sum` has it.

    Returns:
        `[B, T]`, detached, 0 where a token does not count.

    Raises:
        ValueError: gamma is out of range, or shapes differ.

    Source: arXiv 2306.08543, read in the authors' code (microsoft/LMOps, minillm/losses.py). Their mixture of teacher
    and model in sampling has an importance weight, which is `policy_weight` here.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma: expected a number in [0, 1], got {gamma!r}")
    if ref_logprob.shape != old_logprob.shape:
        raise ValueError(f"ref_logprob: expected shape {list(old_logprob.shape)}, got {list(ref_logprob.shape)}")
    rewards = (ref_logprob - old_logprob).detach()
    left = discounted_sum(torch.ones_like(rewards), mask=mask, sequence=sequence)
    return discounted_sum(rewards, gamma, mask=mask, sequence=sequence) / left.clamp(min=1.0)
