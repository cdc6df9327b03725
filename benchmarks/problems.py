"""Named problems: shapes, and the tensors that go with them, the same ones in every process.

One legend throughout: N tokens, H hidden size, V vocabulary. One product is `2 N H V` flops; materialised losses and
the single pass need three of them, a frozen head two, recomputation four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.testing import make_problem


class Inputs(NamedTuple):
    """The tensors of a problem. The targets are aligned with the hidden states and all of them count."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    ref_logprob: Tensor  # [N] float32; of a uniform reference, which cancels between sequences of equal length
    problem: Problem

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._replace(
            hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), problem=replace(self.problem, dtype=dtype)
        )


@dataclass(frozen=True)
class Problem:
    """A shape. `pairs`, unless 0, divides the tokens into 2 * pairs sequences of one length, the chosen ones first."""

    tokens: int
    hidden: int = 576  # SmolLM2-135M
    vocabulary: int = 49152
    dtype: torch.dtype = torch.float32
    pairs: int = 0
    frozen_head: bool = False
    chunk_bytes: int | None = None  # budget of a chunk of logits; None: the library's default

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.tokens // (2 * self.pairs) if self.pairs else self.tokens

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of sequences."""
        return self.tokens // self.length, self.length

    @property
    def logits_bytes(self) -> int:
        """Of the float32 logits that a materialised loss holds, the yardstick of all memory figures."""
        return 4 * self.tokens * self.vocabulary

    @property
    def gradient_bytes(self) -> int:
        """Of one copy of the gradients asked for and, below float32, of their float32 accumulators."""
        elements = self.tokens * self.hidden + (0 if self.frozen_head else self.vocabulary * self.hidden)
        accumulators = 4 * elements if self.dtype.itemsize < 4 else 0
        return elements * self.dtype.itemsize + accumulators

    def inputs(self) -> Inputs:
        """Seeded tensors; the logits' standard deviation is `testing.make_problem`'s, 2 nats."""
        made = make_problem((self.tokens,), self.hidden, self.vocabulary, dtype=self.dtype, trainable=())
        ref_logprob = torch.full((self.tokens,), -math.log(self.vocabulary))
        return Inputs(made.hidden, made.weight, made.targets, ref_logprob, self)

    def brief(self) -> Problem:
        """The same head with few tokens: for warming up and for the comparison with float64.

        As many pairs, for a peer compiles anew for another number, and pairs still longer than a chunk if these are.
        """
        if not self.pairs:
            return replace(self, tokens=min(256, self.tokens // 4))
        return replace(self, tokens=2 * self.pairs * min(self.length, 256 // self.pairs))

    def tiny(self) -> Problem:
        """The same structure in milliseconds. A chunk holds 16 tokens: what did not fit one still does not."""
        if not self.pairs:
            tokens, pairs = 40, 0
        else:
            tokens, pairs = 2 * 2 * (32 if self.length > 128 else 8), 2
        return replace(self, tokens=tokens, pairs=pairs, hidden=24, vocabulary=96, chunk_bytes=16 * 4 * 96)

    def __str__(self) -> str:
        sequences = f", {self.pairs} pairs of 2 x {self.length} tokens" if self.pairs else ""
        head = ", frozen head" if self.frozen_head else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N {self.tokens} H {self.hidden} V {self.vocabulary} {dtype}{sequences}{head}"
