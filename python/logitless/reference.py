"""The specification: each statistic of a token as a formula on its full logits, differentiated by plain autograd.

It allocates `[N, V]` logits. In float64 it is the oracle of the tests: other code is right if it agrees. It is also the
baseline of the benchmarks. Ignored tokens are left out before the product, as in the ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, assert_never

import torch
from torch import Tensor

from .types import DivergenceOptions, Head, LogitTransform, TokenStats, statistics_dtype


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """`z` as `LogitTransform` defines it, `[N, V]` in the statistics' dtype."""
    dtype = statistics_dtype(hidden.dtype)
    z = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return transformed(z, transform)


def transformed(z: Tensor, transform: LogitTransform) -> Tensor:
    """Logits from raw products. A masked entry (-inf) stays masked under a softcap."""
    z = z * transform.logit_scale
    if transform.softcap is not None:
        masked = z.isneginf()
        capped = transform.softcap * torch.tanh(z.masked_fill(masked, 0) / transform.softcap)
        z = capped.masked_fill(masked, -math.inf)
    return z / transform.temperature


def statistics(
    z: Tensor, targets: Tensor | None, outputs: tuple[str, ...], logit_weight: Tensor | None = None
) -> TokenStats:
    """`TokenStats` of logits `z [N, V]` and targets `[N]`; `logit_weight [V]` weights the logits of their mean."""
    found = {name: _STATISTICS[name](z, targets) for name in outputs}
    if logit_weight is not None and "mean_logit" in found:
        found["mean_logit"] = (z * logit_weight.to(z.dtype)).mean(-1)
    return TokenStats(**found)


def for_all(compact: TokenStats, kept: Tensor, count: int) -> TokenStats:
    """Statistics of `count` tokens from those of the `kept` ones, indices; 0 for the others."""
    return TokenStats(*(None if x is None else x.new_zeros(count, *x.shape[1:]).index_add(0, kept, x) for x in compact))


def list_statistics(z: Tensor, ids: Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """`TokenStats` of logits `z [N, V]` and listed ids `[N, K]`, -1 for an absent place."""
    present, logp = ids >= 0, z.log_softmax(-1)
    listed = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), present.to(z.dtype)) > 0
    stats = statistics(z, None, tuple(name for name in outputs if name in ("lse", "entropy")))
    logprob = logp.gather(1, ids.clamp(min=0)).masked_fill(~present, 0.0)
    others = logp.masked_fill(listed, -math.inf)
    nothing = others.isneginf().all(-1, keepdim=True)  # of nothing but -inf, logsumexp's gradient would be NaN
    tail = others.masked_fill(nothing, 0).logsumexp(-1).masked_fill(nothing[:, 0], -math.inf)
    known = stats._replace(logprob=logprob, tail=tail)
    return TokenStats(**{name: getattr(known, name) for name in outputs})


def _logprob(z: Tensor, targets: Tensor) -> Tensor:
    """`log p_t = -log(1 + sum_{j != t} e^(z_j - z_t))`: `z_t - lse` would round to 0 for a confident token."""
    z_target = z.gather(-1, targets[:, None])
    lowest = torch.finfo(z.dtype).min  # not -inf: were all the others masked, logsumexp's gradient would be NaN
    others = z.scatter(-1, targets[:, None], lowest).clamp(min=lowest).logsumexp(-1, keepdim=True)
    return -torch.logaddexp(others - z_target, torch.zeros_like(others))[:, 0]


def _entropy(z: Tensor, targets: Tensor | None) -> Tensor:
    logp = z.log_softmax(-1)
    finite = logp.masked_fill(logp.isneginf(), 0)  # 0 * -inf is 0 here, in value and gradient
    return -(logp.exp() * finite).sum(-1)


_STATISTICS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "logprob": _logprob,
    "lse": lambda z, targets: z.logsumexp(-1),
    "entropy": _entropy,
    "mean_logit": lambda z, targets: z.mean(-1),
    "correct": lambda z, targets: (z.gather(-1, targets[:, None])[:, 0] >= z.amax(-1)).to(z.dtype),
    "log_sum_sq": lambda z, targets: (2 * z.detach().log_softmax(-1)).logsumexp(-1),
}


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    outputs: tuple[str, ...],
    logit_weight: Tensor | None = None,
) -> TokenStats:
    """`TokenStats` of `hidden [N, H]`, `weight [V, H]` and `targets [N]`; see `logitless.linear_logprobs`."""
    if targets is None:
        return statistics(logits(hidden, weight, bias, transform), None, outputs, logit_weight)
    kept = (targets != ignore_index).nonzero()[:, 0]
    compact = statistics(logits(hidden[kept], weight, bias, transform), targets[kept], outputs, logit_weight)
    return for_all(compact, kept, len(targets))


