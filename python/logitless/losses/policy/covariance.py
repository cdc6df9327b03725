"""Losses that keep entropy up by restraining the few tokens whose advantage and log-probability rise together.

To first order a policy-gradient step lowers entropy by the covariance of log-probability and advantage over tokens. A
token's own part of it is `c = (A - mean A) (logprob - mean logprob)`, both means over the batch's counted tokens; few
tokens have nearly all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..catalogue import register
from ..checks import check_number
from ..sequences import wide_dtype
from .policy_loss import PolicyLoss, Samples
from .token_ratio import PPO


@dataclass(frozen=True)
class _Covariance(PolicyLoss):
    """A loss that treats the share of tokens of greatest covariance differently."""

    share: float = 0.0002
    batch_wide: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "share", low=0.0, low_open=True, high=1.0)


def _covariance(samples: Samples) -> Tensor:
    """c of every token; arbitrary where it does not count."""
    assert samples.sequences is not None
    counted = samples.sequences.mask
    count = counted.sum().clamp(min=1)
    # What does not count is 0 in `samples`.
    advantage, logprob = (x - x.sum() / count for x in (samples.advantages, samples.logprob.detach()))
    return advantage * logprob


def _least(values: Tensor, share: float, among: Tensor, counted: Tensor) -> Tensor:
    """Bool: of the tokens `among`, those of least value: the share of all that count, rounded down, at least one."""
    wanted = (counted.sum().to(wide_dtype(values.device)) * share).floor().clamp(min=1.0)
    order = torch.where(among, values, torch.inf).reshape(-1).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return among & (rank < wanted).reshape(among.shape)


@register
@dataclass(frozen=True)
class ClipCov(_Covariance, PPO):
    """Clip-Cov: the clipped surrogate of `ppo`, without a few random tokens of high covariance c.

    `c = (A - mean A) (logprob - mean logprob)` over the batch's counted tokens. Of the tokens with c between
    `covariance_low` and `covariance_high` that the clip leaves alone, `share` of all tokens that count get loss and
    gradient 0, one at least. They stay in the normaliser.

    The input `draw` says which: uniform random numbers, one a token (`torch.rand(...)`), the least of which are taken.
    A loss is a pure function, and draws nothing itself.

    Detached: A, old_logprob, c.

    When to use: long runs whose entropy collapses; its scripts then leave the ratio nearly free (`epsilon_low=1,
    epsilon_high=1, delta=10`).

    Args:
        share: of all tokens, in (0, 1]; 0.0002 (verl's).
        covariance_low, covariance_high: 1 and 5 (verl's).
        epsilon_low, epsilon_high, delta: as `ppo`.

    And those of `PolicyLoss`.

    Left open: nothing in the loss. The means and the share are those of the tokens given at once, so micro-batches
    have their own.

    Source: arXiv 2505.22617, from its authors' code in verl and verl-recipe.
    """

    covariance_low: float = 1.0
    covariance_high: float = 5.0
    name: ClassVar[str] = "clip_cov"
    own_inputs: ClassVar[tuple[str, ...]] = ("advantages", "draw")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "covariance_low")
        check_number(self, "covariance_high", low=self.covariance_low)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        assert samples.sequences is not None
        covariance, counted = _covariance(samples), samples.sequences.mask
        low, high = self._clipped(samples, ratio.detach())
        between = (covariance > self.covariance_low) & (covariance < self.covariance_high)
        left_out = _least(samples.constants["draw"], self.share, counted & between & ~(low | high), counted)
        return torch.where(left_out, 0.0, super()._objective(samples, ratio))


@register
@dataclass(frozen=True)
class KLCov(_Covariance):
    """KL-Cov: `-A r`, plus `kl_coef |log r|` on the few tokens of greatest covariance c; no clip.

    `c = (A - mean A) (logprob - mean logprob)` over the batch's counted tokens; `share` of these, one at least, have
    the penalty. At r = 1 it has no gradient: it holds a token back from the second update of a batch on.

    Detached: A, old_logprob, c.

    When to use: as `clip_cov`, with a penalty in place of leaving tokens out.

    Args:
        share: of all tokens, in (0, 1]; 0.0002 (verl's, and its script's for 32B; 0.002 for 7B).
        kl_coef: not negative; 1, its scripts'. (verl's configuration has 0.1.)

    And those of `PolicyLoss`.

    Left open: nothing in the loss. The means and the share are those of the tokens given at once, so micro-batches
    have their own.

    Source: arXiv 2505.22617, from its authors' code in verl and verl-recipe.
    """

    kl_coef: float = 1.0
    name: ClassVar[str] = "kl_cov"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "kl_coef", low=0.0)

    def _objective(self, samples: Samples, ratio: Tensor) -> Tensor:
        assert samples.sequences is not None
        counted = samples.sequences.mask
        chosen = _least(-_covariance(samples), self.share, counted, counted)
        penalty = torch.where(chosen, self.kl_coef * samples.log_ratio.abs(), 0.0)
        return penalty - samples.advantages * ratio
