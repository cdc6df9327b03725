"""Triton kernels: `kernels/triton/logprobs.py` where logits stay on the chip, `chunk.py` on a chunk of cuBLAS logits.

Forward: one fused kernel, logits in registers. Backward: the gradient of `[tokens, part of the vocabulary]` at a time,
computed from recomputed logits and written once in the dtype of its two products, which are cuBLAS's. Single pass and
unit gradient: `exact.sweep` with this backend's row engine. In numbers of `2 N H V` flops: 1, 3, 3 in all, 2 in all.

Memory: five numbers for each token and split of the vocabulary (forward), `GRADIENT_BYTES` (backward), one chunk of
logits (single pass), and float32 accumulators of the gradients asked for. For float16 operands the recomputing backward
also has float32 copies of the hidden states and of the head.

Tail-corrected: `approximate.blocks`, with `kernels/triton/sparse.py`.

Deterministic: no kernel adds into memory that another program writes to, so there is one path, and it gives the same
bits every time. Two sums have an order that may vary (float32 atomics on a GPU), unless
`torch.use_deterministic_algorithms(True)` asks for one: PyTorch's `index_add_` of the targets' rows into the weight's
gradient, and the hidden states' gradient of a tail-corrected backward.

Numerics: logits, exponentials and sums are float32. float32 operands are multiplied as PyTorch would multiply them
(`torch.set_float32_matmul_precision`): in float32, or in tf32 where that is allowed. float16 holds no small
exponential, so its gradient is float32, and tf32 in its products. No kernel here has run on a GPU yet
(kernels/README.md).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..types import PAIR_BLOCK, DivergenceOptions, Head, TokenStats
from .approximate.blocks import BlockEngine, Routed
from .backend import Backend
from .exact.chunks import Operands, weighted_mean
from .exact.gradients import Accumulators, target_entry
from .exact.products import float16_products, multiply, spans
from .interface import Forward, Gradients, Needs, Problem, RawSide, RowEngine, RowGradient, Tile, Upstream

if TYPE_CHECKING:
    from ..kernels.triton import logprobs

#: Bytes of the recomputing backward's scratch: this, or 1/128 of the bfloat16 logits where that is more.
GRADIENT_BYTES = 16 * 2**20
#: Height of that scratch, in tokens. A taller one means fewer passes over the weight's sums, but a narrower part of the
#: vocabulary within the same bytes, so more passes over the hidden's sums.
GRADIENT_TOKENS = 8192

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Triton(Backend):
    """The backend of Triton's kernels. It overrides the forward and the recomputing backward, which are fused."""

    finishes_gradients = True

    def __init__(self) -> None:
        super().__init__(TritonRows(), divergence_rows=_divergence_rows, blocks=TritonBlocks())

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Takes bfloat16, float16 or float32 tensors on a GPU, and on a CPU in Triton's interpreter."""
        if dtype not in TRITON_DTYPES:
            return f"it takes {[str(dtype) for dtype in TRITON_DTYPES]}, got {dtype}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            old = torch.version.hip is None and capability < (8, 0)
            return f"it takes GPUs of compute capability 8.0 and above, got {capability}" if old else None
        if device.type != "cpu":
            return f"it takes tensors on a GPU, got {device}"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "the tensors are on a CPU, and Triton's interpreter is off (TRITON_INTERPRET=1 before Triton is "
                "imported)"
            )
        return None if _kernels().tile.INTERPRETED.value else "TRITON_INTERPRET was set after Triton had been imported"

    def forward(self, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
        """One fused kernel; a unit gradient, and a task of other rows, want chunks of logits."""
        if unit_gradient or self.row_engine(problem) is not self.rows:
            return super().forward(problem, outputs, unit_gradient)
        return Forward(weighted_mean(problem, measure_blocks(problem, outputs, None)[0]), None)

    def backward(self, problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
        """Gradients from `upstream`: each part of `dL/ds` once, for the products that are needed."""
        if self.row_engine(problem) is not self.rows:
            return super().backward(problem, stats, upstream, needs)
        operands = Operands(problem)
        gradients = Accumulators(operands, needs)
        sums, rows = gradients.begin(), _rows_of_tokens(problem.head, stats, upstream)
        with float16_products(problem.hidden.dtype, problem.hidden.device):
            for tokens, columns, matrix, column_sum in _parts(problem, rows.others, operands.weight.dtype, needs.bias):
                if sums.hidden is not None:
                    multiply(matrix, operands.weight[columns], out=sums.hidden[tokens], add=columns.start > 0)
                if sums.weight is not None:
                    begun = tokens.start > 0 or gradients.weight_begun
                    multiply(matrix.T, operands.hidden[tokens], out=sums.weight[columns], add=begun)
                if sums.bias is not None:
                    sums.bias[columns] += column_sum
        gradients.add_apart(rows.target, upstream)
        return gradients.finish()


def _kernels() -> Any:
    """The modules of `kernels/triton`; importing them imports Triton."""
    from ..kernels import triton
    from ..kernels.triton import chunk, logprobs, sparse, tile  # noqa: F401  attributes of the namespace package

    return triton


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def measure_blocks(problem: Problem, outputs: tuple[str, ...], block: int | None) -> tuple[TokenStats, Tensor | None]:
    """`TokenStats` of every token and the logsumexp of every block of the vocabulary without the target's, in one pass.

    `block`, a power of two, is the width of a block; None: no blocks. The logsumexps are float32
    `[N, ceil(V / block)]`.
    """
    return _kernels().logprobs.fused_forward(
        problem.hidden,
        problem.head.weight,
        _contiguous(problem.head.bias),
        problem.targets.contiguous(),
        transform=problem.head.transform,
        outputs=outputs,
        block=block,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The recomputing backward


def _parts(
    problem: Problem, others: logprobs.RowFactors, operand: torch.dtype, column_sums: bool
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(tokens, columns, their `dL/ds` without the targets' entries, its float32 column sums) in one buffer for all."""
    kernels = _kernels()
    config = kernels.logprobs.gradient_config(problem.hidden, others, problem.head.transform)
    count, vocabulary = len(problem.targets), len(problem.head.weight)
    height = max(1, min(count, GRADIENT_TOKENS))
    width = _width(problem, height, operand.itemsize, config.BLOCK_V)
    buffer = problem.hidden.new_empty(height * width, dtype=operand)
    tiles = -(-height // config.BLOCK_N)
    sums = problem.hidden.new_empty((tiles, width) if column_sums else (0, width), dtype=torch.float32)
    bias, targets = _contiguous(problem.head.bias), problem.targets.contiguous()
    for tokens in spans(count, height):
        taken = kernels.logprobs.RowFactors(*(None if x is None else x[tokens] for x in others))
        out = buffer[: (tokens.stop - tokens.start) * width].view(-1, width)
        partial = sums[: -(-len(out) // config.BLOCK_N)]
        for columns in spans(vocabulary, width):
            kernels.logprobs.gradient_tile(
                problem.hidden[tokens],
                problem.head.weight[columns],
                None if bias is None else bias[columns],
                targets[tokens],
                taken,
                columns.start,
                out,
                transform=problem.head.transform,
                column_sum=partial if column_sums else None,
                config=config,
            )
            used = columns.stop - columns.start
            yield tokens, columns, out[:, :used], partial[:, :used].sum(0)


def scratch_budget(height: int, vocabulary: int, chunk_bytes: int | None) -> int:
    """Bytes for the scratch of so many tokens: the caller's number, or the default."""
    return chunk_bytes or max(GRADIENT_BYTES, height * vocabulary * 2 // 128)


def _width(problem: Problem, height: int, itemsize: int, multiple: int) -> int:
    """Columns of the scratch: what the budget holds, a multiple of the tile's, no more than the vocabulary needs."""
    budget = scratch_budget(height, len(problem.head.weight), problem.chunk_bytes)
    most = -(-len(problem.head.weight) // multiple)
    return multiple * max(1, min(most, budget // (height * itemsize * multiple)))


class _Rows(NamedTuple):
    """Numbers of every token that the gradient's kernels read."""

    others: logprobs.RowFactors  # of the entries other than the target's
    target: Tensor  # [N] dL/ds at the target


def _rows_of_tokens(head: Head, stats: TokenStats, upstream: Upstream) -> _Rows:
    """Eqs. 11 and 12. The target's logit, which a softcap's derivative needs, is logprob + lse."""
    assert stats.logprob is not None and stats.lse is not None
    factor, entropy_grad = upstream.by_probability(stats.lse), upstream.entropy
    if entropy_grad is not None:
        assert stats.entropy is not None
        factor = factor - entropy_grad * stats.entropy
    target, mean_factor = target_entry(stats, upstream), None
    if upstream.mean_logit is not None and head.softcap is not None:
        mean_factor = upstream.mean_logit / len(head.weight)
        target = target + mean_factor
    target = target * head.transform.derivative_at(stats.logprob + stats.lse)
    vectors = (stats.lse, factor, entropy_grad, mean_factor)
    contiguous = (None if x is None else x.float().contiguous() for x in vectors)
    return _Rows(_kernels().logprobs.RowFactors(*contiguous), target)


# ---------------------------------------------------------------------------------------------------------------------
# Engines


class TritonRows(RowEngine):
    """The row engine of `kernels/triton/chunk.py`, on the sweep's buffer."""

    def buffers(self, head: Head, chunk_dtype: torch.dtype | None) -> int:
        return 1 if chunk_dtype is None else 3  # a float32 gradient of 16-bit logits has no room in their place

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        names = tuple(name for name in outputs if name != "mean_logit" or mean_logit is None)
        stats, _ = _kernels().chunk.measure_chunk(
            raw, _contiguous(head.bias), targets.contiguous(), transform=head.transform, outputs=names
        )
        return Tile(raw, targets, stats if mean_logit is None else stats._replace(mean_logit=mean_logit), None)

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        return Tile(raw, targets, stats, None)

    def gradient(self, tile: Tile, head: Head, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        rows = _rows_of_tokens(head, tile.stats, upstream)
        matrix = _kernels().chunk.gradient_(
            tile.logits,
            _contiguous(head.bias),
            tile.targets.contiguous(),
            rows.others,
            transform=head.transform,
            dtype=operand,
        )
        return RowGradient(matrix, None, rows.target)


class TritonBlocks(BlockEngine):
    """The block engine of the fused forward and `kernels/triton/sparse.py`."""

    def takes(self, hidden: Tensor, head: Head) -> bool:
        """Not float16, which cannot hold a small gradient."""
        return hidden.dtype in (torch.bfloat16, torch.float32) and head.softcap is None

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        stats, block_lse = measure_blocks(problem, outputs, PAIR_BLOCK)
        assert block_lse is not None
        return stats, block_lse

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        return Routed(*_kernels().sparse.route(block_lse, lse, magnitude, threshold))

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        _kernels().sparse.listed_gradient(
            problem.hidden,
            problem.head.weight,
            _contiguous(problem.head.bias),
            problem.targets,
            lse,
            factor,
            *routed[:2],
            first,
            count,
            out,
            slope=problem.head.transform.slope,
        )

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        _kernels().sparse.add_weight(gradient, hidden, *routed[:2], first, count, out)

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        ordered = torch.are_deterministic_algorithms_enabled()
        _kernels().sparse.add_hidden(gradient, weight, *routed[:2], first, count, out, ordered=ordered)


def _divergence_rows(
    model: RawSide, ref: RawSide, options: DivergenceOptions, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The divergence engine of Triton's rows on cuBLAS's chunks (why, the kernel's file says)."""
    from ..kernels.triton.divergence import divergence_rows

    return divergence_rows(model, ref, options, upstream)


TRITON = Triton()
