"""Sweeps over chunks of tokens: one GEMM makes a chunk's `[chunk, V]` logits, a row engine turns them into statistics
and into a gradient, and two more GEMMs use that.

Forward: one GEMM a chunk, then the engine's `measure`. Backward: the chunk's GEMM again (`backward`), or at once while
its logits are at hand (`single_pass`, and the unit gradient of a frozen head in `forward`), then its `gradient` and
two GEMMs. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Memory: one chunk of logits (as many more as the engine says), and float32 accumulators of the gradients asked for. A
head that is multiplied in another dtype than its own is converted by parts, again for each product with it: 3% of a
step's time (bfloat16 in float32, H 576, V 49152, chunks of 160 tokens), where a copy would be H / N of the logits.

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

#: Entries of the vocabulary in a part of the head that is converted: on a CPU it stays in a core's cache.
CONVERTED_ENTRIES = {"cpu": 512}
CONVERTED_ENTRIES_ACCELERATOR = 8192


#: Whether torch.addmm adds half-precision products to a float32 sum; torch 2.9 refuses (pytorch/pytorch#167931).
ADDS_NARROW_PRODUCTS = torch.__version__ >= "2.10"


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

    def buffers(self, problem: Problem | Options) -> int:
        """How many buffers of a chunk's size the operations take, the chunk's own among them."""
        ...

    def measure(
        self, raw: Tensor, head: RowHead, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        """Statistics of raw products `[n, V]`; `mean_logit` where it is known already."""
        ...

    def project(
        self,
        hidden: Tensor,
        weight: Tensor,
        out: Tensor,
        head: RowHead,
        targets: Tensor,
        outputs: tuple[str, ...],
        mean_logit: Tensor | None,
    ) -> Tile | None:
        """Raw products in `out [n, V]` and their statistics, by one kernel; None where a GEMM and `measure` do it."""
        return None

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
    chunks = Chunks(engine, problem, ())
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
    elif a.is_cuda and out.dtype == torch.float32 and ADDS_NARROW_PRODUCTS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:
        out.add_(torch.mm(a, b))


def parts_in(dtype: torch.dtype, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the head's rows in that dtype: all of them where it is theirs, else converted into one scratch."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    entries = min(len(weight), CONVERTED_ENTRIES.get(weight.device.type, CONVERTED_ENTRIES_ACCELERATOR))
    scratch = torch.empty(entries, weight.shape[1], dtype=dtype, device=weight.device)
    for columns in spans(len(weight), entries):
        yield columns, scratch[: columns.stop - columns.start].copy_(weight[columns])


def row_stride(vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Elements of a chunk's buffer for each token: whole vectors of 16 bytes where a GPU's kernels read rows."""
    step = 1 if device_type == "cpu" else 16 // dtype.itemsize
    return -(-vocabulary // step) * step


def lay_out(buffer: Tensor, count: int, vocabulary: int, device_type: str) -> Tensor:
    """`[count, V]` in a flat buffer, as the device likes it: vocabulary-major, or rows one after the other."""
    stride = row_stride(vocabulary, buffer.dtype, device_type)
    flat = buffer[: count * stride]
    return flat.view(vocabulary, count).T if device_type == "cpu" else flat.view(count, stride)[:, :vocabulary]


def products(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Raw products `[n, V]` into `out`, in either layout, multiplied in the dtype of `hidden`."""
    vocabulary_major = out.stride(0) == 1
    for columns, part in parts_in(hidden.dtype, weight):
        if vocabulary_major:
            multiply(part, hidden.T, out=out.T[columns])
        else:
            multiply(hidden, part.T, out=out[:, columns])
    return out


def products_with_head(matrix: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = matrix @ weight`, multiplied in the dtype of `matrix`."""
    for columns, part in parts_in(matrix.dtype, weight):
        (multiply_add if columns.start else multiply)(matrix[:, columns], part, out=out)


class Chunks:
    """The operands of the products, and one buffer for a chunk's logits, used again for every chunk."""

    def __init__(self, engine: RowEngine, problem: Problem, outputs: tuple[str, ...]) -> None:
        self.engine, self.problem, self.outputs = engine, problem, outputs
        self.dtype = statistics_dtype(problem.hidden.dtype)
        self.operand = operand_dtype(problem.hidden.dtype, problem.hidden.device)
        self.head = RowHead(None if problem.bias is None else problem.bias.to(self.dtype), problem.transform)
        tokens = chunk_tokens(problem.hidden, problem.weight, problem, engine.buffers(problem))
        self.tokens = min(tokens, max(1, len(problem.targets)))
        device, dtype = problem.hidden.device, problem.chunk_dtype or self.dtype
        stride = row_stride(len(problem.weight), dtype, device.type)
        self.buffer = torch.empty(self.tokens * stride, dtype=dtype, device=device)
        # Without a softcap the mean logit is linear in the hidden state: no pass over the logits.
        self.linear_mean = problem.transform.softcap is None

    @cached_property
    def hidden(self) -> Tensor:
        """All hidden states in the dtype of the products; a copy where that is not their own."""
        return self.problem.hidden.to(self.operand)

    @cached_property
    def weight(self) -> Tensor:
        """The whole head likewise, for products with single rows of it."""
        return self.problem.weight.to(self.operand)

    @property
    def head_at_hand(self) -> Tensor:
        """The head for products with all of it: its copy if there is one."""
        return self.weight if "weight" in vars(self) else self.problem.weight

    @cached_property
    def mean_row(self) -> Tensor:
        sums = [part.sum(0) for _, part in parts_in(self.dtype, self.head_at_hand)]
        return torch.stack(sums).sum(0) / len(self.problem.weight)

    def raw(self, rows: slice) -> Tensor:
        """Raw products `[n, V]`, in the buffer."""
        return products(self.problem.hidden[rows].to(self.operand), self.head_at_hand, self._room(rows))

    def _room(self, rows: slice) -> Tensor:
        return lay_out(self.buffer, rows.stop - rows.start, len(self.problem.weight), self.buffer.device.type)

    def measure(self, rows: slice) -> Tile:
        mean_logit = self._mean_logit(rows) if self.linear_mean and "mean_logit" in self.outputs else None
        hidden, weight, targets = self.problem.hidden[rows], self.problem.weight, self.problem.targets[rows]
        tile = self.engine.project(hidden, weight, self._room(rows), self.head, targets, self.outputs, mean_logit)
        if tile is not None:
            return tile
        return self.engine.measure(self.raw(rows), self.head, targets, self.outputs, mean_logit)

    def recall(self, rows: slice, stats: TokenStats) -> Tile:
        return self.engine.recall(self.raw(rows), self.head, self.problem.targets[rows], stats)

    def _mean_logit(self, rows: slice) -> Tensor:
        mean = self.problem.hidden[rows].to(self.dtype) @ self.mean_row
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
        gradient = chunks.engine.gradient(tile, chunks.head, upstream, chunks.operand)
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
        products_with_head(gradient.matrix, chunks.head_at_hand, out)
        if gradient.row_scale is not None:
            out.mul_(gradient.row_scale[:, None])
        out.addcmul_(gradient.target[:, None], chunks.problem.weight[targets].to(out.dtype))

    def _add_weight(self, out: Tensor, rows: slice, targets: Tensor, gradient: RowGradient) -> None:
        hidden = self.chunks.problem.hidden[rows].to(out.dtype)
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
            part = chunks.problem.hidden[rows].to(chunks.dtype).T @ mean
            self.mean_weight = part + (0 if self.mean_weight is None else self.mean_weight)
        if self.sums.bias is not None:
            self.mean_bias = mean.sum() + (0 if self.mean_bias is None else self.mean_bias)

    def finish(self) -> Gradients:
        vocabulary = len(self.chunks.problem.weight)
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
