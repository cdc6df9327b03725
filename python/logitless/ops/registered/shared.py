"""The parts that all registered ops have in common: how they run, their arguments by name, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from ...backends.interface import Gradients, Problem
from ...types import APPROXIMATE, Head, LogitTransform, statistics_dtype
from ..tokens import Tokens


class Execution(NamedTuple):
    """How an op runs: the last arguments of `logprobs`, `logprobs_backward` and `token_loss`, in this order."""

    backend: str  # a name in `backends.BACKENDS`
    strategy: str  # "recompute", "single_pass" or "single_chunk" for exact gradients; one of `APPROXIMATE`
    tolerance: float  # of an approximate gradient
    chunk_bytes: int | None
    chunk_dtype: torch.dtype | None

    def approximates(self) -> bool:
        """Whether the gradients are approximate."""
        return self.strategy in APPROXIMATE


def problem_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    order: Tensor | None,
    logit_weight: Tensor | None,
    transform: Sequence[float],
    tokens: Tokens,
    execution: Execution,
    *,
    rounds_head: bool = False,
    head_sum: Tensor | None = None,
) -> Problem:
    """The tokens that a backend sees, and the head."""
    return Problem(
        tokens.take(hidden),
        Head(weight, bias, *LogitTransform.unpacked(transform).numbers),
        tokens.take(targets),
        execution.chunk_bytes,
        execution.chunk_dtype,
        order,
        rounds_head,
        cast(logit_weight, statistics_dtype(hidden.dtype)),
        head_sum,
    )


def no_autocast(device: torch.device) -> torch.autocast:
    """Switches autocast off: the public functions have cast already, and an op chooses every dtype itself."""
    return torch.autocast(device.type, enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and gradients by name


def named(op: CustomOpDef, inputs: tuple[Any, ...]) -> Any:
    """An op's arguments as attributes with the names of its schema."""
    return SimpleNamespace(**dict(zip(_names(op), inputs, strict=True)))


def gradients(op: CustomOpDef, **by_name: Any) -> tuple[Any, ...]:
    """One gradient for each of an op's arguments, in the order of its schema; None where none is named."""
    return tuple(by_name.get(name) for name in _names(op))


@cache
def _names(op: CustomOpDef) -> list[str]:
    return [argument.name for argument in op._opoverload._schema.arguments]


def refuse_double_backward() -> None:
    """Raises in a backward that is itself recorded (`create_graph=True`), whose gradient would be incomplete."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "logitless: the fused backward cannot be differentiated again (create_graph=True); use backend='reference'"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients as outputs


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """An op's output for a gradient: an empty tensor stands for None."""
    return like.new_empty(0) if x is None else x


def cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in another dtype, if there is one."""
    return None if gradient is None else gradient.to(dtype)


def gradient_outputs(
    found: Gradients, tokens: Tokens, hidden: Tensor, weight: Tensor, weight_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A backend's gradients as the outputs of a backward op: for all tokens, in the dtypes of hidden and weight.

    The head's is empty where it goes to a caller's buffer `weight_out`.
    """
    return (
        tokens.spread(cast(found.hidden, hidden.dtype), hidden),
        or_empty(cast(delivered(found.weight, weight_out), weight.dtype), hidden),
        or_empty(cast(found.bias, weight.dtype), hidden),
    )


def sum_in(weight_out: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A caller's buffer for the head's gradient, where a backend can add its products to it; else None."""
    return weight_out if weight_out is not None and weight_out.dtype == statistics_dtype(hidden.dtype) else None


def differentiates_head(ctx: Any, place: int) -> bool:
    """Whether a backward pass asks for the gradient of the head, which is an op's tensor argument number `place`.

    With a caller's buffer the answer counts, as every pass adds to it. A pass for other inputs alone, such as the first
    of two that a pipeline makes, must not; what it goes on to is the engine's knowledge, and `ctx` has not got it.
    """
    if not ctx.needs_input_grad[place]:
        return False
    if ctx.weight_out is None:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[place][0]))
    except RuntimeError:  # the head is itself what `torch.autograd.grad` was asked for, as a compiler does
        return True


def delivered(d_weight: Tensor | None, weight_out: Tensor | None) -> Tensor | None:
    """The head's gradient for autograd: None after it was added to a caller's buffer, if there is one."""
    if weight_out is None:
        return d_weight
    if d_weight is not None and d_weight is not weight_out:
        weight_out.add_(d_weight)
    return None


def fake_gradients(
    tensors: Sequence[Tensor | None], needs: Sequence[bool], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor]:
    """Fakes of the gradients of `tensors` that are needed; a dtype of None is the tensor's own."""
    like = next(x for x in tensors if x is not None)
    return [
        x.new_empty(x.shape, dtype=dtype or x.dtype) if need and x is not None else like.new_empty(0)
        for x, need, dtype in zip(tensors, needs, dtypes, strict=True)
    ]


def fake_gradient_outputs(x: Any) -> tuple[Tensor, ...]:
    """Fakes of `gradient_outputs`, from a backward op's arguments by name."""
    needs = [x.needs[0], x.needs[1] and x.weight_out is None, x.needs[2]]
    return tuple(fake_gradients((x.hidden, x.weight, x.bias), needs, (None, None, None)))


def add_scaled(weight_out: Tensor | None, d_weight: Tensor, factor: Tensor, needs: Sequence[bool]) -> list[bool]:
    """Adds `d_weight * factor` to a caller's buffer, if there is one; the gradients (the second is the weight's) left.

    One pass over the buffer, with nothing of its size beside.
    """
    if weight_out is None or not needs[1]:
        return list(needs)
    weight_out.addcmul_(d_weight, factor)
    return [needs[0], False, *needs[2:]]


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in `dtype`, in one pass over the gradient on a GPU.

    In place where this backward is the last to read the gradient and `dtype` is its own, which saves a copy of the
    head.
    """
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        return (gradient * factor).to(dtype)
    if gradient.dtype != dtype and gradient.device.type != "cpu":
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return (gradient * factor if keeps_graph() else gradient.mul_(factor)).to(dtype)
