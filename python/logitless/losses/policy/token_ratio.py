"""Policy-gradient losses whose weight a token knows by itself: REINFORCE, the PPO clip and its kin, CISPO, SAPO.

With `A` the advantage, `r = exp(logprob - old_logprob)` the ratio to the policy that sampled and sg the stop-gradient,
all of them are `-A` times something whose slope in logprob is 1 where r = 1: they differ in how they stop trusting a
sample that the policy has left behind, and in how they are averaged (`reduction`). The names of papers that share the
clip are one formula with their own defaults. What they all can add is `PolicyLoss`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...types import LossReduction
from ..catalogue import register
from ..checks import check_number, check_optional
from ..formulas import k2, weighted_nll
from .policy_loss import PolicyLoss, Samples


@register
@dataclass(frozen=True)
class Reinforce(PolicyLoss):
    """REINFORCE with a baseline: `-A logprob`.

    On-policy it has the gradient of every other loss here. Without a ratio it is right for samples of the current
    policy only; `policy_weight` can carry an importance weight.

    Detached: A.

    When to use: one update per batch of samples. With the advantages of its name it is GPG (`gpg_advantages`), ReMax
    (`remax_advantages`), OPO (`opo_advantages`) or token-level RLOO (`rloo_advantages`).

    Args: those of `PolicyLoss`.

    Left open: the baseline, which is the advantages' business.

    Source: R. J. Williams, 1992; GPG arXiv 2504.02546.
    """

    name: ClassVar[str] = "reinforce"
    advantages_by: ClassVar[str] = "rloo"
    uses_ratio: ClassVar[bool] = False

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        return weighted_nll(samples.advantages, samples.logprob)


@register
@dataclass(frozen=True)
class PPO(PolicyLoss):
    """The clipped surrogate: `-min(r A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)`.

    w = A r while r is inside its bound, 0 beyond: `1 + epsilon_high` from above where A > 0, `1 - epsilon_low` from
    below where A < 0. A ratio on its bound counts as inside. Where A < 0 and r grows, the loss is unbounded, unless
    `delta` bounds that side as well: then `-A min(r, delta)` there, which is both the dual clip (its c) and the
    two-sided clip.

    Detached: A, old_logprob.

    When to use: several updates per batch of samples.

    Args:
        epsilon_low, epsilon_high: 0.2 (PPO's).
        delta: greatest ratio where A < 0, at least `1 + epsilon_high`; None, off, by default. It is the dual clip's c,
            by default on in verl, with 3; recipes of verl and NeMo-RL have 10.

    And those of `PolicyLoss`.

    Left open: nothing in the loss. Its advantages are `generalized_advantages`, the value function learns by
    `value_loss`.

    Source: arXiv 1707.06347, equation 7; dual clip arXiv 1912.09729; two-sided clip arXiv 2505.07291 (INTELLECT-2). The
    formulas were read in implementations (TRL, verl).
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    name: ClassVar[str] = "ppo"
    advantages_by: ClassVar[str] = "gae"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "epsilon_low", low=0.0, high=1.0)
        check_number(self, "epsilon_high", low=0.0)
        check_optional(self, "delta", low=1 + self.epsilon_high)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        rising = ratio.clamp(max=1 + self.epsilon_high)
        falling = ratio.clamp(min=1 - self.epsilon_low, max=self.delta)
        return -samples.advantages * torch.where(samples.advantages >= 0, rising, falling)

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        up, down = samples.advantages > 0, samples.advantages < 0
        high = up & (ratio > 1 + self.epsilon_high)
        if self.delta is not None:
            high = high | (down & (ratio > self.delta))
        return down & (ratio < 1 - self.epsilon_low), high


@register
@dataclass(frozen=True)
class GRPO(PPO):
    """GRPO: the clipped surrogate of `ppo`, averaged over each sequence and then over sequences.

    Detached: A, old_logprob.

    When to use: groups of samples per prompt with `group_advantages`. Averaging by sequence gives a token of a long
    answer less weight than one of a short answer: `dr_grpo` and `dapo` do not.

    Args:
        epsilon_low, epsilon_high, delta: as `ppo`.

    And those of `PolicyLoss`; the paper has `beta=0.04` with k3.

    Left open: nothing in the loss.

    Source: arXiv 2402.03300, equation 3, as in TRL.
    """

    name: ClassVar[str] = "grpo"
    reduction: ClassVar[LossReduction] = "mean_of_means"


@register
@dataclass(frozen=True)
class DrGRPO(PPO):
    """Dr. GRPO: the clipped surrogate of `ppo`, summed and divided by a constant length per sequence.

    Detached: A, old_logprob.

    When to use: as GRPO, without its bias towards short right and long wrong answers; with
    `group_advantages(scale="none")`. The constant is `max_length` of the reduction: the longest completion allowed.

    Args:
        epsilon_low, epsilon_high, delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: the constant; it only scales the learning rate.

    Source: arXiv 2503.20783, as in TRL.
    """

    name: ClassVar[str] = "dr_grpo"
    rewards_over: ClassVar[str] = "none"
    reduction: ClassVar[LossReduction] = "constant_length"


