"""The tail-corrected backward by pairs of a token and a block of the vocabulary, where tensor cores set the rules.

`entries` keeps single entries; here the unit is 128 of them for one token, so that the products are GEMMs with gathered
rows. With c_i = b_i - a_i, the gradients that reach token i's lse and logprob, and every sum without the target:

    mass_ib = sum_(j in block b) p_ij = exp(block_lse_ib - lse_i)
    kept where |c_i| mass_ib >= tolerance * mean_k |c_k|            every entry of a pair that is left is below that

    d hidden_i = sum_(b kept, j in b) g_ij weight_j + sum_b tail_ib mean_b(weight)      g_ij = slope c_i p_ij
    d weight_j = sum_(i kept) g_ij hidden_i + sum_i tail_ib hidden_i / B_b              tail_ib = slope c_i mass_ib

tail_ib is 0 where the pair is kept, and B_b counts the block's entries that are not masked. The target's entries and
the mean logit's part are added apart, exactly. The bounds of docs/tail-corrected.md hold as they stand, because they
hold for any choice of kept entries. Operands of half precision add the rounding of the listed gradient, of the tail and
of the block means.

All losses share two functions. `forward` saves one logsumexp for each pair, `4 N V / 128` bytes. `backward`, which
knows the upstream gradients, lists pairs and multiplies them, the gradient of a group of blocks at a time. A per-token
loss runs `forward`, then itself on all tokens, then `backward`. In numbers of `2 N H V` flops, with s the share of the
pairs kept: 1 + 3 s, and 2 / 128 for the tail; a frozen head 1 + 2 s. The list is made and used on the device: the host
waits once, to learn whether the call is too flat for this. Under a `vocabulary_order` the head is copied in that order.

    when                                                          instead             wasted
    more than half of the pairs would be kept                     exact backward      1 GEMM of a per-token loss
    more than a quarter of the gradient would be left             exact backward      1 GEMM of a per-token loss
    an entropy's gradient in `backward`                           exact backward      nothing
    a per-token loss that reads the entropy                       `entries`           nothing
    a call that the engine does not take (softcap, other dtypes)  `entries`           nothing
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...types import PAIR_BLOCK, PAIR_SPAN, Head, Options, TokenStats, statistics_dtype
from ..exact.chunks import Operands, chunk_budget, weighted_mean
from ..exact.gradients import Accumulators, target_entry
from ..exact.products import multiply, spans
from ..interface import (
    Approximate,
    ExactPasses,
    Forward,
    Gradients,
    Needs,
    Problem,
    Saved,
    SinglePass,
    SummedLosses,
    Upstream,
    empty_gradients,
)
from .entries import Entries, around_a_loss
from .order import permuted, restored
from .report import reports
from .select import MOST_LEFT, block_count, shares

#: At this share of the pairs the listed products cost half of the exact ones, whose GEMMs gather nothing.
MOST_PAIRS = 1 / 2


class Routed(NamedTuple):
    """The pairs that are kept, on the device alone. The list goes block by block, each block's tokens in order."""

    starts: Tensor  # [blocks spans + 1] int32: block b's tokens from PAIR_SPAN s on begin at b spans + s; the end
    tokens: Tensor  # [N blocks] int32, undefined beyond the list
    tail: Tensor  # [N, blocks] mass of the pairs left out, 0 for the others


class BlockEngine(Protocol):
    """A backend's kernels for pairs of a token and a block.

    hidden and weight come with unit column stride, their rows at multiples of 16 bytes where H allows that;
    `problem.targets` contiguous; N is 0 in `measure` alone. Nothing but a kernel's launch happens on the host.
    """

    def takes(self, hidden: Tensor, head: Head) -> bool:
        """Whether the kernels take a call, by dtype, device, H and transform alone: fake tensors are asked too."""
        ...

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        """Statistics, logprob and lse always, and the blocks' logsumexps without the target's entry, `[N, blocks]`.

        The logsumexps have the statistics' dtype; -inf stands for a block of nothing but the target.
        """
        ...

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        """The pairs with `magnitude exp(block_lse - lse) >= threshold [1]`: a product of 0 never, NaN always."""
        ...

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        """`slope factor_i p_ij` of the listed pairs of blocks `[first, first + count)`, one row of `out` each.

        `out [>= N count, 128]` has the operands' dtype and begins with the row of the first pair. It is 0 at the target
        and beyond V, and undefined beyond the list.
        """
        ...

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        """`out [V, K] += gradient^T hidden` over those pairs, `hidden [N, K]` with K any multiple of 8."""
        ...

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        """`out [N, H] += gradient weight`, in the order of the blocks under `torch.use_deterministic_algorithms`."""
        ...


