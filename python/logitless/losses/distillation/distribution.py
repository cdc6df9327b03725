"""Divergences of the model's next-token distribution from a teacher's, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...types import DivergenceKind, DivergenceOptions, TokenStats
from ..catalogue import register
from ..checks import check_number, statistic
from ..loss import DistributionLoss


@register
@dataclass(frozen=True)
class Distillation(DistributionLoss):
    """`D(teacher, model) - nll_weight logprob` per token, D of `logitless.linear_divergence`.

    P is the teacher's (the reference's) distribution and Q the model's. `forward_kl` is KL(P|Q), `reverse_kl` KL(Q|P),
    `symmetric_kl` the sum of both with weights 1 - `mixture` and `mixture`, `js` GKD's generalised JSD with beta =
    `mixture`, `skew_forward_kl` and `skew_reverse_kl` DistiLLM's, with the value of a divergence where DistiLLM's code
    has its cross-entropy part alone (the gradient is the same); the others are named there.

    Temperature is an option of the heads, the teacher's and the model's each; no factor temperature^2 is applied, as
    TRL, Liger and DistiLLM apply none. Hinton et al. do, so that the gradient keeps its size beside a hard loss:
    multiply by it (`token_weight`) where that is wanted. `-logprob` is taken at the model's own temperature too.

    Detached: the teacher; what gradient its tensors get is the caller's choice in `linear_divergence`.

    When to use: a teacher whose hidden states and head are at hand. Forward KL covers the teacher's modes, reverse KL
    picks among them; JS and the skews lie between and are bounded, so that no single token can dominate a batch.

    Args:
        kind: "forward_kl" by default, the distillation of Hinton et al. GKD's and TRL's default is "js" with mixture
            0.5, DistiLLM's the skews.
        mixture: of "js": the teacher's weight in the mixture, 0.5 as GKD's default. TRL takes 0 for forward and 1 for
            reverse KL while its inner values vanish towards both; here both ends are refused without `normalized`, and
            `GKD` has TRL's. Of "symmetric_kl": the reverse KL's weight, 0.9 in DistiLLM. 0.5, the default, is half of
            Jeffreys' divergence, and torchtune's default, whose `sym_kd_ratio` is the forward KL's weight.
        skew: of the skews: the weight of the divergence's own first argument in the mixture, 0.1 as DistiLLM.
        alpha: of "alpha": 1 is forward KL, 0 reverse KL; 0.5, the default, 4 times the squared Hellinger distance.
        normalized: of "js": divided by mixture (1 - mixture), which makes it continuous at both ends (derived).
        nll_weight: of plain NLL added to it; 0, the default, leaves it out. Liger's 0.5 and 0.5 is
            `nll_weight=1` at half of the learning rate.

    Left open: which texts it is taken on (the teacher's, the data's, the model's own), and their share.

    Source: Hinton et al., arXiv 1503.02531 (forward KL); GKD, arXiv 2306.13649 (js; read in TRL's code);
    DistiLLM, arXiv 2402.03898 and its code (skews, symmetric KL: its lambda is `mixture`). The other divergences are
    textbook.
    """

    kind: DivergenceKind = "forward_kl"
    mixture: float = 0.5
    skew: float = 0.1
    alpha: float = 0.5
    normalized: bool = False
    nll_weight: float = 0.0
    name: ClassVar[str] = "distillation"

    def __post_init__(self) -> None:
        check_number(self, "nll_weight", low=0.0)
        DivergenceOptions(self.kind, self.mixture, self.skew, self.alpha, self.normalized)  # its checks

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob",) if self.nll_weight > 0 else ()

    @property
    def linear_divergence(self) -> dict[str, Any]:
        names = ("kind", "mixture", "skew", "alpha", "normalized")
        return {name: getattr(self, name) for name in names}

    def __call__(self, stats: TokenStats | None, divergence: Tensor) -> Tensor:
        """Per-token loss `[...]` from the divergence, and `stats.logprob` where `outputs` names it."""
        if self.nll_weight == 0:
            return divergence
        assert stats is not None
        return divergence - self.nll_weight * statistic(self, stats, "logprob")


@register
@dataclass(frozen=True)
class GKD(DistributionLoss):
    """GKD's divergence with both ends: `beta KL(P|M) + (1-beta) KL(Q|M)`, `M = beta P + (1-beta) Q`; KLs at 0 and 1.

    P is the teacher's distribution and Q the model's. At beta = 0 the loss is the forward KL(P|Q), at 1 the reverse
    KL(Q|P), as TRL has it. It jumps there: the formula between tends to 0 towards both ends, so that beta = 0.01 trains
    a hundred times more slowly than 0. `Distillation("js", normalized=True)` is continuous.

    Detached: the teacher, as in `Distillation`.

    When to use: to reproduce a GKD run, or SDFT. GKD's lambda is the share of steps whose texts the model samples
    itself (TRL's default 0.5); the other steps take the data's texts, or the teacher's (`seq_kd`). The loss does not
    see the difference: draw a number for each step, and give the tokens of either kind as `targets`.

    SDFT is this loss on the model's own samples, with the model itself as the teacher, behind a prompt that also shows
    the demonstration: `ref_hidden` are the states of the sample's tokens there, of the first checkpoint, the current
    one or a moving average. TRL's `sdft` takes beta 0.5, and weights a token by `exp(logprob - old_logprob)` up to 2
    where samples are used again (`token_weight`).

    Args:
        beta: in [0, 1], the teacher's weight in the mixture; 0.5 by default, as in TRL.

    Left open: lambda, the sampling temperature (0.9 in TRL, which is not the loss's), and whose texts they are.

    Source: GKD, arXiv 2306.13649, and TRL (experimental/gkd; the ends are its); SDFT, arXiv 2601.19897, and TRL
    (experimental/sdft, `full_logits`), read in TRL's code alone.
    """

    beta: float = 0.5
    name: ClassVar[str] = "gkd"
    outputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_number(self, "beta", low=0.0, high=1.0)

    @property
    def linear_divergence(self) -> dict[str, Any]:
        return {"kind": "js", "mixture": self.beta, "normalized": self.beta in (0, 1)}

    def __call__(self, stats: TokenStats | None, divergence: Tensor) -> Tensor:
        """Per-token loss `[...]`: the divergence itself."""
        return divergence
