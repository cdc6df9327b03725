"""Losses of supervised fine-tuning: NLL, the f-divergence objectives, and SFT anchored to a reference or an old policy.

For all of them `w = -d loss / d logprob` says what they do: 1 for NLL, phi'(beta rho) for an f-divergence, with
rho = logprob - ref_logprob. Losses of a token's own distribution (DFT and its relatives) are in `weighted`, those of
whole answers in `answers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..types import TokenStats
from .base import Loss, check_choice, check_flag, check_number, constant, read, register
from .divergences import DIVERGENCES, NAMES, SATURATED_PEARSON, Divergence, alpha_divergence
from .policy_base import k3
from .runs import sequences_of
from .weighted import probability_power, weighted_nll


@register
@dataclass(frozen=True)
class NLL(Loss):
    """Negative log-likelihood with label smoothing and z-loss.

    `(1 - eps) (-logprob) + eps (lse - mean_logit) + z_loss lse^2`, eps = `label_smoothing`: label smoothing as
    `torch.nn.functional.cross_entropy` defines it (the uniform part includes the target), written with the mean
    logit, in which it is linear. With both at 0, their default, it is plain NLL and reads `logprob` alone; w = 1.

    Where part of the vocabulary is masked (logits of -inf), the mean logit is -inf and label smoothing gives inf, as
    torch's does. A target with probability 0 gives inf, with gradient -1.

    What is a data-side weight of NLL needs no loss of its own: `token_weight` is SFT(Q)'s quality score or CFT's mask
    of critical tokens (normalised by its sum: `normalizer=token_weight.sum()`); class weights: `linear_cross_entropy`.

    Detached: nothing.

    When to use: the default. Also what to log beside any loss whose value is no likelihood.

    Args:
        label_smoothing: in [0, 1]; 0 by default, as in torch.
        z_loss: weight of lse^2, which keeps logits from drifting; 0 by default, 1e-4 is usual in pre-training. Not
            negative.

    Left open: nothing.

    Source: label smoothing arXiv 1512.00567, section 7; z-loss arXiv 2204.02311, section 5.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    name: ClassVar[str] = "nll"

    def __post_init__(self) -> None:
        check_number(self, "label_smoothing", low=0.0, high=1.0)
        check_number(self, "z_loss", low=0.0)

    @property
    def outputs(self) -> tuple[str, ...]:
        smooth = self.label_smoothing > 0
        return ("logprob", *(("lse",) if smooth or self.z_loss > 0 else ()), *(("mean_logit",) if smooth else ()))

    def __call__(self, stats: TokenStats) -> Tensor:
        """Per-token loss `[...]` from `stats.logprob` (and `lse`, `mean_logit` where `outputs` names them)."""
        loss = -read(self, stats, "logprob")
        if self.label_smoothing > 0:
            uniform = read(self, stats, "lse") - read(self, stats, "mean_logit")
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        if self.z_loss > 0:
            loss = loss + self.z_loss * read(self, stats, "lse").square()
        return loss


@register
@dataclass(frozen=True)
class FDivergenceSFT(Loss):
    """Imitation under an f-divergence with a KL term to the reference ("implicit reward as a bridge").

    `-phi(beta rho) / beta` with `rho = logprob - ref_logprob` and phi the divergence's reward transform
    (`divergences`): w = phi'(beta rho). All rows have w = 1 at the reference; those that are not linear push a token
    less the more its probability has already grown beyond the reference's, so that the optimum lies between the
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

    Extreme values: every row but `pearson_chi2` continues phi linearly towards x -> -inf, so that any finite
    logprob and ref_logprob give a finite loss and gradient, and a logprob of -inf gives inf with the finite gradient
    of the row's `low_slope`. `pearson_chi2`, raw or saturated, stays quadratic there: its gradient is infinite
    at -inf. `ref_logprob` must be finite.

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
        check_choice(self, "divergence", NAMES)
        check_choice(self, "value", ("none", "lse", "one_step"))
        check_choice(self, "per", ("token", "sequence"))
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
    def level(self) -> str:
        return "sequence" if self.value == "lse" or self.per == "sequence" else "token"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",) if self.value == "none" else ("ref_logprob", "ref_lse")

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",) if self.value == "none" else ("logprob", "lse")

    @property
    def reduction(self) -> str:
        return "sequence_mean" if self.per == "sequence" else "mean"

    @property
    def row(self) -> Divergence:
        """The generator, phi and phi' of the divergence chosen."""
        if self.divergence == "alpha":
            return alpha_divergence(self.alpha)
        return SATURATED_PEARSON if self.saturate else DIVERGENCES[self.divergence]

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
        if self.level == "token" and (mask is not None or sequence is not None):
            raise ValueError(f"{self.name}: mask and sequence belong to the sequence losses; this is per token")
        logprob = read(self, stats, "logprob")
        rho = logprob - constant(self, "ref_logprob", ref_logprob, logprob)
        if self.value == "none" and self.per == "token":
            return self._penalty(rho)
        if self.per == "sequence":
            tokens = sequences_of(self, rho, mask, sequence)
            return torch.where(tokens.mask, self._penalty(tokens.sum(rho)) / tokens.count(rho.dtype), 0.0)
        lse = read(self, stats, "lse")
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


