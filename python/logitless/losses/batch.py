"""A loss of any level on one batch of per-token statistics: masks, sequences and their sums, reduction.

What stands between the pure formulas and the ops: the statistics may come from `linear_logprobs`, from a patched model
or from full logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reduce
from ..types import LossReduction, TokenStats
from .base import Loss, sequence_logprob, widest


class Layout(NamedTuple):
    """Which tokens of a batch count, and which sequence each belongs to."""

    mask: Tensor  # [...] bool
    sequence: Tensor | None = None  # [...] int64 in [0, sequences); None: nobody said where sequences begin
    sequences: int = 0
    rows: bool = True  # a row of the last axis is a sequence


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raises unless `cu_seqlens` has its form; its values are read where that waits for no GPU and breaks no graph."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor of S + 1 integers, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 1:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens: expected a tensor of S + 1 integers, got {got}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != tokens or sorted(values) != values:
        raise ValueError(
            f"cu_seqlens: expected boundaries that rise from 0 to the number of tokens {tokens}, got {values}"
        )


def layout(mask: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Sequences by their boundaries in the flattened tokens, else the rows of the last axis; a flat `[N]` has none."""
    if cu_seqlens is None:
        if mask.dim() < 2:
            return Layout(mask)
        count = mask.shape[:-1].numel()
        sequence = torch.arange(count, device=mask.device).view(*mask.shape[:-1], 1)
        return Layout(mask, sequence.expand(mask.shape), count)
    check_boundaries(cu_seqlens, mask.numel())
    tokens = torch.arange(mask.numel(), device=mask.device)
    ends = cu_seqlens.to(mask.device)[1:].contiguous()
    return Layout(mask, torch.searchsorted(ends, tokens, right=True).view(mask.shape), len(cu_seqlens) - 1, rows=False)


def need_sequences(tokens: Layout, why: str) -> Tensor:
    """The tokens' sequences; raises where nobody said where they begin."""
    if tokens.sequence is None:
        raise ValueError(f"cu_seqlens: {why} needs it where hidden is flat, got None")
    return tokens.sequence


def rule_of(
    tokens: Layout,
    reduction: LossReduction,
    normalizer: Tensor | float | None,
    max_length: int | None,
) -> reduce.Rule:
    """The reduction of this batch's tokens."""
    sequence = None
    if reduction in reduce.OF_SEQUENCES:
        sequence = need_sequences(tokens, f"reduction={reduction!r}")
    return reduce.rule(
        reduction,
        tokens.mask,
        sequence=sequence,
        num_sequences=tokens.sequences,
        normalizer=normalizer,
        max_length=max_length,
    )


def spread(name: str, value: Tensor, tokens: Layout) -> Tensor:
    """An input as one value a token: given so, or one a sequence."""
    if value.shape == tokens.mask.shape:
        return value
    if tokens.sequence is not None and value.shape == (tokens.sequences,):
        return value[tokens.sequence]
    sequences = "" if tokens.sequence is None else f" or [{tokens.sequences}], one a sequence"
    expected = f"{list(tokens.mask.shape)} like targets{sequences}"
    raise ValueError(f"{name}: expected shape {expected}, got {list(value.shape)}")


def per_token(
    loss: Loss,
    stats: TokenStats,
    tokens: Layout,
    inputs: Mapping[str, Tensor],
    divergence: Tensor | None = None,
) -> Tensor:
    """The unreduced losses of a token, sequence or distribution loss; what ignored tokens get means nothing."""
    known = {name: torch.where(tokens.mask, x, torch.zeros_like(x)) for name, x in inputs.items()}
    if loss.level == "distribution":
        found: Tensor = loss(stats, divergence)
    elif loss.level == "sequence":
        found = loss(stats, **known, mask=tokens.mask, sequence=None if tokens.rows else tokens.sequence)
    else:
        found = loss(stats, **known)
    return found


def evaluate(
    loss: Loss,
    stats: TokenStats,
    tokens: Layout,
    inputs: Mapping[str, Tensor],
    *,
    token_weight: Tensor | None = None,
    reduction: LossReduction = "mean",
    normalizer: Tensor | float | None = None,
    max_length: int | None = None,
    divergence: Tensor | None = None,
) -> Any:
    """A loss of any level from the statistics it reads; the result of `linear_loss`, without its sweep.

    Args:
        stats: of the mask's shape, with the fields that `loss.outputs` names.
        tokens: which count, and their sequences.
        inputs: the loss's inputs of the mask's shape; of an unpaired loss also its sequence inputs, `[S]` or `[]`.
        token_weight, reduction, normalizer, max_length: see `linear_loss`.
        divergence: per token, for a distribution loss.
    """
    if loss.level in ("pair", "unpaired"):
        result = of_sequences(loss, stats, tokens, inputs)
        return reduced(result, reduction, normalizer)
    losses = per_token(loss, stats, tokens, inputs, divergence)
    if token_weight is not None:
        losses = losses * token_weight.to(losses.dtype)
    rule = rule_of(tokens, reduction, normalizer, max_length)
    return reduce.apply(losses, tokens.mask, rule, keep_tokens=reduction == "none")


