"""`linear_logprobs`, the primitive: checks, choice of backend and strategy, then the op."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, reference
from ..types import OUTPUTS, TAIL_TOLERANCE, BackendName, BackwardName, Options, TokenStats
from . import checks, library


class Call(NamedTuple):
    """One call, checked, cast and flattened."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor | None  # [N] int64
    options: Options

    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias want a gradient here and now."""
        tensors = (self.hidden, self.weight, self.options.bias)
        return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]

    def tail(self) -> float | None:
        """The tolerance of a tail-corrected backward; None where there is none."""
        return self.options.tail if any(self.needs()) else None

    def rounds_head(self, outputs: tuple[str, ...]) -> bool:
        """Whether one product gives a single pass the head's gradient, in bfloat16: all tokens are in one chunk."""
        halves = self.weight.dtype == torch.bfloat16 and self.needs()[1]
        if not halves or self.tail() is not None or "mean_logit" in outputs:
            return False
        name = self.strategy()
        most = backends.STRATEGIES[name].tokens_at_once(self.hidden, self.weight, self.options)
        return name in backends.FINISHED_GRADIENTS and len(self.hidden) <= most

    def strategy(self) -> str:
        """The backend, of `backends.STRATEGIES`."""
        if self.tail() is None:
            return backends.pick(self.options.backend, self.hidden)
        return backends.pick_strategy(self.options.backend, self.options.backward, self.hidden)


def prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    options: Options,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> Call:
    """Checks and normalises the arguments that every op shares; follows autocast as `F.linear` does. `names`: what
    the caller calls the tensors, for messages."""
    if isinstance(hidden, Tensor) and _autocasts(hidden.device.type):
        device = hidden.device.type
        hidden, weight = _autocast(hidden, device), _autocast(weight, device)
        options = replace(options, bias=None if options.bias is None else _autocast(options.bias, device))
    checks.check_head(hidden, weight, options, names)
    if targets is not None:
        checks.check_targets("targets", targets, hidden)
        targets = targets.reshape(-1).long()
    return Call(hidden.reshape(-1, hidden.shape[-1]), weight, targets, options)


def _autocasts(device: str) -> bool:
    # Dynamo of torch 2.11 has no rule for the question whether a device knows autocast at all.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _autocast(x: Tensor, device: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprob",),
    backend: BackendName = "auto",
    backward: BackwardName = "auto",
    chunk_bytes: int | None = None,
    chunk_dtype: torch.dtype | None = None,
    tail_tolerance: float = TAIL_TOLERANCE,
    vocabulary_order: Tensor | None = None,
) -> TokenStats:
    """Per-token statistics of `softmax(z)`, `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) /
    temperature`, with no `[tokens, vocabulary]` tensor.

    Args:
        hidden: `[..., H]`, any strides; float64, float32, bfloat16 or float16. Under autocast, cast as `F.linear` does.
        weight: `[V, H]`, the dtype and device of `hidden`.
        targets: `[...]` int64 or int32 ids in [0, V), aligned with `hidden` (no shift), or `ignore_index`. None where
            `outputs` asks only for `lse`, `entropy`, `mean_logit` or `log_sum_sq`.
        bias: `[V]`; -inf masks a vocabulary entry.
        logit_scale, softcap, temperature: see `LogitTransform`. The defaults leave the logits as they are.
        ignore_index: tokens with this target give 0 and no gradient, and cost nothing. -100 as in PyTorch.
        outputs: which fields of `TokenStats` to compute. The differentiable ones may all be used together.
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

    Returns:
        `TokenStats`, each field of `hidden`'s leading shape in float32 (float64 for float64); None where not asked for.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or value, before anything is computed, and a target
            outside [0, V). On a GPU the last is a device-side assertion, so that nothing waits for it.
        RuntimeError: the gradient is differentiated again (`create_graph=True`) with a backend other than "reference".
    """
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
    )
    outputs = checks.check_outputs(outputs, with_targets=targets is not None)
    call = prepare(hidden, weight, targets, options)
    shape = hidden.shape[:-1]
    stats = _run(call, outputs)
    return TokenStats(*(None if x is None else x.reshape(shape) for x in stats))


def _run(call: Call, outputs: tuple[str, ...]) -> TokenStats:
    options, transform = call.options, call.options.transform
    if options.backend == "reference":
        if call.targets is not None and not torch.compiler.is_compiling():
            counts = call.targets != options.ignore_index
            checks.check_ids(call.targets, counts, options.ignore_index, call.weight.shape[0])
        return reference.linear_logprobs(
            call.hidden,
            call.weight,
            call.targets,
            bias=options.bias,
            transform=transform,
            ignore_index=options.ignore_index,
            outputs=outputs,
        )
    unit = _takes_unit_gradient(call, outputs)
    backend = call.strategy()
    # Without targets any token id serves: the statistics asked for do not depend on it.
    targets = call.hidden.new_zeros(len(call.hidden), dtype=torch.long) if call.targets is None else call.targets
    problem = (
        call.hidden,
        call.weight,
        options.bias,
        targets,
        float(options.logit_scale),
        None if options.softcap is None else float(options.softcap),
        float(options.temperature),
        -1 if call.targets is None else options.ignore_index,
        " ".join(outputs),
    )
    rest = (backend, options.chunk_bytes, options.chunk_dtype)
    if call.tail() is not None:
        found = library.logprobs_tail(*problem, *rest, call.tail(), options.vocabulary_order)
    else:
        found = library.logprobs(*problem, unit, *rest)
    return TokenStats(*(x if name in outputs else None for name, x in zip(OUTPUTS, found[: len(OUTPUTS)], strict=True)))


def _takes_unit_gradient(call: Call, outputs: tuple[str, ...]) -> bool:
    """Whether the frozen head's strategy applies; an error where it was asked for by name and does not."""
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
    return hidden and obstacle is None and call.options.backward != "recompute" and call.options.tail is None
