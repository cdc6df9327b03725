"""Sweeps over chunks of tokens: one GEMM makes a chunk's `[chunk, V]` logits, a row engine turns them into statistics
and into a gradient, and two more GEMMs use that.

Forward: one GEMM a chunk, then the engine's `measure`. Backward: the chunk's GEMM again (`backward`), or at once while
its logits are at hand (`single_pass`, and the unit gradient of a frozen head in `forward`), then its `gradient` and
two GEMMs. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Memory: one chunk of logits (as many more as the engine says), and float32 sums of the gradients asked for. A bfloat16
head whose tokens fit one chunk gets its gradient from the product itself, in bfloat16, without a float32 sum. A head
that is multiplied in another dtype than its own is converted by parts, again for each product with it: 3% of a step's
time (bfloat16 in float32, H 576, V 49152, chunks of 160 tokens), where a copy would be H / N of the logits.

Chunks of a GPU: docs/chunks.md has the rule and its arithmetic.

A CPU keeps the chunk vocabulary-major, `[V, chunk]`: its GEMMs are a fifth to a quarter faster that way round (AVX2,
H 576, V 49152, chunks of 128 to 192 tokens), and no row operation minds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..types import LogitTransform, Options, TokenStats, statistics_dtype
from .problem import (
    Coefficients,
    Forward,
    Gradients,
    Needs,
    Problem,
    SinglePass,
    Upstream,
    empty_gradients,
    empty_sum,
)

#: Default budget for one chunk's logits. A CPU wants them near its cache, a GPU wants GEMMs that fill it; there a
#: trainable head raises it to the bytes of its float32 gradient (`chunk_tokens`).
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20}
DEFAULT_CHUNK_BYTES_ACCELERATOR = 256 * 2**20

#: A chunk's tokens are a multiple of this. On a GPU it is the height of a GEMM's tile: a part of one costs as much.
CHUNK_STEP = {"cpu": 16}
CHUNK_STEP_ACCELERATOR = 128

#: Entries of the vocabulary in a part of the head that is converted: on a CPU it stays in a core's cache.
CONVERTED_ENTRIES = {"cpu": 512}
CONVERTED_ENTRIES_ACCELERATOR = 8192

#: Bytes of a product that is made apart, because it cannot be written in the dtype of where it goes.
PART_BYTES = {"cpu": 2**18}
PART_BYTES_ACCELERATOR = 64 * 2**20


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


def chunk_tokens(
    hidden: Tensor, weight: Tensor, options: Options | Problem, buffers: int = 1, *, trainable: bool = False
) -> int:
    """The most tokens in a chunk: what the budget holds, in whole steps where it holds one, at least 1.

    `trainable`: the head's gradient is summed over the chunks, and reads and writes that sum with each of them. By
    default a chunk may then be as large as the sum on a GPU, which takes H tokens.
    """
    device = hidden.device.type
    budget = options.chunk_bytes or DEFAULT_CHUNK_BYTES.get(device)
    if budget is None:
        sum_bytes = weight.numel() * statistics_dtype(weight.dtype).itemsize
        budget = max(DEFAULT_CHUNK_BYTES_ACCELERATOR, sum_bytes if trainable else 0)
    itemsize = (options.chunk_dtype or statistics_dtype(hidden.dtype)).itemsize
    return max(1, _in_steps(budget // (weight.shape[0] * itemsize * buffers), device))


def _in_steps(tokens: int, device: str) -> int:
    """Rounded down to a multiple of the device's step, or of 16; as it is below 16."""
    step = CHUNK_STEP.get(device, CHUNK_STEP_ACCELERATOR)
    step = step if tokens >= step else 16
    return tokens - tokens % step if tokens >= step else tokens