def reduced(
    result: Any, reduction: LossReduction, normalizer: Tensor | float | None, total: Tensor | None = None
) -> Any:
    """A named tuple of per-pair or per-sequence numbers with its loss reduced over them; `total`: their sum, where a
    sweep has it."""
    if reduction == "none":
        return result
    total = result.loss.sum() if total is None else total
    if reduction == "mean":
        total = reduce.mean(total, max(len(result.loss), 1) if normalizer is None else normalizer)
    return type(result)(total, *result[1:])  # `_replace` makes an object that Dynamo of torch 2.9 to 2.11 cannot return


# ---------------------------------------------------------------------------------------------------------------------
# Sums of sequences


def of_sequences(loss: Loss, stats: TokenStats, tokens: Layout, inputs: Mapping[str, Tensor]) -> Any:
    """A pair or unpaired loss of all of a batch's sequences: its named tuple, per pair or per sequence.

    Pairs are 2B sequences, sequence i chosen over sequence B + i.
    """
    sequence = need_sequences(tokens, f"a loss of whole sequences ({loss.name})").flatten()
    mask = tokens.mask.flatten()
    if loss.level == "pair" and tokens.sequences % 2:
        raise ValueError(f"hidden: expected 2B sequences, the chosen and then the rejected, got {tokens.sequences}")
    per_sequence = {name: x for name, x in inputs.items() if name in loss.sequence_inputs}
    flat = {name: x.flatten() for name, x in inputs.items() if name not in loss.sequence_inputs}
    statistics = TokenStats(*(None if x is None else x.flatten() for x in stats))
    everyone = torch.arange(tokens.sequences // 2 if loss.level == "pair" else tokens.sequences, device=mask.device)
    result = of_groups(loss, statistics, flat, per_sequence, sequence, tokens.sequences, mask, everyone)
    assert stats.logprob is not None
    return type(result)(*(x.to(stats.logprob.dtype) for x in result))


def of_groups(
    loss: Loss,
    stats: TokenStats,
    inputs: Mapping[str, Tensor],
    sequence_inputs: Mapping[str, Tensor],
    sequence: Tensor,
    count: int,
    mask: Tensor,
    groups: Tensor,
) -> Any:
    """The same for some of the pairs (or sequences), `groups`, all of whose tokens are among the `[n]` given.

    Sums are float64, as a loss takes the small differences of long sums.
    """
    weights = _tail_weights(loss, sequence, count, mask)

    def sums(values: Tensor) -> Tensor:
        values = values.to(widest(values.device))
        if weights is not None:
            values = (values * weights).masked_fill(weights == 0, 0.0)  # 0 * -inf would be NaN
        average = loss.average_logprob
        return sequence_logprob(values, sequence=sequence, num_sequences=count, mask=mask, average=average)

    assert stats.logprob is not None
    scores = [sums(x) for x in (stats.logprob, *inputs.values())]
    extras = _extras(loss, stats, sequence, count, mask)
    if loss.level == "unpaired":
        chosen = {name: x if x.dim() == 0 else x[groups] for name, x in sequence_inputs.items()}
        return loss(*(x[groups] for x in scores), **chosen, **{name: x[groups] for name, x in extras.items()})
    rejected = groups + count // 2
    sides = {f"chosen_{name}": x[groups] for name, x in extras.items()}
    sides |= {f"rejected_{name}": x[rejected] for name, x in extras.items()}
    return loss(*(half for x in scores for half in (x[groups], x[rejected])), **sides)


def _lengths(sequence: Tensor, count: int, mask: Tensor) -> Tensor:
    """Counted tokens of each sequence, `[count]` float64."""
    zeros = torch.zeros(count, dtype=widest(mask.device), device=mask.device)
    return zeros.index_add_(0, sequence, mask.to(zeros.dtype))


def _extras(loss: Loss, stats: TokenStats, sequence: Tensor, count: int, mask: Tensor) -> dict[str, Tensor]:
    """What `loss.extras` names, `[count]` each."""
    found: dict[str, Tensor] = {}
    if "length" in loss.extras:
        found["length"] = _lengths(sequence, count, mask)
    if "weight" in loss.extras:
        assert stats.logprob is not None and stats.log_sum_sq is not None
        surplus = (stats.logprob - stats.log_sum_sq).detach().to(widest(mask.device))
        mean = sequence_logprob(surplus, sequence=sequence, num_sequences=count, mask=mask, average=True)
        found["weight"] = mean.exp()
    return found


def _tail_weights(loss: Loss, sequence: Tensor, count: int, mask: Tensor) -> Tensor | None:
    """1 for tokens up to the shorter length of their pair, `loss.tail_weight` beyond; None where that is 1 too."""
    if loss.tail_weight == 1.0 or loss.level != "pair":
        return None
    lengths = _lengths(sequence, count, mask)
    shorter = torch.minimum(lengths[: count // 2], lengths[count // 2 :]).repeat(2)
    place = mask.cumsum(0)  # tokens of a sequence stand together, in their order
    before = place.new_full((count,), len(mask)).scatter_reduce_(0, sequence, place - mask.long(), "amin")
    inside = place - before[sequence] <= shorter[sequence]
    return torch.where(inside, lengths.new_ones(()), loss.tail_weight)
