"""`linear_loss`: any loss of the registry on hidden states and a head, with the cheapest exact strategy for its level.

token              each token's loss needs its own statistics alone: one sweep, three GEMMs (`linear_token_loss`)
sequence           looks along time or over the batch: statistics first, then the loss, and recomputation
pair, unpaired     sums sequences: with a frozen head two GEMMs; else one sweep over whole pairs (or sequences) where
                   the logits of each fit the chunk budget, recomputation where they do not
distribution       one sweep of `linear_divergence`, and one of its per-token part where it has one
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import reduce
from .losses import Loss, get
from .losses.batch import Layout, evaluate, layout, need_sequences, of_groups, of_sequences, reduced, rule_of, spread
from .ops import linear_divergence, linear_logprobs, linear_token_loss
from .ops.call import prepare
from .ops.checks import check_constant, check_ignore_index, check_tensor, check_tokens
from .ops.token_loss import check_token_input, single_pass
from .ops.tokens import is_captured
from .types import OPTION_NAMES, Head, LossReduction, Options, TokenStats


def linear_loss(
    loss: Loss | str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: LossReduction | None = None,
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | Head | None = None,
    **inputs_and_options: Any,
) -> Any:
    """Any loss of `logitless.losses` from hidden states and the output head, with no `[tokens, vocabulary]` tensor.

    Args:
        loss: a loss, `losses.DPO(beta=0.2)`, or its name for its defaults, `"dft"`.
        hidden, weight, targets: `[..., H]`, `[V, H]`, `[...]`, aligned (no shift), as in `linear_logprobs`. A pair loss
            takes `[2B, T, H]`, the first half chosen and the second rejected, or flat `[N, H]` with `cu_seqlens`.
        token_weight: `[...]` constants that multiply the per-token losses (not of a loss of whole sequences).
        cu_seqlens: `[S + 1]` boundaries, 0 first and N last, of S sequences that lie behind one another in flat inputs;
            for a pair loss S = 2B, the chosen ones first. Without it the rows of `[..., T, H]` are the sequences.
        reduction: None takes the loss's own, the one of its paper. "mean" divides by the number of tokens that count
            (of pairs, or of sequences, where the loss has one value for each); "sequence_mean", "mean_of_means" and
            "constant_length" as in the table of `logitless.reduce`; "sum"; "none" gives `[...]` (`[B]`, `[S]`).
        normalizer: number, or tensor of one: the count to divide by instead of this batch's own (tokens for "mean",
            sequences for the three others, pairs), the global one under gradient accumulation or data parallelism.
        max_length: of "constant_length": what stands for every sequence's length.
        ref_hidden, ref_head: `[..., H']` hidden states of the reference (teacher) and its head, a weight `[V, H']` with
            the options of the model's head, or a `Head` with its own; for losses that compare whole distributions.
            `ref_head` None is the model's own head.
        **inputs_and_options: the loss's own inputs by name (`ref_logprob=`, `advantages=`), of the targets' shape or
            one number a sequence, and the options of the head and the backend that `linear_logprobs` documents.

    Returns:
        A scalar (or `[...]`) for token, sequence and distribution losses; for pair and unpaired losses their named
        tuple, `loss` reduced, the metrics one a pair (a sequence) and detached. float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an unknown loss (near names are listed), a missing or unknown input, or anything that
            `linear_logprobs` and `linear_token_loss` refuse.
    """
    loss = get(loss)
    check_tokens(hidden, targets)
    options = {k: v for k, v in inputs_and_options.items() if k in OPTION_NAMES}
    if loss.stats_temperature != 1.0:
        options["temperature"] = options.get("temperature", 1.0) * loss.stats_temperature
    given = {k: v for k, v in inputs_and_options.items() if k not in OPTION_NAMES and v is not None}
    reduction = loss.reduction if reduction is None else reduction  # type: ignore[assignment]
    assert reduction is not None
    whole = loss.level in ("pair", "unpaired")
    if whole and token_weight is not None:
        raise ValueError(f"token_weight: a {loss.level} loss ({loss.name}) has no per-token losses to weight")
    if whole and reduction in reduce.OF_SEQUENCES:
        raise ValueError(f"reduction: a {loss.level} loss ({loss.name}) has no per-token losses, got {reduction!r}")
    if loss.level != "distribution" and (ref_hidden is not None or ref_head is not None):
        name = "ref_hidden" if ref_hidden is not None else "ref_head"
        raise ValueError(f"{name}: {loss.name!r} compares no distributions; its inputs are {loss.inputs}")
    reduce.check(reduction, normalizer, max_length)
    ignore_index = Options(**options).ignore_index
    check_ignore_index(ignore_index)
    tokens = layout(targets != ignore_index, cu_seqlens)
    inputs = loss_inputs(loss, given, tokens, hidden.device)
    if token_weight is not None:
        check_token_input("token_weight", token_weight, hidden)
    batch = _Batch(loss, hidden, weight, targets, tokens, inputs, options)
    if whole:
        return _Sequences(batch).loss(reduction, normalizer)
    reducing: dict[str, Any] = dict(
        token_weight=token_weight, reduction=reduction, normalizer=normalizer, max_length=max_length
    )
    if loss.level == "distribution":
        return _distribution(batch, ref_hidden, ref_head, reducing)
    return _token(batch, **reducing) if loss.level == "token" else _of_statistics(batch, reducing)


@dataclass(frozen=True)
class _Batch:
    """A call, checked."""

    loss: Loss
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    tokens: Layout
    inputs: Mapping[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def loss_inputs(loss: Loss, given: Mapping[str, Any], tokens: Layout, device: torch.device) -> dict[str, Tensor]:
    """The loss's inputs, checked, one value a token (those of an unpaired loss's sequences as they are).

    Unknown inputs and missing ones are errors; an optional one may be None. So are tokens whose sequences nobody named,
    where the loss looks at these.
    """
    needed = (*loss.inputs, *loss.sequence_inputs)
    known = (*needed, *loss.optional_inputs)
    for name in given:
        if name not in known:
            takes = ", ".join(known) or "none"
            hint = f"; a hyper-parameter: losses.{type(loss).__name__}({name}=...)" if name in vars(loss) else ""
            raise TypeError(f"linear_loss: {loss.name!r} has no input or option {name!r}; its inputs are {takes}{hint}")
    per_sequence = f"[{tokens.sequences}], one number a sequence"
    shapes = dict.fromkeys(known, f"{list(tokens.mask.shape)}, or {per_sequence}")
    shapes |= dict.fromkeys(loss.sequence_inputs, per_sequence)
    for name in needed:
        if given.get(name) is None:
            raise ValueError(f"{name}: {loss.name!r} needs it, a tensor {shapes[name]}, got None")
    present = [name for name in known if given.get(name) is not None]
    constants = {name: _constant(name, given[name], shapes[name], device) for name in present}
    found = {name: x if name in loss.sequence_inputs else spread(name, x, tokens) for name, x in constants.items()}
    if loss.of_sequences:
        need_sequences(tokens, f"a loss of whole sequences ({loss.name})")
    return found


def _constant(name: str, value: object, shape: str, device: torch.device) -> Tensor:
    """A constant tensor on the tokens' device; `shape` is for the message."""
    check_tensor(name, value, shape)
    assert isinstance(value, Tensor)
    check_constant(name, value, device)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Per-token losses


