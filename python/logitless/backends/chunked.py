"""PyTorch alone: GEMMs over chunks of tokens (`sweep`) and PyTorch's row operations (`rows`), on any device.

Numerics: logits, exponentials and sums are float32 (float64 for float64). A GPU multiplies half-precision operands
into float32 logits (`torch.mm(out_dtype=)`). A CPU has no such product: it multiplies them in float32, converted by
parts. The gradient's two products are bfloat16's where the operands are and the device is fast at it; float16, which
holds no small gradient, has them in float32 on a CPU and in tf32 on a GPU.

`chunk_dtype=torch.bfloat16` rounds a chunk's logits (2^-9 each), as materialised bfloat16 logits are; on a CPU with
bfloat16 units it makes their product several times as fast. Against float64 on 63 tokens of SmolLM2 (docs/log.md):
log-probs off by at most 0.13 nats, their mean by 0.007, gradients by 0.017 with bfloat16 logits; 1e-5, 3e-7 and 0.0017
with float32 ones, where the last is the rounding of the bfloat16 gradient itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import LogitTransform, Options, TokenStats
from . import sweep, tail
from .divergence import rows as divergence_rows
from .divergence import sweep as divergence_sweep
from .problem import (
    Coefficients,
    DivergenceProblem,
    DivergenceResult,
    Forward,
    Gradients,
    Needs,
    Problem,
    Saved,
    SinglePass,
    Upstream,
)
from .rows import ENGINE


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Every device and floating dtype that PyTorch multiplies."""
    return None


def tokens_at_once(hidden: Tensor, weight: Tensor, options: Options) -> int:
    """The longest group that `single_pass` keeps whole."""
    return sweep.chunk_tokens(hidden, weight, options, ENGINE.buffers(options), trainable=weight.requires_grad)


def forward(problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
    """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
    return sweep.forward(ENGINE, problem, outputs, unit_gradient)


def backward(problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
    """Gradients from `upstream`, the chunk's logits computed again."""
    return sweep.backward(ENGINE, problem, stats, upstream, needs)


def single_pass(
    problem: Problem, outputs: tuple[str, ...], coefficients: Coefficients, groups: Tensor | None, needs: Needs
) -> SinglePass:
    """The sum of a loss and its gradients in one sweep."""
    return sweep.single_pass(ENGINE, problem, outputs, coefficients, groups, needs)


def tail_forward(problem: Problem, outputs: tuple[str, ...], tolerance: float) -> tuple[Forward, Saved]:
    """`TokenStats` of every token, and its entries that carry probability."""
    found, kept = tail.forward(ENGINE, problem, outputs, tolerance)
    return found, kept[:4]


def tail_backward(
    problem: Problem, stats: TokenStats, saved: Saved, upstream: Upstream, needs: Needs, tolerance: float
) -> Gradients:
    """Gradients from those entries."""
    return tail.backward(ENGINE, problem, stats, tail.Kept(*saved), upstream, needs, tolerance)


def tail_single_pass(
    problem: Problem,
    outputs: tuple[str, ...],
    coefficients: Coefficients,
    groups: Tensor | None,
    needs: Needs,
    tolerance: float,
) -> SinglePass:
    """As `single_pass`, tail-corrected."""
    return tail.single_pass(ENGINE, problem, outputs, coefficients, groups, needs, tolerance)


def tail_blocks(hidden: Tensor, weight: Tensor, transform: LogitTransform) -> int:
    """Blocks of the vocabulary whose masses `tail_forward` saves."""
    return tail.blocks(weight.shape[0])


def divergence(problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]) -> DivergenceResult:
    """Divergences and, where `upstream` is given, gradients, in one sweep."""
    return divergence_sweep(divergence_rows, problem, upstream, needs)