def linear_list_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform,
    outputs: tuple[str, ...],
) -> TokenStats:
    """`TokenStats` of `hidden [N, H]`, `weight [V, H]` and targets `[N, K]`, -1 for an absent place."""
    kept = (targets >= 0).any(-1).nonzero()[:, 0]
    compact = list_statistics(logits(hidden[kept], weight, bias, transform), targets[kept], outputs)
    return for_all(compact, kept, len(targets))


# ---------------------------------------------------------------------------------------------------------------------
# Divergences


def linear_divergence(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head,
    *,
    mask: Tensor | None,
    options: DivergenceOptions,
) -> Tensor:
    """`[N]` divergences of the reference from the model, each under its head; see `logitless.linear_divergence`.

    hidden and ref_hidden are `[N, H]` and `[N, H']`, and `mask [N]` has the tokens that count.
    """
    kept = torch.arange(len(hidden), device=hidden.device) if mask is None else mask.nonzero()[:, 0]
    log_q, log_p = (
        logits(x[kept], y.weight, y.bias, LogitTransform(y.logit_scale, y.softcap, y.temperature)).log_softmax(-1)
        for x, y in ((hidden, head), (ref_hidden, ref_head))
    )
    dtype = torch.promote_types(log_q.dtype, log_p.dtype)
    compact = divergence(log_p.to(dtype), log_q.to(dtype), options)
    return compact.new_zeros(len(hidden)).index_add(0, kept, compact)


def divergence(log_p: Tensor, log_q: Tensor, options: DivergenceOptions) -> Tensor:
    """`[n]` divergences of the reference P and the model Q, by definition, from log-probabilities `[n, V]`."""
    nowhere = log_p.isneginf() & log_q.isneginf()  # left out of every sum: -inf less -inf is NaN
    log_p, log_q = log_p.masked_fill(nowhere, 0), log_q.masked_fill(nowhere, 0)

    def total(x: Tensor) -> Tensor:
        return x.masked_fill(nowhere, 0).sum(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        present = ~a.isneginf()
        return total(a.exp() * torch.where(present, a, 0) - a.exp() * torch.where(present, b, 0))

    def mix(weight: float) -> Tensor:  # log(weight P + (1 - weight) Q)
        if weight in (0, 1):
            return log_p if weight else log_q
        return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))

    def alpha_divergence(a: float) -> Tensor:
        if a in (0, 1):
            return kl(log_p, log_q) if a else kl(log_q, log_p)
        return (1 - total((a * log_p + (1 - a) * log_q).exp())) / (a * (1 - a))

    def symmetric_kl(w: float) -> Tensor:
        if w in (0, 1):
            return kl(log_q, log_p) if w else kl(log_p, log_q)
        return (1 - w) * kl(log_p, log_q) + w * kl(log_q, log_p)

    def js(w: float) -> Tensor:
        if options.normalized and w in (0, 1):
            return symmetric_kl(w)
        value = w * kl(log_p, mix(w)) + (1 - w) * kl(log_q, mix(w))
        return value / (w * (1 - w)) if options.normalized else value

    match options.kind:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "symmetric_kl":
            return symmetric_kl(options.mixture)
        case "js":
            return js(options.mixture)
        case "skew_forward_kl":
            return kl(log_p, mix(options.skew))
        case "skew_reverse_kl":
            return kl(log_q, mix(1 - options.skew))
        case "total_variation":
            return total((log_p.exp() - log_q.exp()).abs()) / 2
        case "squared_hellinger":
            return 1 - total(((log_p + log_q) / 2).exp())
        case "pearson_chi2":
            return total((2 * log_q - log_p).exp()) - 1
        case "neyman_chi2":
            return total((2 * log_p - log_q).exp()) - 1
        case "alpha":
            return alpha_divergence(options.alpha)
        case "cross_entropy":
            return -total(log_p.exp() * torch.where(log_p.isneginf(), 0, log_q))
    assert_never(options.kind)
