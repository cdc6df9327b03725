"""The tail-corrected backward by pairs of a token and a block of the vocabulary, where tensor cores set the rules.

`tail` keeps single entries; here the unit is 128 of them for one token, so that the products are GEMMs with gathered
rows. With c_i = b_i - a_i, the gradients that reach token i's lse and logprob, and every sum without the target:

    mass_ib = sum_(j in block b) p_ij = exp(block_lse_ib - lse_i)
    kept where |c_i| mass_ib >= tolerance * mean_k |c_k|            every entry of a pair that is left is below that

    d hidden_i = sum_(b kept, j in b) g_ij weight_j + sum_b tail_ib mean_b(weight)      g_ij = slope c_i p_ij
    d weight_j = sum_(i kept) g_ij hidden_i + sum_i tail_ib hidden_i / B_b              tail_ib = slope c_i mass_ib

tail_ib being 0 where the pair is kept, and B_b the block's entries that are not masked. The target's entries and the
mean logit's part are added apart, exactly.
The bounds of docs/tail-corrected.md hold as they stand, for they hold for any choice of what is kept; with operands of
half precision, to the rounding of the listed gradient, the tail and the block means to that.

One way for all: the forward keeps the logsumexp of every pair, `4 N V / 128` bytes; the backward knows the upstream
gradients, lists pairs, and makes the gradient of a group of blocks at a time. Per-token losses take the same two
functions with the loss between them, over all tokens at once. In numbers of `2 N H V` flops, s the share of the pairs
kept: 1 + 3 s, and 2 / 128 for the tail; a frozen head 1 + 2 s. The list is made and used on the device: the host waits
once, to learn whether the call is too flat for this. Under a `vocabulary_order` the head is copied in that order.

Exact, by the backend's recomputing backward: where more than half of the pairs would be kept, or more than a quarter
of the gradient left (a per-token loss has then spent a GEMM more than an exact one), and for an entropy's gradient in
`forward` and `backward`. By entries, as `tail` does it: what the engine does not take (a softcap, other dtypes), and
per-token losses that read an entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..types import LogitTransform, TokenStats, statistics_dtype
from . import sweep, tail
from .order import permuted, restored
from .problem import Coefficients, Forward, Gradients, Needs, Problem, Saved, SinglePass, Upstream, empty_gradients
from .rows import target_entry

#: Vocabulary entries in a block, and tokens in a slice of a block's list: a tile of the tensor-core kernels.
BLOCK = SLICE = 128
#: At this share of the pairs the listed products cost half of the exact ones, whose GEMMs gather nothing.
MOST_PAIRS = 1 / 2
#: Tokens whose targets' rows are gathered at once, in the accumulators' dtype.
APART_TOKENS = 1024


class Routed(NamedTuple):
    """The pairs that are kept, on the device alone. The list goes block by block, each block's tokens in order."""

    starts: Tensor  # [blocks slices + 1] int32: block b's tokens from SLICE s on begin at b slices + s; the end
    tokens: Tensor  # [N blocks] int32, undefined beyond the list
    tail: Tensor  # [N, blocks] mass of the pairs left out, 0 for the others