@register
@dataclass(frozen=True)
class DAPO(PPO):
    """DAPO's loss: the clipped surrogate of `ppo` with a higher upper bound, averaged over all tokens.

    Detached: A, old_logprob.

    When to use: as GRPO, where long answers matter as much per token and exploration should not be clipped away. Its
    other parts, sampling until groups differ and shaping of overlong rewards, stand outside the loss.

    Args:
        epsilon_low: 0.2.
        epsilon_high: 0.28 (the paper's clip-higher).
        delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss. The mean is over the tokens of the whole, global batch (`normalizer`).

    Source: arXiv 2503.14476; its normaliser as in TRL and verl.
    """

    epsilon_high: float = 0.28
    name: ClassVar[str] = "dapo"


@register
@dataclass(frozen=True)
class VAPO(DAPO):
    """VAPO: the loss of `dapo`, plus `nll_coef nll_weight (-logprob)`: right answers are imitated as well.

    The input `nll_weight` is 0 on tokens of wrong answers. On those of right ones it is n / n_right, tokens of the
    (global) batch over tokens of right answers, so that their NLL has a mean of its own. (1 there gives them a part in
    the one mean.) `policy_weight` and masks do not touch this term.

    Detached: A, old_logprob, nll_weight.

    When to use: right answers are rare, and a sample of one should not be wasted. With advantages of a value function
    (`generalized_advantages` with `length_adaptive_lambda`; returns with `lam=1`).

    Args:
        nll_coef: not negative; 0.1 (the paper's).
        epsilon_low, epsilon_high, delta: as `dapo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2504.05118, equation 10, as in NeMo-RL (`positive_example_nll_weight`, which averages over right
    answers of the micro-batch).
    """

    nll_coef: float = 0.1
    name: ClassVar[str] = "vapo"
    advantages_by: ClassVar[str] = "gae"
    own_inputs: ClassVar[tuple[str, ...]] = ("advantages", "nll_weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "nll_coef", low=0.0)

    def _regulariser(self, samples: Samples, ratio: Tensor) -> Tensor:
        imitation = self.nll_coef * weighted_nll(samples.constants["nll_weight"], samples.logprob)
        rest = super()._regulariser(samples, ratio)
        return imitation if rest is None else imitation + rest


@register
@dataclass(frozen=True)
class BNPO(PPO):
    """TRL's `bnpo`: the clipped surrogate of `ppo`, averaged over the tokens of the local batch.

    The same formula as `dapo` with symmetric bounds. TRL divides by the micro-batch's own tokens; here the normaliser
    is the caller's, and the local count by default.

    Detached: A, old_logprob.

    When to use: to reproduce runs made with it.

    Args:
        epsilon_low, epsilon_high, delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: the Beta-normalised advantages of the paper that shares the name, arXiv 2506.02864, are no part of it.

    Source: TRL's code.
    """

    name: ClassVar[str] = "bnpo"


@register
@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """CISPO: `-sg(clamp(r, ratio_floor, ratio_cap)) A logprob`: clipped weights, and a gradient from every token.

    Detached: the weight, A, old_logprob.

    When to use: several updates per batch where the rare tokens that turn a derivation would be clipped first by `ppo`.

    Args:
        ratio_cap: the greatest weight itself (not 1 + epsilon), 5 by default, a usual value. None: no cap, REINFORCE
            with an importance weight.
        ratio_floor: the least weight, at most `ratio_cap`; 0, off, by default, as in TRL. verl has `1 - epsilon_low`,
            so that a token that has become unlikely weighs no less.

    And those of `PolicyLoss`.

    Left open: the cap, which the paper gives as `1 + epsilon_high` without a value.

    Source: arXiv 2506.13585, as in TRL (whose `epsilon_high` is this cap, and silently 0.2 if it is not set).
    """

    ratio_cap: float | None = 5.0
    ratio_floor: float = 0.0
    name: ClassVar[str] = "cispo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optional(self, "ratio_cap", low=0.0)
        check_number(self, "ratio_floor", low=0.0, high=math.inf if self.ratio_cap is None else self.ratio_cap)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        weight = ratio.detach().clamp(min=self.ratio_floor, max=self.ratio_cap)
        return weighted_nll(weight * samples.advantages, samples.logprob)

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(ratio, dtype=torch.bool)
        return ratio < self.ratio_floor, none if self.ratio_cap is None else ratio > self.ratio_cap


@register
@dataclass(frozen=True)
class SAPO(PolicyLoss):
    """SAPO, a soft gate for the clip: `-(4 / tau) sigmoid(tau (r - 1)) A`, averaged as `grpo`.

    `w = 4 r s (1 - s) A` with `s = sigmoid(tau (r - 1))`: A at r = 1, fading on both sides.

    Detached: A, old_logprob.

    When to use: as `grpo`, where the clip's sudden silence hurts, such as mixtures of experts.

    Args:
        tau_positive: tau where A > 0; 1.
        tau_negative: elsewhere; 1.05, as negative tokens spread their gradient over the whole vocabulary.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2511.20347, as in TRL.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    name: ClassVar[str] = "sapo"
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "tau_positive", low=0.0, low_open=True)
        check_number(self, "tau_negative", low=0.0, low_open=True)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(samples.advantages > 0, self.tau_positive)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * samples.advantages


@register
@dataclass(frozen=True)
class DPPO(PolicyLoss):
    """DPPO with the binary total-variation mask: `-sg(min(r, ratio_cap)) A logprob` within a trust region of p itself.

    A token keeps its gradient while `p - p_old <= threshold_high` (A > 0), `p - p_old >= -threshold_low` (A < 0): a
    rare token may grow by a large factor, a likely one may not move far.

    Detached: weight, mask, A, old_logprob.

    When to use: as `ppo`, where ratios of rare tokens say little about how far the policy moved.

    Args:
        threshold_low, threshold_high: bounds of the change of probability; 0.15, with which verl's example trains.
        ratio_cap: greatest weight; 20, the default of verl's function (its example sets it out of reach).

    And those of `PolicyLoss`.

    Left open: nothing in the loss; `dppo_kl` has the other mask.

    Source: arXiv 2602.04879, from verl's code (`dppo_tv`). Unverified source: the paper was not seen.
    """

    threshold_low: float = 0.15
    threshold_high: float = 0.15
    ratio_cap: float = 20.0
    name: ClassVar[str] = "dppo"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold_low", low=0.0, high=1.0)
        check_number(self, "threshold_high", low=0.0, high=1.0)
        check_number(self, "ratio_cap", low=0.0, low_open=True)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        low, high = self._clipped(samples, ratio)
        weight = torch.where(low | high, 0.0, ratio.detach().clamp(max=self.ratio_cap))
        return weighted_nll(weight * samples.advantages, samples.logprob)

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        logprob = samples.logprob.detach()
        change = logprob.exp() - (logprob - samples.log_ratio.detach()).exp()
        up, down = samples.advantages > 0, samples.advantages < 0
        return down & (change < -self.threshold_low), up & (change > self.threshold_high)


@register
@dataclass(frozen=True)
class DPPOKL(DPPO):
    """DPPO with the binary KL mask: the loss of `dppo`, within a trust region of the divergence of token or not token.

    `D = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))`, with 1e-8 added to the probabilities of the
    rest. A token keeps its gradient while `D <= threshold_high` or p has not risen (A > 0), `D <= threshold_low` or p
    has not fallen (A < 0).

    Detached: weight, mask, A, old_logprob.

    When to use: as `dppo`, with a bound that is tighter for probabilities near 0 and 1.

    Args:
        threshold_low, threshold_high: bounds of D in nats; 0.05, with which verl's example trains.
        ratio_cap: as `dppo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2602.04879, from verl's code (`dppo_kl`). Unverified source: the paper was not seen.
    """

    threshold_low: float = 0.05
    threshold_high: float = 0.05
    name: ClassVar[str] = "dppo_kl"

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        change = samples.log_ratio.detach()
        old = samples.logprob.detach() - change
        rest, old_rest = (1e-8 - torch.expm1(x) for x in (samples.logprob.detach(), old))
        divergence = -old.exp() * change + old_rest * (old_rest / rest).log()
        up, down = samples.advantages > 0, samples.advantages < 0
        low, high = divergence > self.threshold_low, divergence > self.threshold_high
        return down & (change < 0) & low, up & (change > 0) & high


@register
@dataclass(frozen=True)
class DRO(PolicyLoss):
    """DRO's policy part: `-(A logprob - strength / 2 (logprob - old_logprob)^2)`: a pull back instead of a clip.

    `w = A - strength (logprob - old_logprob)`: a token settles at `old_logprob + A / strength`.

    Detached: A, old_logprob.

    When to use: off-policy samples, with one reward per answer and a learned value.

    Args:
        strength: of the pull, not negative; 0.1 is our choice.

    And those of `PolicyLoss`.

    Left open: the paper is of sequences and learns the value function along; this is verl's per-token form.

    Source: arXiv 2405.19107, from verl's code. Unverified source: the paper was not seen.
    """

    strength: float = 0.1
    name: ClassVar[str] = "dro"
    rewards_over: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "strength", low=0.0)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        return weighted_nll(samples.advantages, samples.logprob) + self.strength * k2(samples.log_ratio)
