"""A row engine for several ids a token: it sets the listed entries of a chunk apart, and leaves the rest to an engine.

A token lists K ids. With P the probability of all other entries together, and T the logsumexp of their logits,

    lse     = log(sum_k exp(z_k) + exp(T))                  k over the listed ids, each once
    logprob = z_k - lse,   tail = log P = T - lse           relative to the largest of the K + 1 scores, as in eq. 6
    entropy = -sum_k p_k log p_k - P log P + P H'           H' the entropy of the others among themselves

T and H' are the statistics of a row whose listed entries are -inf: any row engine measures them. So the tail keeps all
its digits where the listed ids have nearly all the probability, and no kernel knows of lists. With upstream gradients
a_k (logprob), b (lse), c (tail) and e (entropy), A the sum of a_k and h = entropy,

    dL/dz_k = a_k + p_k (b - c - A) - e p_k (log p_k + h)
    dL/dT   = c + P (b - c - A) - e P (log P + h - H')
    dL/dH'  = e P

The last two are upstream gradients of the engine's lse and entropy. The first are K numbers a row, which are put into
the matrix that the engine leaves, so that its products serve all K ids. An id that a token lists twice counts once in
every sum. `kernels/MATH.md` numbers the equations that this generalises.

Memory: the engine's, and some `[n, K]` tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...types import Head, TokenStats, statistics_dtype
from ..interface import RowEngine, RowGradient, Tile, Upstream
from .denormals import drop_denormals_


class _Lists(NamedTuple):
    """The listed entries of a chunk."""

    columns: Tensor  # [n, K] int64; an absent place repeats an id of its row
    present: Tensor  # [n, K] bool
    first: Tensor  # [n, K] bool: the place where a row lists an id for the first time
    z: Tensor  # [n, K]
    derivative: Tensor | float  # dz / d(raw product), [n, K] under a softcap
    nothing: Tensor | None  # [n, 1] bool: rows without other entries; None: there are none


class ListedRows(RowEngine):
    """The row engine of targets `[n, K]`, -1 for an absent place, on an engine of targets `[n]`."""

    def __init__(self, engine: RowEngine) -> None:
        self.engine = engine

    def buffers(self, head: Head, chunk_dtype: torch.dtype | None) -> int:
        return self.engine.buffers(head, chunk_dtype)

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        lists, head = _set_apart(raw, head, targets)
        names = ("entropy",) if "entropy" in outputs else ()
        others = self.engine.measure(raw, head, lists.columns[:, 0], names, None)
        return Tile(others.logits, targets, _list_statistics(lists, others.stats, outputs), (lists, others))

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        lists, head = _set_apart(raw, head, targets)
        dummy = lists.columns[:, 0]
        if stats.entropy is None:
            assert stats.tail is not None and stats.lse is not None
            lse = stats.tail + stats.lse
            if lists.nothing is not None:
                lse = lse.masked_fill(lists.nothing[:, 0], 0.0)
            known = TokenStats(logprob=torch.full_like(lse, -math.inf), lse=lse)
            others = self.engine.recall(raw, head, dummy, known)
        else:
            others = self.engine.measure(raw, head, dummy, ("entropy",), None)
        return Tile(others.logits, targets, stats, (lists, others))

    def gradient(self, tile: Tile, head: Head, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        lists, others = tile.private
        listed, of_others = _derivatives(lists, others.stats, tile.stats, upstream)
        matrix, scale, _ = self.engine.gradient(others, _with_mask(head), of_others, operand)
        if scale is not None:
            matrix = matrix.mul_(scale[:, None])
        matrix.scatter_add_(1, lists.columns, (listed * lists.derivative).to(matrix.dtype))
        return RowGradient(drop_denormals_(matrix), None, None)


def _with_mask(head: Head) -> Head:
    """The head for rows with -inf among their products. An engine may look for them only where there is a bias."""
    if head.softcap is None or head.bias is not None:
        return head
    dtype = statistics_dtype(head.weight.dtype)
    return head._replace(bias=torch.zeros(len(head.weight), dtype=dtype, device=head.weight.device))


def _set_apart(raw: Tensor, head: Head, targets: Tensor) -> tuple[_Lists, Head]:
    """Takes the listed entries out of raw products, where they become -inf; the head is the one for the others."""
    present = targets >= 0
    columns = torch.where(present, targets, targets.amax(-1, keepdim=True)).clamp(min=0)
    z = raw.gather(1, columns).to(statistics_dtype(raw.dtype))
    if head.bias is not None:
        z = z + head.bias[columns]
    derivative = head.transform.apply_(z, may_be_masked=True)
    raw.scatter_(1, columns, -math.inf)
    nothing = _fill_empty_rows_(raw, head.bias, targets.shape[1])
    slope = head.transform.slope if derivative is None else derivative
    return _Lists(columns, present, first_places(targets), z, slope, nothing), _with_mask(head)


def _fill_empty_rows_(raw: Tensor, bias: Tensor | None, listed: int) -> Tensor | None:
    """Gives a row without other entries one finite product, as no engine has statistics for it; says which they are."""
    if bias is None and listed < raw.shape[1]:
        return None
    nothing = (raw if bias is None else raw + bias).isneginf().all(-1, keepdim=True)
    column = torch.zeros((), dtype=torch.long, device=raw.device) if bias is None else bias.argmax()
    place = column.expand(len(raw), 1)  # not an index, for which the host would wait
    raw.scatter_(1, place, raw.gather(1, place).masked_fill(nothing, 0.0))
    return nothing


def first_places(targets: Tensor) -> Tensor:
    """The places of `[n, K]` where a row lists an id for the first time, bool; -1 is no id."""
    ids, order = targets.sort(dim=-1, stable=True)
    new = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    return torch.zeros_like(new).scatter(1, order, new) & (targets >= 0)


def _list_statistics(lists: _Lists, others: TokenStats, outputs: tuple[str, ...]) -> TokenStats:
    """The statistics of a chunk's tokens, from those of the entries that are not listed."""
    assert others.lse is not None
    tail = others.lse[:, None]
    if lists.nothing is not None:
        tail = tail.masked_fill(lists.nothing, -math.inf)
    scores = torch.cat([lists.z.masked_fill(~lists.first, -math.inf), tail], 1)
    top, place = scores.max(-1, keepdim=True)
    rest = scores.scatter(1, place, -math.inf).logsumexp(-1, keepdim=True)
    top_logprob = -torch.logaddexp(rest - top, torch.zeros_like(top))
    logprob = (lists.z - top + top_logprob).masked_fill(~lists.present, 0.0)
    stats = TokenStats(logprob, (top - top_logprob)[:, 0], tail=(tail - top + top_logprob)[:, 0])
    if "entropy" not in outputs:
        return stats
    assert others.entropy is not None
    p = (scores - top + top_logprob).exp()
    return stats._replace(entropy=p[:, -1] * others.entropy - torch.xlogy(p, p).sum(-1))


