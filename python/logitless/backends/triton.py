"""Triton kernels: `kernels/triton/logprobs.py` where logits stay on the chip, `chunk.py` on a chunk of cuBLAS logits.

Forward: one fused kernel, logits in registers. Backward: the gradient of `[tokens, part of the vocabulary]` at a time,
computed from recomputed logits and written once in the dtype of its two products, which are cuBLAS's. Single pass and
unit gradient: `sweep` with this backend's row engine. In numbers of `2 N H V` flops: 1, 3, 3 in all, 2 in all.

Memory: five numbers for each token and split of the vocabulary (forward), `GRADIENT_BYTES` (backward), one chunk of
logits (single pass), and float32 accumulators of the gradients asked for.

Tail-corrected: `blocks`, with `kernels/triton/sparse.py`.

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
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..types import LogitTransform, Options, TokenStats
from . import blocks, sweep
from .blocks import Routed
from .divergence import sweep as divergence_sweep
from .problem import (
    Coefficients,
    DivergenceProblem,
    DivergenceResult,
    Forward,
    Gradients,
    Needs,
    Problem,
    SinglePass,
    Upstream,
)
from .rows import target_entry
from .sweep import RowEngine, RowGradient, RowHead, Tile

if TYPE_CHECKING:
    from ..kernels.triton import logprobs

#: Of the recomputing backward's scratch: this, or 1/128 of the bfloat16 logits where that is more.
GRADIENT_BYTES = 16 * 2**20
#: Tokens that the backward takes together: more of them read and write the weight's sums less often, and leave a
#: narrower part of the vocabulary within the scratch, so that the hidden's sums are read and written more often.
GRADIENT_TOKENS = 8192
#: Tokens whose targets' rows are gathered at once, in float32.
APART_TOKENS = 1024

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """GPU tensors, bfloat16, float16 or float32; CPU tensors in Triton's interpreter."""
    if dtype not in DTYPES:
        return f"it takes {[str(dtype) for dtype in DTYPES]}, got {dtype}"
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
            "the tensors are on a CPU, and Triton's interpreter is off (TRITON_INTERPRET=1 before Triton is imported)"
        )
    return None if _kernels().tile.INTERPRETED.value else "TRITON_INTERPRET was set after Triton had been imported"


def tokens_at_once(hidden: Tensor, weight: Tensor, options: Options) -> int:
    """The longest group that `single_pass` keeps whole."""
    if options.tail is not None and TAIL.takes(hidden, weight, options.transform):
        return sys.maxsize
    return sweep.chunk_tokens(hidden, weight, options, ENGINE.buffers(options), trainable=weight.requires_grad)


