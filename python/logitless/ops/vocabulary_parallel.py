"""A call whose head is shared out among processes: this rank's part of it, and the parts' statistics put together.

Every rank runs the op on its own rows, with the targets that it does not hold replaced by one that it does. With the
share of the whole mass that a rank's rows have, `log s_r = lse_r - lse`, the statistics of the whole vocabulary are

    logprob     logprob_r + log s_r, of the rank r that has the target
    lse         log sum_r exp(lse_r)
    entropy     sum_r s_r (entropy_r - log s_r)
    mean_logit  sum_r V_r mean_logit_r / V
    log_sum_sq  log sum_r exp(2 log s_r + log_sum_sq_r)
    tail        log sum_r s_r tail'_r, tail' the mass that is not listed, 1 where a rank has none of the listed ids

One message of a few numbers for each token brings them to every rank, and every rank computes them alike. So a rank's
own gradient is that of its own numbers, without a message, and goes on into its rows through the op's own backward.
`log s_r = logsigmoid(lse_r - log sum_{q != r} exp(lse_q))`, which is right to rounding for a share near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reduce
from ..parallel import Gather, SumGradient, VocabularyGroup, named_group
from ..types import TokenStats
from . import checks
from .call import Call
from .functions import PerTokenLoss

#: Stands for the lse of rows without any mass: `exp` of it is 0 beside any logit, and no difference of two is NaN.
NO_MASS = -1e30


class Shard(NamedTuple):
    """This rank's part of a call."""

    call: Call  # of its own rows and ids, without a group
    owner: Tensor  # of the targets' shape: the rank that has each; -1 where a target does not count
    empty: Tensor | None  # [] bool, whether no row of this rank can have mass; None where none of them is masked


def shard_of(call: Call) -> Shard:
    """This rank's part of a checked call with a group."""
    options, group = call.options, call.group()
    weight, bias, empty = call.weight, options.bias, None
    if not len(weight):  # a row without mass, for ops that want one
        weight, bias = F.pad(weight, (0, 0, 0, 1)), None if bias is None else F.pad(bias, (0, 1))
        empty = torch.ones((), dtype=torch.bool, device=weight.device)
    elif bias is not None:
        empty = bias.isneginf().all()
        bias = torch.where(empty, 0.0, bias)
    order, by_logit = (
        None if x is None else F.pad(x, (0, len(weight) - len(x)))
        for x in (options.vocabulary_order, options.logit_weight)
    )
    buffer = options.grad_out if len(call.weight) else None
    own = {"vocabulary_order": order, "logit_weight": by_logit, "bias": bias, "grad_out": buffer}
    options = replace(options, **own, group=None, ignore_index=-100)  # type: ignore[arg-type]
    targets = torch.zeros_like(call.hidden[:, 0], dtype=torch.long) if call.targets is None else call.targets
    owner = _owner(call, targets)
    local = _local_ids(targets, owner, group)
    part = Call(_hidden(call), weight, local, options)
    return Shard(part, owner, empty)


def _hidden(call: Call) -> Tensor:
    """The hidden states, whose gradient is summed over the ranks."""
    group = call.group()
    hidden: Tensor = SumGradient.apply(call.hidden, group.group) if group.reduces_hidden else call.hidden
    return hidden


def side_of_shard(call: Call) -> Call:
    """A divergence's side with this rank's rows; one row that is masked out where it has none."""
    weight, options = call.weight, call.options
    if not len(weight):
        weight = F.pad(weight, (0, 0, 0, 1))
        bias = weight.new_empty(0) if options.bias is None else options.bias
        options = replace(options, bias=F.pad(bias, (0, 1), value=-torch.inf))
    return Call(_hidden(call), weight, call.targets, options)


def with_common_chunks(part: Call, group: VocabularyGroup) -> Call:
    """The call with a budget that cuts the tokens into the same chunks on every rank, however many rows it has."""
    if len(set(group.rows)) == 1:
        return part
    widest = part.weight[:1].expand(max(group.rows), -1)
    tokens = part._replace(weight=widest).tokens_at_once()
    return part._replace(options=replace(part.options, chunk_bytes=part.bytes_of_chunk(tokens)))