def _derivatives(lists: _Lists, others: TokenStats, stats: TokenStats, upstream: Upstream) -> tuple[Tensor, Upstream]:
    """`dL/dz` of the listed entries `[n, K]`, and the gradients that reach the others' lse and entropy."""
    assert stats.logprob is not None and stats.tail is not None
    a, b, e, c = upstream.logprob, upstream.lse, upstream.entropy, upstream.tail
    p = stats.logprob.exp() * lists.first
    rest = stats.tail.exp()
    common = torch.zeros_like(rest) if b is None else b
    listed, of_tail = torch.zeros_like(p), torch.zeros_like(rest)
    if a is not None:
        a = a * lists.present
        common = common - a.sum(-1)
        listed = torch.where(lists.first, -a * torch.expm1(stats.logprob), a) + p * a  # near 1, a - p a would round
    if c is not None:
        c = c if lists.nothing is None else c.masked_fill(lists.nothing[:, 0], 0.0)  # -inf, whatever the logits
        listed, of_tail = listed - p * c[:, None], -c * torch.expm1(stats.tail)
    listed, of_tail = listed + p * common[:, None], of_tail + rest * common
    of_entropy = None
    if e is not None:
        entropy, within = stats.entropy, others.entropy
        assert entropy is not None and within is not None
        listed = listed - e[:, None] * (torch.xlogy(p, p) + p * entropy[:, None])
        of_tail = of_tail - e * (torch.xlogy(rest, rest) + rest * (entropy - within))
        of_entropy = e * rest
    if lists.nothing is not None:
        of_tail = of_tail.masked_fill(lists.nothing[:, 0], 0.0)
    return listed, Upstream(lse=of_tail, entropy=of_entropy)
