"""Negative log-likelihood, with label smoothing and z-loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...types import TokenStats
from ..catalogue import register
from ..checks import check_number, statistic
from ..loss import TokenLoss


@register
@dataclass(frozen=True)
class NLL(TokenLoss):
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
        loss = -statistic(self, stats, "logprob")
        if self.label_smoothing > 0:
            uniform = statistic(self, stats, "lse") - statistic(self, stats, "mean_logit")
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        if self.z_loss > 0:
            loss = loss + self.z_loss * statistic(self, stats, "lse").square()
        return loss
