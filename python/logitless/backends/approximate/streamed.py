"""Approximate gradients on a CPU by kernels that keep no logits: only the entries that matter leave the cache.

`kernels/cpu/stream.h` computes all logits of a chunk of tokens, block after block of the vocabulary, and keeps those
with `p_ij >= tolerance / SHARE`. For `backward="tail_corrected"` they are float32's. For `"screened"` they are computed
as the processor does it fastest, which may round them, and the kept ones whose error would matter, and the target,
are computed again (`kernels/cpu/README.md` has the products of each set of instructions). The kept entries' part of
`d logprob / d hidden`, called `near`, is summed on the way. So a token leaves its log-prob, its kept entries, the
tail's masses by block (`entries` says what a tail is) and `near`; and the backward

    d hidden_i = c_i (near_i + sum_b tail_ib mean_b(weight)) + its target's and its mean logit's part
    d weight                                                   as in `entries`, entry by entry (kernels/cpu/spread.h)

multiplies no matrix of the size of the logits. About 1 + e + k s GEMMs of 2 N H V flops, with s the share of the
entries kept and k the cost of one, and the product's part of that 1 less where it screens; docs/tail-corrected.md has
figures.

A loss of per-token statistics takes the same two functions with the loss in between, over all tokens at once.

`entries` stands in where this has nothing to offer: float64, a softcap, statistics other than logprob, lse and the
mean logit, and where the first chunks are too flat. A flat chunk among others is computed again, exactly.

Memory: for each thread a block of logits and its tokens as panels, and room for a sixteenth of their entries; 8 bytes
for each kept entry, and 4 (V / 256 + H) bytes for each token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...types import Head, Options, TokenStats
from .. import native
from ..exact.chunks import Chunks, Operands, chunk_budget
from ..exact.denormals import drop_denormals_
from ..exact.gradients import target_entry
from ..exact.products import spans
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
)
from .entries import (
    Entries,
    EntrySums,
    Kept,
    add_kept,
    around_a_loss,
    coefficient_size,
    gradients_from,
    recompute_run,
    rows_of_head,
    runs_of,
)
from .order import inverse
from .report import reports
from .select import MOST_KEPT, MOST_LEFT, SHARE, TAIL_BLOCK, block_count

if TYPE_CHECKING:
    from ...kernels.cpu.library import Library

STATISTICS = {"logprob", "lse", "mean_logit"}

#: Tokens of a chunk: their panels, and a block's logits, fit the second cache.
MOST_TOKENS = 256


class Streamed(Approximate):
    """The kernels where they have something to offer, and `Entries` elsewhere."""

    def __init__(self, backend: ExactPasses, *, screens: bool) -> None:
        self.backend, self.entries, self.screens = backend, Entries(backend), screens

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """Any number where the kernels take the call: the loss stands between a whole forward and a whole backward."""
        return sys.maxsize if _takes(hidden, head, ()) else self.entries.tokens_at_once(hidden, head, options)

    def saved_width(self, hidden: Tensor, head: Head) -> int:
        """The blocks of the tail, and `near` where the kernels take the call."""
        near = head.weight.shape[1] if _takes(hidden, head, ()) else 0
        return self.entries.saved_width(hidden, head) + near

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token; its entries that carry probability, the rest by block, and `near`."""
        return self._streamed(problem, outputs, tolerance) or self._by_entries(problem, outputs, tolerance)

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        """Gradients from the entries, tails and `near` that the forward saved."""
        if not _takes(problem.hidden, problem.head, ()):
            return self.entries.backward(problem, stats, saved, upstream, needs, tolerance)
        counts, column, value, rows = saved
        width = self.entries.saved_width(problem.hidden, problem.head)
        kept, near = Kept(counts, column, value, rows[:, :width]), rows[:, width:]
        if upstream.entropy is not None:
            return gradients_from(self.backend, problem, stats, kept, upstream, needs, tolerance)
        return _Backward(self.backend, problem, stats, kept, near, upstream, needs, tolerance).gradients()

    def single_pass(self, problem: Problem, losses: SummedLosses, tolerance: float) -> SinglePass:
        """The sum of a loss and its gradients: forward, loss and backward, each of all tokens; no group is cut."""
        result = self._streamed(problem, losses.outputs, tolerance)
        if result is None and losses.groups is None:
            return self.entries.single_pass(problem, losses, tolerance)
        (stats, _), saved = result or self._by_entries(problem, losses.outputs, tolerance)

        def gradients(upstream: Upstream) -> Gradients:
            return self.backward(problem, stats, saved, upstream, losses.needs, tolerance)

        return around_a_loss(problem, stats, losses, gradients)

    def _by_entries(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """The forward of `Entries`, and `near` from the entries that it kept."""
        result, saved = self.entries.forward(problem, outputs, tolerance)
        if not _takes(problem.hidden, problem.head, ()):
            return result, saved
        near = rows_of_head(problem.head.weight, Kept(*saved))
        return result, saved._replace(by_block=torch.cat([saved.by_block, near], 1))

    def _streamed(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved] | None:
        """The kernel's forward; None where it has nothing to offer, or the first chunks are too flat for it."""
        if not _takes(problem.hidden, problem.head, outputs):
            return None
        call = _Forward(problem, tolerance, screens=self.screens)
        chunks = call.run()
        if not chunks:
            return None
        counts, column, value = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        mean_logit = Operands(problem).mean_logit(slice(None)) if "mean_logit" in outputs else None
        stats = TokenStats(logprob=call.logprob, lse=call.lse, mean_logit=mean_logit)
        flat = (counts < 0).nonzero()[:, 0]
        if len(flat):
            self._measure_again(problem, flat, stats)
            call.rows.index_fill_(0, flat, 0)
        return Forward(stats, None), Saved(counts, column, value, call.rows)

    def _measure_again(self, problem: Problem, tokens: Tensor, stats: TokenStats) -> None:
        """The exact statistics of tokens that were too flat."""
        part = replace(problem, hidden=problem.hidden[tokens], targets=problem.targets[tokens])
        exact, _ = self.backend.forward(part, (), unit_gradient=False)
        for known, again in zip(stats[:2], exact[:2], strict=True):
            assert known is not None and again is not None
            known.index_copy_(0, tokens, again)


def _takes(hidden: Tensor, head: Head, outputs: Iterable[str]) -> bool:
    """Whether the kernels have something to offer."""
    plain = hidden.dtype != torch.float64 and head.softcap is None and STATISTICS.issuperset(outputs)
    return plain and head.transform.slope > 0 and native.usable(hidden.device)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


class _Chunk(NamedTuple):
    """The kept entries of some tokens."""

    counts: Tensor  # [n] int32; -1: too flat, all of them
    column: Tensor  # [K] int32
    value: Tensor  # [K] float32


class _Forward:
    """A forward's operands as the kernel takes them, and room for its results."""

    def __init__(self, problem: Problem, tolerance: float, *, screens: bool) -> None:
        from ...kernels.cpu.library import DTYPE_CODES, Stream

        self.library, self.problem = native.loaded(), problem
        self.count, self.vocabulary = len(problem.targets), len(problem.head.weight)
        self.blocks = block_count(self.vocabulary, TAIL_BLOCK)
        depth = problem.hidden.shape[1]
        self.logprob, self.lse = torch.empty(self.count), torch.empty(self.count)
        self.rows = torch.empty(self.count, self.blocks + depth)
        hidden, weight = native.unit_stride(problem.hidden), native.unit_stride(problem.head.weight)
        units = _units(self.library, weight) if screens and self.library.screens(weight.dtype) else None
        self.tensors: dict[str, Tensor | None] = {  # the kernel has their addresses alone
            "hidden": hidden, "weight": weight, "units": units, **_by_place(problem),
            "logprob": self.logprob, "lse": self.lse, "rows": self.rows,
        }  # fmt: skip
        self.stream = Stream(
            vocabulary=self.vocabulary,
            depth=depth,
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            dtype=DTYPE_CODES[weight.dtype],
            slope=problem.head.transform.slope,
            largest_unit=0 if units is None else float(units.max()),
            keep=tolerance / SHARE,
            **self.tensors,
        )

    def run(self) -> list[_Chunk] | None:
        """The chunks of every token; None where the first ones are too flat."""
        runs, threads = list(spans(self.count, self._tokens())), torch.get_num_threads()
        first = native.in_threads(self._chunk, runs[:threads])
        if first and all(_is_flat(chunk) for chunk in first):
            return None
        return first + native.in_threads(self._chunk, runs[threads:])

    def _tokens(self) -> int:
        """Tokens of a chunk: what a thread's part of the budget has room for, in chunks of one size."""
        threads, depth = torch.get_num_threads(), self.problem.hidden.shape[1]
        of_token = 24 * MOST_KEPT * self.vocabulary + 4 * (TAIL_BLOCK + 2 * self.blocks + 2 * depth)
        fit = chunk_budget(self.problem.chunk_bytes, "cpu") // (threads * of_token)
        most = max(native.TOKEN_STEP, min(int(fit) // native.TOKEN_STEP * native.TOKEN_STEP, MOST_TOKENS))
        each = -(-self.count // threads)
        equal = -(-each // max(1, -(-each // most)))
        return max(native.TOKEN_STEP, -(-equal // native.TOKEN_STEP) * native.TOKEN_STEP)

    def _chunk(self, rows: slice) -> _Chunk:
        count = rows.stop - rows.start
        room = int(MOST_KEPT * count * self.vocabulary)
        counts, column, value = torch.empty(count).int(), torch.empty(room, dtype=torch.int32), torch.empty(room)
        kept = self.library.stream(self.stream, rows, counts, column, value)
        left = self.rows[rows, : self.blocks].sum()
        if kept < 0 or left > MOST_LEFT * self.problem.head.transform.slope * count:
            return _Chunk(counts.fill_(-1), column[:0].clone(), value[:0].clone())
        return _Chunk(counts, column[:kept].clone(), value[:kept].clone())


def _is_flat(chunk: _Chunk) -> bool:
    return bool((chunk.counts < 0).any())


def _by_place(problem: Problem) -> dict[str, Tensor | None]:
    """Targets, their places in the order, the order and the bias."""
    bias, targets, order = problem.head.bias, problem.targets.contiguous(), problem.vocabulary_order
    return {
        "targets": targets,
        "places": targets if order is None else inverse(order).index_select(0, targets),
        "order": None if order is None else order.contiguous(),
        "bias": None if bias is None else bias.float().contiguous(),
    }


def _units(library: Library, weight: Tensor) -> Tensor:
    """`[V]`: the unit of each row of the head."""
    units = torch.empty(len(weight))
    native.in_threads(lambda rows: library.units(weight[rows], units[rows]), native.shares_of(len(weight)))
    return units


# ---------------------------------------------------------------------------------------------------------------------
# Backward


class _Backward:
    """Gradients from what a forward kept; exact, by recomputation, where a chunk was too flat.

    Entries that the upstream gradients make needless, `|c_i| p_ij < tolerance / SHARE * mean c`, join the tail.
    """

    def __init__(
        self,
        backend: ExactPasses,
        problem: Problem,
        stats: TokenStats,
        kept: Kept,
        near: Tensor,
        upstream: Upstream,
        needs: Needs,
        tolerance: float,
    ) -> None:
        self.library, self.problem, self.stats, self.upstream = native.loaded(), problem, stats, upstream
        self.kept, self.near = kept, near
        self.chunks = Chunks(backend.row_engine(problem), problem, ())
        self.sums = EntrySums(self.chunks, needs, tolerance)
        self.is_exact = kept.counts < 0
        factor = upstream.by_probability(kept.tail[:, 0])
        self.factor = factor.masked_fill_(self.is_exact, 0).contiguous()
        self.rule = tolerance / SHARE * self.chunks.transform.slope
        self.threshold = coefficient_size(upstream).mean() * self.rule

    def gradients(self) -> Gradients:
        """The gradients."""
        if not len(self.factor):
            return self.sums.exact.finish()
        if self.sums.needs.weight or self.sums.needs.bias or reports():
            self._add_listed()
        else:
            self._add_rows(lambda rows: None)
        entry = target_entry(self.stats, self.upstream) * self.chunks.transform.slope
        apart = Upstream(*(None if g is None else g.masked_fill(self.is_exact, 0) for g in self.upstream))
        self.sums.exact.add_apart(entry.masked_fill(self.is_exact, 0), apart)
        return self.sums.exact.finish()

    def _add_rows(self, report: Callable[[slice], None]) -> None:
        """`d hidden` of every run of tokens without their targets, and all that a flat chunk adds.

        `report` is told of the runs that are not flat, in between, for reports list tokens in order.
        """
        for rows, is_exact in runs_of(self.is_exact):
            if is_exact:
                recompute_run(self.sums, rows, self.stats, self.upstream)
            else:
                factor = self.factor[rows, None]
                self.sums.set_hidden(rows, self.near[rows] * factor, self.kept.tail[rows] * factor)
                report(rows)

    def _add_listed(self) -> None:
        """`_add_rows`, and the entries' and the tail's part of the gradients of weight and bias."""
        tail, bias = self.kept.tail * self.factor[:, None], self.sums.exact.sums.bias
        threshold = max(float(self.threshold), torch.finfo(torch.float32).tiny)  # no denormal enters a product
        listed = _route(self.library, self.kept, self.factor, threshold, self.sums.where.block, tail)
        drop_denormals_(tail)
        self._add_rows(lambda rows: self._report(rows, tail, listed.token))
        if bias is not None:
            bias.index_add_(0, listed.column, listed.value)
            bias.addcmul_(tail.sum(0).index_select(0, self.sums.where.block), self.sums.shares)
        if self.sums.needs.weight:
            self._spread(tail, listed)

    def _report(self, rows: slice, tail: Tensor, token: Tensor) -> None:
        for report in reports():
            stay = int(((token >= rows.start) & (token < rows.stop)).sum())
            add_kept(report, self.problem, tail[rows], self.factor[rows], self.threshold, self.rule, stay)

    def _spread(self, tail: Tensor, listed: _Listed) -> None:
        from ...kernels.cpu.library import DTYPE_CODES, Spread

        hidden, order = native.unit_stride(self.problem.hidden), self.problem.vocabulary_order
        begun, out = self.sums.exact.weight_begun, self.sums.exact.begin().weight
        assert out is not None
        tensors = {
            **listed._asdict(),
            "hidden": hidden, "order": None if order is None else order.contiguous(), "share": self.sums.shares,
            "tail": torch.mm(tail.T, hidden.float()), "out": out,
        }  # fmt: skip
        spread = Spread(
            vocabulary=len(out),
            depth=out.shape[1],
            hidden_stride=hidden.stride(0),
            out_stride=out.stride(0),
            dtype=DTYPE_CODES[hidden.dtype],
            add=begun,
            **tensors,
        )
        parts = native.shares_of(len(listed.starts) - 1)
        native.in_threads(lambda blocks: self.library.spread(spread, blocks), parts)
        self.sums.exact.weight_begun = True


class _Listed(NamedTuple):
    """Entries block after block, each times its token's factor, in the order of their tokens."""

    starts: Tensor  # [blocks + 1] int64: where each block's begin
    token: Tensor  # [K] int32
    column: Tensor  # [K] int32
    value: Tensor  # [K] float32


def _route(library: Library, kept: Kept, factor: Tensor, threshold: float, block: Tensor, tail: Tensor) -> _Listed:
    """The entries of at least `threshold`, as `_Listed`; the others are added to `tail`."""
    from ...kernels.cpu.library import Route

    counts, parts = kept.counts.contiguous(), native.shares_of(len(kept.counts))
    first = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.clamp(min=0).cumsum(0)]).tolist()
    column, value = kept.column.contiguous(), kept.value.contiguous()
    operands = {"counts": counts, "column": column, "value": value, "factor": factor, "block": block, "tail": tail}
    following = torch.zeros(len(parts), tail.shape[1], dtype=torch.int64)

    def run(**out: Tensor) -> None:
        route = Route(**operands, **out, tail_stride=tail.stride(0), threshold=threshold)
        native.in_threads(
            lambda i: library.route(route, parts[i], first[parts[i].start], following[i]), range(len(parts))
        )

    run()
    ends = following.T.reshape(-1).cumsum(0)  # block after block, in each the parts
    following = (ends - following.T.reshape(-1)).view(-1, len(parts)).T.contiguous()
    starts = torch.cat([ends.new_zeros(1), ends[len(parts) - 1 :: len(parts)]])
    token, columns = torch.empty(2, int(ends[-1]), dtype=torch.int32)
    listed = _Listed(starts, token, columns, torch.empty(len(token)))
    if len(token):  # an empty tensor's address is null, which asks for a count
        run(out_token=token, out_column=columns, out_value=listed.value)
    return listed
