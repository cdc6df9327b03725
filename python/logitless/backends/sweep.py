"""Sweeps over chunks of tokens: one GEMM makes a chunk's `[chunk, V]` logits, a row engine turns them into statistics
and into a gradient, and two more GEMMs use that.

Forward: one GEMM a chunk, then the engine's `measure`. Backward: the chunk's GEMM again (`backward`), or at once while
its logits are at hand (`single_pass`, and the unit gradient of a frozen head in `forward`), then its `gradient` and
two GEMMs. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Memory: one chunk of logits (as many more as the engine says), and float32 accumulators of the gradients asked for. A
head that is multiplied in another dtype than its own is copied once per call.

A CPU keeps the chunk vocabulary-major, `[V, chunk]`: its GEMMs are a fifth to a quarter faster that way round (AVX2,
H 576, V 49152, chunks of 128 to 192 tokens), and no row operation minds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..types import LogitTransform, Options, TokenStats, statistics_dtype
from .problem import Coefficients, Forward, Gradients, Needs, Problem, SinglePass, Upstream, empty_gradients

#: Default budget for one chunk's logits. A CPU wants them near its cache, a GPU wants GEMMs that fill it.
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20}
DEFAULT_CHUNK_BYTES_ACCELERATOR = 256 * 2**20


class RowHead(NamedTuple):
    """What stands between a raw product and a logit."""

    bias: Tensor | None  # [V] in the statistics' dtype
    transform: LogitTransform


class Tile(NamedTuple):
    """A chunk of rows that was measured, or recalled."""

    logits: Tensor  # [n, V] whatever the engine left there
    targets: Tensor  # [n]
    stats: TokenStats  # [n]; always with logprob and lse
    private: Any  # the engine's own


class RowGradient(NamedTuple):
    """`dL / d(raw product)` of a chunk: `row_scale[:, None] * matrix`, plus `target` at each row's target entry.

    The target's entry of the matrix is 0. Without a softcap the mean logit's part, the same for every entry of a row,
    is not in it: the sweep adds it by two products with one vector.
    """

    matrix: Tensor  # [n, V] in the operands' dtype
    row_scale: Tensor | None  # [n]; None means 1
    target: Tensor  # [n]


class RowEngine(Protocol):
    """Row operations on a chunk. A tile is used once: `gradient` may overwrite it."""

    def buffers(self, problem: Problem | Options, outputs: tuple[str, ...], entropy_gradient: bool) -> int:
        """How many buffers of a chunk's size the operations take, the chunk's own among them."""
        ...

    def measure(
        self, raw: Tensor, head: RowHead, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        """Statistics of raw products `[n, V]`; `mean_logit` where it is known already."""
        ...

    def recall(self, raw: Tensor, head: RowHead, targets: Tensor, stats: TokenStats) -> Tile:
        """The same where the statistics are known, for a backward that computes the logits again."""
        ...

    def gradient(self, tile: Tile, head: RowHead, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        """From the gradients that reach the statistics."""
        ...


def chunk_tokens(hidden: Tensor, weight: Tensor, options: Options | Problem, buffers: int = 1) -> int:
    """Tokens in a chunk: what the budget holds, a multiple of 16 where that leaves any, at least 1."""
    budget = options.chunk_bytes or DEFAULT_CHUNK_BYTES.get(hidden.device.type, DEFAULT_CHUNK_BYTES_ACCELERATOR)
    itemsize = (options.chunk_dtype or statistics_dtype(hidden.dtype)).itemsize
    tokens = budget // (weight.shape[0] * itemsize * buffers)
    return max(1, tokens - tokens % 16 if tokens >= 16 else tokens)


def forward(engine: RowEngine, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    chunks = Chunks(engine, problem, outputs)
    unit = Accumulators(chunks, Needs(hidden=True, weight=False, bias=False)) if unit_gradient else None
    found: list[TokenStats] = []
    for rows in spans(len(problem.targets), chunks.tokens):
        tile = chunks.measure(rows)
        found.append(tile.stats)
        if unit is not None:
            assert tile.stats.lse is not None
            unit.add(rows, tile, Upstream(logprob=torch.ones_like(tile.stats.lse)))
        del tile  # a softcap's derivative is as large as the next chunk
    return Forward(concatenate(found, chunks.dtype, problem, outputs), unit.sums.hidden if unit else None)


def backward(engine: RowEngine, problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`, the chunk's logits computed again."""
    chunks = Chunks(engine, problem, (), entropy_gradient=upstream.entropy is not None)
    gradients = Accumulators(chunks, needs)
    for rows in spans(len(problem.targets), chunks.tokens):
        known = TokenStats(*(None if x is None else x[rows] for x in stats))
        gradients.add(rows, chunks.recall(rows, known), upstream.rows(rows))
    return gradients.finish()