def forward(problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    if unit_gradient:
        return sweep.forward(ENGINE, problem, outputs, unit_gradient)
    return Forward(measure_blocks(problem, outputs, None)[0], None)


def measure_blocks(problem: Problem, outputs: tuple[str, ...], block: int | None) -> tuple[TokenStats, Tensor | None]:
    """`TokenStats` of every token and the logsumexp of every block of `block` vocabulary entries without the target's,
    float32 `[N, ceil(V / block)]`, from the same pass; `block` is a power of two."""
    return _kernels().logprobs.fused_forward(
        problem.hidden,
        problem.weight,
        _contiguous(problem.bias),
        problem.targets.contiguous(),
        transform=problem.transform,
        outputs=outputs,
        block=block,
    )


def backward(problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`: each part of `dL/ds` once, for the products that are needed."""
    chunks = sweep.Chunks(ENGINE, replace(problem, chunk_bytes=1), ())  # for its operands: no chunk is made
    gradients = sweep.Accumulators(chunks, needs)
    sums, rows = gradients.begin(), _rows(problem, problem.weight.shape[0], stats, upstream)
    with sweep.float16_products(problem.hidden.dtype, problem.hidden.device):
        for tokens, columns, matrix, column_sum in _parts(problem, rows.others, chunks.weight.dtype, needs.bias):
            if sums.hidden is not None:
                product = sweep.multiply_add if columns.start else sweep.multiply
                product(matrix, chunks.weight[columns], out=sums.hidden[tokens])
            if sums.weight is not None:
                product = sweep.multiply_add if tokens.start else sweep.multiply
                product(matrix.T, chunks.hidden[tokens], out=sums.weight[columns])
            if sums.bias is not None:
                sums.bias[columns] += column_sum
    for tokens in sweep.spans(len(problem.targets), APART_TOKENS):
        _add_targets(chunks, tokens, rows.target[tokens], sums)
        gradients.add_mean(tokens, upstream.rows(tokens))
    return gradients.finish()


def single_pass(
    problem: Problem, outputs: tuple[str, ...], coefficients: Coefficients, groups: Tensor | None, needs: Needs
) -> SinglePass:
    """The sum of a loss and its gradients in one sweep."""
    return sweep.single_pass(ENGINE, problem, outputs, coefficients, groups, needs)


def _kernels() -> Any:
    """The modules of `kernels/triton`; importing them imports Triton."""
    from ..kernels import triton
    from ..kernels.triton import chunk, logprobs, sparse, tile  # noqa: F401  attributes of the namespace package

    return triton


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# The recomputing backward


def _parts(
    problem: Problem, others: logprobs.RowFactors, operand: torch.dtype, column_sums: bool
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """(tokens, columns, their `dL/ds` without the targets' entries, its float32 column sums) in one buffer for all."""
    kernels = _kernels()
    config = kernels.logprobs.gradient_config(problem.hidden, others, problem.transform)
    count, vocabulary = len(problem.targets), problem.weight.shape[0]
    height = max(1, min(count, GRADIENT_TOKENS))
    width = _width(problem, height, operand.itemsize, config.BLOCK_V)
    buffer = problem.hidden.new_empty(height * width, dtype=operand)
    tiles = -(-height // config.BLOCK_N)
    sums = problem.hidden.new_empty((tiles, width) if column_sums else (0, width), dtype=torch.float32)
    bias, targets = _contiguous(problem.bias), problem.targets.contiguous()
    for tokens in sweep.spans(count, height):
        taken = kernels.logprobs.RowFactors(*(None if x is None else x[tokens] for x in others))
        out = buffer[: (tokens.stop - tokens.start) * width].view(-1, width)
        partial = sums[: -(-len(out) // config.BLOCK_N)]
        for columns in sweep.spans(vocabulary, width):
            kernels.logprobs.gradient_tile(
                problem.hidden[tokens],
                problem.weight[columns],
                None if bias is None else bias[columns],
                targets[tokens],
                taken,
                columns.start,
                out,
                transform=problem.transform,
                column_sum=partial if column_sums else None,
                config=config,
            )
            used = columns.stop - columns.start
            yield tokens, columns, out[:, :used], partial[:, :used].sum(0)


def _width(problem: Problem, height: int, itemsize: int, multiple: int) -> int:
    """Columns of the scratch: what the budget holds, a multiple of the tile's, no more than the vocabulary needs."""
    logits = height * problem.weight.shape[0] * 2
    budget = problem.chunk_bytes or max(GRADIENT_BYTES, logits // 128)
    most = -(-problem.weight.shape[0] // multiple)
    return multiple * max(1, min(most, budget // (height * itemsize * multiple)))


class _Rows(NamedTuple):
    """Numbers of every token that its gradient takes."""

    others: logprobs.RowFactors  # of the entries other than the target's
    target: Tensor  # [N] dL/ds at the target


def _rows(head: Problem | RowHead, vocabulary: int, stats: TokenStats, upstream: Upstream) -> _Rows:
    """Eqs. 11 and 12. The target's logit, which a softcap's derivative needs, is logprob + lse."""
    a, b, entropy_grad, mean_grad = upstream
    assert stats.logprob is not None and stats.lse is not None
    zero = torch.zeros_like(stats.lse)
    factor = (zero if b is None else b) - (zero if a is None else a)
    if entropy_grad is not None:
        assert stats.entropy is not None
        factor = factor - entropy_grad * stats.entropy
    target, mean_factor = target_entry(stats, upstream), None
    if mean_grad is not None and head.transform.softcap is not None:
        mean_factor = mean_grad / vocabulary
        target = target + mean_factor
    target = target * head.transform.derivative_at(stats.logprob + stats.lse)
    vectors = (stats.lse, factor, entropy_grad, mean_factor)
    contiguous = (None if x is None else x.float().contiguous() for x in vectors)
    return _Rows(_kernels().logprobs.RowFactors(*contiguous), target)


def _add_targets(chunks: sweep.Chunks, tokens: slice, target: Tensor, sums: Gradients) -> None:
    """The targets' entries, which are 0 in the matrices."""
    targets = chunks.problem.targets[tokens]
    if sums.hidden is not None:
        sums.hidden[tokens].addcmul_(target[:, None], chunks.weight[targets].float())
    if sums.weight is not None:
        sums.weight.index_add_(0, targets, chunks.hidden[tokens].float() * target[:, None])
    if sums.bias is not None:
        sums.bias.index_add_(0, targets, target)


# ---------------------------------------------------------------------------------------------------------------------
# The row engine of sweeps


class _Engine(RowEngine):
    """See `sweep.RowEngine`: `kernels/triton/chunk.py` on the sweep's buffer."""

    def buffers(self, problem: Problem | Options) -> int:
        return 1 if problem.chunk_dtype is None else 3  # a float32 gradient of 16-bit logits has no room in their place

    def measure(
        self, raw: Tensor, head: RowHead, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        names = tuple(name for name in outputs if name != "mean_logit" or mean_logit is None)
        stats, _ = _kernels().chunk.measure_chunk(
            raw, _contiguous(head.bias), targets.contiguous(), transform=head.transform, outputs=names
        )
        return Tile(raw, targets, stats if mean_logit is None else stats._replace(mean_logit=mean_logit), None)

    def recall(self, raw: Tensor, head: RowHead, targets: Tensor, stats: TokenStats) -> Tile:
        return Tile(raw, targets, stats, None)

    def gradient(self, tile: Tile, head: RowHead, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        rows = _rows(head, tile.logits.shape[1], tile.stats, upstream)
        matrix = _kernels().chunk.gradient_(
            tile.logits,
            _contiguous(head.bias),
            tile.targets.contiguous(),
            rows.others,
            transform=head.transform,
            dtype=operand,
        )
        return RowGradient(matrix, None, rows.target)


ENGINE = _Engine()


# ---------------------------------------------------------------------------------------------------------------------
# The tail-corrected backward


class _Blocks:
    """See `blocks.BlockEngine`: the fused forward and `kernels/triton/sparse.py`."""

    def takes(self, hidden: Tensor, weight: Tensor, transform: LogitTransform) -> bool:
        """Not float16, which cannot hold a small gradient."""
        return hidden.dtype in (torch.bfloat16, torch.float32) and transform.softcap is None

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        stats, block_lse = measure_blocks(problem, outputs, blocks.BLOCK)
        assert block_lse is not None
        return stats, block_lse

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        return Routed(*_kernels().sparse.route(block_lse, lse, magnitude, threshold))

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        _kernels().sparse.listed_gradient(
            problem.hidden,
            problem.weight,
            _contiguous(problem.bias),
            problem.targets,
            lse,
            factor,
            *routed[:2],
            first,
            count,
            out,
            slope=problem.transform.slope,
        )

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        _kernels().sparse.add_weight(gradient, hidden, *routed[:2], first, count, out)

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        ordered = torch.are_deterministic_algorithms_enabled()
        _kernels().sparse.add_hidden(gradient, weight, *routed[:2], first, count, out, ordered=ordered)


TAIL = blocks.Tail(_Blocks(), ENGINE, backward)
tail_forward, tail_backward, tail_single_pass, tail_blocks = TAIL.forward, TAIL.backward, TAIL.single_pass, TAIL.blocks


# ---------------------------------------------------------------------------------------------------------------------
# Divergences


def divergence(problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]) -> DivergenceResult:
    """Divergences and, where `upstream` is given, gradients: cuBLAS's chunks, Triton's rows (why, its file says)."""
    from ..kernels.triton.divergence import divergence_rows

    return divergence_sweep(divergence_rows, problem, upstream, needs)
