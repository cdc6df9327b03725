"""`logitless::logprobs`: statistics of every token, and `logitless::logprobs_backward`: gradients from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends.exact.products import mean_row
from ...backends.interface import Needs, Saved, Upstream
from ...types import DIFFERENTIABLE, OUTPUTS, Head, LogitTransform, TokenStats, statistics_dtype
from ..checks import check_permutation
from ..tokens import NO_LSE, Tokens, of_targets, refuse_capture
from .shared import (
    Execution,
    cast,
    differentiates_head,
    fake_gradient_outputs,
    gradient_outputs,
    gradients,
    named,
    no_autocast,
    or_empty,
    problem_of,
    refuse_double_backward,
    sum_in,
)


@torch.library.custom_op("logitless::logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    logit_weight: Tensor | None,
    transform: Sequence[float],
    ignore_index: int,
    outputs: str,
    weight_out: Tensor | None,
    backend: str,
    strategy: str,
    tolerance: float,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Six statistics `[N]` in the order of `TokenStats`, the unit gradient, and what an approximate backward keeps.

    `outputs` names the statistics wanted, with spaces between; logprob and lse come always. The seventh result is
    `d logprob / d hidden [N, H]`, where the strategy is "single_pass". The last four are a backend's `Saved`, where
    the strategy is approximate. The backward adds the head's gradient to `weight_out`, if there is one.
    """
    execution = Execution(backend, strategy, tolerance, chunk_bytes, chunk_dtype)
    if execution.approximates():
        refuse_capture(hidden.device, "a tail-corrected backward", "use backward='recompute'")
    check_permutation(order)
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    problem = problem_of(hidden, weight, bias, targets, order, logit_weight, transform, tokens, execution)
    names, saved = tuple(outputs.split()), None
    with no_autocast(hidden.device):
        if execution.approximates():
            (stats, unit), saved = backends.BACKENDS[backend].approximate(strategy).forward(problem, names, tolerance)
        else:
            stats, unit = backends.BACKENDS[backend].forward(problem, names, strategy == "single_pass")
    s = [tokens.spread(x, hidden) for x in (*stats[: len(OUTPUTS)], cast(unit, hidden.dtype))]
    counts, column, value, by_block = saved or (None, None, None, None)
    kept = (tokens.spread(counts, hidden), or_empty(column, hidden), or_empty(value, hidden))
    return (s[0], s[1], s[2], s[3], s[4], s[5], s[6], *kept, tokens.spread(by_block, hidden))


@logprobs.register_fake
def _fake_logprobs(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, order, logit_weight, transform, ignore_index, outputs, weight_out, *execution
):
    how, dtype = Execution(*execution), statistics_dtype(hidden.dtype)
    wanted = {"logprob", "lse", *outputs.split()}
    results = [
        hidden.new_empty(targets.shape, dtype=dtype) if name in wanted else hidden.new_empty(0) for name in OUTPUTS
    ]
    results.append(hidden.new_empty(hidden.shape if how.strategy == "single_pass" else 0))
    if not how.approximates():
        return (*results, *(hidden.new_empty(0) for _ in Saved._fields))
    head = Head(weight, bias, *LogitTransform.unpacked(transform).numbers)
    width = backends.BACKENDS[how.backend].approximate(how.strategy).saved_width(hidden, head)
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        *results,
        hidden.new_empty(targets.shape, dtype=torch.int32),
        hidden.new_empty(entries, dtype=torch.int32),
        hidden.new_empty(entries, dtype=dtype),
        hidden.new_empty((targets.shape[0], width), dtype=dtype),
    )


