"""`logitless::token_loss`: a sum of per-token losses with its gradients, in one sweep over the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends.interface import Needs, SummedLosses
from ...types import statistics_dtype
from .. import functions
from ..checks import check_permutation
from ..tokens import of_targets, refuse_capture
from .derivative import coefficients
from .shared import (
    Execution,
    add_scaled,
    cast,
    differentiates_head,
    fake_gradients,
    gradients,
    named,
    no_autocast,
    or_empty,
    problem_of,
    refuse_double_backward,
    scaled,
)


@torch.library.custom_op("logitless::token_loss", mutates_args=())
def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    logit_weight: Tensor | None,
    token_inputs: Sequence[Tensor],
    groups: Tensor | None,
    function: int,
    numbers: Sequence[float],
    transform: Sequence[float],
    ignore_index: int,
    outputs: str,
    needs: Sequence[bool],
    weight_out: Tensor | None,
    backend: str,
    strategy: str,
    tolerance: float,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses' sum, log-probs and losses `[N]`, and the sum's gradients for hidden, weight and bias.

    The gradients have the statistics' dtype; the weight's has its own where the strategy is "single_chunk", which
    promises that all tokens fit one chunk. `function` is a handle of `functions`, `numbers` its floats. Tokens of one
    of the `groups [N]` are seen together; their losses are not one a token, and are left empty. The backward adds the
    weight's gradient to `weight_out`, if there is one.
    """
    execution = Execution(backend, strategy, tolerance, chunk_bytes, chunk_dtype)
    if execution.approximates():
        refuse_capture(hidden.device, "a tail-corrected backward", "use backward='recompute'")
    if groups is not None:
        refuse_capture(hidden.device, "a single pass over whole pairs or sequences", "use backward='recompute'")
    check_permutation(order)
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    if groups is not None:
        tokens = tokens.together(groups)
        groups = tokens.take(groups)
    rounds_head, names = strategy == "single_chunk", tuple(outputs.split())
    head = (hidden, weight, bias, targets, order, logit_weight, transform)
    problem = problem_of(*head, tokens, execution, rounds_head=rounds_head)
    kept = hidden.new_zeros(len(problem.hidden), dtype=statistics_dtype(hidden.dtype)) if groups is None else None
    of_chunk = coefficients(
        functions.of_handle(function, numbers),
        [tokens.take(x) for x in token_inputs],
        names,
        tokens.mask,
        differentiate=any(needs),
        kept=kept,
    )
    losses = SummedLosses(names, of_chunk, groups, Needs(*needs))
    with no_autocast(hidden.device):
        if execution.approximates():
            engine = backends.BACKENDS[backend].approximate(strategy)
            result = engine.single_pass(problem, losses, tolerance)
        else:
            result = backends.BACKENDS[backend].single_pass(problem, losses)
    d_weight = cast(result.gradients.weight, weight.dtype) if rounds_head else result.gradients.weight
    return (
        result.loss,
        tokens.spread(result.logprob, hidden),
        tokens.spread(kept, hidden),
        tokens.spread(result.gradients.hidden, hidden),
        or_empty(d_weight, hidden),
        or_empty(result.gradients.bias, hidden),
    )


@token_loss.register_fake
def _fake_token_loss(*inputs):  # type: ignore[no-untyped-def]
    x = named(token_loss, inputs)
    dtype = statistics_dtype(x.hidden.dtype)
    dtypes = (dtype, x.weight.dtype if x.strategy == "single_chunk" else dtype, dtype)
    tensors = (x.hidden, x.weight, x.bias)
    shapes = (), x.targets.shape, x.targets.shape[:1] if x.groups is None else 0
    return (*(x.hidden.new_empty(shape, dtype=dtype) for shape in shapes), *fake_gradients(tensors, x.needs, dtypes))


def _save_token_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = named(token_loss, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    _, _, _, *of_tensors = output
    ctx.save_for_backward(*of_tensors)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x.hidden, x.weight, x.bias)]
    ctx.needs, ctx.token_inputs, ctx.numbers = x.needs, len(x.token_inputs), len(x.numbers)
    ctx.weight_out = x.weight_out  # not saved for backward: other backward passes may add to it before this one


def _differentiate_token_loss(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    refuse_double_backward()
    # torch.library takes an empty list of numbers for a list of tensors.
    lists = {"token_inputs": [None] * ctx.token_inputs, "numbers": None if ctx.numbers else []}
    if grad is None:
        return gradients(token_loss, **lists)
    weight_out = ctx.weight_out if differentiates_head(ctx, 1) else None
    needs = add_scaled(weight_out, ctx.saved_tensors[1], grad, ctx.needs)
    of_tensors = (
        scaled(gradient, grad, dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    )
    return gradients(token_loss, **dict(zip(("hidden", "weight", "bias"), of_tensors, strict=True)), **lists)


token_loss.register_autograd(_differentiate_token_loss, setup_context=_save_token_loss)
