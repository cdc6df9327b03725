"""A row engine in PyTorch operations, on any device: logits to statistics, exponentials to gradients.

With m_i the largest logit of row i and t its target,

    e_ij = exp(z_ij - m_i) for j != t, and 0 at the target        (replaces z)
    o_i  = log sum_j e_ij                                         (the others), d_i = z_it - m_i (the target)
    logprob = -log(1 + exp(o - d)),  lse = m + log_total,  log_total = log(exp(o) + exp(d))

so a confident token keeps all its digits, and the gradient of the logits needs no second exponential:

    dz_ij = e_ij exp(-log_total_i) (b - a - e (log p_ij + entropy_i)) + m_i / V          for j != t
    dz_it = -a expm1(logprob) + b p_t - e p_t (logprob + entropy) + m / V                (added apart, never as p - 1)

for upstream gradients a (logprob), b (lse), e (entropy) and m (mean_logit), one number a row. Where logits have weights
w, mean_logit is `mean_j w_j z_j`, and m / V becomes m w_j / V. Without entropy and
softcap the bracket is one number a row too, and is left to the products (`row_scale`): the exponentials are the
gradient as they stand. kernels/MATH.md derives each line. On a CPU neither e nor the gradient has denormal entries
(`denormals`): they are 0, and so is the logprob of a token whose others are all below the cut.

Row operations take a part of the vocabulary at a time, which stays in a core's cache from one operation to the next; a
temporary is as large as that part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...types import Head, TokenStats
from ..interface import RowEngine, RowGradient, Tile, Upstream
from .denormals import drop_denormals_, exponential
from .gradients import target_entry
from .products import spans

#: Bytes of the part of a chunk that row operations take at a time.
PIECE_BYTES = {"cpu": 2**20}
PIECE_BYTES_ACCELERATOR = 64 * 2**20

#: Stands for `log 0` where it is multiplied by 0: below the logarithm of every positive number, which is -745 or more.
LOG_OF_ZERO = -1000.0


class _Exponentials(NamedTuple):
    """A tile's private part: what a gradient needs besides the exponentials."""

    log_total: Tensor  # [n]
    derivative: Tensor | None  # [n, V] dz / d(raw product) under a softcap, else None