def equal_chunks(count: int, most: int, device: str) -> int:
    """Tokens of a chunk where `count` are cut into the fewest of at most `most`, which are equal but for the step."""
    chunks = -(-count // most) or 1
    step = CHUNK_STEP.get(device, CHUNK_STEP_ACCELERATOR)
    even = -(-count // chunks)
    return max(1, min(most, -(-even // step) * step, count))


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
    chunks = Chunks(engine, problem, (), trainable=needs.weight)
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
    chunks = Chunks(engine, problem, outputs, trainable=needs.weight, whole_groups=groups is not None)
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


def logit_dtype(dtype: torch.dtype, device: torch.device, chunk_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to multiply logits in: the operands' own where the product is float32 all the same, else float32.

    A GPU's product of half-precision operands is. A CPU's is rounded to their dtype on its way out, so that it takes
    float32 operands, unless bfloat16 logits were asked for and the processor has units for them.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
        return dtype
    return dtype if dtype == chunk_dtype and has_bfloat16_units() else torch.float32


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a chunk's gradient and of what it is multiplied with. float16 cannot hold a row's small
    exponentials; a CPU without bfloat16 units multiplies bfloat16 in float32."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16_units():
        return torch.float32
    return dtype


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def float16_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """For float16 operands on a GPU, makes float32 products tf32's: of 11 bits, as float16 has, and float32's range.

    So hidden states and head enter them exactly, and a gradient, which float16 has no room for, is rounded as finely
    as float16 would round it. In full float32 these products take a GPU many times as long.
    """
    if dtype != torch.float16 or device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, with `out` in its own dtype whatever the operands'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, part in _parts_of_product(a, b, out):
            out[rows].copy_(part)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b`, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and out.dtype == torch.float32 and ADDS_NARROW_PRODUCTS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, part in _parts_of_product(a, b, out):
            out[rows].add_(part)


def _parts_of_product(a: Tensor, b: Tensor, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `a @ b`, some at a time: float32 on a GPU, in the operands' dtype on a CPU."""
    wide = a.is_cuda and a.itemsize == 2
    row_bytes = out.shape[1] * (4 if wide else a.itemsize)
    budget = PART_BYTES.get(a.device.type, PART_BYTES_ACCELERATOR)
    for rows in spans(len(out), max(1, budget // max(1, row_bytes))):
        yield rows, torch.mm(a[rows], b, out_dtype=torch.float32) if wide else torch.mm(a[rows], b)


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

    def __init__(
        self,
        engine: RowEngine,
        problem: Problem,
        outputs: tuple[str, ...],
        *,
        trainable: bool = False,
        whole_groups: bool = False,
    ) -> None:
        """`trainable`: as in `chunk_tokens`. `whole_groups`: chunks may be as long as the budget allows."""
        self.engine, self.problem, self.outputs = engine, problem, outputs
        self.device, dtype = problem.hidden.device, problem.hidden.dtype
        self.dtype = statistics_dtype(dtype)
        self.multiplied = logit_dtype(dtype, self.device, problem.chunk_dtype)
        self.operand = operand_dtype(dtype, self.device)
        self.head = RowHead(None if problem.bias is None else problem.bias.to(self.dtype), problem.transform)
        count, buffers = len(problem.targets), engine.buffers(problem)
        most = chunk_tokens(problem.hidden, problem.weight, problem, buffers, trainable=trainable)
        self.tokens = min(most, max(1, count)) if whole_groups else equal_chunks(count, most, self.device.type)
        # Without a softcap the mean logit is linear in the hidden state: no pass over the logits.
        self.linear_mean = problem.transform.softcap is None
        self._heads = {problem.weight.dtype: problem.weight}

    @cached_property
    def buffer(self) -> Tensor:
        """Room for a chunk's logits."""
        dtype = self.problem.chunk_dtype or self.dtype
        stride = row_stride(len(self.problem.weight), dtype, self.device.type)
        return torch.empty(self.tokens * stride, dtype=dtype, device=self.device)

    @cached_property
    def hidden(self) -> Tensor:
        """All hidden states in the dtype of the gradient's products; a copy where that is not their own."""
        return self.problem.hidden.to(self.operand)

    @property
    def weight(self) -> Tensor:
        """The whole head likewise, for products with single rows of it."""
        return self.head_in(self.operand)

    def head_in(self, dtype: torch.dtype) -> Tensor:
        """The whole head in a dtype, kept; a copy where that is not its own."""
        if dtype not in self._heads:
            self._heads[dtype] = self.problem.weight.to(dtype)
        return self._heads[dtype]

    def head_at_hand(self, dtype: torch.dtype) -> Tensor:
        """The head for products with all of it: in that dtype if there is such a copy, else converted by parts."""
        return self._heads.get(dtype, self.problem.weight)

    @cached_property
    def mean_row(self) -> Tensor:
        sums = [part.sum(0) for _, part in parts_in(self.dtype, self.head_at_hand(self.dtype))]
        return torch.stack(sums).sum(0) / len(self.problem.weight)

    def raw(self, rows: slice) -> Tensor:
        """Raw products `[n, V]`, in the buffer."""
        hidden, weight = self.problem.hidden[rows].to(self.multiplied), self.head_at_hand(self.multiplied)
        return products(hidden, weight, self._room(rows))

    def _room(self, rows: slice) -> Tensor:
        return lay_out(self.buffer, rows.stop - rows.start, len(self.problem.weight), self.device.type)

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
        problem = chunks.problem
        # Of hidden states and head the first product overwrites what is there: no zeros are written and read back.
        self.sums = empty_gradients(problem, needs._replace(weight=False), chunks.dtype)
        self.weight_begun = False
        halves = problem.weight.dtype == chunks.operand == torch.bfloat16
        self.one_product = problem.rounds_head and halves and len(problem.targets) <= chunks.tokens
        # The mean logit's gradient is the same for every entry of the vocabulary: summed apart, added once.
        self.mean_weight: Tensor | None = None  # [H]
        self.mean_bias: Tensor | None = None  # []

    def add(self, rows: slice, tile: Tile, upstream: Upstream) -> None:
        """Adds a chunk's part; the tile is used up."""
        chunks = self.chunks
        gradient = chunks.engine.gradient(tile, chunks.head, upstream, chunks.operand)
        self.add_gradient(rows, tile.targets, gradient, upstream)

    def begin(self) -> Gradients:
        """The sums of everything needed, for a caller that makes the products itself; the first is to overwrite."""
        problem, dtype = self.chunks.problem, self.chunks.dtype
        if self.needs.weight and self.sums.weight is None:
            self.sums = self.sums._replace(weight=empty_sum(problem.weight, dtype, len(problem.targets)))
        return self.sums

    def add_gradient(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """The products of a chunk's gradient."""
        with float16_products(self.chunks.problem.hidden.dtype, self.chunks.device):
            if self.sums.hidden is not None:
                self._add_hidden(self.sums.hidden[rows], targets, gradient)
            if self.sums.bias is not None:
                self._add_bias(self.sums.bias, targets, gradient)
            if self.needs.weight and self.one_product and gradient.row_scale is None and upstream.mean_logit is None:
                self.sums = self.sums._replace(weight=self._weight_of(rows, targets, gradient))
            elif self.needs.weight:
                self._add_weight(rows, targets, gradient)
        self.add_mean(rows, upstream)

    def _add_bias(self, out: Tensor, targets: Tensor, gradient: RowGradient) -> None:
        scale = gradient.row_scale if gradient.row_scale is not None else torch.ones_like(gradient.target)
        multiply_add(gradient.matrix.T, scale[:, None].to(gradient.matrix.dtype), out=out[:, None])
        out.index_add_(0, targets, gradient.target)

    def _add_hidden(self, out: Tensor, targets: Tensor, gradient: RowGradient) -> None:
        chunks = self.chunks
        products_with_head(gradient.matrix, chunks.head_at_hand(gradient.matrix.dtype), out)
        if gradient.row_scale is not None:
            out.mul_(gradient.row_scale[:, None])
        out.addcmul_(gradient.target[:, None], chunks.problem.weight[targets].to(out.dtype))

    def _add_weight(self, rows: slice, targets: Tensor, gradient: RowGradient) -> None:
        out = self.begin().weight
        assert out is not None
        hidden = self.chunks.problem.hidden[rows].to(out.dtype)
        scaled = hidden if gradient.row_scale is None else hidden * gradient.row_scale[:, None]
        product = multiply_add if self.weight_begun else multiply
        product(gradient.matrix.T, scaled.to(gradient.matrix.dtype), out=out)
        self.weight_begun = True
        out.index_add_(0, targets, hidden * gradient.target[:, None])

    def _weight_of(self, rows: slice, targets: Tensor, gradient: RowGradient) -> Tensor:
        """The head's gradient by one product, the targets' entries put into the matrix, which nobody reads after it."""
        matrix = gradient.matrix.scatter_(1, targets[:, None], gradient.target[:, None].to(gradient.matrix.dtype))
        return torch.mm(matrix.T, self.chunks.problem.hidden[rows])

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
        """The gradients; zeros where no token came."""
        vocabulary = len(self.chunks.problem.weight)
        sums = self.begin()
        if sums.weight is not None and self.mean_weight is not None:
            sums.weight.add_(self.mean_weight / vocabulary)
        if sums.bias is not None and self.mean_bias is not None:
            sums.bias.add_(self.mean_bias / vocabulary)
        return sums


def concatenate(
    found: Sequence[TokenStats], dtype: torch.dtype, problem: Problem, outputs: tuple[str, ...]
) -> TokenStats:
    """The chunks' statistics as one, also of no chunk at all."""
    names = {"logprob", "lse", *outputs}
    if not found:
        return TokenStats(**{name: torch.empty(0, dtype=dtype, device=problem.hidden.device) for name in names})
    return TokenStats(**{name: torch.cat([getattr(part, name) for part in found]) for name in names})
