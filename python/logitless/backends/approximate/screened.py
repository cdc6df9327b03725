"""Screened gradients on a CPU: the forward, too, computes in full precision only what carries probability.

`kernels/cpu/screen.cpp` computes all logits of a chunk of tokens by a product of 16-bit integers, at twice the speed of
float32's. Entries with `p_ij >= tolerance / SHARE` are kept. Kept entries for which an integer's error matters, and the
target, are computed again from the operands. The kept entries' part of `d logprob / d hidden`, called `near`, is summed
on the way. So a token leaves its log-prob, its kept entries, the tail's masses by block (`entries` says what a tail is)
and `near`; and the backward

    d hidden_i = c_i (near_i + sum_b tail_ib mean_b(weight)) + its target's and its mean logit's part
    d weight                                                   as in `entries`

multiplies no matrix of the size of the logits. About 0.5 + e + k s GEMMs of 2 N H V flops, with s the share of the
entries kept and k the cost of one; docs/tail-corrected.md has figures.

A loss of per-token statistics takes the same two functions with the loss in between, over all tokens at once.

`entries` stands in where this has nothing to offer: float64, a softcap, statistics other than logprob, lse and the
mean logit, and where the first chunks are too flat. A flat chunk among others is computed again, exactly.

Memory: the head in integers (2 V H bytes), a chunk of float32 logits for each thread, 8 bytes for each kept entry, and
4 (V / 256 + H) bytes for each token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...types import Head, Options, TokenStats
from ..exact.chunks import Operands, chunk_budget
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
from .entries import Entries, Kept, around_a_loss, gradients_from, rows_of_head
from .order import inverse
from .select import MOST_KEPT, MOST_LEFT, SHARE, TAIL_BLOCK, block_count

if TYPE_CHECKING:
    from ...kernels.cpu.library import Library, Screen

STATISTICS = {"logprob", "lse", "mean_logit"}


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """CPU tensors, where the library is built and the processor has AVX2."""
    from ...kernels.cpu import library

    if device.type != "cpu":
        return f"it takes tensors on a CPU, got {device}"
    path = library.location()
    if path is None:
        return "its library is not built: install logitless where there is a C++ compiler (LOGITLESS_CPU=require)"
    try:
        supported = library.load(path).supported
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded: {error}"
    return None if supported else "the processor lacks AVX2, FMA or F16C"


class Screened(Approximate):
    """`backward="screened"`: the kernel where it has something to offer, and `Entries` elsewhere."""

    def __init__(self, backend: ExactPasses) -> None:
        self.backend, self.entries = backend, Entries(backend)

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """Any number where the kernel takes the call: the loss stands between a whole forward and a whole backward."""
        return sys.maxsize if _takes(hidden, head, ()) else self.entries.tokens_at_once(hidden, head, options)

    def saved_width(self, hidden: Tensor, head: Head) -> int:
        """The blocks of the tail, and `near`."""
        return self.entries.saved_width(hidden, head) + head.weight.shape[1]

    def forward(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """`TokenStats` of every token; its entries that carry probability, the rest by block, and `near`."""
        return self._screened(problem, outputs, tolerance) or self._by_entries(problem, outputs, tolerance)

    def backward(
        self, problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
    ) -> Gradients:
        """Gradients from the entries, tails and `near` that the forward saved."""
        counts, column, value, rows = saved
        width = self.entries.saved_width(problem.hidden, problem.head)
        kept = Kept(counts, column, value, rows[:, :width], rows[:, width:])
        return gradients_from(self.backend, problem, stats, kept, upstream, needs, tolerance)

    def single_pass(self, problem: Problem, losses: SummedLosses, tolerance: float) -> SinglePass:
        """The sum of a loss and its gradients: forward, loss and backward, each of all tokens; no group is cut."""
        result = self._screened(problem, losses.outputs, tolerance)
        if result is None and losses.groups is None:
            return self.entries.single_pass(problem, losses, tolerance)
        (stats, _), saved = result or self._by_entries(problem, losses.outputs, tolerance)

        def gradients(upstream: Upstream) -> Gradients:
            return self.backward(problem, stats, saved, upstream, losses.needs, tolerance)

        return around_a_loss(problem, stats, losses, gradients)

    def _by_entries(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
        """The forward of `Entries`, and `near` from the entries that it kept."""
        result, saved = self.entries.forward(problem, outputs, tolerance)
        near = rows_of_head(problem.head.weight, Kept(*saved))
        return result, saved._replace(by_block=torch.cat([saved.by_block, near], 1))

    def _screened(self, problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved] | None:
        """The kernel's forward; None where it has nothing to offer, or the first chunks are too flat for it."""
        if not _takes(problem.hidden, problem.head, outputs):
            return None
        from ...kernels.cpu import library

        path = library.location()
        assert path is not None
        call = _Call(library.load(path), problem, tolerance)
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
    """Whether the kernel has something to offer."""
    return hidden.dtype != torch.float64 and head.softcap is None and STATISTICS.issuperset(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# The kernel's forward


class _Chunk(NamedTuple):
    """The kept entries of some tokens."""

    counts: Tensor  # [n] int32; -1: too flat, all of them
    column: Tensor  # [K] int32
    value: Tensor  # [K] float32


class _Call:
    """One call's operands as the kernel takes them, and room for its results."""

    def __init__(self, library: Library, problem: Problem, tolerance: float) -> None:
        from ...kernels.cpu.library import PANEL, TILE

        self.library, self.problem, self.threads = library, problem, torch.get_num_threads()
        self.count, self.vocabulary = len(problem.targets), len(problem.head.weight)
        self.padded = -(-self.vocabulary // PANEL) * PANEL
        share = chunk_budget(problem.chunk_bytes, "cpu") // self.threads
        even = -(-self.count // self.threads)
        self.tokens = TILE * max(1, min(share // (4 * self.padded * TILE), -(-even // TILE)))
        self.logprob, self.lse = torch.empty(self.count), torch.empty(self.count)
        self.blocks = block_count(self.vocabulary, TAIL_BLOCK)
        self.rows = torch.empty(self.count, self.blocks + problem.hidden.shape[1])
        self.tensors: dict[str, Tensor | None] = self._tensors()  # the kernel has their addresses alone
        self.screen = self._screen(tolerance)

    def _tensors(self) -> dict[str, Tensor | None]:
        problem, head, targets = self.problem, self.problem.head, self.problem.targets.contiguous()
        order = None if problem.vocabulary_order is None else problem.vocabulary_order.contiguous()
        bias = None if head.bias is None else head.bias.float().contiguous()
        weight = _unit_stride(head.weight)
        panels, units = self._packed(weight, order)
        by_place = torch.zeros(self.vocabulary) if bias is None else bias
        by_place = (by_place if order is None else by_place.index_select(0, order)) * head.transform.slope
        return {
            "hidden": _unit_stride(problem.hidden),
            "weight": weight,
            "bias": bias,
            "targets": targets,
            "order": order,
            "places": targets if order is None else inverse(order).index_select(0, targets),
            "panels": panels,
            "units": units,
            "offset": F.pad(by_place, (0, self.padded - self.vocabulary), value=-torch.inf),
            "logprob": self.logprob,
            "lse": self.lse,
            "rows": self.rows,
        }

    def _packed(self, weight: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """The head in integers, and their units in logits."""
        from ...kernels.cpu.library import PANEL

        panels = torch.empty(self.padded * (-(-weight.shape[1] // 2)), dtype=torch.int32)
        units = torch.empty(self.padded)
        step = -(-self.vocabulary // (self.threads * PANEL)) * PANEL
        parts = list(spans(self.vocabulary, step))
        self._in_threads(lambda places: self.library.pack(weight, order, places, panels, units), parts)
        return panels, units.mul_(self.problem.head.transform.slope)

    def _screen(self, tolerance: float) -> Screen:
        from ...kernels.cpu.library import DTYPE_CODES, Screen

        hidden, weight, units = (self.tensors[name] for name in ("hidden", "weight", "units"))
        assert hidden is not None and weight is not None and units is not None
        return Screen(
            vocabulary=self.vocabulary,
            depth=weight.shape[1],
            hidden_stride=hidden.stride(0),
            weight_stride=weight.stride(0),
            dtype=DTYPE_CODES[weight.dtype],
            slope=self.problem.head.transform.slope,
            largest_unit=float(units.max()),
            keep=tolerance / SHARE,
            **self.tensors,
        )

    def run(self) -> list[_Chunk] | None:
        """The chunks of every token; None where the first ones are too flat."""
        runs, scratch = list(spans(self.count, self.tokens)), SimpleQueue[Tensor]()
        for _ in range(min(self.threads, len(runs))):
            scratch.put(torch.empty(self.tokens * self.padded))

        def one(rows: slice) -> _Chunk:
            logits = scratch.get()
            try:
                return self._chunk(rows, logits)
            finally:
                scratch.put(logits)

        first = self._in_threads(one, runs[: self.threads])
        if first and all(_is_flat(chunk) for chunk in first):
            return None
        return first + self._in_threads(one, runs[self.threads :])

    def _chunk(self, rows: slice, logits: Tensor) -> _Chunk:
        count = rows.stop - rows.start
        room = int(MOST_KEPT * count * self.vocabulary)
        counts, column, value = torch.empty(count).int(), torch.empty(room, dtype=torch.int32), torch.empty(room)
        kept = self.library.chunk(self.screen, rows, logits, counts, column, value)
        left = self.rows[rows, : self.blocks].sum()
        if kept < 0 or left > MOST_LEFT * self.problem.head.transform.slope * count:
            return _Chunk(counts.fill_(-1), column[:0].clone(), value[:0].clone())
        return _Chunk(counts, column[:kept].clone(), value[:kept].clone())

    def _in_threads(self, work: Callable[[slice], _Chunk | None], runs: list[slice]) -> list:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(work, runs))


def _is_flat(chunk: _Chunk) -> bool:
    return bool((chunk.counts < 0).any())


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()
