"""The row engine of the chunked backend, in PyTorch operations: logits to statistics, exponentials to gradients.

With m_i the largest logit of row i and t its target,

    e_ij = exp(z_ij - m_i) for j != t, and 0 at the target        (replaces z)
    o_i  = log sum_j e_ij                                         (the others), d_i = z_it - m_i (the target)
    logprob = -log(1 + exp(o - d)),  lse = m + log_total,  log_total = log(exp(o) + exp(d))

so a confident token keeps all its digits, and the gradient of the logits needs no second exponential:

    dz_ij = e_ij exp(-log_total_i) (b - a - e (log p_ij + entropy_i)) + m_i / V          for j != t
    dz_it = -a expm1(logprob) + b p_t - e p_t (logprob + entropy) + m / V                (added apart, never as p - 1)

for upstream gradients a (logprob), b (lse), e (entropy) and m (mean_logit), one number a row. Without entropy and
softcap the bracket is one number a row too, and is left to the products (`row_scale`): the exponentials are the
gradient as they stand. kernels/README.md derives each line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Options, TokenStats
from .problem import Problem, Upstream
from .sweep import RowGradient, RowHead, Tile


class _Exponentials(NamedTuple):
    """What `measure` leaves behind beside the exponentials."""

    log_total: Tensor  # [n]
    derivative: Tensor | None  # [n, V] dz / d(raw product) under a softcap, else None


class _Engine:
    """See `sweep.RowEngine`."""

    def buffers(self, problem: Problem | Options, outputs: tuple[str, ...], entropy_gradient: bool) -> int:
        softcap = problem.transform.softcap is not None
        return 2 if softcap or entropy_gradient or "entropy" in outputs or problem.chunk_dtype is not None else 1

    def measure(
        self, raw: Tensor, head: RowHead, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
    ) -> Tile:
        z = raw if raw.dtype not in (torch.bfloat16, torch.float16) else raw.float()
        if head.bias is not None:
            z.add_(head.bias)
        derivative = head.transform.apply_(z, may_be_masked=head.bias is not None)
        return _statistics(z, derivative, targets, outputs, mean_logit)

    def recall(self, raw: Tensor, head: RowHead, targets: Tensor, stats: TokenStats) -> Tile:
        return self.measure(raw, head, targets, (), None)._replace(stats=stats)

    def gradient(self, tile: Tile, head: RowHead, upstream: Upstream, operand: torch.dtype) -> RowGradient:
        found = _gradient(tile, head, upstream)
        return found._replace(matrix=found.matrix.to(operand))


ENGINE = _Engine()


def _statistics(
    z: Tensor, derivative: Tensor | None, targets: Tensor, outputs: tuple[str, ...], mean_logit: Tensor | None
) -> Tile:
    """Replaces the logits `z [n, V]` by their exponentials; logprob and lse always, the rest where asked for."""
    column = targets[:, None]
    target = z.gather(1, column)
    if mean_logit is None and "mean_logit" in outputs:
        mean_logit = z.mean(-1)
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp_().scatter_(1, column, 0)
    others, d, top = e.sum(-1).log_(), (target - top)[:, 0], top[:, 0]
    log_total = torch.logaddexp(others, d)
    found = {"logprob": -torch.logaddexp(others - d, torch.zeros_like(d)), "lse": top + log_total}
    if mean_logit is not None:
        found["mean_logit"] = mean_logit
    if "entropy" in outputs:
        # log p_ij = log e_ij - log_total
        weighted = _times_log(e).sum(-1) + _times_log(d.exp())
        found["entropy"] = log_total - weighted * (-log_total).exp()
    if "correct" in outputs:
        found["correct"] = (d >= 0).to(z.dtype)
    if "log_sum_sq" in outputs:
        found["log_sum_sq"] = (torch.linalg.vector_norm(e, dim=-1).square() + (2 * d).exp()).log() - 2 * log_total
    return Tile(e, targets, TokenStats(**found), _Exponentials(log_total, derivative))


def _gradient(tile: Tile, head: RowHead, upstream: Upstream) -> RowGradient:
    """Turns the exponentials into the gradient."""
    a, b, entropy_grad, mean_grad = upstream
    stats, slope = tile.stats, head.transform.slope
    log_total, derivative = tile.private
    zero = torch.zeros_like(log_total)
    a, b = zero if a is None else a, zero if b is None else b
    assert stats.logprob is not None and stats.lse is not None  # always measured
    target = target_entry(stats, upstream)
    factor = b - a
    if entropy_grad is not None:
        assert stats.entropy is not None
        factor = factor - entropy_grad * (stats.entropy - log_total)
    total = log_total.exp()
    if derivative is None:
        target = target * slope
    else:
        target = target * derivative.gather(1, tile.targets[:, None])[:, 0]
    if entropy_grad is None and derivative is None:
        return RowGradient(tile.logits, factor / total * slope, target)
    e = _bend_(tile.logits, factor / total, None if entropy_grad is None else entropy_grad / total)
    if derivative is None:
        return RowGradient(e, torch.full_like(total, slope), target)
    if mean_grad is not None:
        e.add_((mean_grad / e.shape[1])[:, None])
    return RowGradient(e.mul_(derivative), None, target)


def target_entry(stats: TokenStats, upstream: Upstream) -> Tensor:
    """`dL / dz` at the target without the mean logit's part, `[n]` (kernels/README.md, eq. 12)."""
    a, b, entropy_grad, _ = upstream
    assert stats.logprob is not None
    p = stats.logprob.exp()
    entry = torch.zeros_like(p) if a is None else -a * torch.expm1(stats.logprob)
    if b is not None:
        entry = entry + b * p
    if entropy_grad is not None:
        assert stats.entropy is not None
        entry = entry - entropy_grad * (torch.xlogy(p, p) + p * stats.entropy)
    return entry


def _times_log(e: Tensor) -> Tensor:
    """`e log e`, 0 where e is 0 (a logit of -inf, or far below the top). `torch.xlogy`, at 0.4 of its time on a CPU."""
    return e.log().clamp_(min=torch.finfo(e.dtype).min).mul_(e)


def _bend_(e: Tensor, factor: Tensor, entropy_factor: Tensor | None) -> Tensor:
    """`e_ij (factor_i - entropy_factor_i log e_ij)` in place."""
    if entropy_factor is None:
        return e.mul_(factor[:, None])
    log_term = _times_log(e).mul_(entropy_factor[:, None])
    return e.mul_(factor[:, None]).sub_(log_term)