class TorchRows(RowEngine):
    """The row engine of PyTorch operations.

    Args:
        logit_weight: `[V]` weights of the mean logit under a softcap, in the statistics' dtype; None: 1 for each.
    """

    def __init__(self, logit_weight: Tensor | None = None) -> None:
        self.logit_weight = logit_weight

    def buffers(self, head: Head, chunk_dtype: torch.dtype | None) -> int:
        return 2 if head.softcap is not None or chunk_dtype is not None else 1

    def measure(
        self, raw: Tensor, head: Head, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        z = raw if raw.dtype not in (torch.bfloat16, torch.float16) else raw.float()
        if head.bias is not None:
            z.add_(head.bias)
        derivative = head.transform.apply_(z, may_be_masked=head.bias is not None)
        if mean_logit is None and "mean_logit" in outputs:
            mean_logit = z.mean(-1) if self.logit_weight is None else z @ (self.logit_weight / z.shape[1])
        return _statistics(z, derivative, targets, outputs, mean_logit)

    def recall(self, raw: Tensor, head: Head, targets: Tensor, stats: TokenStats) -> Tile:
        return self.measure(raw, head, targets, (), None)._replace(stats=stats)

    def gradient(self, tile: Tile, head: Head, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        result = _row_gradient(tile, head, upstream, self.logit_weight)
        return result._replace(matrix=result.matrix.to(operand))


def _statistics(
    z: Tensor, derivative: Tensor | None, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
) -> Tile:
    """Replaces the logits `z [n, V]` by their exponentials; logprob and lse always, the rest where asked for."""
    column = targets[:, None]
    target = z.gather(1, column)[:, 0]
    top = z.amax(-1, keepdim=True)
    z.scatter_(1, column, -math.inf)
    sums = torch.stack([_exponentials_(z[:, columns], top, outputs) for columns in _pieces(z)]).sum(0)
    moments = (top[:, 0], sums[0].log(), sums[1], sums[2])
    return statistics_of(z, targets, outputs, target, *moments, mean_logit, derivative)


def statistics_of(
    logits: Tensor,
    targets: Tensor,
    outputs: tuple[str, ...],
    target: Tensor,
    top: Tensor,
    others: Tensor,
    weighted: Tensor,
    squares: Tensor,
    mean_logit: Tensor | None,
    derivative: Tensor | None = None,
) -> Tile:
    """A tile from its exponentials, relative to `top [n]`, and their sums.

    `target [n]`: its logit. Over the entries other than the target, `[n]`: `others` the logarithm of the sum of `e`,
    `weighted` the sum of `e log e`, `squares` of `e^2`; either of the last two is 0 where it is not needed.
    """
    d = target - top
    log_total = torch.logaddexp(others, d)
    zero = torch.zeros_like(d)
    stats = {"logprob": zero - torch.logaddexp(others - d, zero), "lse": top + log_total}  # not -0.0
    if mean_logit is not None:
        stats["mean_logit"] = mean_logit
    if "entropy" in outputs:
        # log p_ij = log e_ij - log_total
        weighted = weighted + d.exp() * d.clamp(min=LOG_OF_ZERO)
        stats["entropy"] = log_total - weighted * (-log_total).exp()
    if "correct" in outputs:
        stats["correct"] = (d >= 0).to(top.dtype)
    if "log_sum_sq" in outputs:
        stats["log_sum_sq"] = (squares + (2 * d).exp()).log() - 2 * log_total
    return Tile(logits, targets, TokenStats(**stats), _Exponentials(log_total, derivative))


def _pieces(chunk: Tensor) -> Iterator[slice]:
    """The columns that are taken at a time."""
    budget = PIECE_BYTES.get(chunk.device.type, PIECE_BYTES_ACCELERATOR)
    return spans(chunk.shape[1], max(1, budget // (len(chunk) * chunk.itemsize)))


def _exponentials_(z: Tensor, top: Tensor, outputs: tuple[str, ...]) -> Tensor:
    """Replaces logits by `e`; returns the sums of `e`, `e log e` and `e^2`, `[3, n]`, 0 for those not needed."""
    z.sub_(top)
    logarithm = z.clamp(min=LOG_OF_ZERO) if "entropy" in outputs else None
    total = exponential(z, inplace=True).sum(-1)
    none = torch.zeros_like(total)
    weighted = none if logarithm is None else logarithm.mul_(z).sum(-1)
    squares = torch.linalg.vector_norm(z, dim=-1).square() if "log_sum_sq" in outputs else none
    return torch.stack([total, weighted, squares])


def _row_gradient(tile: Tile, head: Head, upstream: Upstream, logit_weight: Tensor | None) -> RowGradient:
    """Turns the exponentials into the gradient."""
    entropy_grad, mean_grad = upstream.entropy, upstream.mean_logit
    stats, slope = tile.stats, head.transform.slope
    log_total, derivative = tile.private
    target, factor = target_entry(stats, upstream), upstream.by_probability(log_total)
    if entropy_grad is not None:
        assert stats.entropy is not None
        factor = factor - entropy_grad * (stats.entropy - log_total)
    total = log_total.exp()
    if derivative is None:
        target = target * slope
    else:
        target = target * derivative.gather(1, tile.targets[:, None])[:, 0]
    if entropy_grad is None and derivative is None:
        return RowGradient(tile.logits, drop_denormals_(factor / total * slope), target)
    e, entropy_factor = tile.logits, None if entropy_grad is None else entropy_grad / total
    even = None if mean_grad is None or derivative is None else mean_grad / e.shape[1]
    for columns in _pieces(e):
        piece = _bend_(e[:, columns], factor / total, entropy_factor)
        if even is not None:
            piece.add_(even[:, None]) if logit_weight is None else piece.addr_(even, logit_weight[columns])
        if derivative is not None:
            piece.mul_(derivative[:, columns])
        # After the products, because what multiplies an exponential may be any small number.
        drop_denormals_(piece)
    return RowGradient(e, torch.full_like(total, slope) if derivative is None else None, target)


def _bend_(e: Tensor, factor: Tensor, entropy_factor: Tensor | None) -> Tensor:
    """`e_ij (factor_i - entropy_factor_i log e_ij)` in place."""
    factor = factor[:, None]
    if entropy_factor is None:
        return e.mul_(factor)
    logarithm = e.clamp(min=torch.finfo(e.dtype).tiny).log_()  # of 0 any number: the product is 0
    return e.mul_(torch.addcmul(factor, logarithm, entropy_factor[:, None], value=-1, out=logarithm))
