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
from typing import NamedTuple

import torch
from torch import Tensor

from ...types import Head, Options, TokenStats
from ..exact import sweep
from ..exact.chunks import Chunks
from ..exact.denormals import drop_denormals_
from ..exact.gradients import Accumulators, add_targets, target_entry
from ..exact.products import spans
from ..interface import (
    Approximate,
    ExactPasses,
    Forward,
    Gradients,
    Needs,
    Problem,
    RowGradient,
    Saved,
    SinglePass,
    SummedLosses,
    Tile,
    Upstream,
    rows_of,
    zero_gradients,
)
from .report import TailReport, reports
from .select import (
    MOST_LEFT,
    SHARE,
    TAIL_BLOCK,
    Split,
    TailBlocks,
    bag,
    block_count,
    rows_left,
    shares,
    split_entries,
    tail_blocks,
    without,
)

#: Kept entries that wait for the head's gradient, which is one pass over the head for all of them.
MOST_WAITING = 2**22


class Entries(Approximate):
    """`backward="tail_corrected"`, entry by entry, on any backend's row engine."""

    def __init__(self, backend: ExactPasses) -> None:
        self.backend = backend

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        return self.backend.tokens_at_once(hidden, head, options)

    def saved_width(self, hidden: Tensor, head: Head) -> int:
        """The blocks of the tail."""
        return block_count(len(head.weight), TAIL_BLOCK)

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token, and its entries of `p_ij >= tolerance / SHARE`: no coefficient is known yet."""
        chunks, where = Chunks(self.backend.row_engine(problem), problem, outputs), tail_blocks(problem)
        stats, saved = [], []
        for rows in spans(len(problem.targets), chunks.tokens):
            tile = chunks.measure(rows)
            stats.append(tile.stats)
            saved.append(_keep(chunks, tile, where, tolerance))
            del tile
        if not saved:
            saved = [_keep_nothing(chunks, 0)]
        joined = Saved(*(torch.cat(parts) for parts in zip(*saved, strict=True)))
        return Forward(sweep.concatenate(stats, chunks.dtype, problem, outputs), None), joined

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        return gradients_from(self.backend, problem, stats, Kept(*saved), upstream, needs, tolerance)

    def single_pass(self, problem: Problem, losses: SummedLosses, tolerance: float) -> SinglePass:
        """One sweep: every statistic's gradient is approximated, under a softcap too, for the matrix is at hand.

        `mean c` is that of the tokens seen so far.
        """

        def sums_of(chunks: Chunks, needs: Needs) -> sweep.Sums:
            return EntrySums(chunks, needs, tolerance)

        return sweep.single_pass(self.backend.row_engine(problem), problem, losses, sums_of)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


class Kept(NamedTuple):
    """`-d logprob / d(raw product)`, split: what a backward that computes no logits is made from."""

    counts: Tensor  # [N] int32 entries of each token; -1: its chunk was too flat, or has a softcap
    column: Tensor  # [K] int32, token after token
    value: Tensor  # [K]
    tail: Tensor  # [N, blocks]


def _keep(chunks: Chunks, tile: Tile, where: TailBlocks, tolerance: float) -> Saved:
    count = len(tile.targets)
    if chunks.transform.softcap is not None:
        return _keep_nothing(chunks, count)
    one = torch.ones(count, dtype=chunks.dtype, device=tile.targets.device)
    gradient = chunks.gradient(tile, Upstream(logprob=-one))
    scale = one if gradient.row_scale is None else gradient.row_scale
    slope = chunks.transform.slope
    split = split_entries(gradient.matrix.to(chunks.dtype), tolerance / SHARE * slope / scale, where, signed=False)
    if split is None:
        return _keep_nothing(chunks, count)
    tail = split.tail * scale[:, None]
    if tail.sum() > MOST_LEFT * slope * count:
        return _keep_nothing(chunks, count)
    token, order = split.token.sort(stable=True)
    counts = torch.bincount(token, minlength=count).int()
    value = split.value.index_select(0, order).mul_(scale.index_select(0, token))
    return Saved(counts, split.column.index_select(0, order), value, tail)


def _keep_nothing(chunks: Chunks, count: int) -> Saved:
    """Saved tensors of tokens whose backward is exact."""
    weight = chunks.problem.head.weight
    return Saved(
        torch.full((count,), -1, dtype=torch.int32, device=weight.device),
        torch.empty(0, dtype=torch.int32, device=weight.device),
        torch.empty(0, dtype=chunks.dtype, device=weight.device),
        torch.zeros(count, block_count(len(weight), TAIL_BLOCK), dtype=chunks.dtype, device=weight.device),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def gradients_from(
    backend: ExactPasses,
    problem: Problem,
    stats: TokenStats,
    kept: Kept,
    upstream: Upstream,
    needs: Needs,
    tolerance: float,
) -> Gradients:
    """Gradients from what a forward kept; exact, by recomputation, where it kept nothing and for the entropy's.

    Entries that the upstream gradients make needless, `|c_i| p_ij < tolerance / SHARE * mean c`, join the tail.
    """
    chunks = Chunks(backend.row_engine(problem), problem, ())
    sums = EntrySums(chunks, needs, tolerance)
    exact = kept.counts < 0 if upstream.entropy is None else torch.ones_like(kept.counts, dtype=torch.bool)
    first = 0
    for run, is_exact in runs_of(exact):
        if is_exact:
            recompute_run(sums, run, stats, upstream)
        else:
            end = first + int(kept.counts[run].sum())
            part = Kept(kept.counts[run], kept.column[first:end], kept.value[first:end], kept.tail[run])
            _add_kept(sums, run, part, stats, upstream)
            first = end
    return sums.finish()


def runs_of(mask: Tensor) -> Iterator[tuple[slice, bool]]:
    """Runs of equal entries of `mask [N]`, and what they are."""
    values, lengths = torch.unique_consecutive(mask, return_counts=True)
    ends = lengths.cumsum(0)
    for value, end, length in zip(values.tolist(), ends.tolist(), lengths.tolist(), strict=True):
        yield slice(end - length, end), value


def recompute_run(sums: EntrySums, run: slice, stats: TokenStats, upstream: Upstream) -> None:
    """Adds the exact products of tokens of which nothing was kept."""
    chunks = sums.chunks
    for part in spans(run.stop - run.start, chunks.tokens):
        rows = slice(run.start + part.start, run.start + part.stop)
        here, tile = rows_of(upstream, rows), chunks.recall(rows, rows_of(stats, rows))
        sums.add_exact(rows, tile.targets, chunks.gradient(tile, here), here)
        del tile


def _add_kept(sums: EntrySums, rows: slice, kept: Kept, stats: TokenStats, upstream: Upstream) -> None:
    problem, slope = sums.chunks.problem, sums.chunks.transform.slope
    here = rows_of(upstream, rows)
    factor = here.by_probability(kept.tail[:, 0])
    rule = sums.tolerance / SHARE * slope
    threshold = coefficient_size(upstream).mean() * rule
    counts = kept.counts.long()
    token = torch.arange(len(counts), device=counts.device, dtype=torch.int32).repeat_interleave(counts)
    value, tail = kept.value * factor.index_select(0, token), kept.tail * factor[:, None]
    stays = value.abs() >= threshold
    few = ~stays
    block = sums.where.block.index_select(0, kept.column[few])
    tail = without(tail, token[few], block, -value[few])
    for report in reports():
        add_kept(report, problem, tail, factor, threshold, rule, int(stays.sum()))
    sums.add_split(rows, Split(token[stays], kept.column[stays], value[stays], tail))
    sums.add_targets(rows, target_entry(rows_of(stats, rows), here) * slope)
    sums.exact.add_mean(rows, here)


def add_kept(
    report: TailReport, problem: Problem, tail: Tensor, factor: Tensor, threshold: Tensor, rule: float, stay: int
) -> None:
    """Adds to a report what is left of each token of a backward from entries, and how many of these stay."""
    size, slope, vocabulary = factor.abs(), problem.head.transform.slope, len(problem.head.weight)
    report.add(tail.sum(-1).abs(), threshold.maximum(size * rule), size * slope, stay + len(factor), vocabulary)


def rows_of_head(weight: Tensor, kept: Kept) -> Tensor:
    """`[N, H]`: the sum of each token's kept values times the head's rows."""
    counts = kept.counts.clamp(min=0)
    token = torch.arange(len(counts), dtype=torch.int32, device=counts.device).repeat_interleave(counts.long())
    return bag(weight.to(kept.value.dtype), kept.column, token, kept.value, len(counts))


def around_a_loss(
    problem: Problem,
    stats: TokenStats,
    losses: SummedLosses,
    gradients: Callable[[Upstream], Gradients],
) -> SinglePass:
    """A loss of all tokens' statistics, between a forward that is done and a backward (`gradients`)."""
    assert stats.logprob is not None
    loss, upstream = stats.logprob.new_zeros(()), Upstream()
    if len(problem.targets):
        loss, upstream = losses.coefficients(stats, slice(0, len(problem.targets)))
    if all(g is None for g in upstream):
        return SinglePass(loss, stats.logprob, zero_gradients(problem, losses.needs, loss.dtype))
    return SinglePass(loss, stats.logprob, gradients(upstream))


