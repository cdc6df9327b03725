"""Class weights of the cross-entropy, as torch defines them, without logits.

    (1 - eps) w_t (-logp_t) + eps / V sum_j w_j (-logp_j),    eps the label smoothing

The sum over the vocabulary is `sum(w) lse - hidden @ (weight.T @ w)`: its first part is one of the token's own
statistics, its second a product with one vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reduce
from .losses.sft.likelihood import NLL
from .ops import linear_token_loss
from .ops.call import Call, prepare_call
from .ops.checks import check_constant, check_tensor
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
    class_weight = _checked_class_weight(class_weight, weight).to(statistics_dtype(call.hidden.dtype))
    if eps > 0 and call.options.softcap is not None:
        raise ValueError("class_weight: with label_smoothing it is refused under a softcap, got softcap and both")
    counts = targets != call.options.ignore_index
    own = torch.where(counts, class_weight[torch.where(counts, targets, 0).clamp(0, vocabulary - 1).long()], 0)
    scale = torch.ones_like(own) if token_weight is None else token_weight
    check_token_input("token_weight", scale, hidden)
    scale = scale.to(class_weight.dtype)
    coefficients = ((1 - eps) * scale * own, eps * scale * class_weight.mean(), nll.z_loss * scale)
    total = linear_token_loss(
        hidden,
        weight,
        targets,
        _nll_terms,
        token_inputs=coefficients,
        outputs=("logprob", "lse"),
        reduction="none" if reduction == "none" else "sum",
        **options,
    )
    if eps > 0:
        linear = _weighted_logits(call, counts.reshape(-1), class_weight).reshape(targets.shape)
        linear = torch.where(counts, linear * scale, 0) * (eps * call.options.transform.slope / vocabulary)
        total = total - (linear if reduction == "none" else linear.sum())
    return reduce.mean(total, own.sum() if normalizer is None else normalizer) if reduction == "mean" else total


def _weighted_logits(call: Call, counts: Tensor, class_weight: Tensor) -> Tensor:
    """`sum_j w_j (hidden @ weight.T + bias)_j`, `[N]`, by a product with one vector."""
    hidden = call.hidden.masked_fill(~counts[:, None], 0)  # an ignored token's NaN would reach the vector's gradient
    with torch.autocast(hidden.device.type, enabled=False):
        row = class_weight.to(call.weight.dtype) @ call.weight
        linear = hidden.to(class_weight.dtype) @ row.to(class_weight.dtype)
        return linear if call.options.bias is None else linear + (class_weight * call.options.bias).sum()


def _nll_terms(stats: TokenStats, target: Tensor, uniform: Tensor, square: Tensor) -> Tensor:
    assert stats.logprob is not None and stats.lse is not None
    return uniform * stats.lse + square * stats.lse.square() - target * stats.logprob


def _checked_class_weight(class_weight: Tensor, weight: Tensor) -> Tensor:
    check_tensor("class_weight", class_weight, f"[{weight.shape[0]}]", 1)
    if len(class_weight) != weight.shape[0]:
        raise ValueError(f"class_weight: expected shape [{weight.shape[0]}], got {list(class_weight.shape)}")
    check_constant("class_weight", class_weight, weight.device, like="weight")
    return class_weight