def _token(
    batch: _Batch,
    *,
    token_weight: Tensor | None,
    reduction: LossReduction,
    normalizer: Tensor | float | None,
    max_length: int | None,
) -> Tensor:
    """One sweep; the reduction's weights go in with the tokens."""
    rule = rule_of(batch.tokens, reduction, normalizer, max_length)
    weights = [x for x in (token_weight, rule.token_weight) if x is not None]
    function: Any = batch.loss
    if weights or batch.inputs:
        function = _TokenLoss(batch.loss, tuple(batch.inputs), len(weights))
    total = linear_token_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        function,
        token_inputs=[*weights, *batch.inputs.values()],
        outputs=batch.loss.outputs,
        reduction="none" if reduction == "none" else "sum",
        **batch.options,
    )
    return total if reduction in ("none", "sum") else reduce.mean(total, rule.normalizer)


@dataclass(frozen=True)
class _TokenLoss:
    """A token loss with its inputs by name, times weights; an object, not a closure, which `torch.compile` could not
    hand to the op."""

    loss: Loss
    names: tuple[str, ...]
    weights: int

    def __call__(self, stats: TokenStats, *values: Tensor) -> Tensor:
        out: Tensor = self.loss(stats, **dict(zip(self.names, values[self.weights :], strict=True)))
        for weight in values[: self.weights]:
            out = weight * out
        return out


