"""`logitless::divergence`: divergences of every token. `logitless::divergence_sum`: their weighted sum with gradients.

The second is the backward of the first too, where no unit gradients are kept. Tokens outside the mask are dropped here,
before a backend sees the problem, since their number is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends.interface import DivergenceProblem, DivergenceResult, Needs, Ranks, Side
from ...parallel import named_group
from ...types import DivergenceOptions, Head, LogitTransform, statistics_dtype
from ..tokens import Tokens, of_mask
from .shared import (
    add_scaled,
    cast,
    delivered,
    differentiates_head,
    fake_gradients,
    gradients,
    named,
    no_autocast,
    or_empty,
    refuse_double_backward,
    scaled,
)

#: The tensors that may get a gradient.
SIDES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


@torch.library.custom_op("logitless::divergence", mutates_args=())
def divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    units: Sequence[bool],
    weight_out: Tensor | None,
    backend: str,
    chunk_bytes: int | None,
    group: str,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences `[N]`, then `d divergence / d hidden [N, H]` and `/ d ref_hidden` where `units` asks (else empty).

    `parameters` are mixture, skew and alpha; `transforms` both heads' three numbers (`LogitTransform.packed`). `group`
    is the name of the process group that shares the heads' rows, "" for none, and `widest` the most rows of one of its
    processes. The backward adds the weight's gradient to `weight_out`, if there is one.
    """
    tokens, options = of_mask(mask), _options(kind, parameters, normalized)
    heads = _heads(weight, bias, ref_weight, ref_bias, transforms)
    problem = _problem(tokens, hidden, ref_hidden, heads, options, chunk_bytes, group, widest)
    ones = tokens.take(torch.ones(len(hidden), device=hidden.device)) if any(units) else None
    model_unit, ref_unit = (Needs(hidden=unit, weight=False, bias=False) for unit in units)
    values, model, ref = _sweep(backend, problem, ones, (model_unit, ref_unit))
    return (
        tokens.spread(values, hidden),
        tokens.spread(cast(model.hidden, hidden.dtype), hidden),
        tokens.spread(cast(ref.hidden, ref_hidden.dtype), hidden),
    )


@divergence.register_fake
def _fake_divergence(*inputs):  # type: ignore[no-untyped-def]
    x = named(divergence, inputs)
    values = x.hidden.new_empty(x.hidden.shape[0], dtype=_result_dtype(x.hidden, x.ref_hidden))
    return values, *fake_gradients((x.hidden, x.ref_hidden), x.units, (None, None))


