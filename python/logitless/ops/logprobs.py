"""`linear_logprobs`, the primitive: checks, choice of backend and strategy, then the op."""

from __future__ import annotations

from typing import Any, Never

import torch
from torch import Tensor

from .. import reference
from ..peers import refuse_unknown
from ..types import LIST_OUTPUTS, OUTPUTS, TAIL_TOLERANCE, BackendName, BackwardName, Options, TokenStats
from . import checks
from .call import Call, flat_ids, prepare_call
from .listed import KEPT_OUTPUTS, exact_statistics, kept_statistics, largest_logit, statistics_from_lse
from .registered.logprobs import logprobs
from .sharded import on_whole_tensors
from .vocabulary_parallel import combined, present, shard_of


@on_whole_tensors
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    among: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprob",),
    constants: tuple[str, ...] = (),
    logit_weight: Tensor | None = None,
    backend: BackendName = "auto",
    backward: BackwardName = "auto",
    chunk_bytes: int | None = None,
    chunk_dtype: torch.dtype | None = None,
    tail_tolerance: float = TAIL_TOLERANCE,
    vocabulary_order: Tensor | None = None,
    group: Any = None,
    grad_out: Tensor | None = None,
    **unknown: Never,
) -> TokenStats:
    """Per-token statistics of `softmax(z)`, `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) /
    temperature`, with no `[tokens, vocabulary]` tensor.

    Args:
        hidden: `[..., H]`, any strides; float64, float32, bfloat16 or float16. Under autocast, cast as `F.linear` does.
        weight: `[V, H]`, the dtype and device of `hidden`; also sharded (DTensor, ZeRO-3): docs/sharded.md.
        targets: `[...]` int64 or int32 ids in [0, V), aligned with `hidden` (no shift), or `ignore_index`. None where
            `outputs` asks only for `lse`, `entropy`, `mean_logit` or `log_sum_sq`. Or `[..., K]`, several ids a token,
            -1 or `ignore_index` for an absent place, at the price of one: `logprob` is `[..., K]` then, and `outputs`
            are of logprob, lse, entropy and `tail`, the logarithm of the mass not listed. An id listed twice counts
            once. A token without an id gives 0; an absent place, 0.
        among: `[..., K]` ids, -1 or `ignore_index` for an absent place: the distribution is renormalised over each
            token's own list, as a sampler's top-k and top-p do, and every target must be in it. No product with the
            vocabulary is made: 2 N K H flops. `outputs` are of logprob, lse, entropy, correct and log_sum_sq. With
            `among=targets`, both `[..., K]`: the log-probs of the whole list.
        bias: `[V]`; -inf masks a vocabulary entry.
        logit_scale, softcap, temperature: see `LogitTransform`. The defaults leave the logits as they are.
        ignore_index: tokens with this target give 0 and no gradient, and cost nothing. -100 as in PyTorch.
        outputs: which fields of `TokenStats` to compute. The differentiable ones may all be used together.
        constants: which of `outputs` come without a gradient, as a metric does: `("entropy",)` beside a loss of logprob
            leaves a frozen head its two GEMMs.
        logit_weight: `[V]` constants w, with which `mean_logit` is `mean_j w_j z_j` (NaN where w is 0 and the logit
            -inf). Under a softcap a chunk's rows are then PyTorch's operations, whatever the backend.
        backend: "reference" (full logits, plain autograd), "cuda", "triton", "chunked", or "auto": the first of the
            last three that takes these tensors (`python -m logitless info` says which, and why not the others).
        backward: "recompute" computes each chunk's logits again (1 + 3 GEMMs of 2 N H V flops); "single_pass" keeps
            `d logprob / d hidden` of a frozen head (2 GEMMs in all, for any loss on top; not for `entropy`, nor a
            trainable bias, nor `mean_logit` under a softcap). "auto" takes the cheapest that is exact.
            "tail_corrected" approximates the gradients of logprob and lse, within a bound that it reports
            (`tail_report`), for little more than the forward's GEMM: docs/tail-corrected.md. Exact where the
            distributions are too flat for it, for entropy's gradient, for mean_logit's, and under a softcap.
            "screened", on a CPU, has the forward approximate too what carries no probability, for half a GEMM in all.
        chunk_bytes: budget for a chunk's float32 logits. None: 32 MiB on a CPU; elsewhere 256 MiB, or the bytes of a
            trainable head's float32 gradient where that is more (docs/chunks.md).
        chunk_dtype: of a chunk's logits, where chunks are used. None: float32 (float64 for float64). torch.bfloat16
            halves their memory traffic on a GPU, lets a CPU with bfloat16 units use them for bfloat16 operands, and
            rounds every logit by up to 2^-9 of itself (backends/chunked.py has the error measured); never a default.
        tail_tolerance: of these two alone, in [0, 1]: an entry of the logits whose gradient is below
            `tail_tolerance / 8` times the mean token's is left to its block's mean; where a GPU's kernels take whole
            blocks of 128 entries, a block below `tail_tolerance` times that. 2^-12 has twice the error of bfloat16
            arithmetic on a trained model, 2^-13 its own; 0 is exact.
        vocabulary_order: of these two alone, `[V]` int64, from `logitless.vocabulary_order`: like entries side by
            side, which a corrected tail is much nearer to. None: the head's own order.
        group: the processes that share the head's rows (tensor parallelism over the vocabulary), a
            `logitless.VocabularyGroup`, a process group or a `DeviceMesh` of one dimension. `weight`, `bias`,
            `logit_weight` and `vocabulary_order` are then this process's own rows', everything else is the same in all
            of them; docs/sharded.md. One more small message, and for `correct` one more product. None: one process
            has the whole head.
        grad_out: `[V, H]`, float32 (float64 for float64) or of the weight's dtype, contiguous, such as Megatron's
            `main_grad`: every backward pass adds the head's gradient to it, and autograd gets none, so that
            `weight.grad` stays as it is. In float32 nothing is rounded to the weight's dtype on the way; the exact
            "recompute" makes its products in the buffer, without another of its size. `weight` must be a trainable
            leaf. The bias's gradient goes to autograd as ever. Not with backend="reference".

    Returns:
        `TokenStats`, each field of `hidden`'s leading shape (logprob: of the targets') in float32 (float64 for
        float64); None where not asked for.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or value, before anything is computed, and a target
            outside [0, V). On a GPU the last is a device-side assertion, so that nothing waits for it.
        RuntimeError: the gradient is differentiated again (`create_graph=True`) with a backend other than "reference".
    """
    refuse_unknown("linear_logprobs", unknown)
    options = Options(
        bias,
        logit_scale,
        softcap,
        temperature,
        ignore_index,
        backend,
        backward,
        chunk_bytes,
        chunk_dtype,
        tail_tolerance,
        vocabulary_order,
        group,
        logit_weight,
        grad_out,
    )
    call = prepare_call(hidden, weight, targets, options, lists=True)
    checks.check_constants(constants, outputs)
    if among is not None:
        stats = _among(call, hidden, among, targets, outputs)
    else:
        known = LIST_OUTPUTS if call.listed() else OUTPUTS
        outputs = checks.check_outputs(outputs, with_targets=targets is not None, known=known)
        checks.check_logit_weight(logit_weight, weight, outputs)
        stats = _of_lists(call, outputs) if call.listed() else _statistics_of_call(call, outputs, constants)
    if constants:
        fields = zip(TokenStats._fields, stats, strict=True)
        stats = TokenStats(*(x if x is None or name not in constants else x.detach() for name, x in fields))
    shape = hidden.shape[:-1]
    return TokenStats(*(None if x is None else x.reshape((*shape, *x.shape[1:])) for x in stats))


