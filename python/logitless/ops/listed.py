"""Several ids a token: their log-probs beside the mass of all others, log-probs within a kept set, and the likeliest.

linear_logprobs(targets [..., K])        one sweep over the logits, whatever K
linear_logprobs(targets, among=ids)      products with the listed ids alone, none with the vocabulary
linear_top_k                             one sweep without a gradient
"""

from __future__ import annotations

from typing import Any, NamedTuple, Never

import torch
from torch import Tensor

from .. import reduce, reference
from ..backends.exact.listed import first_places
from ..parallel import Sum
from ..peers import refuse_unknown
from ..types import LIST_OUTPUTS, BackendName, Options, TokenStats
from . import checks
from .call import Call, prepare_call
from .registered.listed import list_logprobs, listed_products, top_k
from .sharded import on_whole_tensors
from .vocabulary_parallel import likeliest, shard_of

#: The statistics of a kept set of ids.
KEPT_OUTPUTS = ("logprob", "lse", "entropy", "correct", "log_sum_sq")


def exact_statistics(call: Call, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics of targets `[N, K]` that `outputs` names: logprob `[N, K]`, lse, entropy and tail `[N]`."""
    options = call.options
    assert call.targets is not None
    if options.backward == "single_pass":
        raise ValueError(
            "backward: 'single_pass' keeps one gradient vector per token, and targets [..., K] need K; use 'auto', or "
            "linear_token_loss"
        )
    arguments = call.hidden, call.weight, options.bias, call.targets
    if options.backend == "reference":
        _check_ids_of_reference(call, call.targets, "targets")
        return reference.linear_list_logprobs(*arguments, transform=options.transform, outputs=outputs)
    results = list_logprobs(
        *arguments,
        options.transform.packed(),
        options.ignore_index,
        " ".join(outputs),
        options.grad_out,
        call.backend(),
        options.chunk_bytes,
        options.chunk_dtype,
    )
    return TokenStats(**{name: x for name, x in zip(LIST_OUTPUTS, results, strict=True) if name in outputs})


def statistics_from_lse(call: Call, outputs: tuple[str, ...], of_tokens: TokenStats) -> TokenStats:
    """The statistics of targets `[N, K]` on those of whole distributions, which any strategy may have computed.

    The tail would be a difference of nearly equal numbers, and is refused.
    """
    if "tail" in outputs:
        raise ValueError(f"outputs: backward={call.options.backward!r} cannot give 'tail'; use 'auto' or 'recompute'")
    assert call.targets is not None and of_tokens.lse is not None
    logprob = _logits(call, call.targets, "targets") - of_tokens.lse[:, None]
    stats = of_tokens._replace(logprob=logprob.masked_fill(call.targets < 0, 0.0))
    return TokenStats(**{name: getattr(stats, name) for name in outputs})


def kept_statistics(call: Call, among: Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """Statistics of the targets, the distribution renormalised over the ids `among [N, K]`, -1 for an absent place.

    A distribution over K entries is one over a small vocabulary, so the formulas are the reference's own.
    """
    assert call.targets is not None
    kept, logits = first_places(among), _logits(call, among, "among")
    counts = kept.any(-1) if call.listed() else call.targets != call.options.ignore_index
    z = logits.masked_fill(~kept, -torch.inf).masked_fill(~counts[:, None], 0.0)
    if call.listed():
        of_tokens = reference.statistics(z, None, tuple(name for name in outputs if name != "logprob"))
        logprob = logits - z.logsumexp(-1, keepdim=True)
        stats = of_tokens._replace(logprob=logprob.masked_fill(among < 0, 0.0))
    else:
        places = kept & (among == call.targets[:, None])
        missing = counts & ~places.any(-1)
        if not torch.compiler.is_compiling():
            checks.require(~missing.any(), lambda: "among: expected every token's target in its list")
        z = z.masked_fill(missing[:, None], torch.nan)  # what a compiled call says
        stats = reference.statistics(z, places.int().argmax(-1), outputs)
    return TokenStats(*(None if x is None else reduce.zero_outside(counts, x) for x in stats))


def _logits(call: Call, ids: Tensor, name: str) -> Tensor:
    """`z [N, K]` of the listed ids alone; arbitrary where an id is absent, -1. `name` is for the message."""
    options = call.options
    if options.group is not None:
        return _logits_of_shards(call, ids, name)
    if options.backend == "reference":
        _check_ids_of_reference(call, ids, name)
        z = reference.logits(call.hidden, call.weight, options.bias, options.transform)
        return z.gather(1, ids.clamp(min=0))
    z = listed_products(call.hidden, call.weight, ids, name, options.grad_out)
    if options.bias is not None:
        z = z + options.bias[ids.clamp(min=0)].to(z.dtype)
    return reference.transformed(z, options.transform)


def _logits_of_shards(call: Call, ids: Tensor, name: str) -> Tensor:
    """`z [N, K]` where every process has the rows of some of the ids: each computes its own, and they are added up."""
    shard = shard_of(call._replace(targets=ids))
    assert shard.call.targets is not None
    own = shard.owner == call.group().rank
    z = _logits(shard.call, torch.where(own, shard.call.targets, -1), name)
    if shard.empty is not None:
        z = z.masked_fill(shard.empty, -torch.inf)
    total: Tensor = Sum.apply(torch.where(own, z, 0.0), call.group().group)
    return total


def largest_logit(call: Call) -> Tensor:
    """`max_j z_j` of every token, `[N]`, a constant; one product with the vocabulary."""
    with torch.no_grad():
        best = _top_k(call, 1)
    return best.logprob[:, 0] + best.lse


def _check_ids_of_reference(call: Call, ids: Tensor, name: str) -> None:
    """The check that the ops make; a compiled call of the reference goes without."""
    if not torch.compiler.is_compiling():
        checks.check_ids(ids, ids != -1, call.options.ignore_index, len(call.weight), name)


class TopK(NamedTuple):
    """The K likeliest ids of each token, by `linear_top_k`."""

    ids: Tensor
    """`[..., K]` int64, the likeliest first."""
    logprob: Tensor
    """`[..., K]`, their log-probabilities, in nats."""
    lse: Tensor
    """`[...]`, the logsumexp of all logits."""
    tail: Tensor
    """`[...]`, the logarithm of the mass that no listed id has."""


@torch.no_grad()
@on_whole_tensors
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: BackendName = "auto",
    chunk_bytes: int | None = None,
    chunk_dtype: torch.dtype | None = None,
    group: Any = None,
    **unknown: Never,
) -> TopK:
    """The k likeliest ids of each token and their log-probabilities, with no `[tokens, vocabulary]` tensor.

    A teacher's top-k for distillation: `linear_logprobs` takes `ids` as targets of a student. One product with the
    vocabulary, chunk by chunk. Nothing has a gradient.

    Args:
        hidden, weight: `[..., H]` and `[V, H]`, as in `linear_logprobs`, and so are the options.
        k: from 1 to V. Equal logits come in any order.
        group: as in `linear_logprobs`; the ids are those of the whole vocabulary.

    Returns:
        `TopK`; its log-probabilities are float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `linear_logprobs`, and for a k outside [1, V].
    """
    refuse_unknown("linear_top_k", unknown)
    head = dict(bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    options = Options(**head, backend=backend, chunk_bytes=chunk_bytes, chunk_dtype=chunk_dtype, group=group)  # type: ignore[arg-type]
    call = prepare_call(hidden, weight, None, options)
    vocabulary = len(weight) if call.options.group is None else call.group().vocabulary
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k: expected a number in [1, {vocabulary}], got {k}")
    results = _top_k(call, k) if call.options.group is None else _top_k_of_shards(call, k)
    return TopK(*(x.reshape((*hidden.shape[:-1], *x.shape[1:])) for x in results))


def _top_k(call: Call, k: int) -> TopK:
    """The k likeliest of one process's rows, for `[N]` tokens."""
    options, transform = call.options, call.options.transform
    if options.backend == "reference":
        z = reference.logits(call.hidden, call.weight, options.bias, transform)
        ids = z.topk(k, dim=-1).indices
        stats = reference.list_statistics(z, ids, LIST_OUTPUTS)
        return TopK(ids, *(x for x in (stats.logprob, stats.lse, stats.tail) if x is not None))
    arguments = call.hidden, call.weight, options.bias, k, transform.packed(), call.backend()
    return TopK(*top_k(*arguments, options.chunk_bytes, options.chunk_dtype))


def _top_k_of_shards(call: Call, k: int) -> TopK:
    """The k likeliest of all processes' rows, from the k likeliest of each."""
    shard = shard_of(call)
    own = _top_k(shard.call, min(k, len(shard.call.weight)))
    return TopK(*likeliest(own, k, shard, call.group()))
