"""Supervised fine-tuning that is held near a reference or near the policy of the batch's start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...types import TokenStats
from ..catalogue import register
from ..checks import check_number, check_one_of, constant, statistic
from ..formulas import k3, probability_power, weighted_nll
from ..loss import DistributionLoss, TokenLoss


@dataclass(frozen=True)
class _Anchored(DistributionLoss):
    """A token loss plus `kl_weight` times a divergence from the reference, of the whole distribution or by k3."""

    kl_weight: float = 0.05
    kl: str = "forward_kl"
    _power: ClassVar[float]  # of p, the detached weight of the likelihood term

    def __post_init__(self) -> None:
        check_number(self, "kl_weight", low=0.0)
        check_one_of(self, "kl", ("forward_kl", "reverse_kl", "k3"))

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
        logprob = statistic(self, stats, "logprob")
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

    When to use: DFT over many steps, which alone drifts; the reference is the model before training.

    Args:
        kl_weight: 0.05, the paper's and of its code's example; the code's own default is 0.1. Not negative.
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
class PSFT(TokenLoss):
    """Proximal SFT: `-min(r, 1 + epsilon)`, `r = exp(logprob - old_logprob)`; w = r where r <= 1 + epsilon, else 0.

    PPO's clipped objective with advantage 1, of which only the upper clip acts. Where `old_logprob` is the current
    policy's, the gradient is NLL's: it needs several updates per `old_logprob` to differ. A logprob of -inf gives value
    and gradient 0; no ratio overflows.

    Detached: `old_logprob`.

    When to use: several passes over a batch whose policy is to stay near that of the batch's start.

    Args:
        epsilon: 0.28, the code's upper clip; the paper names 0.2 and 0.28. Positive.

    Left open: how long an old policy is kept; the paper renews it every 8 updates.

    Source: arXiv 2508.17784, equations 6 and 7, and its authors' code (zwhong714/PSFT).
    """

    epsilon: float = 0.28
    name: ClassVar[str] = "psft"
    inputs: ClassVar[tuple[str, ...]] = ("old_logprob",)

    def __post_init__(self) -> None:
        check_number(self, "epsilon", low=0.0, low_open=True)

    def __call__(self, stats: TokenStats, old_logprob: Tensor) -> Tensor:
        """Per-token loss `[...]`, in [-1 - epsilon, 0], from `stats.logprob` and the constants `old_logprob`."""
        logprob = statistic(self, stats, "logprob")
        log_ratio = logprob - constant(self, "old_logprob", old_logprob, logprob)
        return -torch.exp(log_ratio.clamp(max=math.log1p(self.epsilon)))
