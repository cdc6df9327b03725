"""Class weights of the cross-entropy, as torch defines them, without logits.

    (1 - eps) w_t (-logp_t) + eps / V sum_j w_j (-logp_j),    eps the label smoothing

The second term is `eps (mean(w) lse - mean_j w_j z_j)`, of two of the token's own statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reduce
from .losses.sft.likelihood import NLL
from .ops import linear_token_loss
from .ops.call import Call, prepare_call
from .ops.checks import check_entry_weight
from .ops.token_loss import check_token_input
from .ops.vocabulary_parallel import shard_of
from .parallel import summed
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
    eps = nll.label_smoothing
    call = prepare_call(hidden, weight, targets, Options(**options))
    check_entry_weight("class_weight", class_weight, weight)
    class_weight = class_weight.to(statistics_dtype(call.hidden.dtype))
    own, mean = _of_targets(call, class_weight).view_as(targets), _mean(call, class_weight)
    scale = torch.ones_like(own) if token_weight is None else token_weight
    check_token_input("token_weight", scale, hidden)
    scale = scale.to(class_weight.dtype)
    coefficients = ((1 - eps) * scale * own, eps * scale * mean, eps * scale, nll.z_loss * scale)
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


def _of_targets(call: Call, class_weight: Tensor) -> Tensor:
    """The class weight of each token's target, `[N]`, 0 where it does not count."""
    assert call.targets is not None
    if call.options.group is None:
        counts, ids = call.targets != call.options.ignore_index, call.targets
    else:
        shard = shard_of(call)
        assert shard.call.targets is not None
        counts, ids = shard.owner == call.group().rank, shard.call.targets
    of_rows = torch.where(
        counts, F.pad(class_weight, (0, 1))[torch.where(counts, ids, 0).clamp(0, len(class_weight))], 0
    )
    return of_rows if call.options.group is None else summed(of_rows, call.group().group)


def _mean(call: Call, class_weight: Tensor) -> Tensor:
    """The mean of the class weights of the whole vocabulary, `[]`."""
    if call.options.group is None:
        return class_weight.mean()
    return summed(class_weight.sum(), call.group().group) / call.group().vocabulary


def _nll_terms(stats: TokenStats, target: Tensor, uniform: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    assert stats.logprob is not None and stats.lse is not None
    loss = uniform * stats.lse + square * stats.lse.square() - target * stats.logprob
    return loss if stats.mean_logit is None else loss - mean * stats.mean_logit