# ---------------------------------------------------------------------------------------------------------------------
# Sums of gradients


class EntrySums:
    """Sums of gradients whose chunks are matrices in two parts, or exact ones where a chunk is too flat."""

    def __init__(self, chunks: Chunks, needs: Needs, tolerance: float) -> None:
        self.chunks, self.needs, self.tolerance = chunks, needs, tolerance
        self.exact = Accumulators(chunks, needs)
        self.where = tail_blocks(chunks.problem)
        self.weight = chunks.head_in(chunks.dtype)
        self.blocks = block_count(len(self.weight), TAIL_BLOCK)
        self.shares = shares(self.where.block, self.blocks, chunks.head.bias, chunks.dtype)
        self.block_weight = self._block_means() if needs.hidden else None
        self.tail_weight = torch.zeros(self.blocks, self.weight.shape[1], dtype=chunks.dtype, device=self.weight.device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # token of the call, column, value
        self.coefficients = torch.zeros((), dtype=chunks.dtype, device=self.weight.device)
        self.seen = 0

    def _block_means(self) -> Tensor:
        place = torch.arange(len(self.shares), dtype=torch.int32, device=self.weight.device)
        rows = place if self.where.order is None else self.where.order.int()
        return bag(self.weight, rows, place // TAIL_BLOCK, self.shares.index_select(0, rows), self.blocks)

    def add(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """Adds a chunk's part."""
        coefficient = coefficient_size(upstream)
        # A block's mean knows nothing of weights of capped logits, which are in the matrix.
        weighted = self.chunks.problem.logit_weight is not None and not self.chunks.linear_mean
        split = None if weighted else self._measured(gradient, upstream, self._threshold(coefficient), coefficient)
        if split is None:
            self.add_exact(rows, targets, gradient, upstream)
            return
        self.add_split(rows, split)
        assert gradient.target is not None
        self.add_targets(rows, gradient.target)
        self.exact.add_mean(rows, upstream)

    def add_exact(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """Adds a chunk's part by the dense products."""
        self.exact.add(rows, targets, gradient, upstream)
        for report in reports():
            report.add_exact(len(targets), len(self.shares))

    def _threshold(self, coefficient: Tensor) -> Tensor:
        """The size `[]` from which an entry of `g` is kept, by the mean coefficient of the tokens seen so far."""
        self.coefficients += coefficient.sum()
        self.seen += len(coefficient)
        return self.coefficients / max(1, self.seen) * (self.tolerance / SHARE * self.chunks.transform.slope)

    def _measured(
        self, gradient: RowGradient, upstream: Upstream, threshold: Tensor, coefficient: Tensor
    ) -> Split | None:
        """The gradient in two parts, reported; None where it is too flat for that."""
        signed = upstream.entropy is not None or self.chunks.transform.softcap is not None
        matrix = gradient.matrix.to(self.chunks.dtype)
        scale = torch.ones_like(coefficient) if gradient.row_scale is None else gradient.row_scale
        split = split_entries(matrix, threshold / scale.abs(), self.where, signed=signed)
        if split is None:
            return None
        left = rows_left(matrix, split, signed=signed) * scale.abs()
        slope = self.chunks.transform.slope
        if left.sum() > MOST_LEFT * slope * coefficient.sum():
            return None
        for report in reports():
            report.add(left, threshold, coefficient * slope, len(split.token) + len(left), len(self.shares))
        return split._replace(value=split.value * scale.index_select(0, split.token), tail=split.tail * scale[:, None])

    def add_split(self, rows: slice, split: Split) -> None:
        """Adds the products of a matrix in two parts; its entries may be in any order."""
        if self.needs.hidden:
            token, order = split.token.sort(stable=True)
            column, value = split.column.index_select(0, order), split.value.index_select(0, order)
            self.set_hidden(rows, bag(self.weight, column, token, value, len(split.tail)), split.tail)
        self.add_head(rows, split)

    def set_hidden(self, rows: slice, near: Tensor, tail: Tensor) -> None:
        """Writes `d hidden` of some tokens; `near [n, H]` is the kept entries' part."""
        if self.exact.sums.hidden is not None:
            assert self.block_weight is not None
            torch.addmm(near, drop_denormals_(tail), self.block_weight, out=self.exact.sums.hidden[rows])

    def add_head(self, rows: slice, split: Split) -> None:
        """Adds a matrix's part of the gradients of weight and bias."""
        bias = self.exact.sums.bias
        if self.needs.weight:
            self.tail_weight.addmm_(drop_denormals_(split.tail).T, self.chunks.hidden[rows].to(self.chunks.dtype))
            self.waiting.append((split.token + rows.start, split.column, split.value))
            if sum(len(token) for token, *_ in self.waiting) > MOST_WAITING:
                self._flush()
        if bias is not None:
            bias.index_add_(0, split.column, split.value)
            bias.addcmul_(split.tail.sum(0).index_select(0, self.where.block), self.shares)

    def add_targets(self, rows: slice, entry: Tensor) -> None:
        """Adds the targets' entries; those of the head's gradient wait with the kept ones."""
        problem = self.chunks.problem
        add_targets(problem, rows, entry, self.exact.sums._replace(weight=None))
        if self.needs.weight:
            token = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=entry.device)
            self.waiting.append((token, problem.targets[rows].int(), entry))

    def _flush(self) -> None:
        """Adds waiting entries and tails to the head's gradient, in one pass over it.

        A tail is one more entry of each row, in a table that has the blocks' sums below the hidden states.
        """
        device, vocabulary = self.weight.device, len(self.shares)
        hidden = self.chunks.hidden.to(self.chunks.dtype)
        row = torch.arange(vocabulary, dtype=torch.int32, device=device)
        tail = (self.where.block + len(hidden), row, self.shares)
        token, column, value = (torch.cat(parts) for parts in zip(*self.waiting, tail, strict=True))
        column, order = column.sort(stable=True)
        table = torch.cat([hidden, self.tail_weight])
        part = bag(table, token.index_select(0, order), column, value.index_select(0, order), vocabulary)
        begun = self.exact.sums.weight
        self.exact.set_weight(part if begun is None else begun.add_(part))
        self.exact.weight_begun = True
        self.waiting.clear()
        self.tail_weight.zero_()

    def finish(self) -> Gradients:
        """The gradients; zeros where no token came."""
        if self.needs.weight and (self.waiting or self.exact.sums.weight is None):
            self._flush()
        return self.exact.finish()


def coefficient_size(upstream: Upstream) -> Tensor:
    """`[n]`: `|logprob's| + |lse's| + |entropy's|` gradient, how hard the loss pulls on each token."""
    sizes = [g.abs() for g in upstream[:3] if g is not None]
    if not sizes:
        return torch.zeros_like(next(g for g in upstream if g is not None))
    return torch.stack(sizes).sum(0)
