"""`linear_loss`: any loss of the registry on hidden states and a head, by the cheapest exact strategy for its level.

level              strategy
token              one sweep, three GEMMs (`linear_token_loss`); as a sequence loss where its own divisor is wanted
sequence           the statistics of all tokens, the loss, and recomputation for the gradient: four GEMMs
pair, unpaired     one sweep over whole pairs (sequences) if the logits of each fit a chunk; else as a sequence loss
distribution       one sweep of `linear_divergence`, and one of the per-token part if there is such a part

A frozen head costs two GEMMs at the first three levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack, overload

import torch
from torch import Tensor

from . import reduce
from .arguments import (
    REFERENCE_STATISTICS,
    LossArguments,
    ReferenceStates,
    check_level,
    check_lists,
    loss_inputs,
    reference_of,
)
from .losses import (
    DistributionLoss,
    Loss,
    PairLoss,
    PreferenceResult,
    SequenceLoss,
    TokenLoss,
    UnpairedLoss,
    UnpairedResult,
    get,
)
from .losses.layout import TokenLayout, reduction_rule, token_layout
from .losses.whole_sequence import WholeSequenceLoss, reduce_groups
from .ops import linear_divergence, linear_logprobs, linear_token_loss
from .ops.call import Call, prepare_call
from .ops.checks import check_ignore_index, check_order, check_tokens
from .ops.sharded import on_whole_tensors
from .ops.token_loss import check_token_input, sum_in_one_sweep
from .ops.tokens import is_captured
from .types import Head, LossReduction, Options, TokenStats, split_options, statistics_dtype


@overload
def linear_loss(
    loss: TokenLoss | SequenceLoss | DistributionLoss,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    **arguments: Unpack[LossArguments],
) -> Tensor: ...
@overload
def linear_loss(
    loss: PairLoss, hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Unpack[LossArguments]
) -> PreferenceResult: ...
@overload
def linear_loss(
    loss: UnpairedLoss, hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Unpack[LossArguments]
) -> UnpairedResult: ...
@overload  # a loss of unknown level, or one whose inputs have names of their own
def linear_loss(loss: Loss | str, hidden: Tensor, weight: Tensor, targets: Tensor, **arguments: Any) -> Any: ...


@on_whole_tensors
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
    among: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | Head | None = None,
    **inputs_and_options: Any,
) -> Any:
    """Any loss of `logitless.losses` from hidden states and the output head, with no `[tokens, vocabulary]` tensor.

    Args:
        loss: a loss, `losses.DPO(beta=0.2)`, or its name for its defaults, `"dft"`.
        hidden, weight, targets: `[..., H]`, `[V, H]`, `[...]`, aligned (no shift), as in `linear_logprobs`. A pair loss
            takes `[2B, T, H]`, the first half chosen and the second rejected, or flat `[N, H]` with `cu_seqlens`. A
            loss of lists (`TopKDistillation`) takes targets `[..., K]`.
        token_weight: `[...]` constants that multiply the per-token losses (not of a loss of whole sequences).
        cu_seqlens: `[S + 1]` boundaries, 0 first and N last, of S sequences that lie behind one another in flat inputs;
            for a pair loss S = 2B, the chosen ones first. Without it the rows of `[..., T, H]` are the sequences.
        reduction: None takes the loss's own, the one of its paper. "mean" divides by the number of tokens that count
            (of pairs, or of sequences, where the loss has one value for each); "sequence_mean", "mean_of_means" and
            "constant_length" as in the table of `logitless.reduce`; "sum"; "none" gives `[...]` (`[B]`, `[S]`).
        normalizer: number, or tensor of one: the count to divide by instead of this batch's own (tokens for "mean",
            sequences for the three others, pairs), the global one under gradient accumulation or data parallelism. A
            loss that counts fewer (`Loss.divided_by`) says what the number has to be.
        max_length: of "constant_length": what stands for every sequence's length.
        among: `[..., K]` ids, the set that the distribution is renormalised over, as in `linear_logprobs`: what a
            sampler's top-k or top-p kept, so that a policy loss's ratio is that of the distribution sampled from
            (`old_logprob` must be, too). Not of a loss that compares distributions, and not with `ref_hidden`.
        ref_hidden: `[..., H']` hidden states of the reference (teacher), for a loss that compares whole distributions,
            or in place of `ref_logprob` (and `ref_lse`), which are then computed here, without a gradient.
        ref_head: the reference's head, a weight `[V, H']` with the options of the model's head, or a `Head` with its
            own. None: the model's own head, as under LoRA.
        **inputs_and_options: the loss's own inputs by name (`LossArguments` lists them), of the targets' shape or one
            number a sequence, and the options of the head and the backend that `linear_logprobs` documents.

    Returns:
        A scalar (or `[...]`) for token, sequence and distribution losses; for pair and unpaired losses their named
        tuple, `loss` reduced, the metrics one a pair (a sequence) and detached. float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an unknown loss (near names are listed), a missing or unknown input, or anything that
            `linear_logprobs` and `linear_token_loss` refuse.
    """
    loss = get(loss)
    check_tokens(hidden, targets)
    check_order(hidden, weight, targets)
    options, given = split_options(inputs_and_options)
    if loss.stats_temperature != 1.0:
        options["temperature"] = options.get("temperature", 1.0) * loss.stats_temperature
    reduction = loss.reduction if reduction is None else reduction
    check_level(loss, token_weight, reduction)
    reduce.check(reduction, normalizer, max_length)
    ignore_index = Options(**options).ignore_index
    check_ignore_index(ignore_index)
    check_lists(loss, hidden, targets, among, ref_hidden)
    listed = (targets != ignore_index) & (targets != -1) if loss.lists else None
    tokens = token_layout(targets != ignore_index if listed is None else listed.any(-1), cu_seqlens)
    names = [name for name in (*loss.inputs, *loss.optional_inputs) if name in REFERENCE_STATISTICS]
    reference = reference_of(loss, names, given, weight, ref_hidden, ref_head, options)
    if reference is not None and names:
        given |= reference.statistics(names, targets, options)
    inputs = loss_inputs(loss, given, tokens, hidden.device, listed)
    if token_weight is not None:
        check_token_input("token_weight", token_weight, hidden)
    among = targets if loss.within_list else among
    settings = token_weight, reduction, normalizer, max_length
    batch = _Batch(hidden, weight, targets, tokens, inputs, options, *settings, among)
    if among is not None:
        return _of_statistics(loss, batch)
    if isinstance(loss, WholeSequenceLoss):
        return _of_whole_sequences(loss, batch)
    if isinstance(loss, DistributionLoss) and loss.compares_distributions:
        assert reference is not None
        return _of_distributions(loss, batch, reference)
    one_sweep = loss.token_wise and not (batch.counts() and loss.divided_by is not None)
    return _in_one_sweep(loss, batch) if one_sweep else _of_statistics(loss, batch)


@dataclass(frozen=True)
class _Batch:
    """The checked arguments of a call, without its loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    tokens: TokenLayout
    inputs: Mapping[str, Tensor]
    options: dict[str, Any]
    token_weight: Tensor | None
    reduction: LossReduction
    normalizer: Tensor | float | None
    max_length: int | None
    among: Tensor | None

    def rule(self) -> reduce.Rule:
        """The reduction of the tokens' losses."""
        return reduction_rule(self.tokens, self.reduction, self.normalizer, self.max_length)

    def counts(self) -> bool:
        """Whether the losses are divided by a count of this batch."""
        return self.normalizer is None and self.reduction not in ("none", "sum")

    def weights(self, rule: reduce.Rule) -> list[Tensor]:
        """The constants that multiply the tokens' losses before they are summed."""
        of_rule = rule.token_weight(statistics_dtype(self.hidden.dtype))
        return [x for x in (self.token_weight, of_rule) if x is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Losses of one value a token


def _in_one_sweep(loss: Loss, batch: _Batch, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
    """A token-wise loss in one sweep; the reduction's weights go in with the tokens."""
    inputs, rule = batch.inputs if inputs is None else inputs, batch.rule()
    weights = batch.weights(rule)
    total = linear_token_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        WithInputs(loss, tuple(inputs), len(weights)) if weights or inputs else loss,
        token_inputs=[*weights, *inputs.values()],
        outputs=loss.outputs,
        reduction="none" if batch.reduction == "none" else "sum",
        **batch.options,
    )
    return total if batch.reduction in ("none", "sum") else reduce.mean(total, rule.normalizer)


@dataclass(frozen=True)
class WithInputs:
    """A token-wise loss with its inputs by name, times weights.

    It is an object because `torch.compile` cannot hand a closure to the op.
    """

    loss: Loss
    names: tuple[str, ...]
    weights: int

    def __call__(self, stats: TokenStats, *values: Tensor) -> Tensor:
        out: Tensor = self.loss(stats, **dict(zip(self.names, values[self.weights :], strict=True)))
        for weight in values[: self.weights]:
            out = weight * out
        return out


@dataclass(frozen=True)
class _WithoutDivergence(TokenLoss):
    """The part of a distribution loss that is a token loss."""

    loss: DistributionLoss

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.loss.outputs

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.loss(stats, torch.zeros_like(getattr(stats, self.outputs[0])))


def _of_statistics(loss: Loss, batch: _Batch, divergence: Tensor | None = None) -> Any:
    """A loss of the statistics of all tokens, which come first."""
    stats = TokenStats()
    if loss.outputs:
        tensors = batch.hidden, batch.weight, batch.targets
        stats = linear_logprobs(*tensors, among=batch.among, outputs=loss.outputs, **batch.options)
    return loss.evaluate(
        stats,
        batch.tokens,
        batch.inputs,
        token_weight=batch.token_weight,
        reduction=batch.reduction,
        normalizer=batch.normalizer,
        max_length=batch.max_length,
        divergence=divergence,
    )


def _of_distributions(loss: DistributionLoss, batch: _Batch, reference: ReferenceStates) -> Tensor:
    """A distribution loss: a sweep sums the divergence, another one the rest; "none" keeps every token's value."""
    for name in ("chunk_dtype", "tail_tolerance", "vocabulary_order"):
        if batch.options.get(name) is not None:
            raise ValueError(f"{name}: {loss.name!r} compares distributions, which does not take it")
    taken = ("backend", "backward", "chunk_bytes", "group", "grad_out")
    options = {name: x for name, x in batch.options.items() if name in taken}
    options |= loss.linear_divergence
    head = Head(batch.weight, **{name: x for name, x in batch.options.items() if name in Head._fields})
    tensors, mask = (batch.hidden, head, reference.hidden, reference.head), batch.tokens.mask
    if batch.reduction == "none":
        values: Tensor = _of_statistics(loss, batch, linear_divergence(*tensors, mask=mask, **options))
        return values
    rule = batch.rule()
    weights = batch.weights(rule)
    token_weight = math.prod(weights[1:], start=weights[0]) if weights else None
    divergence = linear_divergence(*tensors, mask=mask, token_weight=token_weight, reduction="sum", **options)
    total = loss.divergence_weight * reduce.mean(divergence, rule.normalizer)
    return total + _in_one_sweep(_WithoutDivergence(loss), batch, {}) if loss.outputs else total


# ---------------------------------------------------------------------------------------------------------------------
# Losses of whole sequences


def _of_whole_sequences(loss: WholeSequenceLoss, batch: _Batch) -> Any:
    """A loss of whole sequences, in one sweep if every group of sequences fits a chunk: its named tuple, reduced."""
    groups = loss.count_groups(batch.tokens.sequences)
    call = prepare_call(batch.hidden, batch.weight, batch.targets, Options(**batch.options))
    if batch.reduction != "none" and _gains_by_a_sweep(loss, call) and _fits(call, batch.tokens, groups):
        return _sweep_of_groups(loss, batch, call, groups)
    if call.options.grad_out is None:
        options = call.options.keywords()  # with the tensors as they are now, so that autocast copies the head once
        stats = linear_logprobs(call.hidden, call.weight, call.targets, outputs=loss.outputs, **options)
    else:  # which is of the head as it came
        stats = linear_logprobs(batch.hidden, batch.weight, batch.targets, outputs=loss.outputs, **batch.options)
    return reduce_groups(loss.of_batch(stats, batch.tokens, batch.inputs), batch.reduction, batch.normalizer)


def _gains_by_a_sweep(loss: WholeSequenceLoss, call: Call) -> bool:
    """Whether the head is trainable (a frozen one costs two GEMMs), and a group's value needs no other group."""
    options = call.options
    if options.backend == "reference" or options.backward == "recompute" or not call.trains_head():
        return False
    if options.group is not None:
        return False  # the sweep's log-probs, which values and metrics come from, would be those of the own rows
    if not loss.sums_by_group and options.backward == "single_pass":
        raise ValueError(
            f"backward: 'single_pass' cannot serve {loss.name!r} with a trainable head, whose value needs more "
            "than the log-probs of one group of sequences; use backward='auto' or 'recompute'"
        )
    return loss.sums_by_group


def _fits(call: Call, tokens: TokenLayout, groups: int) -> bool:
    """Whether every group's tokens fit a chunk, as far as this can be known without waiting for a GPU."""
    if call.options.backward == "single_pass":
        return True
    if torch.compiler.is_compiling() or is_captured(call.hidden.device) or groups == 0:
        return False  # the sizes of the groups are data, which must not be waited for
    assert tokens.sequence is not None
    sizes = torch.bincount((tokens.sequence % groups)[tokens.mask], minlength=1)
    return int(sizes.max()) <= call.tokens_at_once()


def _sweep_of_groups(loss: WholeSequenceLoss, batch: _Batch, call: Call, groups: int) -> Any:
    """One sweep over whole groups: it gives the losses' sum, and the log-probs that values and metrics come from."""
    assert batch.tokens.sequence is not None
    sequence = batch.tokens.sequence.reshape(-1)
    per_token = {name: x.reshape(-1) for name, x in batch.inputs.items() if name not in loss.sequence_inputs}
    constants = tuple((name, batch.inputs[name]) for name in loss.sequence_inputs)
    function = _WholeGroups(loss, tuple(per_token), constants, batch.tokens.sequences, groups)
    total, logprob, _ = sum_in_one_sweep(
        call, function, [sequence, *per_token.values()], ("logprob",), groups=sequence % max(groups, 1)
    )
    stats = TokenStats(logprob=logprob.view(batch.tokens.mask.shape))
    result = loss.of_batch(stats, batch.tokens, batch.inputs)
    # A group without a token that counts is in no chunk, but its constant belongs to the value.
    total = total + (result.loss.sum() - total).detach()
    return reduce_groups(result, batch.reduction, batch.normalizer, total)


@dataclass(frozen=True)
class _WholeGroups:
    """A loss of a chunk's groups, all of whose tokens are in the chunk; an object for the reason of `WithInputs`."""

    loss: WholeSequenceLoss
    names: tuple[str, ...]
    constants: tuple[tuple[str, Tensor], ...]
    sequences: int
    groups: int

    def __call__(self, stats: TokenStats, sequence: Tensor, *values: Tensor) -> Tensor:
        groups = torch.unique(sequence % max(self.groups, 1))
        inputs = dict(zip(self.names, values, strict=True))
        mask = torch.ones_like(sequence, dtype=torch.bool)
        result = self.loss.of_groups(stats, inputs, dict(self.constants), sequence, self.sequences, mask, groups)
        losses: Tensor = result.loss
        return losses


__all__ = ["linear_loss"]