@torch.library.custom_op("logitless::divergence_sum", mutates_args=())
def divergence_sum(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    needs: Sequence[bool],
    weight_out: Tensor | None,
    backend: str,
    chunk_bytes: int | None,
    group: str,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sum_i upstream_i D_i` over the tokens that count, and its gradients for the six tensors of both sides.

    The gradients have the statistics' dtype and are empty where not needed. Other arguments are those of `divergence`.
    """
    sides = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    description, execution = (kind, parameters, normalized, transforms), (backend, chunk_bytes, group, widest)
    return _sum_with_gradients(upstream, sides, mask, description, needs, None, execution)


@torch.library.custom_op("logitless::divergence_backward", mutates_args=("weight_out",))
def divergence_backward(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    needs: Sequence[bool],
    weight_out: Tensor,
    backend: str,
    chunk_bytes: int | None,
    group: str,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `divergence_sum` gives, but that the weight's gradient is added to `weight_out`; its own is empty."""
    sides = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    description, execution = (kind, parameters, normalized, transforms), (backend, chunk_bytes, group, widest)
    return _sum_with_gradients(upstream, sides, mask, description, needs, weight_out, execution)


def _sum_with_gradients(
    upstream: Tensor,
    sides: tuple[Any, ...],
    mask: Tensor | None,
    description: tuple[Any, ...],
    needs: Sequence[bool],
    weight_out: Tensor | None,
    execution: tuple[str, int | None, str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of both ops above."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    (*kind, transforms), tokens = description, of_mask(mask)
    backend, *limits = execution
    heads = _heads(weight, bias, ref_weight, ref_bias, transforms)
    dtype = _result_dtype(hidden, ref_hidden)
    head_sum = weight_out if weight_out is not None and weight_out.dtype == dtype else None
    problem = _problem(tokens, hidden, ref_hidden, heads, _options(*kind), *limits, head_sum=head_sum)  # type: ignore[arg-type]
    upstream = tokens.take(upstream.to(dtype))
    values, model, ref = _sweep(backend, problem, upstream, (Needs(*needs[:3]), Needs(*needs[3:])))
    return (
        (tokens.masked(values) * upstream).sum(),
        tokens.spread(model.hidden, hidden),
        or_empty(delivered(model.weight, weight_out), hidden),
        or_empty(model.bias, hidden),
        tokens.spread(ref.hidden, hidden),
        or_empty(ref.weight, hidden),
        or_empty(ref.bias, hidden),
    )


@divergence_sum.register_fake
def _fake_divergence_sum(*inputs):  # type: ignore[no-untyped-def]
    x = named(divergence_sum, inputs)
    return _fake_sum(x, x.needs)


@divergence_backward.register_fake
def _fake_divergence_backward(*inputs):  # type: ignore[no-untyped-def]
    x = named(divergence_backward, inputs)
    return _fake_sum(x, [x.needs[0], False, *x.needs[2:]])


def _fake_sum(x: Any, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    dtype = _result_dtype(x.hidden, x.ref_hidden)
    tensors = [getattr(x, name) for name in SIDES]
    return x.hidden.new_empty((), dtype=dtype), *fake_gradients(tensors, needs, [dtype] * len(SIDES))


# ---------------------------------------------------------------------------------------------------------------------
# From an op's arguments to the backend


def _options(kind: str, parameters: Sequence[float], normalized: bool) -> DivergenceOptions:
    mixture, skew, alpha = parameters
    return DivergenceOptions(kind, mixture, skew, alpha, normalized)  # type: ignore[arg-type]


def _heads(
    weight: Tensor, bias: Tensor | None, ref_weight: Tensor, ref_bias: Tensor | None, transforms: Sequence[float]
) -> tuple[Head, Head]:
    model, ref = (LogitTransform.unpacked(numbers) for numbers in (transforms[:3], transforms[3:]))
    return Head(weight, bias, *model.numbers), Head(ref_weight, ref_bias, *ref.numbers)


def _problem(
    tokens: Tokens,
    hidden: Tensor,
    ref_hidden: Tensor,
    heads: tuple[Head, Head],
    options: DivergenceOptions,
    chunk_bytes: int | None,
    group: str,
    widest: int,
    *,
    head_sum: Tensor | None = None,
) -> DivergenceProblem:
    model, ref = heads
    sides = Side(tokens.take(hidden), model, head_sum), Side(tokens.take(ref_hidden), ref)
    return DivergenceProblem(*sides, options, chunk_bytes, Ranks(named_group(group), widest) if group else None)


def _sweep(
    backend: str, problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]
) -> DivergenceResult:
    with no_autocast(problem.model.hidden.device):
        return backends.BACKENDS[backend].divergence(problem, upstream, needs)


def _result_dtype(*hidden: Tensor) -> torch.dtype:
    return torch.promote_types(*(statistics_dtype(x.dtype) for x in hidden))


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save_divergence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = named(divergence, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.units = x.units
    ctx.description = (x.kind, x.parameters, x.normalized, x.transforms)
    ctx.execution = (x.backend, x.chunk_bytes, x.group, x.widest)
    ctx.weight_out = x.weight_out  # not saved for backward: other backward passes may add to it before this one
    _, unit, ref_unit = output
    ctx.save_for_backward(unit, ref_unit, x.mask, *(getattr(x, name) for name in SIDES))


def _differentiate_divergence(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    unit, ref_unit, mask, *tensors = ctx.saved_tensors
    if grad is None:
        return gradients(divergence)
    if any(ctx.units):
        grad = grad if mask is None else torch.where(mask, grad, 0)
        hidden, ref_hidden = (
            (grad[:, None] * vector).to(vector.dtype) if wanted else None
            for vector, wanted in zip((unit, ref_unit), ctx.units, strict=True)
        )
        return gradients(divergence, hidden=hidden, ref_hidden=ref_hidden)
    needs = [need and x is not None for x, need in zip(tensors, ctx.needs_input_grad, strict=False)]
    needs[1] = differentiates_head(ctx, 1)
    arguments = grad, *tensors, mask, *ctx.description, needs, ctx.weight_out, *ctx.execution
    _, *results = divergence_sum(*arguments) if ctx.weight_out is None else divergence_backward(*arguments)
    needs[1] = needs[1] and ctx.weight_out is None
    by_name = zip(SIDES, results, tensors, needs, strict=True)
    return gradients(divergence, **{name: g.to(x.dtype) if need else None for name, g, x, need in by_name})


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = named(divergence_sum, inputs)
    tensors = [getattr(x, name) for name in SIDES]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs, ctx.dtypes = x.needs, [None if tensor is None else tensor.dtype for tensor in tensors]
    ctx.weight_out = x.weight_out  # as above
    _, *results = output
    ctx.save_for_backward(*results)


def _differentiate_sum(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    if grad is None:
        return gradients(divergence_sum)
    weight_out = ctx.weight_out if differentiates_head(ctx, 2) else None
    needs = add_scaled(weight_out, ctx.saved_tensors[1], grad, ctx.needs)
    by_name = zip(SIDES, ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    return gradients(
        divergence_sum, **{name: scaled(g, grad, dtype) if need else None for name, g, dtype, need in by_name}
    )


divergence.register_autograd(_differentiate_divergence, setup_context=_save_divergence)
divergence_sum.register_autograd(_differentiate_sum, setup_context=_save_sum)