def _owner(call: Call, targets: Tensor) -> Tensor:
    """The rank that has each target; -1 where it does not count."""
    group, absent = call.group(), -1 if targets.dim() > 1 else call.options.ignore_index
    counts = torch.ones_like(targets, dtype=torch.bool) if call.targets is None else targets != absent
    if not torch.compiler.is_compiling():
        checks.check_ids(targets, counts, call.options.ignore_index, group.vocabulary)
    ends = torch.tensor(group.rows, device=targets.device).cumsum(0)
    return torch.where(counts, torch.searchsorted(ends, targets, right=True), -1)


def _local_ids(targets: Tensor, owner: Tensor, group: VocabularyGroup) -> Tensor:
    """The targets as this rank's ids; any id where another rank has the target, -100 (-1 in a list) where none counts.

    A list names one id at least if the whole list does.
    """
    own = owner == group.rank
    local = torch.where(own, targets - group.start, 0)
    if targets.dim() == 1:
        return local.masked_fill(owner < 0, -100)
    first = torch.zeros_like(own).scatter(1, (owner >= 0).int().argmax(-1, keepdim=True), True)
    stands_in = first & (owner >= 0) & ~own.any(-1, keepdim=True)
    return local.masked_fill(~own & ~stands_in, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The whole vocabulary's statistics


def combined(
    local: dict[str, Tensor], owner: Tensor, empty: Tensor | None, group: VocabularyGroup, outputs: Sequence[str]
) -> TokenStats:
    """The statistics of the whole vocabulary that `outputs` names, on every rank, from this rank's own.

    `local` has logprob, lse and whatever else is asked for, `[n]` each; for lists logprob `[n, K]`, and the tail. For
    "correct" it has "top" too, the rank's largest logit. `owner` and `empty` are a `Shard`'s.
    """
    parts = _parts_of_ranks(local, owner, empty, group)
    lists = owner.dim() == 2
    counts = (owner.amax(-1) if lists else owner) >= 0
    log_share = _log_shares(parts["lse"])
    found = {"lse": parts["lse"].logsumexp(0)}
    place = owner.clamp(min=0)[None]
    share = log_share[..., None].expand(-1, -1, place.shape[-1]) if lists else log_share
    found["logprob"] = (parts["logprob"].gather(0, place) + share.gather(0, place))[0]
    if "entropy" in parts:
        found["entropy"] = (log_share.exp() * (parts["entropy"] - log_share)).sum(0)
    if "mean_logit" in parts:
        rows = torch.tensor(group.rows, dtype=log_share.dtype, device=log_share.device)
        found["mean_logit"] = (rows[:, None] / group.vocabulary * parts["mean_logit"]).sum(0)
    if "log_sum_sq" in parts:
        found["log_sum_sq"] = (2 * log_share + parts["log_sum_sq"]).detach().logsumexp(0)
    if "top" in parts:
        target = found["logprob"] + found["lse"]
        others = torch.arange(len(group.rows), device=place.device)[:, None] != place
        leads = target >= parts["top"].where(others, -torch.inf).amax(0)
        found["correct"] = (leads & (parts["correct"].gather(0, place)[0] > 0)).to(target.dtype)
    if "tail" in parts:
        found["tail"] = _logsumexp(parts["tail"] + log_share)
    masks = {name: owner >= 0 if name == "logprob" else counts for name in found}
    return TokenStats(**{name: reduce.zero_outside(masks[name], found[name]) for name in outputs})


def present(stats: TokenStats) -> dict[str, Tensor]:
    """The statistics that were computed, by name."""
    return {name: x for name, x in stats._asdict().items() if x is not None}


def _parts_of_ranks(
    local: dict[str, Tensor], owner: Tensor, empty: Tensor | None, group: VocabularyGroup
) -> dict[str, Tensor]:
    """Every rank's statistics by name, `[ranks, n]` each, in one message."""
    own = owner == group.rank
    stats = {**local, "logprob": torch.where(own, local["logprob"], 0.0)}
    if "tail" in stats:
        stats["tail"] = torch.where(own.any(-1), stats["tail"], 0.0)
    if empty is not None:
        mean = -torch.inf if group.rows[group.rank] else 0.0  # a row that stands in for none is no logit
        without = {"lse": NO_MASS, "entropy": 0.0, "log_sum_sq": 0.0, "mean_logit": mean, "top": -torch.inf}
        stats |= {name: torch.where(empty, x, stats[name]) for name, x in without.items() if name in stats}
    widths = [1 if x.dim() == 1 else x.shape[1] for x in stats.values()]
    message = torch.cat([x[:, None] if x.dim() == 1 else x for x in stats.values()], 1)
    everyone = Gather.apply(message, group.group).split(widths, -1)
    parts = {name: x if stats[name].dim() == 2 else x[..., 0] for name, x in zip(stats, everyone, strict=True)}
    nothing = (parts["lse"] <= NO_MASS).all(0)
    parts["lse"] = parts["lse"].masked_fill(nothing, torch.nan)  # a row of nothing but -inf has no distribution
    return parts


def _log_shares(lse: Tensor) -> Tensor:
    """`log s_r`, `[ranks, n]`."""
    ranks = torch.arange(len(lse), device=lse.device)
    others = lse[None].masked_fill((ranks[:, None] == ranks)[..., None], NO_MASS).logsumexp(1)
    return F.logsigmoid(lse - others)


def _logsumexp(x: Tensor) -> Tensor:
    """Over the ranks; of nothing but -inf its gradient is 0, not NaN."""
    nothing = x.isneginf().all(0)
    return x.masked_fill(nothing, 0.0).logsumexp(0).masked_fill(nothing, -torch.inf)


def likeliest(
    own: tuple[Tensor, Tensor, Tensor, Tensor], k: int, shard: Shard, group: VocabularyGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k likeliest ids of all ranks, their logprob, lse and tail, from ids, logprob, lse and tail of each rank's."""
    ids, logprob, lse, tail = own
    if shard.empty is not None:
        lse = torch.where(shard.empty, NO_MASS, lse)
    missing = k - ids.shape[1]
    ids, logprob = F.pad(ids + group.start, (0, missing)), F.pad(logprob, (0, missing), value=-torch.inf)
    everyone = Gather.apply(torch.cat([logprob, lse[:, None], tail[:, None]], 1), group.group)
    logprobs, (lse, tail) = everyone[..., :k], everyone[..., k:].unbind(-1)
    log_share = _log_shares(lse)
    shape = (len(ids), len(group.rows) * k)
    candidates = (logprobs + log_share[..., None]).transpose(0, 1).reshape(shape)
    found, place = candidates.topk(k, dim=-1)
    chosen = torch.zeros_like(candidates, dtype=torch.bool).scatter(1, place, True)
    rest = torch.cat([candidates.masked_fill(chosen, -torch.inf), (tail + log_share).T], 1)
    all_ids = Gather.apply(ids, group.group).transpose(0, 1).reshape(shape)
    return all_ids.gather(1, place), found, lse.logsumexp(0), rest.logsumexp(-1)


@dataclass(frozen=True)
class OfWhole:
    """A per-token loss of the whole vocabulary's statistics, as a function of this rank's own, chunk by chunk.

    Its inputs begin with `inputs()`. Each chunk sends one message, so all ranks must have the same chunks
    (`with_common_chunks`). The fields are constants that `torch.compile` can hand over.
    """

    function: PerTokenLoss
    outputs: tuple[str, ...]
    group: str
    rows: tuple[int, ...]
    masked: bool

    @staticmethod
    def of(function: PerTokenLoss, outputs: tuple[str, ...], shard: Shard, group: VocabularyGroup) -> OfWhole:
        """The loss of one call's shard."""
        return OfWhole(function, outputs, group.group.group_name, group.rows, shard.empty is not None)

    @staticmethod
    def inputs(shard: Shard) -> list[Tensor]:
        """The constants of each token that the function needs: the owner, and whether this rank's rows have no mass."""
        return [shard.owner, *(() if shard.empty is None else (shard.empty.expand(len(shard.owner)),))]

    def __call__(self, stats: TokenStats, owner: Tensor, *inputs: Tensor) -> Tensor:
        empty, inputs = (inputs[0], inputs[1:]) if self.masked else (None, inputs)
        group = VocabularyGroup(named_group(self.group), self.rows)
        return self.function(combined(present(stats), owner, empty, group, self.outputs), *inputs)
