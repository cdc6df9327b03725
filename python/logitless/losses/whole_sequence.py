"""The levels of losses that sum whole sequences: pairs of them (`PairLoss`) and single ones (`UnpairedLoss`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import reduce
from ..types import LossReduction, TokenStats
from .layout import TokenLayout, need_sequences
from .loss import Loss
from .sequences import sequence_logprob, wide_dtype


class PreferenceResult(NamedTuple):
    """The result of a pair loss: the loss, with its graph, and detached metrics, all per pair.

    The pure losses return `[B]` tensors throughout; the one-call forms reduce `loss` and leave the metrics per pair.
    """

    loss: Tensor
    """The loss to minimise."""
    chosen_reward: Tensor
    """`beta (chosen - ref_chosen)`, whatever the divergence: log-ratios of averages for losses of averages, of sums
    otherwise; without a reference `beta chosen`."""
    rejected_reward: Tensor
    margin: Tensor
    """`chosen_reward - rejected_reward`."""
    accuracy: Tensor
    """1 where the chosen reward is the greater, strictly: a tie counts as wrong."""
    chosen_logprob: Tensor
    rejected_logprob: Tensor


class UnpairedResult(NamedTuple):
    """The result of an unpaired loss: the loss, with its graph, and detached metrics, all per completion, `[S]`.

    The one-call forms reduce `loss` and leave the metrics per completion.
    """

    loss: Tensor
    """The loss to minimise."""
    reward: Tensor
    """`beta (logprob - ref_logprob)`."""
    logprob: Tensor


class WholeSequenceLoss(Loss):
    """A loss of groups of whole sequences, by the sums of their log-probabilities; a group is a pair or one sequence.

    It gives a named tuple, one value a group: first `loss`, unreduced, then detached metrics. It costs three GEMMs
    where every group fits a chunk, else four.
    """

    of_sequences: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("ref_logprob",)

    @property
    def extras(self) -> tuple[str, ...]:
        """Properties of a sequence that the loss reads beside its log-probability, passed by keyword.

        `"length"`: counted tokens, as `chosen_length`, `rejected_length` (`length`). `"weight"`: the mean of
        `logprob - log_sum_sq` over a sequence's tokens, exponentiated and detached, as `chosen_weight`, ....
        """
        return ()

    @property
    def average_logprob(self) -> bool:
        """Whether sequences' log-probabilities are averages over their tokens instead of sums."""
        return False

    @property
    def sums_by_group(self) -> bool:
        """Whether a group's value needs nothing but its own log-probs, so that one sweep will do."""
        return not self.batch_wide and self.outputs == ("logprob",)

    def count_groups(self, sequences: int) -> int:
        """The number of groups in a batch of that many sequences."""
        return sequences

    def evaluate(
        self,
        stats: TokenStats,
        tokens: TokenLayout,
        inputs: Mapping[str, Tensor],
        *,
        token_weight: Tensor | None = None,
        reduction: LossReduction = "mean",
        normalizer: Tensor | float | None = None,
        max_length: int | None = None,
        divergence: Tensor | None = None,
    ) -> Any:
        return reduce_groups(self.of_batch(stats, tokens, inputs), reduction, normalizer)

    def of_batch(self, stats: TokenStats, tokens: TokenLayout, inputs: Mapping[str, Tensor]) -> Any:
        """The named tuple of all of a batch's groups, unreduced."""
        sequence = need_sequences(tokens, f"a loss of whole sequences ({self.name})").flatten()
        mask = tokens.mask.flatten()
        groups = torch.arange(self.count_groups(tokens.sequences), device=mask.device)
        per_sequence = {name: x for name, x in inputs.items() if name in self.sequence_inputs}
        flat = {name: x.flatten() for name, x in inputs.items() if name not in self.sequence_inputs}
        statistics = TokenStats(*(None if x is None else x.flatten() for x in stats))
        result = self.of_groups(statistics, flat, per_sequence, sequence, tokens.sequences, mask, groups)
        assert stats.logprob is not None
        return type(result)(*(x.to(stats.logprob.dtype) for x in result))

    def of_groups(
        self,
        stats: TokenStats,
        inputs: Mapping[str, Tensor],
        sequence_inputs: Mapping[str, Tensor],
        sequence: Tensor,
        count: int,
        mask: Tensor,
        groups: Tensor,
    ) -> Any:
        """The named tuple of some groups, all of whose tokens are among the `[n]` given.

        `sequence [n]` numbers the tokens' sequences, of which the batch has `count`. Sums are float64, as a loss takes
        the small differences of long sums.
        """
        weights = self._token_weights(sequence, count, mask)

        def sums(values: Tensor) -> Tensor:
            values = values.to(wide_dtype(values.device))
            if weights is not None:
                values = (values * weights).masked_fill(weights == 0, 0.0)  # 0 * -inf would be NaN
            average = self.average_logprob
            return sequence_logprob(values, sequence=sequence, num_sequences=count, mask=mask, average=average)

        assert stats.logprob is not None
        scores = [sums(x) for x in (stats.logprob, *inputs.values())]
        return self._call(scores, sequence_inputs, _extras(self.extras, stats, sequence, count, mask), groups)

    def _token_weights(self, sequence: Tensor, count: int, mask: Tensor) -> Tensor | None:
        """Factors `[n]` of the tokens in their sequences' sums; None where all are 1."""
        return None

    def _call(
        self,
        scores: Sequence[Tensor],
        sequence_inputs: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        groups: Tensor,
    ) -> Any:
        """The loss of some groups from the scores and extras of all of the batch's sequences."""
        raise NotImplementedError


