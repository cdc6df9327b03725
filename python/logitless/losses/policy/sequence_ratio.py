"""Policy-gradient losses that trust or distrust a sequence as a whole: RLOO, GSPO, GMPO, LUSPO, VESPO, TOPR, GVPO.

A sequence's value stands on each of its counted tokens, so that the loss's own `reduction` gives the paper's objective.
An empty sequence contributes 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...types import LossReduction
from ..catalogue import register
from ..checks import check_number, check_one_of
from ..formulas import MAX_LOG_RATIO, bounded_exp, weighted_nll
from ..sequences import Sequences, wide_dtype
from .policy_loss import PolicyLoss, Samples
from .token_ratio import PPO


def _sequences(samples: Samples) -> Sequences:
    assert samples.sequences is not None
    return samples.sequences


@register
@dataclass(frozen=True)
class RLOO(PPO):
    """RLOO's loss: the clipped surrogate of `ppo` with the ratio of whole sequences.

    That ratio is `exp(sum_t (logprob - old_logprob))`. On-policy the loss is REINFORCE of the sequence's summed
    logprob, averaged over sequences.

    Detached: A, old_logprob.

    When to use: with `rloo_advantages`, one or few updates per batch: the ratio of a long answer leaves any bound at
    once. Its token-level form is `reinforce` with the same advantages.

    Args:
        epsilon_low, epsilon_high, delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: the paper has no ratio; the clip is TRL's.

    Source: arXiv 2402.14740, as in TRL.
    """

    name: ClassVar[str] = "rloo"
    advantages_by: ClassVar[str] = "rloo"
    of_sequences: ClassVar[bool] = True
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def _log_ratio(self, samples: Samples) -> Tensor:
        return _sequences(samples).sum(samples.log_ratio)


@register
@dataclass(frozen=True)
class GSPO(PPO):
    """GSPO: the clipped surrogate of `ppo` with the length-normalised ratio `s = exp(mean_t (logprob - old_logprob))`.

    w = A s / |y| on every token of a sequence that is not clipped.

    Detached: A, old_logprob.

    When to use: as `grpo`, where single tokens' ratios are noise, as in mixtures of experts.

    Args:
        epsilon_low: 3e-4; s is a mean, and moves little (TRL's 0.2 would hardly ever clip).
        epsilon_high: 4e-4.
        delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2507.18071, as in TRL; the values of epsilon through a public review that quotes the paper.
    """

    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4
    name: ClassVar[str] = "gspo"
    of_sequences: ClassVar[bool] = True
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def _log_ratio(self, samples: Samples) -> Tensor:
        return _sequences(samples).mean(samples.log_ratio)


@register
@dataclass(frozen=True)
class GSPOToken(GSPO):
    """GSPO-token: `gspo` with a gradient of each token's own, `s_t = sg(s) p / sg(p)`: value s, w = A_t s.

    With one advantage per sequence value and gradient are `gspo`'s.

    Detached: A, old_logprob, the sequence's ratio.

    When to use: as `gspo`, with advantages that differ within a sequence.

    Args:
        epsilon_low, epsilon_high, delta: as `gspo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2507.18071, as in verl; the values of epsilon as for `gspo`.
    """

    name: ClassVar[str] = "gspo_token"

    def _log_ratio(self, samples: Samples) -> Tensor:
        return super()._log_ratio(samples).detach() + samples.logprob - samples.logprob.detach()


@register
@dataclass(frozen=True)
class LUSPO(GSPO):
    """LUSPO: `gspo` times the sequence's length, so that no answer gains by being short: a sum over tokens.

    Detached: A, old_logprob.

    When to use: as `gspo`, where answers shrink in training.

    Args:
        epsilon_low: 2e-3 (the paper's, section 5.1).
        epsilon_high: 2.5e-3 (the paper's).
        delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2602.05261, as in TRL 1.16, whose index of papers quotes the values of epsilon.
    """

    epsilon_low: float = 2e-3
    epsilon_high: float = 2.5e-3
    name: ClassVar[str] = "luspo"
    reduction: ClassVar[LossReduction] = "sequence_mean"


@register
@dataclass(frozen=True)
class GMPO(PolicyLoss):
    """GMPO: `-A G`, `G = exp(mean_t c_t)` the geometric mean of ratios that are clipped token by token, in logarithms.

    `c = min(log r, epsilon_high)` where A > 0, `max(log r, -epsilon_low)` elsewhere; w = A G / |y| for a token inside
    its bound and 0 beyond.

    Detached: A, old_logprob.

    When to use: as `grpo`, with bounds wide enough for exploration: the geometric mean is not thrown by single tokens.

    Args:
        epsilon_low, epsilon_high: bounds of log r, 0.4 (the paper's).

    And those of `PolicyLoss`.

    Left open: nothing in the loss. TRL drops low-entropy tokens from the mean, here `top_entropy` drops their loss.

    Source: arXiv 2507.20673, as in TRL and verl.
    """

    epsilon_low: float = 0.4
    epsilon_high: float = 0.4
    name: ClassVar[str] = "gmpo"
    of_sequences: ClassVar[bool] = True
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "epsilon_low", low=0.0)
        check_number(self, "epsilon_high", low=0.0)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        log_ratio = samples.log_ratio
        rising, falling = log_ratio.clamp(max=self.epsilon_high), log_ratio.clamp(min=-self.epsilon_low)
        clipped = torch.where(samples.advantages > 0, rising, falling)
        return -samples.advantages * bounded_exp(_sequences(samples).mean(clipped))

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        up, down = samples.advantages > 0, samples.advantages < 0
        return down & (samples.log_ratio < -self.epsilon_low), up & (samples.log_ratio > self.epsilon_high)


#: VESPO's least log weight, that of its code: log 1e-8.
_LEAST_LOG_WEIGHT = math.log(1e-8)


@register
@dataclass(frozen=True)
class VESPO(PolicyLoss):
    """VESPO: `-sg(phi(w)) A logprob` with `phi(w) = w^k exp(lambda (1 - w))` of the sequence's whole ratio w.

    w = exp(sum_t (logprob - old_logprob)), each term held within 20 and the sum within [log 1e-8, 20]. phi is 1 at
    w = 1, has its maximum at w = k / lambda, and fades on both sides.

    Detached: phi, A, old_logprob.

    When to use: samples of an older policy or of another engine (give the sampler's log-probs as `old_logprob`, and w
    holds both ratios): a smooth gate in place of a clip of products.

    Args:
        k_positive, lambda_positive: 2 and 3, where A >= 0.
        k_negative, lambda_negative: 3 and 2, elsewhere.

    And those of `PolicyLoss`.

    Left open: nothing in the loss.

    Source: arXiv 2602.10693, as in TRL, whose defaults these are.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    name: ClassVar[str] = "vespo"
    of_sequences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            check_number(self, field, low=0.0, low_open=True)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        return weighted_nll(self._phi(samples) * samples.advantages, samples.logprob)

    def _phi(self, samples: Samples) -> Tensor:
        log_ratio = samples.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        log_w = _sequences(samples).sum(log_ratio).clamp(_LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
        up = samples.advantages >= 0
        k = torch.full_like(log_w, self.k_negative).masked_fill(up, self.k_positive)
        lam = torch.full_like(log_w, self.lambda_negative).masked_fill(up, self.lambda_positive)
        return torch.exp(k * log_w - lam * torch.expm1(log_w))


@register
@dataclass(frozen=True)
class TOPR(PolicyLoss):
    """TOPR: `-A logprob` where A > 0, `-sg(min(w, 1)) A logprob` elsewhere, w the ratio of the whole sequence.

    w = exp(sum_t (logprob - old_logprob)). Right answers are imitated, however unlikely they have become. Wrong ones
    lose their weight as the policy leaves them behind, so that nothing is pushed down for ever.

    Detached: the weight, A, old_logprob.

    When to use: answers sampled long ago, several epochs over them included, without a KL. A is the paper's reward, 1
    or -1, or the reward less a baseline, which decides what share of answers counts as right.

    Args:
        per: `"sequence"` (the paper's, default), or `"token"`: each token's own ratio, as Trinity-RFT and ROLL have it.

    And those of `PolicyLoss`.

    Left open: the baseline.

    Source: arXiv 2503.14286, equation 8 as ROLL's code quotes it, and Trinity-RFT's code. Unverified source: the paper
    was not seen.
    """

    per: str = "sequence"
    name: ClassVar[str] = "topr"
    advantages_by: ClassVar[str] = "rloo"
    reduction: ClassVar[LossReduction] = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self, "per", ("sequence", "token"))

    @property
    def of_sequences(self) -> bool:
        return self.per == "sequence" or self.off_policy_threshold is not None

    def _log_ratio(self, samples: Samples) -> Tensor:
        return _sequences(samples).sum(samples.log_ratio) if self.per == "sequence" else samples.log_ratio

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        weight = torch.where(samples.advantages > 0, 1.0, ratio.detach().clamp(max=1.0))
        return weighted_nll(weight * samples.advantages, samples.logprob)

    def _clipped(self, samples: Samples, ratio: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(ratio, dtype=torch.bool), (samples.advantages < 0) & (ratio > 1)


@register
@dataclass(frozen=True)
class GVPO(PolicyLoss):
    """GVPO: half the variance, within a group, of `z = ratio_scale log w - A`, w the ratio of the whole sequence.

    A sequence's value is `n / (n - 1) (z - mean z of its group)^2 / 2` on each of its tokens, n answers in its group;
    0 in a group of one. It is least where the policy is the optimum of reward with a KL of weight `ratio_scale` to that
    of `old_logprob`: `ratio_scale log w` then is the reward, up to a number per prompt that the mean takes out.

    The input `group` says which prompt a token's sequence belongs to, in whole numbers; groups must not be cut.

    Detached: A, old_logprob. The group's mean of log w is not, which changes nothing where A adds up to 0.

    When to use: samples of any policy, old ones or demonstrations included, as no ratio multiplies anything; with
    `group_advantages(scale="none")`.

    Args:
        ratio_scale: the paper's beta, positive; 0.1 (its code's).

    And those of `PolicyLoss`.

    Left open: nothing in the loss. Its code adds up the groups of a micro-batch, here they are averaged.

    Source: arXiv 2504.19599, from its authors' code (verl-recipe).
    """

    ratio_scale: float = 0.1
    name: ClassVar[str] = "gvpo"
    rewards_over: ClassVar[str] = "none"
    own_inputs: ClassVar[tuple[str, ...]] = ("advantages", "group")
    of_sequences: ClassVar[bool] = True
    batch_wide: ClassVar[bool] = True
    reduction: ClassVar[LossReduction] = "mean_of_means"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "ratio_scale", low=0.0, low_open=True)

    def _constants(self, inputs: Mapping[str, Tensor | None], like: Tensor) -> dict[str, Tensor]:
        constants = super()._constants(inputs, like)
        group = inputs["group"]
        assert group is not None
        index = group.flatten().unique(return_inverse=True)[1]  # as float32, large numbers would fall together
        return {**constants, "group": index.reshape(like.shape).to(wide_dtype(like.device))}

    def _log_ratio(self, samples: Samples) -> Tensor:
        return _sequences(samples).sum(samples.log_ratio)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        z = self.ratio_scale * self._log_ratio(samples) - samples.advantages
        group = samples.constants["group"].long().flatten()
        one = _sequences(samples).first().to(z.dtype)  # one token for each sequence
        total, size = (torch.zeros_like(z).flatten().index_add(0, group, x.flatten()) for x in (one * z, one))
        mean, size = (x[group].reshape(z.shape) for x in (total / size.clamp(min=1.0), size))
        factor = torch.where(_sequences(samples).mask & (size > 1), size / (size - 1).clamp(min=1.0), 0.0)
        return factor * (z - mean).square() / 2
