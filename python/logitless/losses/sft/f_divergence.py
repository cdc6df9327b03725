"""Imitation under an f-divergence, with a weight phi'(beta rho) of every token, rho = logprob - ref_logprob.

The table of phi is in `reward_transforms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...types import LossReduction, TokenStats
from ..catalogue import register
from ..checks import check_flag, check_number, check_one_of, constant, statistic
from ..loss import SequenceLoss
from ..sequences import sequences_of
from .reward_transforms import REWARD_TRANSFORMS, SATURATED_PEARSON, RewardTransform, alpha_transform


@register
@dataclass(frozen=True)
class FDivergenceSFT(SequenceLoss):
    """Imitation under an f-divergence with a KL term to the reference ("implicit reward as a bridge").

    `-phi(beta rho) / beta` with `rho = logprob - ref_logprob` and phi the divergence's reward transform (a row of
    `reward_transforms`): w = phi'(beta rho). All rows have w = 1 at the reference; those that are not linear push a
    token less the more its probability has already grown beyond the reference's, so that the optimum lies between the
    reference and the expert: `pi proportional to expert * phi'(beta log(pi / ref))`. For `reverse_kl` that is
    `expert^(1/(1+beta)) ref^(beta/(1+beta))`. `total_variation` is NLL plus a constant, and so is every row as
    beta -> 0.

    `per="sequence"` applies phi to the whole answer's `R = beta sum_t rho_t`; every token of the answer holds an equal
    share of `-phi(R) / beta`, so that their sum is the answer's loss.

    `value="none"` takes the representative of the reward with value function 0, as DPO does. The other two read the
    model as a soft Q-function, with the values `V_t / beta = dl_t = lse_t - ref_lse_t`; the shift of the logits,
    which a softmax does not see, becomes a trained value function. They are experiments:

    - `value="lse"`: `x_t = beta (rho_t + dl_t - dl_{t+1})`, and a sequence's loss is `sum_t -phi(x_t) / beta + dl_0`.
      t + 1 is the next counted token of the same sequence and dl is 0 after the last; dl_0 is added to the first
      token's loss. For `total_variation` the values telescope, and the sum is that of NLL again.
    - `value="one_step"`: every token is its own episode, `-phi(beta (rho_t + dl_t)) / beta + dl_t`: the shift settles
      where the mean of w is 1. `total_variation` is NLL plus a constant token by token.

    Extreme values: every row continues phi linearly towards x -> -inf, so that any finite logprob and ref_logprob give
    a finite loss and gradient, and a logprob of -inf gives inf with the finite gradient of the row's `low_slope`.
    `pearson_chi2`, raw or saturated, does so below x = -1e4 alone, with the slope 5001 that it has there.
    `ref_logprob` must be finite.

    Detached: the reference alone; nothing of the model. IQ-Learn's code detaches the weight and multiplies it with rho:
    the same gradient, another value.

    When to use: SFT that is to stay near its starting point without a second KL term; a larger beta keeps it nearer.
    `reverse_kl` and `squared_hellinger` are the smooth, bounded choices.

    Args:
        divergence: `total_variation`, `pearson_chi2`, `squared_hellinger`, `reverse_kl` (KL(model || expert)),
            `forward_kl` (KL(expert || model)), `js`, `neyman_chi2` or `alpha`. Default `pearson_chi2`, one of the
            two that the paper's summary recommends, read as those who follow IQ-Learn read it: phi = x - x^2 / 4.
            Read literally, the paper's chi2(expert, model) is `neyman_chi2`.
        beta: strength of the KL term, positive and in the unit of 1 / nats. 0.1 by default, as in DPO.
        value: `"none"` (the default), `"lse"` (a sequence loss) or `"one_step"`.
        alpha: of `divergence="alpha"` alone: 1 is `forward_kl`, 0 `reverse_kl`, as everywhere in this library. In
            terms of the parameter that multiplies the model's side, a, it is 1 - a.
        saturate: of `pearson_chi2` alone: weight 0 instead of a negative one beyond x = 2 (the exact conjugate).
            Raw, the loss is the regression `(beta / 4) (rho - 2 / beta)^2 - 1 / beta`, which pulls tokens back to
            rho = 2 / beta.
        per: `"token"`, which follows from the token-level decision process, or `"sequence"`, with `value="none"`.

    Left open: the paper's own losses, betas and level.

    Source: arXiv 2507.00018 for the objective `min D_f(expert, model) + beta KL(model || ref)`. Unverified source: its
    own loss equations could not be seen, and every equation here is derived from that objective in the manner of
    IQ-Learn (arXiv 2106.12142, whose code has the same weights, detached).
    """

    divergence: str = "pearson_chi2"
    beta: float = 0.1
    value: str = "none"
    alpha: float = 0.5
    saturate: bool = False
    per: str = "token"
    name: ClassVar[str] = "f_divergence_sft"

    def __post_init__(self) -> None:
        check_one_of(self, "divergence", (*REWARD_TRANSFORMS, "alpha"))
        check_one_of(self, "value", ("none", "lse", "one_step"))
        check_one_of(self, "per", ("token", "sequence"))
        check_number(self, "beta", low=0.0, low_open=True)
        check_number(self, "alpha")
        check_flag(self, "saturate")
        if self.saturate and self.divergence != "pearson_chi2":
            raise ValueError(f"FDivergenceSFT: saturate belongs to 'pearson_chi2', got {self.divergence!r}")
        if self.alpha != 0.5 and self.divergence != "alpha":
            raise ValueError(f"FDivergenceSFT: alpha belongs to divergence='alpha', got {self.divergence!r}")
        if self.per == "sequence" and self.value != "none":
            raise ValueError(f"FDivergenceSFT: per='sequence' takes value='none' alone, got {self.value!r}")

    @property
    def of_sequences(self) -> bool:
        return self.value == "lse" or self.per == "sequence"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",) if self.value == "none" else ("ref_logprob", "ref_lse")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",) if self.value == "none" else ("logprob", "lse")

    @property
    def reduction(self) -> LossReduction:
        return "sequence_mean" if self.per == "sequence" else "mean"

    @property
    def row(self) -> RewardTransform:
        """The generator, phi and phi' of the divergence chosen."""
        if self.divergence == "alpha":
            return alpha_transform(self.alpha)
        return SATURATED_PEARSON if self.saturate else REWARD_TRANSFORMS[self.divergence]

    def __call__(
        self,
        stats: TokenStats,
        ref_logprob: Tensor,
        ref_lse: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> Tensor:
        """Per-token loss of the statistics' shape; for a sequence loss the last axis is time.

        Args:
            stats: `logprob`, and `lse` unless `value="none"`.
            ref_logprob: the same of the reference model, a constant.
            ref_lse: `lse` of the reference model, a constant, unless `value="none"`.
            mask: bool, the tokens that count; all by default. Others get exactly 0 and no gradient. This and `sequence`
                belong to the sequence losses.
            sequence: int64, which sequence a token belongs to where several lie behind one another on the last axis
                (each contiguous); a row is one sequence by default.
        """
        if ref_lse is not None and self.value == "none":
            raise ValueError(f"{self.name}: ref_lse belongs to value='lse' and 'one_step'; value is 'none'")
        if self.token_wise and (mask is not None or sequence is not None):
            raise ValueError(f"{self.name}: mask and sequence belong to the sequence losses; this is per token")
        logprob = statistic(self, stats, "logprob")
        rho = logprob - constant(self, "ref_logprob", ref_logprob, logprob)
        if self.value == "none" and self.per == "token":
            return self._penalty(rho)
        if self.per == "sequence":
            tokens = sequences_of(self, rho, mask, sequence)
            return torch.where(tokens.mask, self._penalty(tokens.sum(rho)) / tokens.count(rho.dtype), 0.0)
        lse = statistic(self, stats, "lse")
        drift = lse - constant(self, "ref_lse", ref_lse, lse)
        if self.value == "one_step":
            return self._penalty(rho + drift) + drift
        tokens = sequences_of(self, rho, mask, sequence)
        # Masked before phi: a NaN behind an ignored token would otherwise reach the gradient through 0 * NaN.
        rho, drift = (torch.where(tokens.mask, x, 0.0) for x in (rho, drift))
        penalty = self._penalty(rho + drift - tokens.following(drift))
        return torch.where(tokens.mask, penalty + torch.where(tokens.first(), drift, 0.0), 0.0)

    def _penalty(self, log_ratio: Tensor) -> Tensor:
        return -self.row.value(self.beta * log_ratio) / self.beta
