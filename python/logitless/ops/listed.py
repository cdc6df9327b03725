"""Several ids a token: their log-probs beside the mass of all others, log-probs within a kept set, and the likeliest.

linear_logprobs(targets [..., K])        one sweep over the logits, whatever K
linear_logprobs(targets, among=ids)      products with the listed ids alone, none with the vocabulary
linear_top_k                             one sweep without a gradient
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, reduce, reference
from ..backends.exact.listed import first_places
from ..types import LIST_OUTPUTS, BackendName, Options, TokenStats
from . import checks
from .call import Call, prepare_call
from .registered.listed import list_logprobs, listed_products, top_k

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
    if options.backend == "reference":
        _check_ids_of_reference(call, ids, name)
        z = reference.logits(call.hidden, call.weight, options.bias, options.transform)
        return z.gather(1, ids.clamp(min=0))
    z = listed_products(call.hidden, call.weight, ids, name, options.grad_out)
    if options.bias is not None:
        z = z + options.bias[ids.clamp(min=0)].to(z.dtype)
    return reference.transformed(z, options.transform)


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
) -> TopK:
    """The k likeliest ids of each token and their log-probabilities, with no `[tokens, vocabulary]` tensor.

    A teacher's top-k for distillation: `linear_logprobs` takes `ids` as targets of a student. One product with the
    vocabulary, chunk by chunk. Nothing has a gradient.

    Args:
        hidden, weight: `[..., H]` and `[V, H]`, as in `linear_logprobs`, and so are the options.
        k: from 1 to V. Equal logits come in any order.

    Returns:
        `TopK`; its log-probabilities are float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `linear_logprobs`, and for a k outside [1, V].
    """
    head = dict(bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    options = Options(**head, backend=backend, chunk_bytes=chunk_bytes, chunk_dtype=chunk_dtype)  # type: ignore[arg-type]
    call = prepare_call(hidden, weight, None, options)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= len(weight):
        raise ValueError(f"k: expected a number in [1, {len(weight)}], got {k}")
    transform, shape = call.options.transform, hidden.shape[:-1]
    if backend == "reference":
        z = reference.logits(call.hidden, call.weight, call.options.bias, transform)
        ids = z.topk(k, dim=-1).indices
        stats = reference.list_statistics(z, ids, LIST_OUTPUTS)
        results = TopK(ids, *(x for x in (stats.logprob, stats.lse, stats.tail) if x is not None))
    else:
        name = backends.pick(backend, call.hidden)
        arguments = call.hidden, call.weight, call.options.bias, k, transform.packed(), name
        results = TopK(*top_k(*arguments, chunk_bytes, chunk_dtype))
    return TopK(*(x.reshape((*shape, *x.shape[1:])) for x in results))
