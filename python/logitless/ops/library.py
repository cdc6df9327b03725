"""The `torch.library` ops: schemas, fakes and autograd formulas. What `torch.compile` sees of this library.

    logitless::logprobs            statistics of every token, and the unit gradient of a frozen head
    logitless::logprobs_backward   its gradient by recomputation
    logitless::logprobs_tail       statistics of every token, and what a tail-corrected backward needs of its logits
    logitless::logprobs_tail_backward
    logitless::token_loss          a loss of per-token statistics with its gradients, in one sweep

A custom op has a fixed number of outputs: a statistic or a gradient that nobody asked for is an empty tensor.
Ignored tokens are dropped here, before a backend sees the problem, since their number is data (`tokens`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.problem import Coefficients, Gradients, Needs, Problem, Upstream
from ..types import DIFFERENTIABLE, OUTPUTS, LogitTransform, TokenStats, statistics_dtype
from .checks import check_permutation
from .tokens import NO_LSE, Tokens, of_targets, refuse_capture

PerTokenLoss = Callable[..., Tensor]

_functions: dict[int, Any] = {}  # handle -> a function, or its description
_kept_handles: dict[Any, int] = {}
_next_handle = itertools.count()
_NUMBER = "<number>"


# ---------------------------------------------------------------------------------------------------------------------
# What every op shares


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    tokens: Tokens,
    transform: LogitTransform,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
    vocabulary_order: Tensor | None = None,
) -> Problem:
    """What a backend sees."""
    hidden, targets = tokens.take(hidden), tokens.take(targets)
    return Problem(hidden, weight, bias, targets, transform, chunk_bytes, chunk_dtype, vocabulary_order)


def _no_autocast(device: torch.device) -> torch.autocast:
    """The public functions have cast already; inside, every dtype is chosen."""
    return torch.autocast(device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# logprobs


@torch.library.custom_op("logitless::logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    outputs: str,
    unit_gradient: bool,
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six statistics `[N]` in the order of `TokenStats`, then `d logprob / d hidden [N, H]` where `unit_gradient`.

    `outputs` names the statistics wanted, with spaces between; logprob and lse come always."""
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    transform = LogitTransform(logit_scale, softcap, temperature)
    problem = _problem(hidden, weight, bias, targets, tokens, transform, chunk_bytes, chunk_dtype)
    with _no_autocast(hidden.device):
        stats, unit = backends.BACKENDS[backend].forward(problem, tuple(outputs.split()), unit_gradient)
    unit = None if unit is None else unit.to(hidden.dtype)
    results = [tokens.spread(x, hidden) for x in (*stats, unit)]
    return results[0], results[1], results[2], results[3], results[4], results[5], results[6]


@logprobs.register_fake
def _logprobs_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, logit_scale, softcap, temperature, ignore_index, outputs, unit_gradient, *_
):
    dtype = statistics_dtype(hidden.dtype)
    wanted = {"logprob", "lse", *outputs.split()}
    stats = [
        hidden.new_empty(targets.shape, dtype=dtype) if name in wanted else hidden.new_empty(0) for name in OUTPUTS
    ]
    return (*stats, hidden.new_empty(hidden.shape) if unit_gradient else hidden.new_empty(0))