def single_pass(
    engine: RowEngine,
    problem: Problem,
    outputs: tuple[str, ...],
    coefficients: Coefficients,
    groups: Tensor | None,
    needs: Needs,
    accumulators: Callable[[Chunks, Needs], Accumulators] | None = None,
) -> SinglePass:
    """The sum of a loss and its gradients in one sweep; `groups [N]`, non-decreasing, are never cut by a chunk.
    `accumulators` takes the place of the exact ones."""
    chunks = Chunks(engine, problem, outputs)
    gradients = (accumulators or Accumulators)(chunks, needs)
    count = len(problem.targets)
    loss = torch.zeros((), dtype=chunks.dtype, device=problem.hidden.device)
    logprob = torch.empty(count, dtype=chunks.dtype, device=problem.hidden.device)
    for rows in spans(count, chunks.tokens) if groups is None else group_spans(groups, chunks.tokens):
        tile = chunks.measure(rows)
        assert tile.stats.logprob is not None
        logprob[rows] = tile.stats.logprob
        chunk_loss, upstream = coefficients(tile.stats, rows)
        loss += chunk_loss
        if any(needs):
            gradients.add(rows, tile, upstream)
        del tile  # as in `forward`
    return SinglePass(loss, logprob, gradients.finish())


def group_spans(groups: Tensor, tokens: int) -> Iterator[slice]:
    """Runs of whole groups of at most `tokens` tokens each."""
    ends = torch.unique_consecutive(groups, return_counts=True)[1].cumsum(0).tolist()
    start = stop = 0
    for end in ends:
        if end - stop > tokens:
            raise ValueError(
                f"backward: 'single_pass' needs a whole group's logits in one chunk, but {end - stop} tokens "
                f"exceed the {tokens} that chunk_bytes allows; raise chunk_bytes or use backward='recompute'"
            )
        if end - start > tokens:
            yield slice(start, stop)
            start = stop
        stop = end
    if stop > start:
        yield slice(start, stop)


def spans(count: int, tokens: int) -> Iterator[slice]:
    """Runs of `tokens` tokens."""
    return (slice(start, min(start + tokens, count)) for start in range(0, count, tokens))


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in. float16 cannot hold a row's small exponentials; a CPU without bfloat16 units
    multiplies bfloat16 in float32."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, with `out` in its own dtype whatever the operands'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b`, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b))