class BlockEngine(Protocol):
    """What a backend's kernels do. hidden and weight come with unit column stride, their rows at multiples of 16 bytes
    where H allows that; `problem.targets` contiguous; N is 0 in `measure` alone. Nothing but a kernel's launch happens
    on the host."""

    def takes(self, hidden: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
        """From dtype, device, H and transform alone: fake tensors are asked too."""
        ...

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        """Statistics, logprob and lse always, and `[N, blocks]` logsumexps of the blocks without the target's entry,
        in the statistics' dtype; -inf for a block of nothing else."""
        ...

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        """Kept where `magnitude exp(block_lse - lse) >= threshold [1]`: a product of 0 never, NaN always."""
        ...

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        """`slope factor_i p_ij` of the listed pairs of blocks `[first, first + count)`, one row of `out`
        `[>= N count, 128]` each, from that of the first pair on; 0 at the target and beyond V. `out` has the operands'
        dtype, and is undefined beyond the list."""
        ...

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        """`out [V, K] += gradient^T hidden` over those pairs, `hidden [N, K]` with K any multiple of 8."""
        ...

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        """`out [N, H] += gradient weight`, in the order of the blocks under `torch.use_deterministic_algorithms`."""
        ...


@dataclass(frozen=True)
class Tail:
    """A backend's tail-corrected functions (see `backends`), from its kernels."""

    engine: BlockEngine
    rows: sweep.RowEngine  # for `tail`, where the block engine does not take a call
    exact: Callable[[Problem, TokenStats, Upstream, Needs], Gradients]

    def takes(self, hidden: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
        """Whether such a call goes by blocks; then no group is too large for `single_pass`."""
        return self.engine.takes(hidden, weight, transform)

    def blocks(self, hidden: Tensor, weight: Tensor, transform: LogitTransform) -> int:
        """How many numbers `forward` leaves for each token."""
        by_blocks = self.takes(hidden, weight, transform)
        return blocks(weight.shape[0]) if by_blocks else tail.blocks(weight.shape[0])

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token, and the logsumexp of its blocks."""
        if not self._takes(problem):
            found, kept = tail.forward(self.rows, problem, outputs, tolerance)
            return found, kept[:4]
        stats, block_lse = self.engine.measure(_aligned(permuted(problem)), outputs)
        counts = torch.zeros(len(block_lse), dtype=torch.int32, device=block_lse.device)
        return Forward(stats, None), (counts, counts.new_empty(0), block_lse.new_empty(0), block_lse)

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        """Gradients from what the forward kept; exact where the call is flat, and for the entropy's."""
        if not self._takes(problem):
            return tail.backward(self.rows, problem, stats, tail.Kept(*saved), upstream, needs, tolerance)
        count = len(problem.targets)
        if count == 0:
            return empty_gradients(problem, needs, statistics_dtype(problem.hidden.dtype))
        if upstream.entropy is None:
            pairs = _choose(self.engine, _aligned(permuted(problem)), stats, saved[3], upstream, tolerance)
            if not pairs.flat():
                return restored(_products(pairs, self.rows, upstream, needs), problem.vocabulary_order)
        for report in tail.reports():
            report.add_exact(count, problem.weight.shape[0])
        return self.exact(problem, stats, upstream, needs)

    def single_pass(
        self,
        problem: Problem,
        outputs: tuple[str, ...],
        coefficients: Coefficients,
        groups: Tensor | None,
        needs: Needs,
        tolerance: float,
    ) -> SinglePass:
        """The sum of a loss and its gradients: forward, loss and backward, each of all tokens; no group is cut."""
        if not self._takes(problem) or "entropy" in outputs:
            return tail.single_pass(self.rows, problem, outputs, coefficients, groups, needs, tolerance)
        here = permuted(problem)
        (stats, _), saved = self.forward(here, outputs, tolerance)

        def gradients(upstream: Upstream) -> Gradients:
            found = self.backward(here, stats, saved, upstream, needs, tolerance)
            return restored(found, problem.vocabulary_order)

        return tail.around_a_loss(problem, stats, coefficients, needs, gradients)

    def _takes(self, problem: Problem) -> bool:
        return self.takes(problem.hidden, problem.weight, problem.transform)


def blocks(vocabulary: int) -> int:
    """How many blocks a vocabulary has; the last may be short."""
    return -(-vocabulary // BLOCK)


def has_aligned_rows(matrix: Tensor) -> bool:
    """Rows of contiguous elements, each at a multiple of 16 bytes."""
    starts = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    return starts and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _aligned(problem: Problem) -> Problem:
    """As an engine gets it."""
    hidden, weight = _with_aligned_rows(problem.hidden), _with_aligned_rows(problem.weight)
    return replace(problem, hidden=hidden, weight=weight, targets=problem.targets.contiguous())


def _with_aligned_rows(matrix: Tensor) -> Tensor:
    """A copy, where they are not and the width allows it; of another width, contiguous ones."""
    if has_aligned_rows(matrix):
        return matrix
    odd = matrix.shape[1] * matrix.itemsize % 16 != 0
    return matrix.contiguous() if odd else matrix.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs


class _Pairs(NamedTuple):
    """A call's pairs, and what chose them."""

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
        return bool(many | (self.left.sum() > tail.MOST_LEFT * self.factor.abs().sum()))

    def report(self) -> None:
        """To whoever collects: what was left of each token, and how many entries were not."""
        slope, vocabulary = self.problem.transform.slope, self.problem.weight.shape[0]
        for report in tail.reports():
            threshold, coefficient = self.threshold * slope, self.factor.abs() * slope
            report.add(self.left * slope, threshold, coefficient, self._entries(), vocabulary)

    def _entries(self) -> int:
        """Listed entries, and the targets' where their blocks are not listed."""
        targets, vocabulary = self.problem.targets, self.problem.weight.shape[0]
        counts = self.routed.starts[:: -(-len(targets) // SLICE)].diff().long()
        block = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        of_target = block == targets[self.routed.tokens[: len(block)]] // BLOCK
        widths = (vocabulary - block * BLOCK).clamp(max=BLOCK)
        return int(widths.sum() - of_target.sum()) + len(targets)


def _choose(
    engine: BlockEngine, problem: Problem, stats: TokenStats, block_lse: Tensor, upstream: Upstream, tolerance: float
) -> _Pairs:
    assert stats.lse is not None
    lse = stats.lse.contiguous()
    factor = torch.zeros_like(lse)
    if upstream.lse is not None:
        factor += upstream.lse
    if upstream.logprob is not None:
        factor -= upstream.logprob
    magnitude = factor.abs()
    threshold = magnitude.mean(0, keepdim=True) * tolerance
    routed = engine.route(block_lse.contiguous(), lse, magnitude, threshold)
    return _Pairs(engine, problem, stats, lse, factor, threshold, routed, routed.tail.sum(1) * magnitude)


# ---------------------------------------------------------------------------------------------------------------------
# Their products


def _products(pairs: _Pairs, rows: sweep.RowEngine, upstream: Upstream, needs: Needs) -> Gradients:
    """The tail first, which overwrites, then what is added to it."""
    pairs.report()
    problem = pairs.problem
    chunks = sweep.Chunks(rows, replace(problem, chunk_bytes=1), ())  # for its operands: no chunk is made
    gradients = sweep.Accumulators(chunks, needs)
    sums, slope = gradients.begin(), problem.transform.slope
    _put_back(chunks, sums, pairs.routed.tail * (pairs.factor * slope)[:, None])
    _add_listed(pairs, sums)
    entry = target_entry(pairs.stats, upstream) * slope
    for tokens in sweep.spans(len(problem.targets), APART_TOKENS):
        add_targets(chunks, tokens, entry[tokens], sums)
        gradients.add_mean(tokens, upstream.rows(tokens))
    return gradients.finish()


def _in_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Views `[blocks, entries, ...]` of `[V, ...]`, and which blocks they are: the whole ones, and a short last one."""
    whole = len(x) // BLOCK
    if whole:
        yield slice(0, whole), x[: whole * BLOCK].unflatten(0, (whole, BLOCK))
    if len(x) % BLOCK:
        yield slice(whole, whole + 1), x[whole * BLOCK :][None]


def _shares(chunks: sweep.Chunks) -> Tensor:
    """`[V]`: the part of its block's tail that an entry gets. A masked one, of probability 0, gets none."""
    vocabulary, bias = chunks.weight.shape[0], chunks.head.bias
    shares = torch.ones(vocabulary, dtype=chunks.dtype, device=chunks.weight.device)
    if bias is not None:
        shares.masked_fill_(bias.isneginf(), 0)
    for _, entries in _in_blocks(shares):
        entries.div_(entries.sum(1, keepdim=True).clamp_(min=1))
    return shares


def _put_back(chunks: sweep.Chunks, sums: Gradients, left: Tensor) -> None:
    """Two small products in the operands' dtype: the sums `left [N, blocks]`, each over its block's entries."""
    shares, masses = _shares(chunks), left.to(chunks.weight.dtype)
    if sums.hidden is not None:
        means = masses.new_empty(left.shape[1], chunks.weight.shape[1])
        for (which, entries), (_, share) in zip(_in_blocks(chunks.weight), _in_blocks(shares), strict=True):
            means[which] = torch.bmm(share[:, None].to(masses.dtype), entries)[:, 0]
        sweep.multiply(masses, means, out=sums.hidden)
    if sums.weight is not None:
        by_block = left.new_empty(left.shape[1], chunks.hidden.shape[1])
        sweep.multiply(masses.T, chunks.hidden, out=by_block)
        _spread(by_block, shares, out=sums.weight)
    if sums.bias is not None:
        _spread(left.sum(0)[:, None], shares, out=sums.bias[:, None])


def _spread(by_block: Tensor, shares: Tensor, out: Tensor) -> None:
    """`out [V, K] = shares [V] by_block [blocks, K]`, in place: it is as large as the head."""
    for (which, entries), (_, share) in zip(_in_blocks(out), _in_blocks(shares), strict=True):
        torch.mul(by_block[which, None], share[:, :, None], out=entries)


def _add_listed(pairs: _Pairs, sums: Gradients) -> None:
    """The listed pairs' gradient, a group of blocks at a time, and its products."""
    engine, problem, routed = pairs.engine, pairs.problem, pairs.routed
    count, (vocabulary, _) = len(problem.targets), problem.weight.shape
    width = _group(problem)
    gradient = problem.hidden.new_empty(count * width, BLOCK)
    # The bias's gradient is the head's for a hidden state of ones.
    ones, of_bias = problem.hidden.new_ones(count, 8), None
    if sums.bias is not None:
        of_bias = torch.zeros(vocabulary, 8, dtype=sums.bias.dtype, device=sums.bias.device)
    for group in sweep.spans(blocks(vocabulary), width):
        part = (routed, group.start, group.stop - group.start)
        engine.gradient(problem, pairs.lse, pairs.factor, *part, gradient)
        if sums.hidden is not None:
            engine.add_hidden(gradient, problem.weight, *part, sums.hidden)
        if sums.weight is not None:
            engine.add_weight(gradient, problem.hidden, *part, sums.weight)
        if of_bias is not None:
            engine.add_weight(gradient, ones, *part, of_bias)
    if sums.bias is not None and of_bias is not None:
        sums.bias.add_(of_bias[:, 0])


def _group(problem: Problem) -> int:
    """Blocks whose gradient fits the budget with all tokens in each of them, at least one."""
    device = problem.hidden.device.type
    budget = problem.chunk_bytes or sweep.DEFAULT_CHUNK_BYTES.get(device, sweep.DEFAULT_CHUNK_BYTES_ACCELERATOR)
    most = budget // (len(problem.targets) * BLOCK * problem.hidden.itemsize)
    return max(1, min(blocks(problem.weight.shape[0]), most))


def add_targets(chunks: sweep.Chunks, tokens: slice, entry: Tensor, sums: Gradients) -> None:
    """The targets' entries `[n]` of `dL / d(raw product)`, which are 0 in every matrix."""
    targets = chunks.problem.targets[tokens]
    if sums.hidden is not None:
        sums.hidden[tokens].addcmul_(entry[:, None], chunks.weight[targets].to(chunks.dtype))
    if sums.weight is not None:
        sums.weight.index_add_(0, targets, chunks.hidden[tokens].to(chunks.dtype) * entry[:, None])
    if sums.bias is not None:
        sums.bias.index_add_(0, targets, entry)
