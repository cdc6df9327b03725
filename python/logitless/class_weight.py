"""Class weights of the cross-entropy, as torch defines them, without logits.

    (1 - eps) w_t (-logp_t) + eps / V sum_j w_j (-logp_j),    eps the label smoothing

The second term is `eps (mean(w) lse - mean_j w_j z_j)`, of two of the token's own statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reduce
from .losses.sft.likelihood import NLL
from .ops import linear_token_loss
from .ops.call import prepare_call
from .ops.checks import check_entry_weight
from .ops.token_loss import check_token_input
from .types import Options, Reduction, TokenStats, statistics_dtype


def class_weighted_nll(
    nll: NLL,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    class_weight: Tensor,
    *,
    token_weight: Tensor | None,
    reduction: Reduction,
    normalizer: Tensor | float | None,
    options: dict[str, Any],
) -> Tensor:
    """NLL with class weights `[V]`; "mean" divides by the sum of the targets' weights."""
    eps, vocabulary = nll.label_smoothing, weight.shape[0]
    call = prepare_call(hidden, weight, targets, Options(**options))
    check_entry_weight("class_weight", class_weight, weight)
    class_weight = class_weight.to(statistics_dtype(call.hidden.dtype))
    counts = targets != call.options.ignore_index
    own = torch.where(counts, class_weight[torch.where(counts, targets, 0).clamp(0, vocabulary - 1).long()], 0)
    scale = torch.ones_like(own) if token_weight is None else token_weight
    check_token_input("token_weight", scale, hidden)
    scale = scale.to(class_weight.dtype)
    coefficients = ((1 - eps) * scale * own, eps * scale * class_weight.mean(), eps * scale, nll.z_loss * scale)
    total = linear_token_loss(
        hidden,
        weight,
        targets,
        _nll_terms,
        token_inputs=coefficients,
        outputs=("logprob", "lse", "mean_logit") if eps > 0 else ("logprob", "lse"),
        logit_weight=class_weight if eps > 0 else None,
        reduction="none" if reduction == "none" else "sum",
        **options,
    )
    return reduce.mean(total, own.sum() if normalizer is None else normalizer) if reduction == "mean" else total


def _nll_terms(stats: TokenStats, target: Tensor, uniform: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    assert stats.logprob is not None and stats.lse is not None
    loss = uniform * stats.lse + square * stats.lse.square() - target * stats.logprob
    return loss if stats.mean_logit is None else loss - mean * stats.mean_logit