def products(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Raw products `[n, V]` in the buffer, in the layout that the device likes."""
    vocabulary = weight.shape[0]
    flat = buffer[: len(hidden) * vocabulary]
    if hidden.device.type == "cpu":
        multiply(weight, hidden.T, out=flat.view(vocabulary, -1))
        return flat.view(vocabulary, -1).T
    multiply(hidden, weight.T, out=flat.view(-1, vocabulary))
    return flat.view(-1, vocabulary)


class Chunks:
    """The head's operands and one buffer for a chunk's logits, used again for every chunk."""

    def __init__(
        self, engine: RowEngine, problem: Problem, outputs: tuple[str, ...], *, entropy_gradient: bool = False
    ) -> None:
        self.engine, self.problem, self.outputs = engine, problem, outputs
        self.dtype = statistics_dtype(problem.hidden.dtype)
        operand = operand_dtype(problem.hidden.dtype, problem.hidden.device)
        self.hidden, self.weight = problem.hidden.to(operand), problem.weight.to(operand)
        self.head = RowHead(None if problem.bias is None else problem.bias.to(self.dtype), problem.transform)
        buffers = engine.buffers(problem, outputs, entropy_gradient)
        tokens = chunk_tokens(problem.hidden, problem.weight, problem, buffers)
        self.tokens = min(tokens, max(1, len(problem.targets)))
        self.buffer = torch.empty(
            self.tokens * self.weight.shape[0], dtype=problem.chunk_dtype or self.dtype, device=self.hidden.device
        )
        # Without a softcap the mean logit is linear in the hidden state: no pass over the logits.
        self.linear_mean = problem.transform.softcap is None

    @cached_property
    def mean_row(self) -> Tensor:
        return self.weight.mean(0, dtype=self.dtype)

    def raw(self, rows: slice) -> Tensor:
        """Raw products `[n, V]`, in the buffer."""
        return products(self.hidden[rows], self.weight, self.buffer)

    def measure(self, rows: slice) -> Tile:
        mean_logit = self._mean_logit(rows) if self.linear_mean and "mean_logit" in self.outputs else None
        return self.engine.measure(self.raw(rows), self.head, self.problem.targets[rows], self.outputs, mean_logit)

    def recall(self, rows: slice, stats: TokenStats) -> Tile:
        return self.engine.recall(self.raw(rows), self.head, self.problem.targets[rows], stats)

    def _mean_logit(self, rows: slice) -> Tensor:
        mean = self.hidden[rows].to(self.dtype) @ self.mean_row
        if self.head.bias is not None:
            mean = mean + self.head.bias.mean()
        return mean * self.problem.transform.slope


class Accumulators:
    """Gradient sums in the statistics' dtype, whatever the number of chunks."""

    def __init__(self, chunks: Chunks, needs: Needs) -> None:
        self.chunks, self.needs = chunks, needs
        self.sums = empty_gradients(chunks.problem, needs, chunks.dtype)
        # The mean logit's gradient is the same for every entry of the vocabulary: summed apart, added once.
        self.mean_weight: Tensor | None = None  # [H]
        self.mean_bias: Tensor | None = None  # []

    def add(self, rows: slice, tile: Tile, upstream: Upstream) -> None:
        """Adds a chunk's part; the tile is used up."""
        chunks = self.chunks
        gradient = chunks.engine.gradient(tile, chunks.head, upstream, chunks.weight.dtype)
        self.add_gradient(rows, tile.targets, gradient, upstream)

    def add_gradient(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """The products of a chunk's gradient."""
        if self.sums.hidden is not None:
            self._add_hidden(self.sums.hidden[rows], targets, gradient)
        if self.sums.weight is not None:
            self._add_weight(self.sums.weight, rows, targets, gradient)
        if self.sums.bias is not None:
            scale = gradient.row_scale if gradient.row_scale is not None else torch.ones_like(gradient.target)
            multiply_add(gradient.matrix.T, scale[:, None].to(gradient.matrix.dtype), out=self.sums.bias[:, None])
            self.sums.bias.index_add_(0, targets, gradient.target)
        self.add_mean(rows, upstream)

    def _add_hidden(self, out: Tensor, targets: Tensor, gradient: RowGradient) -> None:
        chunks = self.chunks
        multiply(gradient.matrix, chunks.weight, out=out)
        if gradient.row_scale is not None:
            out.mul_(gradient.row_scale[:, None])
        out.addcmul_(gradient.target[:, None], chunks.weight[targets].to(out.dtype))

    def _add_weight(self, out: Tensor, rows: slice, targets: Tensor, gradient: RowGradient) -> None:
        hidden = self.chunks.hidden[rows].to(out.dtype)
        scaled = hidden if gradient.row_scale is None else hidden * gradient.row_scale[:, None]
        multiply_add(gradient.matrix.T, scaled.to(gradient.matrix.dtype), out=out)
        out.index_add_(0, targets, hidden * gradient.target[:, None])

    def add_mean(self, rows: slice, upstream: Upstream) -> None:
        """The mean logit's part, where it is not in the matrix."""
        chunks = self.chunks
        if upstream.mean_logit is None or not chunks.linear_mean:
            return
        mean = upstream.mean_logit * chunks.problem.transform.slope
        if self.sums.hidden is not None:
            self.sums.hidden[rows].addcmul_(mean[:, None], chunks.mean_row)
        if self.needs.weight:
            part = chunks.hidden[rows].to(chunks.dtype).T @ mean
            self.mean_weight = part + (0 if self.mean_weight is None else self.mean_weight)
        if self.sums.bias is not None:
            self.mean_bias = mean.sum() + (0 if self.mean_bias is None else self.mean_bias)

    def finish(self) -> Gradients:
        vocabulary = self.chunks.weight.shape[0]
        if self.sums.weight is not None and self.mean_weight is not None:
            self.sums.weight.add_(self.mean_weight / vocabulary)
        if self.sums.bias is not None and self.mean_bias is not None:
            self.sums.bias.add_(self.mean_bias / vocabulary)
        return self.sums


def concatenate(
    found: Sequence[TokenStats], dtype: torch.dtype, problem: Problem, outputs: tuple[str, ...]
) -> TokenStats:
    """The chunks' statistics as one, also of no chunk at all."""
    names = {"logprob", "lse", *outputs}
    if not found:
        return TokenStats(**{name: torch.empty(0, dtype=dtype, device=problem.hidden.device) for name in names})
    return TokenStats(**{name: torch.cat([getattr(part, name) for part in found]) for name in names})
