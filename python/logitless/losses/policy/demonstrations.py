"""Losses of batches that mix a policy's own samples with demonstrations: LUFFY, CHORD, UFT, SRFT, Prefix-RFT; and
Dense-Path REINFORCE, which takes its rewards from a model that imitated demonstrations.

The bool input `demonstration` says which tokens are a demonstration's; the others are the policy's own, and get a
policy loss. KL and entropy bonus, estimates over the policy's own samples, leave demonstrations out.

How much of a demonstration is shown, and its weight: `schedules`. Advantages of prefixes:
`advantages.prefix_rft_advantages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...types import LossReduction, TokenStats
from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, check_optional
from ..formulas import weighted_nll
from ..sft.token_weights import DFT, CHORDPhi, LUFFYShaping
from .policy_loss import PolicyLoss, Samples
from .token_ratio import PPO, Reinforce
from .weights import top_entropy_mask


@dataclass(frozen=True)
class Mixed(PolicyLoss):
    """A loss of its own for the tokens of demonstrations."""

    own_inputs: ClassVar[tuple[str, ...]] = ("advantages", "demonstration")
    #: What a completion shows of a demonstration: the "whole", a "prefix" that it continues, or a "hint" to all.
    shows: ClassVar[str] = "whole"

    def _regulariser(self, samples: Samples, ratio: Tensor) -> Tensor | None:
        total = super()._regulariser(samples, ratio)
        return total if total is None else torch.where(_demonstration(samples), 0.0, total)


def _demonstration(samples: Samples) -> Tensor:
    return samples.constants["demonstration"] != 0


@dataclass(frozen=True)
class _Imitating(Mixed, PPO):
    """The clipped surrogate on own tokens, imitation on demonstrations, whose `old_logprob` is not looked at."""

    def _log_ratio(self, samples: Samples) -> Tensor:
        return torch.where(_demonstration(samples), 0.0, samples.log_ratio)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        own = super()._objective(samples, ratio)
        return torch.where(_demonstration(samples), self._imitate(samples), own)

    def _imitate(self, samples: Samples) -> Tensor:
        raise NotImplementedError


@register
@dataclass(frozen=True)
class LUFFY(_Imitating):
    """LUFFY: the clipped surrogate of `ppo` on own tokens, `-A p / (p + gamma)` on demonstrations, p the probability.

    A demonstration has no sampler to divide by: its ratio is p itself, shaped so that unlikely tokens still teach;
    `w = A gamma p / (p + gamma)^2`, greatest at p = gamma (`luffy_shaping` is that term alone).

    Detached: A, old_logprob. The shaped ratio is not.

    When to use: groups in which one answer per prompt (of eight) is an expert's, and its advantage is the group's
    (`group_advantages(scale="none")` over all of them).

    Args:
        gamma: positive; 0.1 (the paper's).
        epsilon_low, epsilon_high, delta: of own tokens, as `ppo`. Its scripts often switch the clip off: large values.

    And those of `PolicyLoss`; the paper has `entropy_coef=0.01`, the authors' script 0.001.

    Left open: the normaliser. The paper divides by all tokens, which is the default here; the authors' script divides
    a micro-batch's sum by its padded width. Their entropy bonus runs over demonstrations too, which are left out here.

    Source: arXiv 2504.14945, equations 5 to 7, and its authors' code (ElliottYan/LUFFY).
    """

    gamma: float = 0.1
    name: ClassVar[str] = "luffy"
    rewards_over: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "gamma", low=0.0, low_open=True)

    def _imitate(self, samples: Samples) -> Tensor:
        return samples.advantages * LUFFYShaping(gamma=self.gamma)(TokenStats(logprob=samples.logprob))


@register
@dataclass(frozen=True)
class CHORD(_Imitating):
    """CHORD: `(1 - mu)` times the clipped surrogate of `ppo` on own tokens, `mu` times an SFT loss on demonstrations.

    Detached: A, old_logprob, the SFT loss's token weight.

    When to use: demonstrations that the policy should learn from without being dragged off its own distribution. Each
    kind of token has a mean of its own in the paper: `token_weight=own_means(...)`.

    Args:
        mu: weight of demonstrations, in [0, 1]; 0.1 (its code's). `chord_mu` schedules it.
        imitation: `"phi"` (default; `chord_phi`, weight p (1 - p)), `"nll"` (CHORD-mu) or `"dft"` (its code's
            `sft_is`).
        epsilon_low, epsilon_high, delta: of own tokens, as `ppo`.

    And those of `PolicyLoss`.

    Left open: mu's peak and schedule for CHORD-mu; the code's defaults are constant.

    Source: arXiv 2508.11408, from its authors' code (Trinity-RFT).
    """

    mu: float = 0.1
    imitation: str = "phi"
    name: ClassVar[str] = "chord"
    own_means: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "mu", low=0.0, high=1.0)
        check_one_of(self, "imitation", ("phi", "nll", "dft"))

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        share = torch.full_like(ratio, 1 - self.mu).masked_fill(_demonstration(samples), self.mu)
        return share * super()._objective(samples, ratio)

    def _imitate(self, samples: Samples) -> Tensor:
        if self.imitation == "nll":
            return -samples.logprob
        weighted = CHORDPhi() if self.imitation == "phi" else DFT()
        return weighted(TokenStats(logprob=samples.logprob))


@register
@dataclass(frozen=True)
class UFT(_Imitating):
    """UFT: the clipped surrogate of `ppo` on the answer, `-hint_weight logprob` on the hint that was shown before it.

    The hint, a prefix of a demonstration, is part of the prompt: its tokens get no policy gradient.

    Detached: A, old_logprob.

    When to use: tasks that the policy hardly ever solves unaided: hints shorten them, and less so as it learns
    (`uft_hint_length`).

    Args:
        hint_weight: not negative; 0.001 (its code's). The paper averages hint and answer apart:
            `token_weight=own_means(...)`.
        epsilon_low, epsilon_high, delta: of the answer, as `ppo`.

    And those of `PolicyLoss`; its code has a KL and an entropy bonus on.

    Left open: the KL's weight. Its code cuts hints between sentences; `uft_hint_length` cuts between tokens.

    Source: arXiv 2505.16984, from its authors' code (liumy2010/UFT).
    """

    hint_weight: float = 0.001
    name: ClassVar[str] = "uft"
    shows: ClassVar[str] = "hint"
    own_means: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "hint_weight", low=0.0)

    def _imitate(self, samples: Samples) -> Tensor:
        return -self.hint_weight * samples.logprob


@register
@dataclass(frozen=True)
class SRFT(Mixed):
    """SRFT: SFT and policy gradient on demonstrations, entropy-weighted policy gradient on own answers.

    - demonstrations: `-sft_weight sg(exp(-H)) logprob - A p`: imitation where the policy is sure of itself, and the
      ratio p / 1 without a clip;
    - own tokens, A the reward itself, 1 or -1: `-rollout_weight sg(exp(H)) A logprob` where A > 0, `-A logprob`
      elsewhere.

    H is the entropy of the token's distribution, held below `entropy_cap` (exp(H) can reach the size of the
    vocabulary). Nothing stops the logprob of tokens with A < 0 from falling on.

    Detached: A, H. p is not.

    When to use: one stage in place of SFT followed by RL, with one demonstration in each group of rollouts.

    Args:
        sft_weight: 0.5 (the paper's), not negative.
        rollout_weight: of own tokens with A > 0; 0.1 (the paper's), not negative.
        entropy_sign: of H on demonstrations: -1 as in the paper (default), or 1 as in its released code; they disagree.
        entropy_cap: nats; 5 is our choice.

    And those of `PolicyLoss`; the paper has `entropy_coef=0.001`.

    Left open: the sign, above.

    Source: arXiv 2506.19767, equations 8 to 13. Unverified source: the equations are known through notes, and through
    a reimplementation that has the same weights on own tokens.
    """

    sft_weight: float = 0.5
    rollout_weight: float = 0.1
    entropy_sign: int = -1
    entropy_cap: float = 5.0
    name: ClassVar[str] = "srft"
    advantages_by: ClassVar[str] = "signed"
    uses_ratio: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ("logprob", "entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("sft_weight", "rollout_weight", "entropy_cap"):
            check_number(self, field, low=0.0)
        if self.entropy_sign not in (-1, 1):
            raise ValueError(f"SRFT: entropy_sign must be -1 or 1, got {self.entropy_sign!r}")

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        assert samples.entropy is not None
        logprob, advantages = samples.logprob, samples.advantages
        entropy = samples.entropy.detach().clamp(max=self.entropy_cap)
        imitation = weighted_nll(self.sft_weight * torch.exp(self.entropy_sign * entropy), logprob)
        own_weight = torch.where(advantages > 0, self.rollout_weight * torch.exp(entropy), 1.0)
        own = weighted_nll(own_weight * advantages, logprob)
        return torch.where(_demonstration(samples), imitation - advantages * logprob.exp(), own)


@register
@dataclass(frozen=True)
class PrefixRFT(Mixed, PPO):
    """Prefix-RFT: the clipped surrogate of `ppo` on answers that continue a demonstration's prefix, prefix included.

    Prefix and continuation have advantages of their own (`prefix_rft_advantages`). Of all the batch's prefix tokens
    only the share `keep` of highest entropy, where the policy is undecided, has a gradient; the others stay in the
    normaliser. `old_logprob` is the sampling policy's for prefix tokens too.

    Detached: A, old_logprob, the entropies' comparison.

    When to use: one of a group's samples continues a prefix whose length falls over the run (`prefix_rft_length`).

    Args:
        keep: share in (0, 1]; 0.2 (the paper's). Below 1 it is a quantile of the whole batch.
        clip_demonstration: whether the clip holds for prefix tokens too; True as in its code. False: `-A r` there.
        epsilon_low, epsilon_high: 0.2.
        delta: 3, the dual clip of its code.

    And those of `PolicyLoss`. The reduction is Dr. GRPO's, as in the paper: give `max_length`, the longest completion
    allowed.

    Left open: the scale of the reduction. The authors' code divides a micro-batch's sum by `max_length` alone, and not
    by its sequences, then averages over micro-batches: `normalizer=` their number gives that. The default of its
    configuration is a mean over tokens (`reduction="mean"`). Its KL covers the prefix, which is left out here.

    Source: arXiv 2507.01679, from its authors' code (ZeroYuHuang/prefix_rft).
    """

    delta: float | None = 3.0
    keep: float = 0.2
    clip_demonstration: bool = True
    name: ClassVar[str] = "prefix_rft"
    advantages_by: ClassVar[str] = "prefix"
    rewards_over: ClassVar[str] = "none"
    shows: ClassVar[str] = "prefix"
    reduction: ClassVar[LossReduction] = "constant_length"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "keep", low=0.0, low_open=True, high=1.0)
        check_flag(self, "clip_demonstration")

    @property
    def ranks_entropy(self) -> bool:
        return self.keep < 1 or self.top_entropy < 1

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        clipped = super()._objective(samples, ratio)
        if self.clip_demonstration:
            return clipped
        return torch.where(_demonstration(samples), -samples.advantages * ratio, clipped)

    def _entropy_mask(self, samples: Samples) -> Tensor | None:
        mask = super()._entropy_mask(samples)
        if self.keep == 1:
            return mask
        assert samples.entropy is not None
        prefix = _demonstration(samples)
        chosen = ~prefix | top_entropy_mask(samples.entropy, self.keep, prefix)
        return chosen if mask is None else chosen & mask


@register
@dataclass(frozen=True)
class DensePathReinforce(Reinforce):
    """Dense-Path REINFORCE: `-G logprob` with rewards from SFT itself, `r_t = sft_logprob - ref_logprob`.

    `sft_logprob` is an SFT model's (the policy's starting point), `ref_logprob` an earlier checkpoint's of the same
    training, both on the policy's own samples. `G_t` is the return `r_t + gamma G_{t+1}` or the reward `r_t`. The KL of
    `PolicyLoss` is to `sft_logprob`.

    Detached: G.

    When to use: on-policy training after SFT without rewards or a critic. Style tokens can game the log-ratio:
    `reward_clip` bounds each.

    Args:
        credit: `"return"` (default) or `"token"`.
        gamma: in [0, 1]; 1, since less was worse in the paper. Of `credit="return"` alone.
        reward_clip: greatest |r_t|, or None (default).

    And those of `PolicyLoss`; the paper adds the KL, `beta > 0`.

    Left open: whether the weight is the reward or the return, and the KL's coefficient, were not seen; a checkpoint
    from half of the training served best as reference.

    Source: arXiv 2510.02493. Unverified source: reviews and summaries; the equations are derived.
    """

    credit: str = "return"
    gamma: float = 1.0
    reward_clip: float | None = None
    name: ClassVar[str] = "dense_path_reinforce"
    anchor: ClassVar[str] = "sft_logprob"
    own_inputs: ClassVar[tuple[str, ...]] = ("sft_logprob", "ref_logprob")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(self, "credit", ("return", "token"))
        check_number(self, "gamma", low=0.0, high=1.0)
        check_optional(self, "reward_clip", low=0.0)
        if self.gamma != 1 and self.credit != "return":
            raise ValueError(f"DensePathReinforce: gamma belongs to credit='return', got {self.credit!r}")

    @property
    def of_sequences(self) -> bool:
        return self.credit == "return" or self.off_policy_threshold is not None

    def _samples(
        self,
        stats: TokenStats,
        inputs: Mapping[str, Tensor | None],
        mask: Tensor | None,
        sequence: Tensor | None,
    ) -> Samples:
        samples = super()._samples(stats, inputs, mask, sequence)
        reward = samples.constants["sft_logprob"] - samples.constants["ref_logprob"]
        if self.reward_clip is not None:
            reward = reward.clamp(-self.reward_clip, self.reward_clip)
        if self.credit == "return":
            assert samples.sequences is not None
            reward = samples.sequences.discounted(reward, self.gamma)
        return replace(samples, constants={**samples.constants, "advantages": reward})