class Blocks(Approximate):
    """`backward="tail_corrected"` by a backend's kernels for pairs; by `Entries` where these do not take a call."""

    def __init__(self, engine: BlockEngine, backend: ExactPasses) -> None:
        self.engine, self.backend, self.entries = engine, backend, Entries(backend)

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """Any number where the kernels take the call: the loss stands between a whole forward and a whole backward."""
        if self.engine.takes(hidden, head):
            return sys.maxsize
        return self.entries.tokens_at_once(hidden, head, options)

    def saved_width(self, hidden: Tensor, head: Head) -> int:
        """The blocks of the vocabulary."""
        if self.engine.takes(hidden, head):
            return block_count(len(head.weight), PAIR_BLOCK)
        return self.entries.saved_width(hidden, head)

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token, and the logsumexp of its blocks."""
        if not self.engine.takes(problem.hidden, problem.head):
            return self.entries.forward(problem, outputs, tolerance)
        stats, block_lse = self.engine.measure(_aligned(permuted(problem)), outputs)
        stats = weighted_mean(problem, stats)
        counts = torch.zeros(len(block_lse), dtype=torch.int32, device=block_lse.device)
        return Forward(stats, None), Saved(counts, counts.new_empty(0), block_lse.new_empty(0), block_lse)

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        """Gradients from what the forward saved; exact where the call is flat, and for the entropy's."""
        if not self.engine.takes(problem.hidden, problem.head):
            return self.entries.backward(problem, stats, saved, upstream, needs, tolerance)
        count = len(problem.targets)
        if count == 0:
            return empty_gradients(problem, needs, statistics_dtype(problem.hidden.dtype))
        if upstream.entropy is None:
            here = _aligned(permuted(problem))
            pairs = _choose(self.engine, here, stats, saved.by_block, upstream, tolerance)
            if not pairs.flat():
                return restored(_products(pairs, upstream, needs), problem.vocabulary_order)
        for report in reports():
            report.add_exact(count, len(problem.head.weight))
        return self.backend.backward(problem, stats, upstream, needs)

    def single_pass(self, problem: Problem, losses: SummedLosses, tolerance: float) -> SinglePass:
        """The sum of a loss and its gradients: forward, loss and backward, each of all tokens; no group is cut."""
        if not self.engine.takes(problem.hidden, problem.head) or "entropy" in losses.outputs:
            return self.entries.single_pass(problem, losses, tolerance)
        here = permuted(problem)
        (stats, _), saved = self.forward(here, losses.outputs, tolerance)

        def gradients(upstream: Upstream) -> Gradients:
            return restored(
                self.backward(here, stats, saved, upstream, losses.needs, tolerance), problem.vocabulary_order
            )

        return around_a_loss(problem, stats, losses, gradients)


def has_aligned_rows(matrix: Tensor) -> bool:
    """Whether the rows are contiguous, each at a multiple of 16 bytes."""
    starts = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    return starts and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _aligned(problem: Problem) -> Problem:
    """A problem as an engine gets it."""
    hidden, weight = _with_aligned_rows(problem.hidden), _with_aligned_rows(problem.head.weight)
    head = problem.head._replace(weight=weight)
    return replace(problem, hidden=hidden, head=head, targets=problem.targets.contiguous())


