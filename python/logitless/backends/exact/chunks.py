"""Chunks of tokens whose logits exist at once: how many tokens one has, its operands, and the buffer for its logits.

Memory: one chunk of logits (as many more as the row engine says). A head that is multiplied in another dtype than its
own is converted by parts, again for each product with it: 3% of a step's time (bfloat16 in float32, H 576, V 49152,
chunks of 160 tokens), where a copy would be H / N of the logits.

The rule for a chunk's size on a GPU, with its arithmetic, is in docs/chunks.md.

A CPU keeps the chunk vocabulary-major, `[V, chunk]`: its GEMMs are a fifth to a quarter faster that way round (AVX2,
H 576, V 49152, chunks of 128 to 192 tokens), and no row operation minds.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ...types import Head, Options, TokenStats, statistics_dtype
from ..interface import Problem, RowEngine, RowGradient, Tile, Upstream
from .products import logit_dtype, mean_row, operand_dtype, raw_products

#: Default budget for one chunk's logits. A CPU wants them near its cache, a GPU wants GEMMs that fill it; there a
#: trainable head raises it to the bytes of its float32 gradient (`chunk_tokens`).
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20}
DEFAULT_CHUNK_BYTES_ACCELERATOR = 256 * 2**20

#: A chunk's tokens are a multiple of this. On a GPU it is the height of a GEMM's tile: a part of one costs as much.
CHUNK_STEP = {"cpu": 16}
CHUNK_STEP_ACCELERATOR = 128


# ---------------------------------------------------------------------------------------------------------------------
# How large


def chunk_budget(chunk_bytes: int | None, device: str) -> int:
    """Bytes for a chunk: the caller's number, or the device's default."""
    return chunk_bytes or DEFAULT_CHUNK_BYTES.get(device, DEFAULT_CHUNK_BYTES_ACCELERATOR)


def chunk_tokens(
    hidden: Tensor, weight: Tensor, options: Options | Problem, buffers: int = 1, *, trainable: bool = False
) -> int:
    """The most tokens in a chunk: what the budget holds, in whole steps where it holds one, at least 1.

    `trainable`: the head's gradient is summed over the chunks, and reads and writes that sum with each of them. By
    default a chunk may then be as large as the sum on a GPU, which takes H tokens.
    """
    device = hidden.device.type
    budget = chunk_budget(options.chunk_bytes, device)
    if trainable and options.chunk_bytes is None and device not in DEFAULT_CHUNK_BYTES:
        budget = max(budget, weight.numel() * statistics_dtype(weight.dtype).itemsize)
    return max(1, _in_steps(budget // token_bytes(hidden, weight, options, buffers), device))


def token_bytes(hidden: Tensor, weight: Tensor, options: Options | Problem, buffers: int = 1) -> int:
    """Bytes of the budget for each token of a chunk."""
    itemsize = (options.chunk_dtype or statistics_dtype(hidden.dtype)).itemsize
    return weight.shape[0] * itemsize * buffers


def _in_steps(tokens: int, device: str) -> int:
    """`tokens`, rounded down to a multiple of the device's step, or of 16; unchanged below 16."""
    step = CHUNK_STEP.get(device, CHUNK_STEP_ACCELERATOR)
    step = step if tokens >= step else 16
    return tokens - tokens % step if tokens >= step else tokens


