"""Distillation from a teacher's likeliest ids: its top-k log-probs, stored or from a server, without its distribution.

The student's log-probs of all K ids come from one sweep over the logits (`linear_logprobs` with targets `[..., K]`), so
that K costs next to nothing.

```python
import torch
from logitless import linear_loss, linear_top_k, losses

hidden = torch.randn(6, 16, requires_grad=True)
weight = torch.randn(50, 16, requires_grad=True)
teacher, head = torch.randn(6, 24), torch.randn(50, 24)
top = linear_top_k(teacher, head, 8)
loss = losses.TopKDistillation("reverse_kl")
out = linear_loss(loss, hidden, weight, top.ids, teacher_logprob=top.logprob, teacher_tail=top.tail)
out.backward()
```
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...types import TokenStats
from ..catalogue import register
from ..checks import check_number, check_one_of, constant, statistic
from ..loss import TokenLoss

TopKKind = Literal["forward_kl", "reverse_kl", "mixed_kl", "cross_entropy"]
Unlisted = Literal["bucket", "left_out", "renormalized"]

#: The least mass that a teacher's tail is taken to have where only its listed log-probs are known: float32's rounding.
LEAST_TAIL = 2.0**-24


@register
@dataclass(frozen=True)
class TopKDistillation(TokenLoss):
    """A divergence of a teacher P from the student Q, of which P is known at K ids a token.

    `kind` is `forward_kl`, KL(P|Q); `reverse_kl`, KL(Q|P); `mixed_kl`, `mixture KL(P|Q) + (1 - mixture) KL(Q|P)`; or
    `cross_entropy`, `-sum_k P_k log Q_k`, which has forward KL's gradient: KL to given probabilities, and the loss of a
    draft model on its target's. `unlisted` says what becomes of the ids that are not listed:

        "bucket"        all of them are one more outcome; both are distributions over K + 1, and the value is at most
                        the divergence of the full ones (the data-processing inequality)
        "renormalized"  both are renormalised over the K ids: distributions over K, and no logit of another id is
                        computed; the student may put any mass elsewhere, unseen
        "left_out"      the sum over the K ids alone, with log-probs of the full vocabulary; forward kinds only, as the
                        reverse sum falls without bound when the student leaves the list

    The targets are the teacher's ids, `[..., K]`, with -1 or `ignore_index` for an absent place. Inputs:
    `teacher_logprob [..., K]`, natural logarithms at the temperature of the loss, any number at an absent place, -inf
    for an id without probability, which then counts as absent; and optionally `teacher_tail [...]`, the logarithm of
    the teacher's mass that is not listed. Without it that mass is 1 less the listed, at least 2^-24.

    Detached: the teacher.

    When to use: a teacher behind a server or in a file. With its hidden states at hand `Distillation` needs no list.

    Args:
        kind: forward KL by default, as verl's `forward_kl_topk` and NeMo-RL.
        unlisted: "bucket" by default, as it is the one that sees mass outside the list; TRL's `loss_add_tail`, on by
            default. NeMo-RL's default is "renormalized", verl's forward KL is "left_out".
        mixture: the weight of forward KL in "mixed_kl", 0.5.

    Left open: the number of ids, and which texts it is taken on; verl's and NeMo-RL's recipes have 32 to 512 ids.

    Source: Hinton et al., arXiv 1503.02531; TRL 1.16, server distillation (the bucket); verl `compute_forward_kl_topk`
    (which also clamps the sum at 0 from below; here not, as this takes the gradient from a token); NeMo-RL
    `DistillationLossFn` (its `zero_outside_topk`, which gives the teacher a tiny constant outside the list, is left
    out).
    """

    kind: TopKKind = "forward_kl"
    unlisted: Unlisted = "bucket"
    mixture: float = 0.5
    name: ClassVar[str] = "top_k_distillation"
    inputs: ClassVar[tuple[str, ...]] = ("teacher_logprob",)
    lists: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_one_of(self, "kind", get_args(TopKKind))
        check_one_of(self, "unlisted", get_args(Unlisted))
        check_number(self, "mixture", low=0.0, high=1.0)
        if self.unlisted == "left_out" and self.kind in ("reverse_kl", "mixed_kl"):
            raise ValueError(
                f"unlisted: 'left_out' makes {self.kind!r} fall without bound; expected 'bucket' or 'renormalized'"
            )

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        return ("teacher_tail",) if self.unlisted == "bucket" else ()

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("logprob", "tail") if self.unlisted == "bucket" else ("logprob",)

    @property
    def within_list(self) -> bool:
        return self.unlisted == "renormalized"

    def __call__(self, stats: TokenStats, teacher_logprob: Tensor, teacher_tail: Tensor | None = None) -> Tensor:
        """Per-token loss `[...]` from `stats.logprob [..., K]`, and `stats.tail` where `outputs` names it."""
        log_q = statistic(self, stats, "logprob")
        log_p = constant(self, "teacher_logprob", teacher_logprob, log_q)
        log_q = log_q.masked_fill(log_p.isneginf(), -math.inf)
        if self.unlisted == "bucket":
            own = statistic(self, stats, "tail")
            tail = unlisted_mass(log_p) if teacher_tail is None else constant(self, "teacher_tail", teacher_tail, own)
            tail = tail.masked_fill(own.isneginf(), -math.inf)  # a list of the whole vocabulary has no tail
            log_p, log_q = torch.cat([log_p, tail[..., None]], -1), torch.cat([log_q, own[..., None]], -1)
        elif self.unlisted == "renormalized":
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
        if self.kind == "cross_entropy":
            return -(log_p.exp() * _finite(log_q, log_p)).sum(-1)
        if self.kind == "forward_kl":
            return _kl(log_p, log_q)
        reverse = _kl(log_q, log_p)
        return reverse if self.kind == "reverse_kl" else self.mixture * _kl(log_p, log_q) + (1 - self.mixture) * reverse


def unlisted_mass(log_p: Tensor) -> Tensor:
    """The logarithm of the mass that no listed id has, `log(1 - sum_k p_k)`, at least log `LEAST_TAIL`."""
    return torch.log((-torch.expm1(log_p.logsumexp(-1))).clamp(min=LEAST_TAIL))


def _finite(x: Tensor, log_weight: Tensor) -> Tensor:
    """`x`, and 0 where its weight is 0."""
    return x.masked_fill(log_weight.isneginf(), 0.0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`sum_k a_k (log a_k - log b_k)`."""
    return (log_a.exp() * (_finite(log_a, log_a) - _finite(log_b, log_a))).sum(-1)