@torch.library.custom_op("logitless::logprobs_backward", mutates_args=("weight_out",))
def logprobs_backward(
    upstream: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    logit_weight: Tensor | None,
    transform: Sequence[float],
    ignore_index: int,
    weight_out: Tensor | None,
    backend: str,
    strategy: str,
    tolerance: float,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, in their dtypes; the weight's is added to `weight_out`, if there is one.

    `upstream` holds the gradients of logprob, lse, entropy and mean logit, `stats` the first three statistics,
    `saved` the last four results of `logprobs` where the strategy is approximate.
    """
    execution = Execution(backend, strategy, tolerance, chunk_bytes, chunk_dtype)
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    exact = not execution.approximates()
    head = (hidden, weight, bias, targets, order, logit_weight, transform)
    rounds_head, head_sum = exact and weight_out is None, sum_in(weight_out, hidden) if exact else None
    problem = problem_of(*head, tokens, execution, rounds_head=rounds_head, head_sum=head_sum)
    known, wanted = _known(stats, tokens), Needs(*needs)
    reaching = Upstream(*(tokens.take(g) for g in upstream))
    with no_autocast(hidden.device):
        if exact:
            result = backends.BACKENDS[backend].backward(problem, known, reaching, wanted)
        else:
            counts, column, value, by_block = saved
            kept = Saved(tokens.take(counts), column, value, tokens.take(by_block))
            engine = backends.BACKENDS[backend].approximate(strategy)
            result = engine.backward(problem, known, kept, reaching, wanted, tolerance)
    return gradient_outputs(result, tokens, hidden, weight, weight_out)


@logprobs_backward.register_fake
def _fake_logprobs_backward(*inputs):  # type: ignore[no-untyped-def]
    return fake_gradient_outputs(named(logprobs_backward, inputs))


def _known(stats: Sequence[Tensor | None], tokens: Tokens) -> TokenStats:
    """The forward's statistics as a backend sees them in the backward."""
    known = TokenStats(*(tokens.take(x) for x in stats))
    return known._replace(lse=tokens.take(stats[OUTPUTS.index("lse")], NO_LSE))


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = named(logprobs, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[len(DIFFERENTIABLE) :])
    logprob, lse, entropy, _, _, _, unit, *saved = output
    ctx.execution = Execution(x.backend, x.strategy, x.tolerance, x.chunk_bytes, x.chunk_dtype)
    kept = saved if ctx.execution.approximates() else []
    tensors = (x.hidden, x.weight, x.bias, x.targets, x.order, x.logit_weight)
    ctx.save_for_backward(*tensors, logprob, lse, entropy, unit, *kept)
    ctx.transform, ctx.ignore_index, ctx.outputs = x.transform, x.ignore_index, ("logprob", "lse", *x.outputs.split())
    ctx.weight_out = x.weight_out  # not saved for backward: other backward passes may add to it before this one


def _differentiate_logprobs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward()
    hidden, weight, bias, targets, order, logit_weight, logprob, lse, entropy, unit, *saved = ctx.saved_tensors
    # A statistic that nobody asked for is an empty tensor, and so is its gradient.
    upstream = [g if name in ctx.outputs else None for name, g in zip(DIFFERENTIABLE, grads, strict=False)]
    if all(g is None for g in upstream):
        return gradients(logprobs)
    if ctx.execution.strategy == "single_pass":
        counts, transform = targets != ctx.ignore_index, LogitTransform.unpacked(ctx.transform)
        row = weight, torch.where(counts, targets, 0), transform.derivative_at(logprob + lse), transform.slope
        return gradients(logprobs, hidden=_scale_unit(unit, *row, logit_weight, counts, upstream))
    wants = named(logprobs, ctx.needs_input_grad)
    needs = [wants.hidden, differentiates_head(ctx, 1), bias is not None and wants.bias]
    stats = [logprob, lse, entropy if "entropy" in ctx.outputs else None]
    head = (weight, bias, targets, order, logit_weight, ctx.transform, ctx.ignore_index, ctx.weight_out)
    d_hidden, d_weight, d_bias = logprobs_backward(upstream, stats, saved, needs, hidden, *head, *ctx.execution)
    return gradients(
        logprobs,
        hidden=d_hidden if wants.hidden else None,
        weight=d_weight if wants.weight and ctx.weight_out is None else None,
        bias=d_bias if wants.bias else None,
    )


def _scale_unit(
    unit: Tensor,
    weight: Tensor,
    targets: Tensor,
    target_slope: Tensor | float,
    slope: float,
    logit_weight: Tensor | None,
    counts: Tensor,
    upstream: Sequence[Tensor | None],
) -> Tensor:
    """A frozen head's `d_hidden = (a - b) unit + b c_t weight_t + m slope mean_j w_j weight_j`, a scaling of rows.

    `a`, `b` and `m` reach logprob, lse and the mean logit; `c_t` is `target_slope`, the target's derivative.
    """
    a, b, _, m = (None if g is None else torch.where(counts, g, 0) for g in upstream)
    dtype = next(g.dtype for g in (a, b, m) if g is not None)
    total = torch.zeros(unit.shape, dtype=dtype, device=unit.device)
    if a is not None:
        total = total + a[:, None] * unit
    if b is not None:
        total = total - b[:, None] * unit + (target_slope * b)[:, None] * weight[targets]
    if m is not None:
        mean = weight.mean(0, dtype=dtype) if logit_weight is None else mean_row(weight, logit_weight.to(dtype), dtype)
        total = total + m[:, None] * (mean * slope)
    return total.to(unit.dtype)


logprobs.register_autograd(_differentiate_logprobs, setup_context=_save_logprobs)