def _among(call: Call, hidden: Tensor, among: Tensor, targets: Tensor | None, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics of a distribution over the listed ids alone."""
    if targets is None or (call.listed() and among is not targets):
        raise ValueError("targets: with among, expected one id a token, or the same tensor as among")
    outputs = checks.check_outputs(
        outputs, with_targets=not call.listed() or "correct" not in outputs, known=KEPT_OUTPUTS
    )
    checks.check_logit_weight(call.options.logit_weight, call.weight, outputs)
    checks.check_targets("among", among, hidden, lists=True)
    if among.dim() != hidden.dim():
        raise ValueError(f"among: expected shape [..., K], several ids a token, got {list(among.shape)}")
    return kept_statistics(call, flat_ids(among, hidden, call.options.ignore_index), outputs)


def _of_lists(call: Call, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics of targets `[N, K]`; an approximate strategy has those of the whole distribution."""
    if not call.approximates():
        return exact_statistics(call, outputs) if call.options.group is None else _of_shard(call, outputs)
    assert call.targets is not None
    some_id = call.targets.amax(-1)
    one = call._replace(targets=some_id.masked_fill(some_id < 0, call.options.ignore_index))
    names = ("lse", *(name for name in outputs if name == "entropy"))
    return statistics_from_lse(call, outputs, _statistics_of_call(one, names))


def _statistics_of_call(call: Call, outputs: tuple[str, ...], constants: tuple[str, ...] = ()) -> TokenStats:
    """The statistics that `outputs` names, `[N]` each, None for the others; `constants` need no gradient."""
    if call.options.group is not None:
        return _of_shard(call, outputs, constants)
    if call.options.backend == "reference":
        return _reference(call, outputs)
    options = call.options
    # Without targets any token id serves: the statistics asked for do not depend on it.
    targets = call.hidden.new_zeros(len(call.hidden), dtype=torch.long) if call.targets is None else call.targets
    varying = tuple([name for name in outputs if name not in constants])
    results = logprobs(
        call.hidden,
        call.weight,
        options.bias,
        targets,
        options.vocabulary_order,
        options.logit_weight,
        options.transform.packed(),
        -1 if call.targets is None else options.ignore_index,
        " ".join(outputs),
        options.grad_out,
        *call.execution("single_pass" if _takes_unit_gradient(call, varying) else "recompute"),
    )
    stats = zip(OUTPUTS, results[: len(OUTPUTS)], strict=True)
    return TokenStats(*(x if name in outputs else None for name, x in stats))


def _of_shard(call: Call, outputs: tuple[str, ...], constants: tuple[str, ...] = ()) -> TokenStats:
    """The statistics of the whole vocabulary, of which this process has a part of the rows."""
    shard, names = shard_of(call), tuple(dict.fromkeys(("logprob", "lse", *outputs)))
    if call.listed():
        needed = tuple(dict.fromkeys((*names, "tail")))
        stats = present(exact_statistics(shard.call, needed))
    else:
        stats = present(_statistics_of_call(shard.call, names, constants))
    if "correct" in outputs:
        stats["top"] = largest_logit(shard.call)
    return combined(stats, shard.owner, shard.empty, call.group(), outputs)


def _reference(call: Call, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics of full logits, by plain autograd."""
    options = call.options
    if call.targets is not None and not torch.compiler.is_compiling():
        counts = call.targets != options.ignore_index
        checks.check_ids(call.targets, counts, options.ignore_index, call.weight.shape[0])
    return reference.linear_logprobs(
        call.hidden,
        call.weight,
        call.targets,
        bias=options.bias,
        transform=options.transform,
        ignore_index=options.ignore_index,
        outputs=outputs,
        logit_weight=options.logit_weight,
    )


def _takes_unit_gradient(call: Call, outputs: tuple[str, ...]) -> bool:
    """Whether to keep `d logprob / d hidden` of a frozen head; an error if this was asked for by name and cannot be."""
    hidden, weight, bias = call.needs()
    if not (hidden or weight or bias):
        return False
    obstacle = None
    if weight or bias:
        obstacle = "the head is trainable"
    elif "entropy" in outputs:
        obstacle = "the entropy's gradient needs a second vector per token"
    elif "mean_logit" in outputs and call.options.softcap is not None:
        obstacle = "the mean logit's gradient under a softcap needs a second vector per token"
    if call.options.backward == "single_pass" and obstacle is not None:
        raise ValueError(
            f"backward: 'single_pass' keeps one gradient vector per token of a frozen head, but {obstacle}; "
            "use backward='recompute', or linear_token_loss"
        )
    return hidden and obstacle is None and call.options.backward != "recompute" and not call.approximates()