@dataclass(frozen=True)
class _Anchored(Loss):
    """A token loss plus `kl_weight` times a divergence from the reference, of the whole distribution or by k3."""

    kl_weight: float = 0.05
    kl: str = "forward_kl"
    _power: ClassVar[float]  # of p, the detached weight of the likelihood term

    def __post_init__(self) -> None:
        check_number(self, "kl_weight", low=0.0)
        check_choice(self, "kl", ("forward_kl", "reverse_kl", "k3"))

    @property
    def level(self) -> str:
        return "token" if self.kl == "k3" else "distribution"

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",) if self.kl == "k3" else ()

    @property
    def linear_divergence(self) -> dict[str, Any]:
        return {} if self.kl == "k3" else {"kind": self.kl}

    @property
    def divergence_weight(self) -> float:
        return self.kl_weight

    def __call__(
        self, stats: TokenStats, divergence: Tensor | None = None, *, ref_logprob: Tensor | None = None
    ) -> Tensor:
        """Per-token loss `[...]` from `stats.logprob` and `divergence` `[...]`, or, with k3, `ref_logprob` `[...]`."""
        logprob = read(self, stats, "logprob")
        if self.kl == "k3":
            divergence = k3(constant(self, "ref_logprob", ref_logprob, logprob) - logprob)
        if divergence is None:
            raise ValueError(f"{self.name}: kl={self.kl!r} needs the divergence per token, got None")
        likelihood = weighted_nll(probability_power(logprob.detach(), self._power), logprob)
        return likelihood + self.kl_weight * divergence


@register
@dataclass(frozen=True)
class ASFT(_Anchored):
    """Anchored SFT: `-sg(p) logprob + kl_weight KL`, DFT held near a reference; w of the first term is p.

    - `kl="forward_kl"`: KL(ref || model) over the whole vocabulary, in one pass with the reference's hidden states.
    - `kl="reverse_kl"`: KL(model || ref), which the paper found to collapse.
    - `kl="k3"`: `exp(r) - r - 1` of the target alone, `r = ref_logprob - logprob`, with w = exp(r) - 1: it pulls the
      target's probability to the reference's. On an expert's tokens it is an unbiased estimate of no KL. It continues
      linearly above r = 20. (k1, whose w is constant, would only rescale NLL there, and is not offered.)

    Detached: the weight p, and the reference.

    When to use: DFT over many steps, which alone drifts; the reference is the model before training (with LoRA, the
    model without its adapter).

    Args:
        kl_weight: 0.05, the paper's; its code has 0.1, and 0.03 for bfloat16. Not negative.
        kl: `forward_kl` by default, as in the paper and its code.

    Left open: paper and code give different weights. Both terms have the same mean over tokens here and in the authors'
    code.

    Source: arXiv 2509.23753, equation 6, and its authors' code. Unverified source: the paper's numbers are known
    through notes; k3 for this purpose is another framework's.
    """

    name: ClassVar[str] = "asft"
    _power: ClassVar[float] = 1.0


@register
@dataclass(frozen=True)
class SFTKL(_Anchored):
    """SFT with a KL term: `-logprob + kl_weight KL`, KL as in `asft`.

    With `kl="forward_kl"` the optimum at a token is the mixture `(expert + kl_weight ref) / (1 + kl_weight)`.

    Detached: the reference.

    When to use: as the baseline of anchored losses; it forgets less than NLL and learns less.

    Args:
        kl_weight: 0.05 by default, as for `asft`; comparisons in the literature use up to 0.5. Not negative.
        kl: `forward_kl`, `reverse_kl` or `k3`, as in `asft`.

    Left open: the weight.

    Source: arXiv 2509.23753, from its authors' code (`sft+kl`); k3 for this purpose is another framework's.
    """

    name: ClassVar[str] = "sft_kl"
    _power: ClassVar[float] = 0.0


@register
@dataclass(frozen=True)
class PSFT(Loss):
    """Proximal SFT: `-min(r, 1 + epsilon)`, `r = exp(logprob - old_logprob)`; w = r where r <= 1 + epsilon, else 0.

    PPO's clipped objective with advantage 1, of which only the upper clip acts. Where `old_logprob` is the current
    policy's, the gradient is NLL's: it needs several updates per `old_logprob` to differ. A logprob of -inf gives value
    and gradient 0; no ratio overflows.

    Detached: `old_logprob`.

    When to use: several passes over a batch whose policy is to stay near that of the batch's start.

    Args:
        epsilon: 0.28, the code's upper clip; the paper names 0.2 and 0.28. Positive.

    Left open: how long an old policy is kept; the paper renews it every 8 updates.

    Source: arXiv 2508.17784, equations 6 and 7, and its authors' code. Unverified source: the equations' numbers are
    known through notes.
    """

    epsilon: float = 0.28
    name: ClassVar[str] = "psft"

    def __post_init__(self) -> None:
        check_number(self, "epsilon", low=0.0, low_open=True)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("old_logprob",)

    def __call__(self, stats: TokenStats, old_logprob: Tensor) -> Tensor:
        """Per-token loss `[...]`, in [-1 - epsilon, 0], from `stats.logprob` and the constants `old_logprob`."""
        logprob = read(self, stats, "logprob")
        log_ratio = logprob - constant(self, "old_logprob", old_logprob, logprob)
        return -torch.exp(log_ratio.clamp(max=math.log1p(self.epsilon)))