class PairLoss(WholeSequenceLoss):
    """A loss of pairs of sequences: `loss(chosen, rejected, ref_chosen, ref_rejected, **extras)`, `[B]` each.

    Of a batch's 2B sequences, sequence i is chosen over sequence B + i. A loss whose `inputs` are empty has no
    reference, and is called as `loss(chosen, rejected, **extras)`. Its sequence inputs reach it as extras do, one of
    each side: `chosen_reward`, `rejected_reward`.
    """

    level: ClassVar[str] = "pair"
    __call__: Callable[..., PreferenceResult]

    @property
    def tail_weight(self) -> float:
        """The weight that a token beyond the shorter length of its pair has in its sequence's sum."""
        return 1.0

    def count_groups(self, sequences: int) -> int:
        if sequences % 2:
            raise ValueError(f"hidden: expected 2B sequences, the chosen and then the rejected, got {sequences}")
        return sequences // 2

    def _token_weights(self, sequence: Tensor, count: int, mask: Tensor) -> Tensor | None:
        if self.tail_weight == 1.0:
            return None
        lengths = _wide_lengths(sequence, count, mask)
        shorter = torch.minimum(lengths[: count // 2], lengths[count // 2 :]).repeat(2)
        place = mask.cumsum(0)  # tokens of a sequence stand together, in their order
        before = place.new_full((count,), len(mask)).scatter_reduce_(0, sequence, place - mask.long(), "amin")
        inside = place - before[sequence] <= shorter[sequence]
        return torch.where(inside, lengths.new_ones(()), self.tail_weight)

    def _call(
        self,
        scores: Sequence[Tensor],
        sequence_inputs: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        groups: Tensor,
    ) -> PreferenceResult:
        sides = {"chosen": groups, "rejected": groups + len(scores[0]) // 2}
        known = {name: x.expand(len(scores[0])) if x.dim() == 0 else x for name, x in sequence_inputs.items()}
        by_side = {f"{side}_{name}": x[rows] for side, rows in sides.items() for name, x in {**extras, **known}.items()}
        return self(*(x[rows] for x in scores for rows in sides.values()), **by_side)


class UnpairedLoss(WholeSequenceLoss):
    """A loss of single sequences: `loss(logprob, ref_logprob, **sequence_inputs, **extras)`, `[S]` each."""

    level: ClassVar[str] = "unpaired"
    __call__: Callable[..., UnpairedResult]

    def _call(
        self,
        scores: Sequence[Tensor],
        sequence_inputs: Mapping[str, Tensor],
        extras: Mapping[str, Tensor],
        groups: Tensor,
    ) -> UnpairedResult:
        own = {name: x if x.dim() == 0 else x[groups] for name, x in sequence_inputs.items()}
        return self(*(x[groups] for x in scores), **own, **{name: x[groups] for name, x in extras.items()})


def reduce_groups(
    result: Any, reduction: LossReduction, normalizer: Tensor | float | None, total: Tensor | None = None
) -> Any:
    """A named tuple of per-group values with its loss reduced; `total` is the losses' sum if a sweep has it."""
    if reduction == "none":
        return result
    total = result.loss.sum() if total is None else total
    if reduction == "mean":
        total = reduce.mean(total, max(len(result.loss), 1) if normalizer is None else normalizer)
    return type(result)(total, *result[1:])  # `_replace` makes an object that Dynamo of torch 2.9 to 2.11 cannot return


def _wide_lengths(sequence: Tensor, count: int, mask: Tensor) -> Tensor:
    """Counted tokens of each sequence, `[count]` float64."""
    return reduce.sequence_lengths(mask, sequence, count).to(wide_dtype(mask.device))


def _extras(names: tuple[str, ...], stats: TokenStats, sequence: Tensor, count: int, mask: Tensor) -> dict[str, Tensor]:
    """The properties of the sequences that `WholeSequenceLoss.extras` names, `[count]` each."""
    extras: dict[str, Tensor] = {}
    if "length" in names:
        extras["length"] = _wide_lengths(sequence, count, mask)
    if "weight" in names:
        assert stats.logprob is not None and stats.log_sum_sq is not None
        surplus = (stats.logprob - stats.log_sum_sq).detach().to(wide_dtype(mask.device))
        mean = sequence_logprob(surplus, sequence=sequence, num_sequences=count, mask=mask, average=True)
        extras["weight"] = mean.exp()
    return extras