@dataclass(frozen=True)
class _TokenPart(Loss):
    """A distribution loss without its divergence: a token loss."""

    loss: Loss

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.loss.outputs

    def __call__(self, stats: TokenStats) -> Tensor:
        found: Tensor = self.loss(stats, torch.zeros_like(getattr(stats, self.outputs[0])))
        return found


def _of_statistics(batch: _Batch, reducing: dict[str, Any], divergence: Tensor | None = None) -> Tensor:
    """Statistics of every token, then the loss."""
    stats = TokenStats()
    if batch.loss.outputs:
        stats = linear_logprobs(batch.hidden, batch.weight, batch.targets, outputs=batch.loss.outputs, **batch.options)
    out: Tensor = evaluate(batch.loss, stats, batch.tokens, batch.inputs, divergence=divergence, **reducing)
    return out


def _distribution(
    batch: _Batch, ref_hidden: Tensor | None, ref_head: Tensor | Head | None, reducing: dict[str, Any]
) -> Tensor:
    """A sweep that sums the divergence, and one that sums the per-token part; values of every token where asked for."""
    if ref_hidden is None:
        raise ValueError(f"ref_hidden: {batch.loss.name!r} needs the reference's hidden states, got None")
    check_tensor("ref_hidden", ref_hidden, "[..., H']")
    for name in ("chunk_dtype", "tail_tolerance", "vocabulary_order"):
        if batch.options.get(name) is not None:
            raise ValueError(f"{name}: {batch.loss.name!r} compares distributions, which does not take it")
    head, reference, options = _heads(batch.weight, ref_head, batch.options)
    options |= batch.loss.linear_divergence
    ref_hidden, mask, reduction = ref_hidden.detach(), batch.tokens.mask, reducing["reduction"]
    if reduction == "none":
        divergence = linear_divergence(batch.hidden, head, ref_hidden, reference, mask=mask, **options)
        return _of_statistics(batch, reducing, divergence)
    rule = rule_of(batch.tokens, reduction, reducing["normalizer"], reducing["max_length"])
    weights = [x for x in (reducing["token_weight"], rule.token_weight) if x is not None]
    divergence = linear_divergence(
        batch.hidden,
        head,
        ref_hidden,
        reference,
        mask=mask,
        token_weight=math.prod(weights[1:], start=weights[0]) if weights else None,
        reduction="sum",
        **options,
    )
    total = batch.loss.divergence_weight * reduce.mean(divergence, rule.normalizer)
    if not batch.loss.outputs:
        return total
    part = _Batch(_TokenPart(batch.loss), batch.hidden, batch.weight, batch.targets, batch.tokens, {}, batch.options)
    return total + _token(part, **reducing)


def _heads(
    weight: Tensor, ref_head: Tensor | Head | None, options: Mapping[str, Any]
) -> tuple[Head, Head, dict[str, Any]]:
    """The model's head, the reference's (the same options where it brings none), and the backend's options. The
    reference is a constant, also where it is the model's own head."""
    own = {name: options[name] for name in Head._fields if name in options}
    head = Head(weight, **own)
    if ref_head is None:
        ref_head = head
    elif not isinstance(ref_head, Head):
        ref_head = Head(ref_head, **own)
    bias = None if ref_head.bias is None else ref_head.bias.detach()
    reference = ref_head._replace(weight=ref_head.weight.detach(), bias=bias)
    return head, reference, {name: x for name, x in options.items() if name in ("backend", "backward", "chunk_bytes")}


# ---------------------------------------------------------------------------------------------------------------------
# Losses of whole sequences


