"""Tail-corrected gradients: the entries that carry probability one by one, all the others at rank one per block.

The matrix of a chunk's logit gradients, `g [n, V]`, is almost empty in a trained model. With c_i the size of token i's
upstream gradients (|logprob's| + |lse's| + |entropy's|), `tolerance` the option and SHARE = 8, an entry is kept where

    |g_ij| >= tolerance / SHARE * mean_k c_k            (|c_i| p_ij, without an entropy's gradient and a softcap)

and what is left of a block b of B = 256 vocabulary entries is put back as its mean, so that rows keep their sum:

    d hidden_i = sum_kept g_ij weight_j   + sum_b tail_ib mean_b(weight)           tail_ib = sum_(j in b, left) g_ij
    d weight_j = sum_kept g_ij hidden_i   + sum_i tail_i,b(j) hidden_i / B

The blocks are those of the problem's `vocabulary_order`, where it has one.
The target's entry is always kept. Row i's error has L1 norm at most `2 left_i`, with `left_i = sum_left |g_ij|`, and L2
norm at most `sqrt(tolerance / SHARE * mean c * left_i)`. docs/tail-corrected.md derives this, the cost, and why entries
rather than blocks are the unit here. The products with the kept entries are `embedding_bag`s: sums of rows of the head,
or of the hidden states, each times a number.

A chunk that is too flat for this takes the exact products instead: where more than 1 / 32 of its entries would be kept,
or more than a quarter of its gradient would be left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import TokenStats
from . import rows as row_math
from . import sweep
from .order import places
from .problem import Coefficients, Forward, Gradients, Needs, Problem, SinglePass, Upstream, zero_gradients

#: Vocabulary entries in a block of the tail. 64 takes 2% off the error and four times the memory.
BLOCK = 256
#: `tail_tolerance` is the mass below which a whole block of 64 could be left out; an entry is held to an eighth of
#: it. At this ratio both rules have about the same error (docs/tail-corrected.md), and entries are a tenth of the work.
SHARE = 8
#: A kept entry costs some nine times what it costs in the GEMMs, and 8 bytes until the backward: at this share a third
#: of the products' time and a sixteenth of the logits' memory.
MOST_KEPT = 1 / 32
#: More than this share of a gradient is never put back as means.
MOST_LEFT = 1 / 4
#: Kept entries that wait for the head's gradient, which is one pass over the head for all of them.
MOST_WAITING = 2**22


# ---------------------------------------------------------------------------------------------------------------------
# What was left out


@dataclass
class TailReport:
    """What tail-corrected backwards left out, token by token in the order in which they ran.

    Only tokens that count are listed. `left` is exact, not an estimate; the bounds follow from it alone.
    """

    _left: list[Tensor] = field(default_factory=list)
    _threshold: list[Tensor] = field(default_factory=list)
    _coefficient: list[Tensor] = field(default_factory=list)
    kept: int = 0
    """Entries of the logits' gradient that were kept, the targets' among them."""
    entries: int = 0
    """Entries in all: tokens times vocabulary."""
    exact_tokens: int = 0
    """Tokens that took the exact products, because their chunk was too flat."""

    @property
    def left(self) -> Tensor:
        """`[tokens]`: the L1 norm of the token's logit gradient that was put back as block means; 0 where exact."""
        return torch.cat(self._left) if self._left else torch.empty(0)

    @property
    def tail_mass(self) -> Tensor:
        """`[tokens]`: `left` over the size of the token's upstream gradient. The probability mass, for a logprob's."""
        coefficient = torch.cat(self._coefficient) if self._coefficient else torch.empty(0)
        return torch.where(coefficient > 0, self.left / coefficient, 0)

    @property
    def l1_bound(self) -> Tensor:
        """`[tokens]`: the error of the token's logit gradient is at most this in the L1 norm."""
        return 2 * self.left

    @property
    def l2_bound(self) -> Tensor:
        """`[tokens]`: the same in the L2 norm. Every entry left is below the threshold, so its square is below the
        threshold times it; putting means back only shortens the error."""
        return (torch.cat(self._threshold) * self.left).sqrt() if self._left else torch.empty(0)

    def add(self, left: Tensor, threshold: Tensor, coefficient: Tensor, kept: int, vocabulary: int) -> None:
        """Of a chunk that was tail-corrected."""
        for values, value in ((self._left, left), (self._threshold, threshold), (self._coefficient, coefficient)):
            values.append(value.detach().expand(len(left)).to("cpu", torch.float64))
        self.kept += kept
        self.entries += len(left) * vocabulary

    def add_exact(self, tokens: int, vocabulary: int) -> None:
        """Of tokens that took the exact products."""
        zero = torch.zeros(tokens)
        self.add(zero, zero, zero, tokens * vocabulary, vocabulary)
        self.exact_tokens += tokens