@torch.library.custom_op("logitless::logprobs_backward", mutates_args=())
def logprobs_backward(
    upstream: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Sequence[Tensor | None],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: Sequence[bool],
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, in their dtypes, from those of logprob, lse, entropy and mean logit."""
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    transform = LogitTransform(logit_scale, softcap, temperature)
    problem = _problem(hidden, weight, bias, targets, tokens, transform, chunk_bytes, chunk_dtype)
    with _no_autocast(hidden.device):
        gradients = backends.BACKENDS[backend].backward(
            replace(problem, rounds_head=True),
            _known(stats, tokens),
            Upstream(*(tokens.take(g) for g in upstream)),
            Needs(*needs),
        )
    return _in_their_dtypes(gradients, tokens, hidden, weight)


def _in_their_dtypes(
    gradients: Gradients, tokens: Tokens, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulated gradients as an op returns them."""
    return (
        tokens.spread(_in_its_dtype(gradients.hidden, hidden), hidden),
        _or_empty(_in_its_dtype(gradients.weight, weight), hidden),
        _or_empty(_in_its_dtype(gradients.bias, weight), hidden),
    )


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An op's output of a head's gradient: an empty tensor for None."""
    return like.new_empty(0) if x is None else x


def _known(stats: Sequence[Tensor | None], tokens: Tokens) -> TokenStats:
    """The forward's statistics for a backward."""
    found = TokenStats(*(tokens.take(x) for x in stats))
    return found._replace(lse=tokens.take(stats[OUTPUTS.index("lse")], NO_LSE))


def _in_its_dtype(gradient: Tensor | None, of: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(of.dtype)


@logprobs_backward.register_fake
def _logprobs_backward_fake(  # type: ignore[no-untyped-def]
    upstream, hidden, weight, bias, targets, stats, logit_scale, softcap, temperature, ignore_index, needs, *_
):
    return _empty_like_wanted(hidden, weight, bias, needs)


def _empty_like_wanted(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Fakes of the gradients asked for."""
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _save_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, logit_scale, softcap, temperature, ignore_index, outputs, unit, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(hidden, weight, bias, targets, *output[:3], output[6])
    ctx.transform, ctx.ignore_index = (logit_scale, softcap, temperature), ignore_index
    ctx.outputs, ctx.unit, ctx.rest = outputs.split(), unit, rest


def _differentiate_logprobs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    hidden, weight, bias, targets, logprob, lse, entropy, unit = ctx.saved_tensors
    upstream = _upstream(ctx.outputs, grads)
    found: list[Tensor | None] = [None] * 13
    if all(g is None for g in upstream):
        return tuple(found)
    if ctx.unit:
        transform = LogitTransform(*ctx.transform)
        found[0] = _scale_unit(unit, weight, targets, logprob, lse, transform, ctx.ignore_index, upstream)
        return tuple(found)
    needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
    stats = [logprob, lse, entropy if "entropy" in ctx.outputs else None]
    gradients = logprobs_backward(
        upstream, hidden, weight, bias, targets, stats, *ctx.transform, ctx.ignore_index, needs, *ctx.rest
    )
    found[:3] = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return tuple(found)


def _upstream(outputs: Sequence[str], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Of the differentiable statistics; of one that nobody asked for there is an empty tensor."""
    wanted = ("logprob", "lse", *outputs)
    return [g if name in wanted else None for name, g in zip(DIFFERENTIABLE, grads, strict=False)]


def _refuse_double_backward() -> None:
    """Called by a backward: gradients are recorded in there with `create_graph=True` alone, and would be incomplete."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "logitless: the fused backward cannot be differentiated again (create_graph=True); use backend='reference'"
        )


def _scale_unit(
    unit: Tensor,
    weight: Tensor,
    targets: Tensor,
    logprob: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    ignore_index: int,
    upstream: Sequence[Tensor | None],
) -> Tensor:
    """A frozen head's `d_hidden = (a - b) unit + b c_t weight_t + m slope mean(weight)`, a scaling of rows."""
    a, b, _, m = upstream
    total = torch.zeros(unit.shape, dtype=logprob.dtype, device=unit.device)
    counts = targets != ignore_index
    a, b, m = (None if g is None else torch.where(counts, g, 0) for g in (a, b, m))
    if a is not None:
        total = total + a[:, None] * unit
    if b is not None:
        slope = transform.derivative_at(logprob + lse) * b
        total = total - b[:, None] * unit + slope[:, None] * weight[torch.where(counts, targets, 0)]
    if m is not None:
        row = weight.mean(0, dtype=total.dtype) * transform.slope
        total = total + m[:, None] * row
    return total.to(unit.dtype)


logprobs.register_autograd(_differentiate_logprobs, setup_context=_save_logprobs)


# ---------------------------------------------------------------------------------------------------------------------
# logprobs, tail-corrected


@torch.library.custom_op("logitless::logprobs_tail", mutates_args=())
def logprobs_tail(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    outputs: str,
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
    tail_tolerance: float,
    vocabulary_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six statistics as `logprobs`, then the backend's `Saved`."""
    refuse_capture(hidden.device, "a tail-corrected backward", "use backward='recompute'")
    check_permutation(vocabulary_order)
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    transform = LogitTransform(logit_scale, softcap, temperature)
    problem = _problem(hidden, weight, bias, targets, tokens, transform, chunk_bytes, chunk_dtype, vocabulary_order)
    with _no_autocast(hidden.device):
        found, saved = backends.STRATEGIES[backend].tail_forward(problem, tuple(outputs.split()), tail_tolerance)
    stats = [tokens.spread(x, hidden) for x in found.stats]
    counts, column, value, by_block = saved
    counts, by_block = tokens.spread(counts, hidden), tokens.spread(by_block, hidden)
    return (stats[0], stats[1], stats[2], stats[3], stats[4], stats[5], counts, column, value, by_block)


@logprobs_tail.register_fake
def _logprobs_tail_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, logit_scale, softcap, temperature, ignore_index, outputs, backend, *_
):
    dtype, transform = statistics_dtype(hidden.dtype), LogitTransform(logit_scale, softcap, temperature)
    *stats, _ = _logprobs_fake(
        hidden, weight, bias, targets, logit_scale, softcap, temperature, ignore_index, outputs, False
    )
    width = backends.STRATEGIES[backend].tail_blocks(hidden, weight, transform)
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        *stats,
        hidden.new_empty(targets.shape, dtype=torch.int32),
        hidden.new_empty(entries, dtype=torch.int32),
        hidden.new_empty(entries, dtype=dtype),
        hidden.new_empty((targets.shape[0], width), dtype=dtype),
    )


@torch.library.custom_op("logitless::logprobs_tail_backward", mutates_args=())
def logprobs_tail_backward(
    upstream: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    needs: Sequence[bool],
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
    tail_tolerance: float,
    vocabulary_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `logprobs_backward`, from what `logprobs_tail` saved."""
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    transform = LogitTransform(logit_scale, softcap, temperature)
    problem = _problem(hidden, weight, bias, targets, tokens, transform, chunk_bytes, chunk_dtype, vocabulary_order)
    counts, column, value, by_block = saved
    counts, by_block = tokens.take(counts), tokens.take(by_block)
    with _no_autocast(hidden.device):
        gradients = backends.STRATEGIES[backend].tail_backward(
            problem,
            _known(stats, tokens),
            (counts, column, value, by_block),
            Upstream(*(tokens.take(g) for g in upstream)),
            Needs(*needs),
            tail_tolerance,
        )
    return _in_their_dtypes(gradients, tokens, hidden, weight)


@logprobs_tail_backward.register_fake
def _logprobs_tail_backward_fake(  # type: ignore[no-untyped-def]
    upstream, hidden, weight, bias, targets, stats, saved, logit_scale, softcap, temperature, ignore_index, needs, *_
):
    return _empty_like_wanted(hidden, weight, bias, needs)


def _save_logprobs_tail(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, logit_scale, softcap, temperature, ignore_index, outputs, *rest, order = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(hidden, weight, bias, targets, order, *output[:3], *output[6:])
    ctx.transform, ctx.ignore_index = (logit_scale, softcap, temperature), ignore_index
    ctx.outputs, ctx.rest = outputs.split(), rest


def _differentiate_logprobs_tail(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward()
    hidden, weight, bias, targets, order, logprob, lse, entropy, *saved = ctx.saved_tensors
    upstream = _upstream(ctx.outputs, grads)
    found: list[Tensor | None] = [None] * 14
    if all(g is None for g in upstream):
        return tuple(found)
    needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
    stats = [logprob, lse, entropy if "entropy" in ctx.outputs else None]
    head = (*ctx.transform, ctx.ignore_index)
    gradients = logprobs_tail_backward(
        upstream, hidden, weight, bias, targets, stats, saved, *head, needs, *ctx.rest, order
    )
    found[:3] = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return tuple(found)


logprobs_tail.register_autograd(_differentiate_logprobs_tail, setup_context=_save_logprobs_tail)


# ---------------------------------------------------------------------------------------------------------------------
# token_loss


@torch.library.custom_op("logitless::token_loss", mutates_args=())
def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_inputs: Sequence[Tensor],
    groups: Tensor | None,
    function: int,
    numbers: Sequence[float],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    outputs: str,
    needs: Sequence[bool],
    backend: str,
    chunk_bytes: int | None,
    chunk_dtype: torch.dtype | None,
    tail_tolerance: float | None,
    vocabulary_order: Tensor | None,
    rounds_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of a function's losses over the tokens that count, their log-probs `[N]`, and the sum's gradients for
    hidden, weight and bias, in the statistics' dtype; the weight's in its own where `rounds_head`. `function` is a
    handle of `_functions`, `numbers` its floats; tokens of one of the `groups [N]` are seen together.
    `tail_tolerance`: of a tail-corrected gradient; None: exact."""
    if tail_tolerance is not None:
        refuse_capture(hidden.device, "a tail-corrected backward", "use backward='recompute'")
    if groups is not None:
        refuse_capture(hidden.device, "a single pass over whole pairs or sequences", "use backward='recompute'")
    check_permutation(vocabulary_order)
    tokens = of_targets(targets, ignore_index, weight.shape[0])
    if groups is not None:
        tokens = tokens.together(groups)
        groups = tokens.take(groups)
    transform = LogitTransform(logit_scale, softcap, temperature)
    problem = _problem(hidden, weight, bias, targets, tokens, transform, chunk_bytes, chunk_dtype, vocabulary_order)
    problem = replace(problem, rounds_head=rounds_head)
    inputs = [tokens.take(x) for x in token_inputs]
    names = tuple(outputs.split())
    made = _rebuild(_functions[function], iter(numbers))
    coefficients = _coefficients(made, inputs, names, tokens.mask, differentiate=any(needs), per_token=groups is None)
    module, wanted = backends.STRATEGIES[backend], Needs(*needs)
    with _no_autocast(hidden.device):
        if tail_tolerance is None:
            found = module.single_pass(problem, names, coefficients, groups, wanted)
        else:
            found = module.tail_single_pass(problem, names, coefficients, groups, wanted, tail_tolerance)
    loss, logprob, gradients = found
    return (
        loss,
        tokens.spread(logprob, hidden),
        tokens.spread(gradients.hidden, hidden),
        _or_empty(_in_its_dtype(gradients.weight, weight) if rounds_head else gradients.weight, hidden),
        _or_empty(gradients.bias, hidden),
    )


@token_loss.register_fake
def _token_loss_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, targets, *options
):
    needs, rounds_head = options[9], options[-1]
    dtype = statistics_dtype(hidden.dtype)
    dtypes = (dtype, weight.dtype if rounds_head else dtype, dtype)
    gradients = [
        x.new_empty(x.shape, dtype=kind) if need and x is not None else hidden.new_empty(0)
        for x, kind, need in zip((hidden, weight, bias), dtypes, needs, strict=True)
    ]
    return (hidden.new_empty((), dtype=dtype), hidden.new_empty(targets.shape, dtype=dtype), *gradients)


def _coefficients(
    function: PerTokenLoss,
    inputs: Sequence[Tensor],
    outputs: tuple[str, ...],
    mask: Tensor | None,
    *,
    differentiate: bool,
    per_token: bool,
) -> Coefficients:
    """`function` of the statistics named, chunk by chunk, with its derivative by autograd; 0 outside a mask."""

    def of_chunk(stats: TokenStats, rows: slice) -> tuple[Tensor, Upstream]:
        here = Tokens(None, None if mask is None else mask[rows])
        stats = TokenStats(*(here.take(x) if name in outputs else None for name, x in zip(OUTPUTS, stats, strict=True)))
        constants = [x[rows] for x in inputs]
        shape = (rows.stop - rows.start,) if per_token else None
        if not differentiate:
            return here.take(check_losses(function(stats, *constants), shape)).sum(), Upstream()
        with _autograd_inside_an_op():
            leaves = TokenStats(
                *(
                    x.detach().requires_grad_(name in DIFFERENTIABLE) if x is not None else None
                    for name, x in zip(OUTPUTS, stats, strict=True)
                )
            )
            losses = check_losses(function(leaves, *constants), shape)
            _check_leaves(losses, leaves)
            total = here.take(losses).sum()
            wanted = [x for x in leaves[:4] if x is not None]
            found = iter(torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * 4)
        return total.detach(), Upstream(*(None if x is None else here.take(next(found)) for x in leaves[:4]))

    return of_chunk


def check_losses(losses: object, shape: tuple[int, ...] | None) -> Tensor:
    """One loss per token, where a shape says how many."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"per_token_loss: expected it to return a tensor, got {type(losses).__name__}")
    if shape is not None and losses.shape != shape:
        raise ValueError(f"per_token_loss: expected losses of shape {list(shape)} from it, got {list(losses.shape)}")
    return losses


def _check_leaves(losses: Tensor, leaves: TokenStats) -> None:
    """The gradient leads to the statistics alone."""
    known = {id(x) for x in leaves if x is not None}
    for leaf in _graph_leaves(losses):
        if id(leaf) not in known:
            raise ValueError(
                f"per_token_loss: closes over a tensor of shape {list(leaf.shape)} that requires a gradient, which the "
                "single pass cannot give; detach it, or use linear_logprobs and apply the loss to its result"
            )


def _graph_leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that autograd would accumulate a gradient into."""
    if tensor.grad_fn is None:
        if tensor.requires_grad:
            yield tensor
        return
    stack, seen = [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """A custom op runs below autograd; the derivative of a per-token loss, on `[chunk]` vectors, wants it back."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def _save_token_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.needs, ctx.token_inputs, ctx.numbers = inputs[13], len(inputs[4]), len(inputs[7])


def _differentiate_token_loss(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    _refuse_double_backward()
    found: list[Any] = [None] * 20
    found[4] = [None] * ctx.token_inputs
    found[7] = None if ctx.numbers else []  # torch.library takes an empty list for a list of tensors
    if grad is None:
        return tuple(found)
    for i, (gradient, dtype, need) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)):
        if need:
            found[i] = _scaled(gradient, grad, dtype)
    return tuple(found)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in a dtype, in one pass over it on a GPU; in place where this backward is the last to read it
    and no other dtype is wanted, which saves a copy of the head."""
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        return (gradient * factor).to(dtype)
    if gradient.dtype != dtype and gradient.device.type != "cpu":
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return (gradient * factor if keeps_graph() else gradient.mul_(factor)).to(dtype)


token_loss.register_autograd(_differentiate_token_loss, setup_context=_save_token_loss)


def describe(function: PerTokenLoss, numbers: list[float]) -> Any:
    """The function in constants that `torch.compile` can hand over: a dataclass as `(class, values)`, fields likewise.

    An object made inside a compiled region must not go over as it stands: Dynamo would rebuild it without its fields.
    Its floats, which Dynamo may have made symbolic, are appended to `numbers` and travel as arguments of the op.
    """
    if isinstance(function, FunctionType):
        return function
    if not is_dataclass(function):
        raise TypeError(f"per_token_loss: under torch.compile a function or a dataclass, got {type(function).__name__}")
    values: list[Any] = []
    for field in fields(function):
        value = getattr(function, field.name)
        if isinstance(value, float):
            numbers.append(value)
            value = _NUMBER
        values.append(describe(value, numbers) if callable(value) else value)
    return (type(function), tuple(values))


def _rebuild(description: Any, numbers: Iterator[float]) -> Any:
    if isinstance(description, tuple) and description and isinstance(description[0], type):
        made, values = description
        names = (field.name for field in fields(made))  # some fields may be keyword-only
        return made(**{name: _rebuild(value, numbers) for name, value in zip(names, values, strict=True)})
    return next(numbers) if isinstance(description, str) and description == _NUMBER else description


def keep(description: Any) -> int:
    """A handle for the life of the process: a compiled graph calls the function again and again."""
    if description not in _kept_handles:
        _kept_handles[description] = next(_next_handle)
        _functions[_kept_handles[description]] = description
    return _kept_handles[description]


# What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes.
keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def function_handle(function: PerTokenLoss) -> Iterator[int]:
    """The function's number, as an op takes no Python object; given up again at the end of an eager call."""
    handle = next(_next_handle)
    _functions[handle] = function
    try:
        yield handle
    finally:
        del _functions[handle]
