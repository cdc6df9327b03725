"""The specification: every statistic of a token from its full logits, in the fewest words, by plain autograd.

It allocates `[N, V]` logits. It is the oracle of the tests, the baseline of the benchmarks and, in float64, the answer
to "what should this be". Ignored tokens are left out before the product, as everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import LogitTransform, TokenStats, statistics_dtype


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """`z` as `LogitTransform` defines it, `[N, V]` in the statistics' dtype."""
    dtype = statistics_dtype(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return transformed(z, transform)


def transformed(z: Tensor, transform: LogitTransform) -> Tensor:
    """Finished logits from raw ones; what is masked (-inf) stays so under a softcap."""
    z = z * transform.logit_scale
    if transform.softcap is not None:
        masked = z.isneginf()
        capped = transform.softcap * torch.tanh(z.masked_fill(masked, 0) / transform.softcap)
        z = capped.masked_fill(masked, -math.inf)
    return z / transform.temperature


def statistics(z: Tensor, targets: Tensor | None, outputs: tuple[str, ...]) -> TokenStats:
    """`TokenStats` of logits `z [N, V]` and targets `[N]`."""
    logp = z.log_softmax(-1)
    p = logp.exp()
    finite = logp.masked_fill(logp.isneginf(), 0)  # 0 * -inf is 0 here, in value and gradient
    found: dict[str, Tensor] = {}
    if targets is not None:
        # log p_t = -log(1 + sum_{j != t} e^(z_j - z_t)): z_t - lse would round to 0 for a confident token
        z_target = z.gather(-1, targets[:, None])
        lowest = torch.finfo(z.dtype).min  # not -inf: were all the others masked, logsumexp's gradient would be NaN
        others = z.scatter(-1, targets[:, None], lowest).clamp(min=lowest).logsumexp(-1, keepdim=True)
        found["logprob"] = -torch.logaddexp(others - z_target, torch.zeros_like(others))[:, 0]
        found["correct"] = (z_target >= z.amax(-1, keepdim=True))[:, 0].to(z.dtype)
    found["lse"] = z.logsumexp(-1)
    found["entropy"] = -(p * finite).sum(-1)
    found["mean_logit"] = z.mean(-1)
    found["log_sum_sq"] = (2 * logp).logsumexp(-1).detach()
    return TokenStats(**{name: found[name] for name in outputs})


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    outputs: tuple[str, ...],
) -> TokenStats:
    """`TokenStats` of `hidden [N, H]`, `weight [V, H]` and `targets [N]`; see `logitless.linear_logprobs`."""
    if targets is None:
        return statistics(logits(hidden, weight, bias, transform), None, outputs)
    kept = (targets != ignore_index).nonzero()[:, 0]
    compact = statistics(logits(hidden[kept], weight, bias, transform), targets[kept], outputs)
    return TokenStats(*(None if x is None else x.new_zeros(len(targets)).index_add(0, kept, x) for x in compact))