def equal_chunks(count: int, most: int, device: str) -> int:
    """Tokens in each of the fewest chunks of at most `most` that hold `count`; they are equal but for the step."""
    chunks = -(-count // most) or 1
    step = CHUNK_STEP.get(device, CHUNK_STEP_ACCELERATOR)
    even = -(-count // chunks)
    return max(1, min(most, -(-even // step) * step, count))


def row_stride(vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Elements of a chunk's buffer for each token: whole vectors of 16 bytes where a GPU's kernels read rows."""
    step = 1 if device_type == "cpu" else 16 // dtype.itemsize
    return -(-vocabulary // step) * step


def lay_out(buffer: Tensor, count: int, vocabulary: int, device_type: str) -> Tensor:
    """`[count, V]` in a flat buffer, as the device likes it: vocabulary-major, or rows one after the other."""
    stride = row_stride(vocabulary, buffer.dtype, device_type)
    flat = buffer[: count * stride]
    return flat.view(vocabulary, count).T if device_type == "cpu" else flat.view(count, stride)[:, :vocabulary]


# ---------------------------------------------------------------------------------------------------------------------
# What is multiplied


class Operands:
    """The hidden states and the head of a call, in the dtypes that its products want."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.device, dtype = problem, problem.hidden.device, problem.hidden.dtype
        self.dtype = statistics_dtype(dtype)
        self.multiplied = logit_dtype(dtype, self.device, problem.chunk_dtype)
        self.operand = operand_dtype(dtype, self.device)
        self.head = in_dtype(problem.head, self.dtype)
        self.transform = problem.head.transform
        # Without a softcap the mean logit is linear in the hidden state: no pass over the logits.
        self.linear_mean = self.transform.softcap is None
        self._heads = {problem.head.weight.dtype: problem.head.weight}

    @cached_property
    def hidden(self) -> Tensor:
        """All hidden states in the dtype of the gradient's products; a copy if that is not their own."""
        return self.problem.hidden.to(self.operand)

    @property
    def weight(self) -> Tensor:
        """The whole head in the dtype of the gradient's products, for products with single rows of it."""
        return self.head_in(self.operand)

    def head_in(self, dtype: torch.dtype) -> Tensor:
        """The whole head in a dtype, kept; a copy if that is not its own."""
        if dtype not in self._heads:
            self._heads[dtype] = self.problem.head.weight.to(dtype)
        return self._heads[dtype]

    def head_at_hand(self, dtype: torch.dtype) -> Tensor:
        """The head for products with all of it: in that dtype if there is such a copy, else as it is."""
        return self._heads.get(dtype, self.problem.head.weight)

    @cached_property
    def mean_row(self) -> Tensor:
        """`[H]`, the mean of the head's rows, each times its logit's weight."""
        return mean_row(self.head_at_hand(self.dtype), self.problem.logit_weight, self.dtype)

    def mean_logit(self, rows: slice) -> Tensor:
        """`[n]`, the mean logits of some tokens, without a softcap."""
        mean = self.problem.hidden[rows].to(self.dtype) @ self.mean_row
        if self.head.bias is not None:
            weight = self.problem.logit_weight
            mean = mean + (self.head.bias if weight is None else self.head.bias * weight).mean()
        return mean * self.transform.slope


def weighted_mean(problem: Problem, stats: TokenStats) -> TokenStats:
    """Statistics of a fused kernel, whose mean logit has no weights, with the weighted one, without a softcap."""
    if problem.logit_weight is None or stats.mean_logit is None:
        return stats
    return stats._replace(mean_logit=Operands(problem).mean_logit(slice(None)))


def in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """The head as a row engine gets it: the bias in the statistics' dtype."""
    return head._replace(bias=None if head.bias is None else head.bias.to(dtype))


class Chunks(Operands):
    """A call cut into chunks, with one buffer for a chunk's logits that is used again for every chunk."""

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
        super().__init__(problem)
        self.engine, self.outputs = engine, outputs
        count, buffers = len(problem.targets), engine.buffers(problem.head, problem.chunk_dtype)
        most = chunk_tokens(problem.hidden, problem.head.weight, problem, buffers, trainable=trainable)
        self.tokens = min(most, max(1, count)) if whole_groups else equal_chunks(count, most, self.device.type)

    @cached_property
    def buffer(self) -> Tensor:
        """Room for a chunk's logits."""
        dtype = self.problem.chunk_dtype or self.dtype
        stride = row_stride(len(self.problem.head.weight), dtype, self.device.type)
        return torch.empty(self.tokens * stride, dtype=dtype, device=self.device)

    def raw(self, rows: slice) -> Tensor:
        """Raw products `[n, V]`, in the buffer."""
        hidden, weight = self.problem.hidden[rows].to(self.multiplied), self.head_at_hand(self.multiplied)
        return raw_products(hidden, weight, self._room(rows))

    def _room(self, rows: slice) -> Tensor:
        return lay_out(self.buffer, rows.stop - rows.start, len(self.problem.head.weight), self.device.type)

    def measure(self, rows: slice) -> Tile:
        """A chunk's products and their statistics."""
        mean_logit = self.mean_logit(rows) if self.linear_mean and "mean_logit" in self.outputs else None
        hidden, targets = self.problem.hidden[rows], self.problem.targets[rows]
        tile = self.engine.project(hidden, self._room(rows), self.head, targets, self.outputs, mean_logit)
        if tile is not None:
            return tile
        return self.engine.measure(self.raw(rows), self.head, targets, self.outputs, mean_logit)

    def recall(self, rows: slice, stats: TokenStats) -> Tile:
        """A chunk's products once more, where their statistics are known."""
        return self.engine.recall(self.raw(rows), self.head, self.problem.targets[rows], stats)

    def gradient(self, tile: Tile, upstream: Upstream) -> RowGradient:
        """The gradient of a chunk's products; the tile is used up."""
        return self.engine.gradient(tile, self.head, upstream, self.operand)
