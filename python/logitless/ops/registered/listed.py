"""Ops on several ids a token: `list_logprobs`, `listed_products` and `top_k`, and their backward ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends.exact.chunks import Chunks
from ...backends.exact.products import spans
from ...backends.interface import Needs, Upstream
from ...types import LIST_OUTPUTS, TokenStats, statistics_dtype
from ..checks import check_ids
from ..tokens import NO_LSE, Tokens, of_targets
from .shared import (
    Execution,
    cast,
    delivered,
    differentiates_head,
    fake_gradient_outputs,
    fake_gradients,
    gradient_outputs,
    gradients,
    named,
    no_autocast,
    or_empty,
    problem_of,
    refuse_double_backward,
    sum_in,
)

#: Bytes of the head's rows that are gathered at once.
GATHERED_BYTES = {"cpu": 4 * 2**20}
GATHERED_BYTES_ACCELERATOR = 256 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of listed ids


@torch.library.custom_op("logitless::list_logprobs", mutates_args=())
def list_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Sequence[float],
    ignore_index: int,
    outputs: str,
    weight_out: Tensor | None,
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics in the order of `LIST_OUTPUTS` of targets `[N, K]`, -1 for an absent place.

    The logprob is `[N, K]`, the others `[N]`. All but the entropy come always; it is empty unless `outputs` names it.
    """
    execution = Execution(backend, "recompute", 0.0, chunk_bytes, chunk_dtype)
    tokens = of_targets(targets, ignore_index, len(weight))
    problem = problem_of(hidden, weight, bias, targets, None, None, transform, tokens, execution)
    with no_autocast(hidden.device):
        stats = backends.BACKENDS[backend].forward(problem, (*outputs.split(), "tail"), False).stats
    logprob, lse, entropy, tail = (tokens.spread(getattr(stats, name), hidden) for name in LIST_OUTPUTS)
    return logprob, lse, entropy, tail


@list_logprobs.register_fake
def _fake_list_logprobs(*inputs):  # type: ignore[no-untyped-def]
    x = named(list_logprobs, inputs)
    of_tokens = [x.hidden.new_empty(len(x.hidden), dtype=statistics_dtype(x.hidden.dtype)) for _ in range(3)]
    if "entropy" not in x.outputs.split():
        of_tokens[1] = x.hidden.new_empty(0)
    return (of_tokens[0].new_empty(x.targets.shape), *of_tokens)


