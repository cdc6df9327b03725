"""PyTorch GEMMs over chunks of tokens: `[chunk, V]` logits within a byte budget, on any device.

Forward: one GEMM a chunk, then `rows.statistics_` in place. Backward: the chunk's GEMM again (`backward`), or at once
while its logits are at hand (`single_pass`, and the unit gradient of a frozen head in `forward`), then `rows.gradient_`
and two GEMMs. In numbers of `2 N H V` flops: forward 1, backward 3, single pass 3 in all, frozen head 2 in all.

Memory: one chunk of float32 logits (two under a softcap, or where the entropy is asked for), and float32 accumulators
of the gradients asked for. A head that is multiplied in another dtype than its own is copied once per call.

Numerics: logits, exponentials and sums are float32 (float64 for float64). float16, and bfloat16 on a CPU without
bfloat16 units, is multiplied in float32. A CPU with such units multiplies in bfloat16, several times as fast, and
rounds the chunk's logits on their way out of the GEMM (2^-9 each), as materialised bfloat16 logits are; a GPU does not
(`torch.mm(out_dtype=)`). Against float64 on 63 tokens of SmolLM2 (docs/log.md): log-probs off by at most 0.13 nats,
their mean by 0.007, gradients by 0.017 in bfloat16; 1e-5, 3e-7 and 0.0017 in float32, where the last is the rounding of
the bfloat16 gradient itself.

A CPU keeps the chunk vocabulary-major, `[V, chunk]`: its GEMMs are a fifth to a quarter faster that way round (AVX2,
H 576, V 49152, chunks of 128 to 192 tokens), and no row operation minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..types import Options, TokenStats, statistics_dtype
from . import rows as row_math
from .problem import Coefficients, Forward, Gradients, Needs, Problem, SinglePass, Upstream, empty_gradients

#: Default budget for one chunk's logits. A CPU wants them near its cache, a GPU wants GEMMs that fill it.
DEFAULT_CHUNK_BYTES = {"cpu": 32 * 2**20}
DEFAULT_CHUNK_BYTES_ACCELERATOR = 256 * 2**20


def supports(hidden: Tensor, weight: Tensor) -> str | None:
    """Every device and floating dtype that PyTorch multiplies."""
    return None


def chunk_tokens(hidden: Tensor, weight: Tensor, chunk_bytes: int | None, buffers: int = 1) -> int:
    """Tokens in a chunk: what the budget holds, a multiple of 16 where that leaves any, at least 1."""
    budget = chunk_bytes or DEFAULT_CHUNK_BYTES.get(hidden.device.type, DEFAULT_CHUNK_BYTES_ACCELERATOR)
    tokens = budget // (weight.shape[0] * statistics_dtype(hidden.dtype).itemsize * buffers)
    return max(1, tokens - tokens % 16 if tokens >= 16 else tokens)


def tokens_at_once(hidden: Tensor, weight: Tensor, options: Options) -> int:
    """The longest group that `single_pass` keeps whole, where the loss reads logprob alone."""
    return chunk_tokens(hidden, weight, options.chunk_bytes, 1 if options.softcap is None else 2)


def forward(problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    chunks = _Chunks(problem, outputs)
    unit = _Accumulators(chunks, Needs(hidden=True, weight=False, bias=False)) if unit_gradient else None
    found: list[TokenStats] = []
    for rows in _spans(len(problem.targets), chunks.tokens):
        tile = chunks.tile(rows)
        found.append(tile.stats)
        if unit is not None:
            unit.add(rows, tile, Upstream(logprob=torch.ones_like(tile.log_total)))
        del tile  # a softcap's derivative is as large as the next chunk
    return Forward(_concatenate(found, chunks.dtype, problem, outputs), unit.sums.hidden if unit else None)


def backward(problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`, the chunk's logits computed again."""
    chunks = _Chunks(problem, (), buffers=2 if upstream.entropy is not None else 1)
    gradients = _Accumulators(chunks, needs)
    for rows in _spans(len(problem.targets), chunks.tokens):
        known = TokenStats(*(None if x is None else x[rows] for x in stats))
        gradients.add(rows, chunks.tile(rows)._replace(stats=known), upstream.rows(rows))
    return gradients.finish()


def single_pass(
    problem: Problem,
    outputs: tuple[str, ...],
    coefficients: Coefficients,
    groups: Tensor | None,
    needs: Needs,
) -> SinglePass:
    """The sum of a loss and its gradients in one sweep; `groups [N]`, non-decreasing, are never cut by a chunk."""
    chunks = _Chunks(problem, outputs)
    gradients = _Accumulators(chunks, needs)
    count = len(problem.targets)
    loss = torch.zeros((), dtype=chunks.dtype, device=problem.hidden.device)
    logprob = torch.empty(count, dtype=chunks.dtype, device=problem.hidden.device)
    spans = _spans(count, chunks.tokens) if groups is None else group_spans(groups, chunks.tokens)
    for rows in spans:
        tile = chunks.tile(rows)
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


def _spans(count: int, tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + tokens, count)) for start in range(0, count, tokens))


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to multiply in. float16 cannot hold a row's small exponentials; for bfloat16 see the header."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return dtype


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, with `out` in the statistics' dtype whatever the operands'."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b`, likewise."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b))


