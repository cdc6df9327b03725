"""Sums of the gradients of hidden states, weight and bias, whatever the number of chunks.

The sums have the statistics' dtype. A bfloat16 head whose tokens fit one chunk gets its gradient from the product
itself, in bfloat16, without a float32 sum (`Problem.rounds_head`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...types import TokenStats
from .. import native
from ..interface import Gradients, Needs, Problem, RowGradient, Upstream, empty_gradients, empty_sum, rows_of
from .chunks import Operands
from .denormals import drop_denormals_
from .products import float16_products, multiply, products_with_head, spans

#: Tokens whose targets' rows of the head are gathered at once, in the sums' dtype, where there are no chunks.
GATHERED_TOKENS = 1024


class Accumulators:
    """The sums of a call's gradients, to which each chunk adds its part."""

    def __init__(self, operands: Operands, needs: Needs, *, chunk: int = 0) -> None:
        """`chunk`: tokens of a chunk; 0 where the caller makes the products itself."""
        self.operands, self.needs = operands, needs
        problem = operands.problem
        # The first product overwrites the sums of hidden states and head: no zeros are written and read back.
        self.sums = empty_gradients(problem, needs._replace(weight=False), operands.dtype)
        self.weight_begun = False
        if needs.weight and problem.head_sum is not None:
            self.set_weight(problem.head_sum)
            self.weight_begun = True
        halves = problem.head.weight.dtype == operands.operand == torch.bfloat16
        self.one_product = problem.rounds_head and halves and len(problem.targets) <= chunk
        # The mean logit's gradient is one vector, times each entry's weight: summed apart, added once.
        self.mean_weight: Tensor | None = None  # [H]
        self.mean_bias: Tensor | None = None  # []

    def begin(self) -> Gradients:
        """The sums of everything needed, for a caller that makes the products itself; the first is to overwrite."""
        problem, dtype = self.operands.problem, self.operands.dtype
        if self.needs.weight and self.sums.weight is None:
            self.set_weight(empty_sum(problem.head.weight, dtype, len(problem.targets)))
        return self.sums

    def set_weight(self, total: Tensor) -> None:
        """Makes a tensor the head's sum."""
        self.sums = self.sums._replace(weight=total)

    def add(self, rows: slice, targets: Tensor, gradient: RowGradient, upstream: Upstream) -> None:
        """Adds the products of a chunk's gradient."""
        rounds = self.one_product and gradient.row_scale is None and upstream.mean_logit is None
        with float16_products(self.operands.problem.hidden.dtype, self.operands.device):
            if self.sums.hidden is not None:
                self._set_hidden(self.sums.hidden[rows], gradient)
            if self.sums.bias is not None:
                self._add_bias(self.sums.bias, gradient)
            if self.needs.weight and not rounds:
                self._add_weight(rows, gradient)
            sums = self.sums
            if self.needs.weight and rounds:  # last, as it puts the targets' entries into the matrix
                self.set_weight(self._weight_of(rows, targets, gradient))
                sums = sums._replace(weight=None)
        if gradient.target is not None:
            add_targets(self.operands.problem, rows, gradient.target, sums)
        self.add_mean(rows, upstream)

    def _set_hidden(self, out: Tensor, gradient: RowGradient) -> None:
        products_with_head(gradient.matrix, self.operands.head_at_hand(gradient.matrix.dtype), out)
        if gradient.row_scale is not None:
            for rows in self._undisturbed(len(out)):
                out[rows].mul_(gradient.row_scale[rows, None])

    def _add_bias(self, out: Tensor, gradient: RowGradient) -> None:
        scale = gradient.row_scale if gradient.row_scale is not None else gradient.matrix.new_ones(len(gradient.matrix))
        multiply(gradient.matrix.T, scale[:, None].to(gradient.matrix.dtype), out=out[:, None], add=True)

    def _add_weight(self, rows: slice, gradient: RowGradient) -> None:
        out = self.begin().weight
        assert out is not None
        hidden, matrix = self.operands.problem.hidden[rows], gradient.matrix
        parts = [_scaled(hidden, gradient, part, out.dtype) for part in self._undisturbed(len(hidden))]
        multiply(matrix.T, parts[0] if len(parts) == 1 else torch.cat(parts), out=out, add=self.weight_begun)
        self.weight_begun = True

    def _undisturbed(self, count: int) -> Iterator[slice]:
        return native.undisturbed(count, *_row_traits(self.operands.problem))

    def _weight_of(self, rows: slice, targets: Tensor, gradient: RowGradient) -> Tensor:
        """The head's gradient by one product, the targets' entries put into the matrix, which nobody reads after it."""
        matrix = gradient.matrix
        if gradient.target is not None:
            matrix.scatter_(1, targets[:, None], drop_denormals_(gradient.target[:, None].to(matrix.dtype)))
        return torch.mm(matrix.T, self.operands.problem.hidden[rows])

    def add_mean(self, rows: slice, upstream: Upstream) -> None:
        """Adds the mean logit's part, if it is not in the matrix."""
        operands = self.operands
        if upstream.mean_logit is None or not operands.linear_mean:
            return
        mean = upstream.mean_logit * operands.transform.slope
        if self.sums.hidden is not None:
            self.sums.hidden[rows].addcmul_(mean[:, None], operands.mean_row)
        if self.needs.weight:
            part = operands.problem.hidden[rows].to(operands.dtype).T @ mean
            self.mean_weight = part + (0 if self.mean_weight is None else self.mean_weight)
        if self.sums.bias is not None:
            self.mean_bias = mean.sum() + (0 if self.mean_bias is None else self.mean_bias)

    def add_apart(self, entry: Tensor, upstream: Upstream) -> None:
        """Adds all targets' entries `[N]` and the mean logit's part, for a caller that makes the products itself."""
        for rows in spans(len(entry), GATHERED_TOKENS):
            add_targets(self.operands.problem, rows, entry[rows], self.begin())
            self.add_mean(rows, rows_of(upstream, rows))

    def finish(self) -> Gradients:
        """The gradients; zeros where no token came."""
        vocabulary, weight = len(self.operands.problem.head.weight), self.operands.problem.logit_weight
        sums = self.begin()
        if sums.weight is not None and self.mean_weight is not None:
            part = self.mean_weight / vocabulary
            sums.weight.add_(part) if weight is None else sums.weight.addr_(weight, part)
        if sums.bias is not None and self.mean_bias is not None:
            part = self.mean_bias / vocabulary
            sums.bias.add_(part if weight is None else weight * part)
        return sums