_reports: list[TailReport] = []


@contextmanager
def tail_report() -> Iterator[TailReport]:
    """Collects what the tail-corrected backwards inside leave out. Without it, nothing is collected.

    with tail_report() as report:
        loss.backward()
    report.tail_mass.mean(), report.l1_bound.max()
    """
    report = TailReport()
    _reports.append(report)
    try:
        yield report
    finally:
        _reports.remove(report)


def reports() -> tuple[TailReport, ...]:
    """Those that are collecting."""
    return tuple(_reports)


# ---------------------------------------------------------------------------------------------------------------------
# A matrix in two parts


def blocks(vocabulary: int) -> int:
    """How many blocks a vocabulary has; the last may be short."""
    return -(-vocabulary // BLOCK)


class Split(NamedTuple):
    """`[n, V]`: entries one by one, and per block what is spread over it."""

    token: Tensor  # [K] int32
    column: Tensor  # [K] int32
    value: Tensor  # [K]
    tail: Tensor  # [n, blocks] sums of what is left


class Layout(NamedTuple):
    """Which entries a block of the tail has. An order changes nothing else: no copy of the head is made for it."""

    order: Tensor | None  # [V] int64: the entries, block after block; None: as they stand in the head
    block: Tensor  # [V] int32: the block of each entry


def layout(problem: Problem) -> Layout:
    order = problem.vocabulary_order
    place = torch.arange(len(problem.weight), device=problem.weight.device) if order is None else places(order)
    return Layout(order, (place // BLOCK).int())


def _by_block(matrix: Tensor, order: Tensor | None) -> Tensor:
    """Sums over blocks of the vocabulary, `[n, V]` to `[n, blocks]`, along the memory of a vocabulary-major chunk."""
    vocabulary_major = matrix.stride(0) == 1
    if order is not None and vocabulary_major:
        return F.embedding_bag(order, matrix.T, torch.arange(0, len(order), BLOCK, device=order.device), mode="sum").T
    if order is not None:
        matrix = matrix.index_select(1, order)
    x, dim = (matrix.T, 0) if vocabulary_major else (matrix, 1)
    whole = x.shape[dim] // BLOCK
    sums = x.narrow(dim, 0, whole * BLOCK).unflatten(dim, (whole, BLOCK)).sum(dim + 1)
    rest = x.narrow(dim, whole * BLOCK, x.shape[dim] - whole * BLOCK).sum(dim, keepdim=True)
    sums = torch.cat([sums, rest], dim) if x.shape[dim] % BLOCK else sums
    return sums.T if vocabulary_major else sums


def _positions(mask: Tensor) -> Tensor:
    """Where a contiguous mask is set, flat. Eight entries at a time: most eights of a mask like these are empty."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    eights = flat.view(torch.int64)
    found = eights.nonzero()[:, 0]
    which, byte = eights.index_select(0, found).view(torch.bool).view(-1, 8).nonzero().unbind(1)
    return found.index_select(0, which) * 8 + byte


def _split(matrix: Tensor, threshold: Tensor, where: Layout, *, signed: bool) -> Split | None:
    """Entries of at least `threshold [n]` in absolute value, and the rest by block; None where too many are kept."""
    size = matrix.abs() if signed else matrix
    vocabulary_major = matrix.stride(0) == 1
    mask = torch.ge(size.T, threshold) if vocabulary_major else torch.ge(size, threshold[:, None])
    if mask.count_nonzero() > MOST_KEPT * mask.numel():
        return None
    position = _positions(mask)
    slow, fast = position // mask.shape[1], position % mask.shape[1]
    token, column = (fast, slow) if vocabulary_major else (slow, fast)
    value = (matrix.T if vocabulary_major else matrix).reshape(-1).index_select(0, position)
    tail = _by_block(matrix, where.order)
    return Split(token.int(), column.int(), value, _without(tail, token, where.block.index_select(0, column), value))


def _without(tail: Tensor, token: Tensor, block: Tensor, value: Tensor) -> Tensor:
    """Block sums less those entries."""
    kept = torch.zeros_like(tail, memory_format=torch.contiguous_format)
    kept.view(-1).index_add_(0, token.long() * tail.shape[1] + block, value)
    return tail - kept


def _bag(table: Tensor, row: Tensor, group: Tensor, value: Tensor, groups: int) -> Tensor:
    """`out[k] = sum_(group = k) value table[row]`, for `group` in order."""
    offsets = torch.searchsorted(group, torch.arange(groups, dtype=group.dtype, device=group.device), out_int32=True)
    return F.embedding_bag(row, table, offsets, mode="sum", per_sample_weights=value)


class _Accumulators(sweep.Accumulators):
    """As `sweep`'s, with the products of a chunk's matrix in two parts."""

    def __init__(self, chunks: sweep.Chunks, needs: Needs, tolerance: float) -> None:
        super().__init__(chunks, needs)
        self.tolerance, self.one_product = tolerance, False
        self.blocks = blocks(chunks.problem.weight.shape[0])
        self.layout = layout(chunks.problem)
        self.weight = chunks.head_in(chunks.dtype)
        self.spread = self._spread()
        self.block_weight = self._block_means() if needs.hidden else None
        self.tail_weight = torch.zeros(self.blocks, self.weight.shape[1], dtype=chunks.dtype, device=self.weight.device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # token of the call, column, value
        self.coefficients = torch.zeros((), dtype=chunks.dtype, device=self.weight.device)
        self.seen = 0

    def _spread(self) -> Tensor:
        """`[V]`: the part of its block's tail that an entry gets. A masked one, of probability 0, gets none."""
        chunks, bias = self.chunks, self.chunks.head.bias
        takes = torch.ones(self.weight.shape[0], dtype=chunks.dtype, device=self.weight.device)
        if bias is not None:
            takes = takes.masked_fill(bias.isneginf(), 0)
        members = takes.new_zeros(self.blocks).index_add_(0, self.layout.block, takes)
        return takes / members.clamp(min=1).index_select(0, self.layout.block)

    def _block_means(self) -> Tensor:
        place = torch.arange(len(self.spread), dtype=torch.int32, device=self.weight.device)
        rows = place if self.layout.order is None else self.layout.order.int()
        return _bag(self.weight, rows, place // BLOCK, self.spread.index_select(0, rows), self.blocks)

    def add_gradient(self, rows: slice, targets: Tensor, gradient: sweep.RowGradient, upstream: Upstream) -> None:
        coefficient = coefficient_size(upstream)
        threshold = self._threshold(coefficient)
        split = self._measured(gradient, upstream, threshold, coefficient)
        if split is None:
            self.add_exact(rows, targets, gradient, upstream)
            return
        self.add_split(rows, split)
        self.add_targets(rows, targets, gradient.target)
        self.add_mean(rows, upstream)

    def add_exact(self, rows: slice, targets: Tensor, gradient: sweep.RowGradient, upstream: Upstream) -> None:
        """The dense products."""
        super().add_gradient(rows, targets, gradient, upstream)
        for report in _reports:
            report.add_exact(len(targets), len(self.spread))

    def _threshold(self, coefficient: Tensor) -> Tensor:
        """Of an entry of `g`, `[]`, by the mean of the tokens seen so far."""
        self.coefficients += coefficient.sum()
        self.seen += len(coefficient)
        slope = self.chunks.problem.transform.slope
        return self.coefficients / max(1, self.seen) * (self.tolerance / SHARE * slope)

    def _measured(
        self, gradient: sweep.RowGradient, upstream: Upstream, threshold: Tensor, coefficient: Tensor
    ) -> Split | None:
        """The gradient in two parts, reported; None where it is too flat for that."""
        signed = upstream.entropy is not None or self.chunks.problem.transform.softcap is not None
        matrix = gradient.matrix.to(self.chunks.dtype)
        scale = torch.ones_like(coefficient) if gradient.row_scale is None else gradient.row_scale
        split = _split(matrix, threshold / scale.abs(), self.layout, signed=signed)
        if split is None:
            return None
        left = _left(matrix, split, signed=signed) * scale.abs()
        slope = self.chunks.problem.transform.slope
        if left.sum() > MOST_LEFT * slope * coefficient.sum():
            return None
        for report in _reports:
            report.add(left, threshold, coefficient * slope, len(split.token) + len(left), len(self.spread))
        return split._replace(value=split.value * scale.index_select(0, split.token), tail=split.tail * scale[:, None])

    def add_split(self, rows: slice, split: Split) -> None:
        """The products of a matrix in two parts; its entries may be in any order."""
        if self.sums.hidden is not None:
            token, order = split.token.sort(stable=True)
            column, value = split.column.index_select(0, order), split.value.index_select(0, order)
            self.set_hidden(rows, _bag(self.weight, column, token, value, len(split.tail)), split.tail)
        self.add_head(rows, split)

    def set_hidden(self, rows: slice, near: Tensor, tail: Tensor) -> None:
        """`d hidden`, `near [n, H]` of it from the entries."""
        if self.sums.hidden is not None:
            assert self.block_weight is not None
            torch.addmm(near, tail, self.block_weight, out=self.sums.hidden[rows])

    def add_head(self, rows: slice, split: Split) -> None:
        """The head's part of `add_split`."""
        if self.needs.weight:
            self.tail_weight.addmm_(split.tail.T, self.chunks.hidden[rows].to(self.chunks.dtype))
            self.waiting.append((split.token + rows.start, split.column, split.value))
            if sum(len(token) for token, *_ in self.waiting) > MOST_WAITING:
                self._flush()
        if self.sums.bias is not None:
            self.sums.bias.index_add_(0, split.column, split.value)
            self.sums.bias.addcmul_(split.tail.sum(0).index_select(0, self.layout.block), self.spread)

    def add_targets(self, rows: slice, targets: Tensor, entry: Tensor) -> None:
        if self.sums.hidden is not None:
            self.sums.hidden[rows].addcmul_(entry[:, None], self.weight[targets])
        if self.needs.weight:
            token = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=targets.device)
            self.waiting.append((token, targets.int(), entry))
        if self.sums.bias is not None:
            self.sums.bias.index_add_(0, targets, entry)

    def _flush(self) -> None:
        """Entries and tails into the head's gradient: one pass over it. A tail is one more entry of each row, in a
        table that has the blocks' sums below the hidden states."""
        device, vocabulary = self.weight.device, len(self.spread)
        hidden = self.chunks.hidden.to(self.chunks.dtype)
        row = torch.arange(vocabulary, dtype=torch.int32, device=device)
        tail = (self.layout.block + len(hidden), row, self.spread)
        token, column, value = (torch.cat(parts) for parts in zip(*self.waiting, tail, strict=True))
        column, order = column.sort(stable=True)
        table = torch.cat([hidden, self.tail_weight])
        found = _bag(table, token.index_select(0, order), column, value.index_select(0, order), vocabulary)
        self.sums = self.sums._replace(weight=found if self.sums.weight is None else self.sums.weight.add_(found))
        self.weight_begun = True
        self.waiting.clear()
        self.tail_weight.zero_()

    def finish(self) -> Gradients:
        if self.needs.weight and (self.waiting or self.sums.weight is None):
            self._flush()
        return super().finish()


def coefficient_size(upstream: Upstream) -> Tensor:
    """`[n]`: the size of the upstream gradients that reach the entries by their probability."""
    found = [g.abs() for g in upstream[:3] if g is not None]
    if not found:
        return torch.zeros_like(next(g for g in upstream if g is not None))
    return torch.stack(found).sum(0)


def _left(matrix: Tensor, split: Split, *, signed: bool) -> Tensor:
    """`[n]`: the L1 norm of what is left of each row; rounding may take it below 0."""
    if not signed:
        return split.tail.sum(-1).clamp(min=0)
    kept = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    kept.index_add_(0, split.token, split.value.abs())
    return (matrix.abs().sum(-1) - kept).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# What the ops call


def single_pass(
    engine: sweep.RowEngine,
    problem: Problem,
    outputs: tuple[str, ...],
    coefficients: Coefficients,
    groups: Tensor | None,
    needs: Needs,
    tolerance: float,
) -> SinglePass:
    """`sweep.single_pass`, tail-corrected: every statistic's gradient, under a softcap too, for the matrix is at hand.

    `mean c` is that of the tokens seen so far."""

    def accumulators(chunks: sweep.Chunks, needs: Needs) -> sweep.Accumulators:
        return _Accumulators(chunks, needs, tolerance)

    return sweep.single_pass(engine, problem, outputs, coefficients, groups, needs, accumulators)


class Kept(NamedTuple):
    """What a forward leaves behind for a backward that computes no logits: `-d logprob / d(raw product)`, split."""

    counts: Tensor  # [N] int32 entries of each token; -1: its chunk was too flat, or has a softcap
    column: Tensor  # [K] int32, token after token
    value: Tensor  # [K]
    tail: Tensor  # [N, blocks]
    near: Tensor | None = None  # [N, H] the sum of each token's values times the head's rows, where that was made


def forward(
    engine: sweep.RowEngine, problem: Problem, outputs: tuple[str, ...], tolerance: float
) -> tuple[Forward, Kept]:
    """`TokenStats` of every token, and its entries of `p_ij >= tolerance / SHARE`: no coefficient is known yet."""
    chunks, where = sweep.Chunks(engine, problem, outputs), layout(problem)
    found, kept = [], []
    for rows in sweep.spans(len(problem.targets), chunks.tokens):
        tile = chunks.measure(rows)
        found.append(tile.stats)
        kept.append(_keep(chunks, tile, where, tolerance))
        del tile
    if not kept:
        kept = [_exact(chunks, 0)]
    stats = sweep.concatenate(found, chunks.dtype, problem, outputs)
    return Forward(stats, None), Kept(*(torch.cat(parts) for parts in zip(*(part[:4] for part in kept), strict=True)))


def _keep(chunks: sweep.Chunks, tile: sweep.Tile, where: Layout, tolerance: float) -> Kept:
    count = len(tile.targets)
    if chunks.problem.transform.softcap is not None:
        return _exact(chunks, count)
    one = torch.ones(count, dtype=chunks.dtype, device=tile.targets.device)
    gradient = chunks.engine.gradient(tile, chunks.head, Upstream(logprob=-one), chunks.operand)
    matrix = gradient.matrix.to(chunks.dtype)
    scale = one if gradient.row_scale is None else gradient.row_scale
    slope = chunks.problem.transform.slope
    split = _split(matrix, tolerance / SHARE * slope / scale, where, signed=False)
    if split is None:
        return _exact(chunks, count)
    tail = split.tail * scale[:, None]
    if tail.sum() > MOST_LEFT * slope * count:
        return _exact(chunks, count)
    token, order = split.token.sort(stable=True)
    counts = torch.bincount(token, minlength=count).int()
    value = split.value.index_select(0, order).mul_(scale.index_select(0, token))
    return Kept(counts, split.column.index_select(0, order), value, tail)


def _exact(chunks: sweep.Chunks, count: int) -> Kept:
    weight = chunks.problem.weight
    return Kept(
        torch.full((count,), -1, dtype=torch.int32, device=weight.device),
        torch.empty(0, dtype=torch.int32, device=weight.device),
        torch.empty(0, dtype=chunks.dtype, device=weight.device),
        torch.zeros(count, blocks(weight.shape[0]), dtype=chunks.dtype, device=weight.device),
    )


def backward(
    engine: sweep.RowEngine,
    problem: Problem,
    stats: TokenStats,
    kept: Kept,
    upstream: Upstream,
    needs: Needs,
    tolerance: float,
) -> Gradients:
    """Gradients from what the forward kept; exact, by recomputation, where it kept nothing and for the entropy's.

    Entries that the upstream gradients make needless, `|c_i| p_ij < tolerance / SHARE * mean c`, join the tail."""
    chunks = sweep.Chunks(engine, problem, ())
    accumulators = _Accumulators(chunks, needs, tolerance)
    exact = kept.counts < 0 if upstream.entropy is None else torch.ones_like(kept.counts, dtype=torch.bool)
    runs = torch.unique_consecutive(exact, return_counts=True)
    start = first = 0
    for is_exact, length in zip(*(x.tolist() for x in runs), strict=True):
        run = slice(start, start + length)
        if is_exact:
            _recompute(accumulators, run, stats, upstream)
        else:
            end = first + int(kept.counts[run].sum())
            near = None if kept.near is None else kept.near[run]
            part = Kept(kept.counts[run], kept.column[first:end], kept.value[first:end], kept.tail[run], near)
            _from_kept(accumulators, run, part, stats, upstream)
            first = end
        start += length
    return accumulators.finish()


def rows_of_head(weight: Tensor, kept: Kept) -> Tensor:
    """`near` of what `forward` kept, `[N, H]`."""
    counts = kept.counts.clamp(min=0)
    token = torch.arange(len(counts), dtype=torch.int32, device=counts.device).repeat_interleave(counts.long())
    return _bag(weight.to(kept.value.dtype), kept.column, token, kept.value, len(counts))


def around_a_loss(
    problem: Problem,
    stats: TokenStats,
    coefficients: Coefficients,
    needs: Needs,
    gradients: Callable[[Upstream], Gradients],
) -> SinglePass:
    """A loss of all tokens' statistics between a forward that has been and a backward."""
    assert stats.logprob is not None
    loss, upstream = stats.logprob.new_zeros(()), Upstream()
    if len(problem.targets):
        loss, upstream = coefficients(stats, slice(0, len(problem.targets)))
    if all(g is None for g in upstream):
        return SinglePass(loss, stats.logprob, zero_gradients(problem, needs, loss.dtype))
    return SinglePass(loss, stats.logprob, gradients(upstream))


def _recompute(accumulators: _Accumulators, run: slice, stats: TokenStats, upstream: Upstream) -> None:
    chunks = accumulators.chunks
    for part in sweep.spans(run.stop - run.start, chunks.tokens):
        rows = slice(run.start + part.start, run.start + part.stop)
        known = TokenStats(*(None if x is None else x[rows] for x in stats))
        tile = chunks.recall(rows, known)
        gradient = chunks.engine.gradient(tile, chunks.head, upstream.rows(rows), chunks.operand)
        accumulators.add_exact(rows, tile.targets, gradient, upstream.rows(rows))


def _from_kept(accumulators: _Accumulators, rows: slice, kept: Kept, stats: TokenStats, upstream: Upstream) -> None:
    problem, slope = accumulators.chunks.problem, accumulators.chunks.problem.transform.slope
    here = upstream.rows(rows)
    known = TokenStats(*(None if x is None else x[rows] for x in stats))
    factor = _less(here.lse, here.logprob, like=kept.tail)
    rule = accumulators.tolerance / SHARE * slope
    threshold = coefficient_size(upstream).mean() * rule
    counts = kept.counts.long()
    token = torch.arange(len(counts), device=counts.device, dtype=torch.int32).repeat_interleave(counts)
    value, tail = kept.value * factor.index_select(0, token), kept.tail * factor[:, None]
    stays = value.abs() >= threshold
    few = ~stays
    block = accumulators.layout.block.index_select(0, kept.column[few])
    tail = _without(tail, token[few], block, -value[few])
    left = tail.sum(-1).abs()
    for report in _reports:
        count, largest = int(stays.sum()) + len(counts), threshold.maximum(factor.abs() * rule)
        report.add(left, largest, factor.abs() * slope, count, problem.weight.shape[0])
    split = Split(token[stays], kept.column[stays], value[stays], tail)
    if kept.near is None:
        accumulators.add_split(rows, split)
    else:
        accumulators.set_hidden(rows, kept.near * factor[:, None], kept.tail * factor[:, None])
        accumulators.add_head(rows, split)
    accumulators.add_targets(rows, problem.targets[rows], row_math.target_entry(known, here) * slope)
    accumulators.add_mean(rows, here)


def _less(b: Tensor | None, a: Tensor | None, *, like: Tensor) -> Tensor:
    """`b - a`, None being 0."""
    zero = like.new_zeros(len(like))
    return (zero if b is None else b) - (zero if a is None else a)