class _Chunks:
    """The head's operands and one buffer for a chunk's logits, used again for every chunk."""

    def __init__(self, problem: Problem, outputs: tuple[str, ...], buffers: int = 1) -> None:
        self.problem, self.outputs = problem, outputs
        self.dtype = statistics_dtype(problem.hidden.dtype)
        operand = operand_dtype(problem.hidden.dtype, problem.hidden.device)
        self.hidden, self.weight = problem.hidden.to(operand), problem.weight.to(operand)
        self.bias = None if problem.bias is None else problem.bias.to(self.dtype)
        if problem.transform.softcap is not None or "entropy" in outputs:
            buffers = 2
        self.tokens = min(
            chunk_tokens(problem.hidden, problem.weight, problem.chunk_bytes, buffers), max(1, len(problem.targets))
        )
        self.buffer = torch.empty(self.tokens * self.weight.shape[0], dtype=self.dtype, device=self.hidden.device)
        # Without a softcap the mean logit is linear in the hidden state: no pass over the logits.
        self.linear_mean = problem.transform.softcap is None

    @cached_property
    def mean_row(self) -> Tensor:
        return self.weight.mean(0, dtype=self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """Raw products plus bias, `[n, V]`, in the buffer."""
        vocabulary = self.weight.shape[0]
        hidden = self.hidden[rows]
        flat = self.buffer[: len(hidden) * vocabulary]
        if hidden.device.type == "cpu":
            _multiply(self.weight, hidden.T, out=flat.view(vocabulary, -1))
            z = flat.view(vocabulary, -1).T
        else:
            z = flat.view(-1, vocabulary)
            _multiply(hidden, self.weight.T, out=z)
        return z if self.bias is None else z.add_(self.bias)

    def tile(self, rows: slice) -> row_math.Tile:
        z = self.logits(rows)
        derivative = self.problem.transform.apply_(z, may_be_masked=self.bias is not None)
        mean_logit = self._mean_logit(rows) if self.linear_mean and "mean_logit" in self.outputs else None
        return row_math.statistics_(z, derivative, self.problem.targets[rows], self.outputs, mean_logit)

    def _mean_logit(self, rows: slice) -> Tensor:
        mean = self.hidden[rows].to(self.dtype) @ self.mean_row
        if self.bias is not None:
            mean = mean + self.bias.mean()
        return mean * self.problem.transform.slope


class _Accumulators:
    """Gradient sums in the statistics' dtype, whatever the number of chunks."""

    def __init__(self, chunks: _Chunks, needs: Needs) -> None:
        self.chunks = chunks
        self.sums = empty_gradients(chunks.problem, needs, chunks.dtype)
        # The mean logit's gradient is the same for every entry of the vocabulary: summed apart, added once.
        self.mean_weight: Tensor | None = None  # [H]
        self.mean_bias: Tensor | None = None  # []

    def add(self, rows: slice, tile: row_math.Tile, upstream: Upstream) -> None:
        """Adds a chunk's part; the tile is used up."""
        chunks = self.chunks
        gradient = row_math.gradient_(tile, upstream, chunks.problem.transform)
        mean = upstream.mean_logit if chunks.linear_mean else None
        if mean is not None:
            mean = mean * chunks.problem.transform.slope
        matrix = gradient.matrix.to(chunks.weight.dtype)
        if self.sums.hidden is not None:
            self._add_hidden(self.sums.hidden[rows], tile.targets, matrix, gradient, mean)
        if self.sums.weight is not None:
            self._add_weight(self.sums.weight, rows, tile.targets, matrix, gradient, mean)
        if self.sums.bias is not None:
            scale = gradient.row_scale if gradient.row_scale is not None else torch.ones_like(gradient.target)
            self.sums.bias.addmv_(gradient.matrix.T, scale).index_add_(0, tile.targets, gradient.target)
            if mean is not None:
                self.mean_bias = mean.sum() + (0 if self.mean_bias is None else self.mean_bias)

    def _add_hidden(
        self, out: Tensor, targets: Tensor, matrix: Tensor, gradient: row_math.RowGradient, mean: Tensor | None
    ) -> None:
        chunks = self.chunks
        _multiply(matrix, chunks.weight, out=out)
        if gradient.row_scale is not None:
            out.mul_(gradient.row_scale[:, None])
        out.addcmul_(gradient.target[:, None], chunks.weight[targets].to(out.dtype))
        if mean is not None:
            out.addcmul_(mean[:, None], chunks.mean_row)

    def _add_weight(
        self,
        out: Tensor,
        rows: slice,
        targets: Tensor,
        matrix: Tensor,
        gradient: row_math.RowGradient,
        mean: Tensor | None,
    ) -> None:
        hidden = self.chunks.hidden[rows].to(out.dtype)
        scaled = hidden if gradient.row_scale is None else hidden * gradient.row_scale[:, None]
        _multiply_add(matrix.T, scaled.to(matrix.dtype), out=out)
        out.index_add_(0, targets, hidden * gradient.target[:, None])
        if mean is not None:
            self.mean_weight = hidden.T @ mean + (0 if self.mean_weight is None else self.mean_weight)

    def finish(self) -> Gradients:
        vocabulary = self.chunks.weight.shape[0]
        if self.sums.weight is not None and self.mean_weight is not None:
            self.sums.weight.add_(self.mean_weight / vocabulary)
        if self.sums.bias is not None and self.mean_bias is not None:
            self.sums.bias.add_(self.mean_bias / vocabulary)
        return self.sums


def _concatenate(
    found: Sequence[TokenStats], dtype: torch.dtype, problem: Problem, outputs: tuple[str, ...]
) -> TokenStats:
    """The chunks' statistics as one, also of no chunk at all."""
    names = {"logprob", "lse", *outputs}
    if not found:
        return TokenStats(**{name: torch.empty(0, dtype=dtype, device=problem.hidden.device) for name in names})
    return TokenStats(**{name: torch.cat([getattr(part, name) for part in found]) for name in names})
