"""`linear_token_loss`, the single-pass form: a loss of each token's own statistics, three GEMMs in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from .. import reduce
from ..peers import refuse_unknown
from ..types import LIST_OUTPUTS, OPTION_NAMES, OUTPUTS, OptionKeywords, Options, Reduction
from . import checks, functions
from .call import Call, prepare_call
from .functions import PerTokenLoss
from .logprobs import linear_logprobs
from .registered.derivative import check_losses
from .registered.token_loss import token_loss
from .sharded import on_whole_tensors
from .vocabulary_parallel import OfWhole, shard_of, with_common_chunks


@on_whole_tensors
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    per_token_loss: PerTokenLoss,
    *,
    token_inputs: Sequence[Tensor] = (),
    outputs: tuple[str, ...] = ("logprob",),
    logit_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    """`sum_i per_token_loss(stats_i, *inputs_i) / normalizer` over the tokens that count, in one sweep over the logits.

    Where a token's loss depends on that token's own statistics alone, its derivative is known as soon as they are, so a
    chunk's logits become its gradient at once: three GEMMs of 2 N H V flops in all, two where the head is frozen.

    Args:
        hidden, weight, targets: `[..., H]`, `[V, H]`, `[...]` (or `[..., K]`), as in `linear_logprobs`.
        per_token_loss: any function of `(TokenStats of [n] vectors, *[n] token inputs)` that returns `[n]` losses, of
            differentiable PyTorch operations. It is called chunk by chunk, or once with all tokens, so it must be
            elementwise along them; what it gives for tokens that do not count is left out. What it closes over gets no
            gradient. Without any gradient wanted the forward alone is computed.
        token_inputs: constants of shape `[...]` (such as a reference's log-probs), cut into chunks with the tokens; of
            shape `[..., K]` where the targets have lists.
        outputs: the fields of `TokenStats` that the function reads.
        logit_weight: `[V]` constants, the weights of `mean_logit`, as in `linear_logprobs`.
        reduction: "mean" divides by the number of tokens that count, or by `normalizer` (a number or a tensor of one:
            the global count under gradient accumulation or data parallelism); all ignored gives 0, connected to the
            graph. "sum"; "none" returns `[...]`, 0 where ignored.
        **options: of the head and the backend, as in `linear_logprobs`. `backward="single_pass"` with
            `reduction="none"` and a trainable head is refused: the upstream gradients come too late; "auto" recomputes.

    Returns:
        A scalar (or `[...]` for "none"), float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as `linear_logprobs`; a token input of another shape, or that requires a gradient; a
            function that closes over a tensor that requires a gradient.

    Under `torch.compile` a single pass calls the function as it stands, inside the op, without a graph break; it must
    not change between calls of one compiled graph. Elsewhere it is compiled with what surrounds it.
    """
    refuse_unknown("linear_token_loss", options, OPTION_NAMES)
    checks.check_choice("reduction", reduction, get_args(Reduction))
    reduce.check(reduction, normalizer)
    checks.check_tokens(hidden, targets)
    if not callable(per_token_loss):
        raise TypeError(f"per_token_loss: expected a function, got {type(per_token_loss).__name__}")
    call = prepare_call(hidden, weight, targets, Options(**options, logit_weight=logit_weight), lists=True)
    outputs = checks.check_outputs(outputs, with_targets=True, known=LIST_OUTPUTS if call.listed() else OUTPUTS)
    checks.check_logit_weight(logit_weight, weight, outputs)
    for i, value in enumerate(token_inputs):
        check_token_input(f"token_inputs[{i}]", value, hidden, lists=call.listed())
    if call.listed() and call.approximates():
        raise ValueError(f"backward: {options['backward']!r} takes one target a token here; see linear_logprobs")
    counts = counted(targets, call)
    if normalizer is None:
        normalizer = counts.sum().float()
    if reduction == "none" or not sums_in_one_sweep(call, outputs):
        if reduction == "none" and call.options.backward == "single_pass" and call.trains_head():
            raise ValueError(
                "backward: 'single_pass' cannot serve reduction='none' with a trainable head, whose upstream gradients "
                "come after the pass; use backward='auto' or 'recompute'"
            )
        stats = linear_logprobs(hidden, weight, targets, outputs=outputs, logit_weight=logit_weight, **options)
        # What stands behind an ignored token may be anything; a function's derivative there must not be NaN.
        known = [reduce.zero_outside(counts, x) for x in token_inputs]
        losses = check_losses(per_token_loss(stats, *known), tuple(counts.shape))
        rule = reduce.Rule(None, 1.0 if reduction == "sum" else normalizer)
        return reduce.apply(losses, counts, rule, keep_tokens=reduction == "none")
    flat = [x.reshape(len(call.hidden), *x.shape[hidden.dim() - 1 :]) for x in token_inputs]
    total = sum_in_one_sweep(call, per_token_loss, flat, outputs).loss
    return total if reduction == "sum" else reduce.mean(total, normalizer)


def counted(targets: Tensor, call: Call) -> Tensor:
    """The tokens that count, of the shape of the targets without their lists."""
    if not call.listed():
        return targets != call.options.ignore_index
    assert call.targets is not None
    return (call.targets >= 0).any(-1).view(targets.shape[:-1])


class SweepResult(NamedTuple):
    """The results of one sweep."""

    loss: Tensor  # [] sum of the losses, differentiable
    logprob: Tensor  # of the flat targets' shape, a constant
    losses: Tensor  # [N], constants; empty with groups


def sums_in_one_sweep(call: Call, outputs: tuple[str, ...]) -> bool:
    """Whether `sum_in_one_sweep` serves a prepared call; where not, the statistics come first, and then the loss.

    Without a gradient the forward alone will do. Over a group the chunks must be alike on all ranks, which those of an
    approximate strategy need not be, and a chunk's statistics have no `correct`.
    """
    if not any(call.needs()) or call.options.backward == "recompute" or call.options.backend == "reference":
        return False
    return call.options.group is None or not (call.approximates() or "correct" in outputs)


def sum_in_one_sweep(
    call: Call,
    function: PerTokenLoss,
    inputs: Sequence[Tensor],
    outputs: tuple[str, ...],
    groups: Tensor | None = None,
) -> SweepResult:
    """The sum of a loss over a prepared call. Tokens of one of the `groups [N]` must be in one chunk."""
    if call.options.group is not None:
        shard = shard_of(call)
        function, inputs = OfWhole.of(function, outputs, shard, call.group()), [*OfWhole.inputs(shard), *inputs]
        names = ("logprob", "lse", *outputs, *(("tail",) if call.listed() else ()))
        call, outputs = with_common_chunks(shard.call, call.group()), tuple(dict.fromkeys(names))
    if torch.compiler.is_compiling():
        numbers: list[float] = []
        return _total(call, functions.keep(functions.describe(function, numbers)), numbers, inputs, outputs, groups)
    with functions.handle_of(function) as handle:
        return _total(call, handle, [], inputs, outputs, groups)


def _total(
    call: Call,
    function: int,
    numbers: list[float],
    inputs: Sequence[Tensor],
    outputs: tuple[str, ...],
    groups: Tensor | None,
) -> SweepResult:
    assert call.targets is not None
    options = call.options
    loss, logprob, losses, *_ = token_loss(
        call.hidden,
        call.weight,
        options.bias,
        call.targets,
        options.vocabulary_order,
        options.logit_weight,
        list(inputs),
        groups,
        function,
        numbers,
        options.transform.packed(),
        options.ignore_index,
        " ".join(outputs),
        list(call.needs()),
        options.grad_out,
        *call.execution("single_chunk" if call.fits_one_chunk(outputs) else "single_pass"),
    )
    return SweepResult(loss, logprob, losses)


def check_token_input(name: str, value: Tensor, hidden: Tensor, *, lists: bool = False) -> None:
    """Raises unless the value is a constant of the tokens' shape; with `lists`, of some numbers a token."""
    checks.check_tensor(name, value, f"{list(hidden.shape[:-1])}")
    if (value.shape[: hidden.dim() - 1] if lists else value.shape) != hidden.shape[:-1]:
        raise ValueError(f"{name}: expected shape {list(hidden.shape[:-1])} like targets, got {list(value.shape)}")
    checks.check_constant(name, value, hidden.device)
