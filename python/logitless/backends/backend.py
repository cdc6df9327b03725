"""A backend: its engines, and the functions that the ops call, written once on these engines."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..types import Head, Options, TokenStats
from .approximate.blocks import BlockEngine, Blocks
from .approximate.entries import Entries
from .exact import sweep
from .exact.chunks import chunk_tokens, token_bytes
from .exact.divergence import divergence_sweep, torch_divergence_rows
from .exact.listed import ListedRows
from .exact.torch_rows import TorchRows
from .interface import (
    Approximate,
    DivergenceEngine,
    DivergenceProblem,
    DivergenceResult,
    Forward,
    Gradients,
    Needs,
    Problem,
    RowEngine,
    SinglePass,
    SummedLosses,
    Upstream,
)


class Backend:
    """A way to run the ops: a row engine is all it needs, and a subclass overrides what it does otherwise.

    Attributes:
        rows: the row engine of every sweep over chunks that its kernels can serve (`row_engine`).
        divergence_rows: the row engine of divergences.
        blocks: kernels for a tail-corrected backward by pairs of a token and a block; None: entry by entry.
        finishes_gradients: whether the row engine leaves a finished gradient, without a factor for each row, so that
            one product can make the head's.
    """

    finishes_gradients = False

    def __init__(
        self,
        rows: RowEngine,
        *,
        divergence_rows: DivergenceEngine = torch_divergence_rows,
        blocks: BlockEngine | None = None,
    ) -> None:
        self.rows, self.divergence_rows = rows, divergence_rows
        self._tail_corrected: Approximate = Entries(self) if blocks is None else Blocks(blocks, self)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None, or the reason why the backend cannot take tensors of this device and dtype."""
        return None

    def row_engine(self, problem: Problem) -> RowEngine:
        """The row engine of a sweep: the backend's own, where its kernels know the task.

        For targets `[N, K]` one that knows of lists stands on it. PyTorch's operations, on every device, serve weights
        of capped logits, which only class weights with label smoothing under a softcap ask for.
        """
        if problem.targets.dim() > 1:
            return ListedRows(self.rows)
        return self._rows(problem.head, problem.logit_weight)

    def _rows(self, head: Head, logit_weight: Tensor | None) -> RowEngine:
        weighs = logit_weight is not None and head.softcap is not None
        return TorchRows(logit_weight) if weighs else self.rows

    def tokens_at_once(self, hidden: Tensor, head: Head, options: Options) -> int:
        """The longest group of tokens that `single_pass` keeps whole."""
        buffers = self._rows(head, options.logit_weight).buffers(head, options.chunk_dtype)
        return chunk_tokens(hidden, head.weight, options, buffers, trainable=head.weight.requires_grad)

    def bytes_of_token(self, hidden: Tensor, head: Head, options: Options) -> int:
        """The bytes of a chunk's budget that `single_pass` takes for each token."""
        buffers = self._rows(head, options.logit_weight).buffers(head, options.chunk_dtype)
        return token_bytes(hidden, head.weight, options, buffers)

    def forward(self, problem: Problem, outputs: tuple[str, ...], unit_gradient: bool) -> Forward:
        """`TokenStats` of every token and, for a frozen head, `d logprob / d hidden`."""
        return sweep.forward(self.row_engine(problem), problem, outputs, unit_gradient)

    def backward(self, problem: Problem, stats: TokenStats, upstream: Upstream, needs: Needs) -> Gradients:
        """Gradients from `upstream`, the logits computed again."""
        return sweep.backward(self.row_engine(problem), problem, stats, upstream, needs)

    def single_pass(self, problem: Problem, losses: SummedLosses) -> SinglePass:
        """The sum of a loss and its gradients in one sweep."""
        return sweep.single_pass(self.row_engine(problem), problem, losses)

    def divergence(
        self, problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]
    ) -> DivergenceResult:
        """Divergences and, with an `upstream` gradient, the gradients of both sides, in one sweep."""
        if problem.ranks is None:
            return divergence_sweep(self.divergence_rows, problem, upstream, needs)
        # Rows that other processes have too are normalised with theirs, between PyTorch's operations.
        rows = partial(torch_divergence_rows, group=problem.ranks.group)
        return divergence_sweep(rows, problem, upstream, needs)

    def approximate(self, backward: str) -> Approximate:
        """The strategy that approximates gradients, by the name that `backward=` has for it."""
        if backward != "tail_corrected":
            raise KeyError(backward)
        return self._tail_corrected