def _scaled(hidden: Tensor, gradient: RowGradient, rows: slice, dtype: torch.dtype) -> Tensor:
    """Hidden states times their rows' factors, in the dtype of the matrix."""
    states = hidden[rows]
    if gradient.row_scale is not None:
        states = drop_denormals_(states.to(dtype) * gradient.row_scale[rows, None])
    return states.to(gradient.matrix.dtype)


def _row_traits(problem: Problem) -> tuple[int, torch.dtype, torch.device]:
    return problem.hidden.shape[1], problem.head.weight.dtype, problem.hidden.device


def add_targets(problem: Problem, rows: slice, entry: Tensor, sums: Gradients) -> None:
    """Adds the targets' entries `[n]` of `dL / d(raw product)`, which are 0 in every matrix."""
    for part in native.undisturbed(len(entry), *_row_traits(problem)):
        _add_targets(problem, slice(rows.start + part.start, rows.start + part.stop), entry[part], sums)


def _add_targets(problem: Problem, rows: slice, entry: Tensor, sums: Gradients) -> None:
    targets = problem.targets[rows]
    if sums.hidden is not None:
        sums.hidden[rows].addcmul_(entry[:, None], problem.head.weight.index_select(0, targets).to(sums.hidden.dtype))
    if sums.weight is not None:
        _add_rows(sums.weight, targets, problem.hidden[rows].to(sums.weight.dtype) * entry[:, None])
    if sums.bias is not None:
        sums.bias.index_add_(0, targets, entry)


def _add_rows(total: Tensor, which: Tensor, rows: Tensor) -> None:
    """`total[which] += rows`. On a CPU `index_add_` wakes PyTorch's other threads however few the rows are."""
    if total.device.type == "cpu":
        total.index_put_((which,), rows, accumulate=True)
    else:
        total.index_add_(0, which, rows)


def target_entry(stats: TokenStats, upstream: Upstream) -> Tensor:
    """`dL / dz` at the target without the mean logit's part, `[n]` (kernels/MATH.md, eq. 12)."""
    a, b, entropy_grad = upstream[:3]
    assert stats.logprob is not None
    p = stats.logprob.exp()
    entry = torch.zeros_like(p) if a is None else -a * torch.expm1(stats.logprob)
    if b is not None:
        entry = entry + b * p
    if entropy_grad is not None:
        assert stats.entropy is not None
        entry = entry - entropy_grad * (torch.xlogy(p, p) + p * stats.entropy)
    return entry