class _Sequences:
    """A loss of pairs of sequences, or of single ones."""

    def __init__(self, batch: _Batch) -> None:
        self.batch, self.tokens = batch, batch.tokens
        self.sequence = need_sequences(batch.tokens, f"a loss of whole sequences ({batch.loss.name})").reshape(-1)
        pair = batch.loss.level == "pair"
        if pair and self.tokens.sequences % 2:
            raise ValueError(
                f"hidden: expected 2B sequences, the chosen and then the rejected, got {self.tokens.sequences}"
            )
        self.count = self.tokens.sequences // 2 if pair else self.tokens.sequences
        self.call = prepare(batch.hidden, batch.weight, batch.targets, Options(**batch.options))

    def loss(self, reduction: LossReduction, normalizer: Tensor | float | None) -> Any:
        """The loss's named tuple, reduced."""
        if reduction != "none" and self.one_sweep():
            result, total = self.sweep()
            return reduced(result, reduction, normalizer, total)
        stats = linear_logprobs(
            self.call.hidden,
            self.batch.weight,
            self.call.targets,
            outputs=self.batch.loss.outputs,
            **self.call.options.keywords(),
        )
        return reduced(self.result(stats), reduction, normalizer)

    def result(self, stats: TokenStats) -> Any:
        """The loss of every pair from the tokens' statistics `[N]`."""
        shape = self.tokens.mask.shape
        known = TokenStats(*(None if x is None else x.view(shape) for x in stats))
        return of_sequences(self.batch.loss, known, self.tokens, self.batch.inputs)

    def one_sweep(self) -> bool:
        """Whether three GEMMs can do: a trainable head (a frozen one needs but two) and groups that fit a chunk."""
        options, loss = self.call.options, self.batch.loss
        if options.backend == "reference" or options.backward == "recompute" or not any(self.call.needs()[1:]):
            return False
        if loss.batch_wide or loss.outputs != ("logprob",):
            if options.backward == "single_pass":
                raise ValueError(
                    f"backward: 'single_pass' cannot serve {loss.name!r} with a trainable head, whose value needs more "
                    "than the log-probs of one group of sequences; use backward='auto' or 'recompute'"
                )
            return False
        if options.backward == "single_pass":
            return True
        if torch.compiler.is_compiling() or is_captured(self.call.hidden.device) or self.count == 0:
            return False  # which groups fit a chunk is data, for which nobody may wait
        sizes = torch.bincount((self.sequence % self.count)[self.tokens.mask.reshape(-1)], minlength=1)
        return int(sizes.max()) <= self.call.tokens_at_once()

    def sweep(self) -> tuple[Any, Tensor]:
        """One sweep over whole groups: values and metrics from the log-probs it leaves behind, and the losses' sum."""
        loss, inputs = self.batch.loss, self.batch.inputs
        names = tuple(name for name in inputs if name not in loss.sequence_inputs)
        constants = tuple((name, inputs[name]) for name in inputs if name in loss.sequence_inputs)
        group = self.sequence % max(self.count, 1)
        of_chunk = _WholeGroups(loss, names, constants, self.tokens.sequences, self.count)
        per_token = [self.sequence, *(inputs[name].reshape(-1) for name in names)]
        total, logprob = single_pass(self.call, of_chunk, per_token, ("logprob",), groups=group)
        result = self.result(TokenStats(logprob=logprob))
        # A group without a token that counts is in no chunk; its constant belongs to the value all the same.
        return result, total + (result.loss.sum() - total).detach()


@dataclass(frozen=True)
class _WholeGroups:
    """A loss of a chunk's pairs (sequences), all of whose tokens are in it; an object, as `_TokenLoss` is."""

    loss: Loss
    names: tuple[str, ...]
    constants: tuple[tuple[str, Tensor], ...]
    sequences: int
    groups: int

    def __call__(self, stats: TokenStats, sequence: Tensor, *values: Tensor) -> Tensor:
        groups = torch.unique(sequence % max(self.groups, 1))
        inputs = dict(zip(self.names, values, strict=True))
        mask = torch.ones_like(sequence, dtype=torch.bool)
        result = of_groups(self.loss, stats, inputs, dict(self.constants), sequence, self.sequences, mask, groups)
        per_group: Tensor = result.loss
        return per_group


__all__ = ["linear_loss"]
