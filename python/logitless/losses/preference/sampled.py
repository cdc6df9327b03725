"""Preference losses of sampled answers, which read more of them than an order: REBEL, A*-PO, XPO.

The reference is the policy that the run, or its round, began with: log-ratios `v = logprob - ref_logprob`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..catalogue import register
from ..checks import check_number, constant, shared_constant
from ..sequences import wide_dtype
from ..whole_sequence import PairLoss, PreferenceResult, UnpairedLoss, UnpairedResult
from .dpo import log_ratios, preference_result, smoothed_logistic

__all__ = ["optimal_value"]


@register
@dataclass(frozen=True)
class REBEL(PairLoss):
    """Regression on relative rewards: `(v_chosen - v_rejected - eta (R_chosen - R_rejected))^2`.

    R are the answers' rewards, `reward [2B]`. Which of the two counts as chosen changes nothing. The loss is quadratic:
    a logprob of -inf gives the loss and the gradient inf.

    Detached: the reference, the rewards R and the metrics, whose rewards are `v / eta`, in the unit of R.

    When to use: two sampled answers to a prompt and a reward model, whose differences then count and not their signs
    alone. The reference is the policy that sampled them, which moves from round to round.

    Args:
        eta: positive, nats per unit of reward; 1 as in the authors' code. It is the inverse of DPO's beta.

    Left open: nothing. IPO of sums is this loss at `R_chosen - R_rejected = 1 / (2 beta eta)`.

    Source: arXiv 2404.16767, in the scale of the authors' code (ZhaolinGao/REBEL): the paper's loss times eta^2.
    """

    eta: float = 1.0
    name: ClassVar[str] = "rebel"
    sequence_inputs: ClassVar[tuple[str, ...]] = ("reward",)

    def __post_init__(self) -> None:
        check_number(self, "eta", low=0.0, low_open=True)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        *,
        chosen_reward: Tensor,
        rejected_reward: Tensor,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities and rewards, all `[B]`.

        Raises:
            ValueError: the shapes differ.
        """
        v_chosen, v_rejected = log_ratios(self, chosen, rejected, ref_chosen, ref_rejected)
        better = constant(self, "chosen_reward", chosen_reward, chosen)
        better = better - constant(self, "rejected_reward", rejected_reward, chosen)
        loss = (v_chosen - v_rejected - self.eta * better).square()
        return preference_result(loss, v_chosen / self.eta, v_rejected / self.eta, chosen, rejected)


@register
@dataclass(frozen=True)
class A2PO(UnpairedLoss):
    """A*-PO, regression on the optimal advantage: `(beta v - A)^2` of single answers.

    `A = R - V*`, the input `advantages [S]`, is the answer's reward over the value of its prompt, which `optimal_value`
    estimates from answers of the reference. The policy that is optimal for the reward and a KL of weight beta to the
    reference has `beta v = A` on every answer. The loss is quadratic: a logprob of -inf gives the loss and the gradient
    inf.

    SPPO with win rates P is this loss over beta^2 at `A = P - 1/2`.

    Detached: the reference, the advantages and the metrics.

    When to use: verifiable rewards and one sampled answer a prompt: no critic, and no group to compare with while
    training. A prompt that the reference never solves teaches nothing, and is left out.

    Args:
        beta: weight of the KL, positive; 1e-3 as in the authors' code.

    Left open: the entropy bonus of the authors' code, 0 by default there.

    Source: arXiv 2505.20686 and its code (ZhaolinGao/A-PO); TRL's A2PO agrees. SPPO arXiv 2405.00675 and its code
    (uclaml/SPPO).
    """

    beta: float = 1e-3
    name: ClassVar[str] = "a2po"
    sequence_inputs: ClassVar[tuple[str, ...]] = ("advantages",)

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)

    def __call__(self, logprob: Tensor, ref_logprob: Tensor, *, advantages: Tensor) -> UnpairedResult:
        """Loss and metrics per answer from summed log-probabilities, all `[S]`; ValueError where shapes differ."""
        reward = self.beta * (logprob - constant(self, "ref_logprob", ref_logprob, logprob))
        target = shared_constant(self, "advantages", advantages, reward)
        return UnpairedResult((reward - target).square(), reward.detach(), logprob.detach())


def optimal_value(rewards: Tensor, *, beta: float = 0.5) -> Tensor:
    """A*-PO's value of prompts, `V* = beta log mean_i exp(R_i / beta)`, from answers that the reference sampled.

    Args:
        rewards: `[..., n]`, those of a prompt's n answers, finite.
        beta: positive; 0.5 as in the authors' code, where it is not the beta of the loss. Towards 0 the value becomes
            the greatest reward, with growing beta their mean.

    Returns:
        `[...]`, detached, in the dtype of the rewards (float32 at least).

    Raises:
        ValueError: beta is not a positive number, or there are no answers.

    Source: arXiv 2505.20686 and its code.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a positive number, got {beta!r}")
    if rewards.dim() == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards: expected [..., n] with n at least 1, got {list(rewards.shape)}")
    wide = rewards.detach().to(wide_dtype(rewards.device))
    value = beta * (torch.logsumexp(wide / beta, dim=-1) - math.log(rewards.shape[-1]))
    return value.to(torch.promote_types(rewards.dtype, torch.float32))


@register
@dataclass(frozen=True)
class XPO(PairLoss):
    """Exploratory preference optimisation: DPO, and a push away from the answer that the reference sampled.

    `-logsigmoid(beta (v_chosen - v_rejected)) + alpha logprob(the reference's answer)`. Of each pair one answer is the
    policy's and the other the reference's, as the bools `from_reference [2B]` say; a judge says which is chosen. The
    push is optimism: it makes the policy try what the reference would not say. It has no lower bound. A logprob of -inf
    of the reference's answer gives the loss -inf, or NaN where DPO's is inf; the gradient is finite.

    Detached: the reference and the metrics, which are DPO's.

    When to use: online DPO whose own samples no longer teach anything. Without the push it is `DPO` on sampled pairs.

    Args:
        beta: positive; 0.1 as in TRL.
        alpha: weight of the push, positive; 1e-5 as in TRL.

    Left open: nothing.

    Source: arXiv 2405.21046; taken over from an implementation (TRL's XPO trainer).
    """

    beta: float = 0.1
    alpha: float = 1e-5
    name: ClassVar[str] = "xpo"
    sequence_inputs: ClassVar[tuple[str, ...]] = ("from_reference",)

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "alpha", low=0.0, low_open=True)

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        *,
        chosen_from_reference: Tensor,
        rejected_from_reference: Tensor,
    ) -> PreferenceResult:
        """Per-pair loss and metrics from summed log-probabilities and bools, all `[B]`.

        Raises:
            ValueError: the shapes differ. TypeError: `from_reference` is not bool.
        """
        c, r = (self.beta * v for v in log_ratios(self, chosen, rejected, ref_chosen, ref_rejected))
        loss = smoothed_logistic(c - r, 0.0)
        for answer, of_reference in ((chosen, chosen_from_reference), (rejected, rejected_from_reference)):
            if of_reference.dtype != torch.bool:
                raise TypeError(f"xpo: from_reference must be bool, got {of_reference.dtype}")
            marked = constant(self, "from_reference", of_reference, answer) > 0
            loss = loss + torch.where(marked, self.alpha * answer, 0.0)
        return preference_result(loss, c, r, chosen, rejected)