@torch.library.custom_op("logitless::list_logprobs_backward", mutates_args=("weight_out",))
def list_logprobs_backward(
    upstream: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: Sequence[float],
    ignore_index: int,
    weight_out: Tensor | None,
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their dtypes; the weight's is added to `weight_out`, if there is one.

    `upstream` and `stats` are in the order of `LIST_OUTPUTS`.
    """
    execution = Execution(backend, "recompute", 0.0, chunk_bytes, chunk_dtype)
    tokens = of_targets(targets, ignore_index, len(weight))
    head = (hidden, weight, bias, targets, None, None, transform)
    rounds_head, head_sum = weight_out is None, sum_in(weight_out, hidden)
    problem = problem_of(*head, tokens, execution, rounds_head=rounds_head, head_sum=head_sum)
    known = TokenStats(**{name: tokens.take(x) for name, x in zip(LIST_OUTPUTS, stats, strict=True)})
    known = known._replace(lse=tokens.take(stats[1], NO_LSE))
    reaching = Upstream(**{name: tokens.take(g) for name, g in zip(LIST_OUTPUTS, upstream, strict=True)})
    with no_autocast(hidden.device):
        result = backends.BACKENDS[backend].backward(problem, known, reaching, Needs(*needs))
    return gradient_outputs(result, tokens, hidden, weight, weight_out)


@list_logprobs_backward.register_fake
def _fake_list_logprobs_backward(*inputs):  # type: ignore[no-untyped-def]
    return fake_gradient_outputs(named(list_logprobs_backward, inputs))


def _save_list_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = named(list_logprobs, inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x.hidden, x.weight, x.bias, x.targets, *output)
    ctx.rest = (x.transform, x.ignore_index, x.weight_out, x.backend, x.chunk_bytes, x.chunk_dtype)
    ctx.weight_out = x.weight_out
    ctx.with_entropy = "entropy" in x.outputs.split()


def _differentiate_list_logprobs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    if all(g is None for g in grads):
        return gradients(list_logprobs)
    hidden, weight, bias, targets, *stats = ctx.saved_tensors
    upstream = list(grads)
    if not ctx.with_entropy:
        upstream[2] = stats[2] = None
    wants = named(list_logprobs, ctx.needs_input_grad)
    needs = [wants.hidden, differentiates_head(ctx, 1), bias is not None and wants.bias]
    results = list_logprobs_backward(upstream, stats, needs, hidden, weight, bias, targets, *ctx.rest)
    names, needs[1] = ("hidden", "weight", "bias"), wants.weight and ctx.weight_out is None
    return gradients(list_logprobs, **{n: g for n, g, need in zip(names, results, needs, strict=True) if need})


list_logprobs.register_autograd(_differentiate_list_logprobs, setup_context=_save_list_logprobs)


# ---------------------------------------------------------------------------------------------------------------------
# Products with listed ids alone


@torch.library.custom_op("logitless::listed_products", mutates_args=())
def listed_products(hidden: Tensor, weight: Tensor, ids: Tensor, name: str, weight_out: Tensor | None) -> Tensor:
    """`hidden[n] @ weight[ids[n, k]]`, `[N, K]` in the statistics' dtype: 2 N K H flops, and a gather of the rows.

    Those of id 0 where an id is absent, -1. `name` is what the ids are called in a message.
    """
    check_ids(ids, ids != -1, -1, len(weight), name)
    ids, dtype = ids.clamp(min=0), statistics_dtype(hidden.dtype)
    out = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
    with no_autocast(hidden.device):
        for rows, gathered in _gathered(weight, ids, dtype):
            torch.bmm(gathered, hidden[rows].to(dtype)[:, :, None], out=out[rows, :, None])
    return out


@listed_products.register_fake
def _fake_listed_products(hidden, weight, ids, name, weight_out):  # type: ignore[no-untyped-def]
    return hidden.new_empty(ids.shape, dtype=statistics_dtype(hidden.dtype))


@torch.library.custom_op("logitless::listed_products_backward", mutates_args=("weight_out",))
def listed_products_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    needs: Sequence[bool],
    weight_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, in their dtypes; the head's is summed in the statistics', or in `weight_out`.

    The upstream gradient of an absent place is 0.
    """
    ids, dtype = ids.clamp(min=0), upstream.dtype
    d_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs[0] else None
    d_weight = sum_in(weight_out, hidden) if needs[1] else None
    if needs[1] and d_weight is None:
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    with no_autocast(hidden.device):
        if d_hidden is not None:
            for rows, gathered in _gathered(weight, ids, dtype):
                torch.bmm(upstream[rows, None], gathered, out=d_hidden[rows, None])
        if d_weight is not None:
            for rows in _spans_of_ids(weight, ids, dtype):
                parts = upstream[rows, :, None] * hidden[rows].to(dtype)[:, None]
                d_weight.index_add_(0, ids[rows].flatten(), parts.flatten(0, 1))
    d_weight = cast(delivered(d_weight, weight_out), weight.dtype)
    return or_empty(cast(d_hidden, hidden.dtype), hidden), or_empty(d_weight, hidden)


@listed_products_backward.register_fake
def _fake_listed_products_backward(upstream, hidden, weight, ids, needs, weight_out):  # type: ignore[no-untyped-def]
    needs = [needs[0], needs[1] and weight_out is None]
    return tuple(fake_gradients((hidden, weight), needs, (None, None)))


def _spans_of_ids(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Runs of tokens whose ids' rows of the head fit the budget."""
    budget = GATHERED_BYTES.get(weight.device.type, GATHERED_BYTES_ACCELERATOR)
    return spans(len(ids), max(1, budget // (max(1, ids.shape[1]) * weight.shape[1] * dtype.itemsize)))


def _gathered(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Runs of tokens, and the rows of the head that they list, `[n, K, H]`."""
    for rows in _spans_of_ids(weight, ids, dtype):
        yield rows, weight[ids[rows]].to(dtype)


def _save_listed_products(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.weight_out = inputs[-1]


def _differentiate_listed_products(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    hidden, weight, ids = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], differentiates_head(ctx, 1)]
    d_hidden, d_weight = listed_products_backward(grad.contiguous(), hidden, weight, ids, needs, ctx.weight_out)
    needs[1] = needs[1] and ctx.weight_out is None
    return gradients(listed_products, hidden=d_hidden if needs[0] else None, weight=d_weight if needs[1] else None)


listed_products.register_autograd(_differentiate_listed_products, setup_context=_save_listed_products)


# ---------------------------------------------------------------------------------------------------------------------
# The likeliest ids


@torch.library.custom_op("logitless::top_k", mutates_args=())
def top_k(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    transform: Sequence[float],
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest ids of each token, `[N, k]`, their logprob, likeliest first, and lse and tail, `[N]`."""
    execution = Execution(backend, "recompute", 0.0, chunk_bytes, chunk_dtype)
    ids = torch.zeros(len(hidden), k, dtype=torch.long, device=hidden.device)
    problem = problem_of(hidden, weight, bias, ids, None, None, transform, Tokens(None, None), execution)
    engine = backends.BACKENDS[backend].row_engine(problem)
    chunks = Chunks(engine, problem, ("tail",))
    results = [ids, *(torch.empty(ids.shape[:d], dtype=chunks.dtype, device=ids.device) for d in (2, 1, 1))]
    with no_autocast(hidden.device):
        for rows in spans(len(ids), chunks.tokens):
            raw = chunks.raw(rows)
            scores = raw if chunks.head.bias is None else raw + chunks.head.bias  # a transform keeps their order
            ids[rows] = scores.topk(k, dim=-1).indices
            stats = engine.measure(raw, chunks.head, ids[rows], ("tail",), None).stats
            for out, statistic in zip(results[1:], (stats.logprob, stats.lse, stats.tail), strict=True):
                assert statistic is not None
                out[rows] = statistic
    return results[0], results[1], results[2], results[3]


@top_k.register_fake
def _fake_top_k(hidden, weight, bias, k, *_):  # type: ignore[no-untyped-def]
    ids = hidden.new_empty((len(hidden), k), dtype=torch.long)
    dtype = statistics_dtype(hidden.dtype)
    return (ids, *(hidden.new_empty(ids.shape[:d], dtype=dtype) for d in (2, 1, 1)))
