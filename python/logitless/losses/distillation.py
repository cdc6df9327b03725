"""Distillation: the divergence of the model's next-token distribution from a teacher's, over the whole vocabulary.

```python
import torch
from logitless import Head, linear_loss, losses

hidden = torch.randn(2, 6, 16, requires_grad=True)
weight = torch.randn(100, 16, requires_grad=True)
targets = torch.randint(100, (2, 6))  # say which positions count, and serve nll_weight
teacher = torch.randn(2, 6, 32)  # another hidden size, the same vocabulary
head = Head(torch.randn(100, 32), temperature=2.0)

loss = losses.Distillation("js", mixture=0.5, nll_weight=0.1)
out = linear_loss(loss, hidden, weight, targets, ref_hidden=teacher, ref_head=head, temperature=2.0)
out.backward()
print(out.item())
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..types import DivergenceKind, DivergenceOptions, TokenStats
from .catalogue import register
from .checks import check_number, statistic
from .loss import DistributionLoss


@register
@dataclass(frozen=True)
class Distillation(DistributionLoss):
    """`D(teacher, model) - nll_weight logprob` per token, D of `logitless.linear_divergence`.

    P is the teacher's (the reference's) distribution and Q the model's. `forward_kl` is KL(P|Q), `reverse_kl` KL(Q|P),
    `js` GKD's generalised JSD with beta = `mixture`, `skew_forward_kl` and `skew_reverse_kl` DistiLLM's, with the
    value of a divergence where DistiLLM's code has its cross-entropy part alone (the gradient is the same); the others
    are named there.

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
            reverse KL while its inner values vanish towards both; here both ends are refused without `normalized`.
        skew: of the skews: the weight of the divergence's own first argument in the mixture, 0.1 as DistiLLM.
        alpha: of "alpha": 1 is forward KL, 0 reverse KL; 0.5, the default, 4 times the squared Hellinger distance.
        normalized: of "js": divided by mixture (1 - mixture), which makes it continuous at both ends (derived).
        nll_weight: of plain NLL added to it; 0, the default, leaves it out. Liger's 0.5 and 0.5 is
            `nll_weight=1` at half of the learning rate.

    Left open: which texts it is taken on (the teacher's, the data's, the model's own), and their share.

    Source: Hinton et al., arXiv 1503.02531 (forward KL); GKD, arXiv 2306.13649 (js; unverified source, recalled);
    DistiLLM, arXiv 2402.03898 and its code (skews). The other divergences are textbook.
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