def _with_aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix, or a copy whose rows are aligned if its width allows that, else contiguous."""
    if has_aligned_rows(matrix):
        return matrix
    odd = matrix.shape[1] * matrix.itemsize % 16 != 0
    return matrix.contiguous() if odd else matrix.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs


class _Pairs(NamedTuple):
    """A call's pairs, and the numbers that they were chosen by."""

    engine: BlockEngine
    problem: Problem
    stats: TokenStats
    lse: Tensor  # [N]
    factor: Tensor  # [N] c
    threshold: Tensor  # [1]
    routed: Routed
    left: Tensor  # [N] |c| times the mass left

    def flat(self) -> bool:
        """Whether the exact products are the better ones. The host waits for this."""
        many = self.routed.starts[-1] > MOST_PAIRS * self.routed.tail.numel()
        return bool(many | (self.left.sum() > MOST_LEFT * self.factor.abs().sum()))

    def report(self) -> None:
        """Tells whoever collects what was left of each token, and how many entries were kept."""
        slope, vocabulary = self.problem.head.transform.slope, len(self.problem.head.weight)
        for report in reports():
            threshold, coefficient = self.threshold * slope, self.factor.abs() * slope
            report.add(self.left * slope, threshold, coefficient, self._entries(), vocabulary)

    def _entries(self) -> int:
        """How many entries are listed; a target counts too where its block is not listed."""
        targets, vocabulary = self.problem.targets, len(self.problem.head.weight)
        counts = self.routed.starts[:: -(-len(targets) // PAIR_SPAN)].diff().long()
        block = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        of_target = block == targets[self.routed.tokens[: len(block)]] // PAIR_BLOCK
        widths = (vocabulary - block * PAIR_BLOCK).clamp(max=PAIR_BLOCK)
        return int(widths.sum() - of_target.sum()) + len(targets)


def _choose(
    engine: BlockEngine, problem: Problem, stats: TokenStats, block_lse: Tensor, upstream: Upstream, tolerance: float
) -> _Pairs:
    assert stats.lse is not None
    lse = stats.lse.contiguous()
    factor = upstream.by_probability(lse)
    magnitude = factor.abs()
    threshold = magnitude.mean(0, keepdim=True) * tolerance
    routed = engine.route(block_lse.contiguous(), lse, magnitude, threshold)
    return _Pairs(engine, problem, stats, lse, factor, threshold, routed, routed.tail.sum(1) * magnitude)


# ---------------------------------------------------------------------------------------------------------------------
# Their products


def _products(pairs: _Pairs, upstream: Upstream, needs: Needs) -> Gradients:
    """The gradients of kept pairs and tails. The tail comes first, because its products overwrite."""
    pairs.report()
    operands = Operands(pairs.problem)
    gradients = Accumulators(operands, needs)
    sums, slope = gradients.begin(), operands.transform.slope
    _put_back(operands, sums, pairs.routed.tail * (pairs.factor * slope)[:, None])
    _add_listed(pairs, sums)
    gradients.add_apart(target_entry(pairs.stats, upstream) * slope, upstream)
    return gradients.finish()


def _in_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views `[blocks, entries, ...]` of `[V, ...]`, and which blocks they are: the whole ones, and a short last one."""
    whole = len(x) // PAIR_BLOCK
    if whole:
        yield slice(0, whole), x[: whole * PAIR_BLOCK].unflatten(0, (whole, PAIR_BLOCK))
    if len(x) % PAIR_BLOCK:
        yield slice(whole, whole + 1), x[whole * PAIR_BLOCK :][None]


def _put_back(operands: Operands, sums: Gradients, left: Tensor) -> None:
    """Spreads the sums `left [N, blocks]` over their blocks' entries, by two small products in the operands' dtype."""
    weight, count = operands.weight, left.shape[1]
    block = torch.arange(len(weight), device=weight.device) // PAIR_BLOCK
    share_of, masses = shares(block, count, operands.head.bias, operands.dtype), left.to(weight.dtype)
    if sums.hidden is not None:
        means = masses.new_empty(count, weight.shape[1])
        for (which, entries), (_, share) in zip(_in_blocks(weight), _in_blocks(share_of), strict=True):
            means[which] = torch.bmm(share[:, None].to(masses.dtype), entries)[:, 0]
        multiply(masses, means, out=sums.hidden)
    if sums.weight is not None:
        by_block = left.new_empty(count, operands.hidden.shape[1])
        multiply(masses.T, operands.hidden, out=by_block)
        _spread_blocks(by_block, share_of, out=sums.weight)
    if sums.bias is not None:
        _spread_blocks(left.sum(0)[:, None], share_of, out=sums.bias[:, None])


def _spread_blocks(by_block: Tensor, share_of: Tensor, out: Tensor) -> None:
    """`out [V, K] = share_of [V] by_block [blocks, K]`, in place: it is as large as the head."""
    for (which, entries), (_, share) in zip(_in_blocks(out), _in_blocks(share_of), strict=True):
        torch.mul(by_block[which, None], share[:, :, None], out=entries)


def _add_listed(pairs: _Pairs, sums: Gradients) -> None:
    """The listed pairs' gradient, a group of blocks at a time, and its products."""
    engine, problem, routed = pairs.engine, pairs.problem, pairs.routed
    count, (vocabulary, _) = len(problem.targets), problem.head.weight.shape
    width = _blocks_at_once(problem)
    gradient = problem.hidden.new_empty(count * width, PAIR_BLOCK)
    # The bias's gradient is the head's for a hidden state of ones.
    ones, of_bias = problem.hidden.new_ones(count, 8), None
    if sums.bias is not None:
        of_bias = torch.zeros(vocabulary, 8, dtype=sums.bias.dtype, device=sums.bias.device)
    for group in spans(block_count(vocabulary, PAIR_BLOCK), width):
        part = (routed, group.start, group.stop - group.start)
        engine.gradient(problem, pairs.lse, pairs.factor, *part, gradient)
        if sums.hidden is not None:
            engine.add_hidden(gradient, problem.head.weight, *part, sums.hidden)
        if sums.weight is not None:
            engine.add_weight(gradient, problem.hidden, *part, sums.weight)
        if of_bias is not None:
            engine.add_weight(gradient, ones, *part, of_bias)
    if sums.bias is not None and of_bias is not None:
        sums.bias.add_(of_bias[:, 0])


def _blocks_at_once(problem: Problem) -> int:
    """How many blocks' gradients fit the budget with all tokens in each of them; at least one."""
    budget = chunk_budget(problem.chunk_bytes, problem.hidden.device.type)
    most = budget // (len(problem.targets) * PAIR_BLOCK * problem.hidden.itemsize)
    return max(1, min(block_count(len(problem.head.weight), PAIR_BLOCK), most))
