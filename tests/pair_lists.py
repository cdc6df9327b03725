"""Lists of (token, block) pairs: a problem with its exact gradient, and the list that a kernel writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logitless.types import PAIR_BLOCK, PAIR_SPAN


@dataclass
class PairProblem:
    """A head's operands and the upstream gradients of logprob, lse and entropy."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    upstream: Tensor  # [3, N]
    softcap: float = 0.0

    @property
    def blocks(self) -> int:
        return -(-len(self.weight) // PAIR_BLOCK)

    @property
    def raw(self) -> Tensor:
        return self.hidden.double() @ self.weight.double().T

    @property
    def logits(self) -> Tensor:
        return self.softcap * torch.tanh(self.raw / self.softcap) if self.softcap else self.raw

    def block_lse(self) -> Tensor:
        """[N, blocks], the target left out."""
        others = self.logits.scatter(1, self.targets[:, None], -math.inf)
        return torch.stack([block.logsumexp(1) for block in others.split(PAIR_BLOCK, 1)], 1)

    def entropy(self) -> Tensor:
        logp = self.logits.log_softmax(1)
        return -(logp.exp() * logp).sum(1)

    def gradient(self) -> Tensor:
        """dL/ds [N, V], by autograd, its target entries 0."""
        s = self.raw.requires_grad_()
        z = self.softcap * torch.tanh(s / self.softcap) if self.softcap else s
        logp = z.log_softmax(1)
        a, b, e = self.upstream.double()
        logprob = logp.gather(1, self.targets[:, None])[:, 0]
        total = (a * logprob + b * z.logsumexp(1) - e * (logp.exp() * logp).sum(1)).sum()
        (found,) = torch.autograd.grad(total, s)
        return found.scatter(1, self.targets[:, None], 0)


def draw(
    rows: int, vocabulary: int, depth: int, *, spread: float = 4.0, softcap: float = 0.0, seed: int = 0
) -> PairProblem:
    g = torch.Generator().manual_seed(seed)
    return PairProblem(
        torch.randn(rows, depth, generator=g).bfloat16(),
        (torch.randn(vocabulary, depth, generator=g) * spread / depth**0.5).bfloat16(),
        torch.randint(vocabulary, (rows,), generator=g),
        torch.randn(3, rows, generator=g),
        softcap,
    )


class RoutedPairs(NamedTuple):
    starts: Tensor  # [blocks spans + 1]
    tokens: Tensor  # [N blocks]
    tail: Tensor  # [N, blocks]

    def pairs(self, rows: int) -> Tensor:
        """(block, token) of the list, in its order."""
        spans = -(-rows // PAIR_SPAN)
        counts = self.starts[::spans].diff()
        block = torch.arange(len(counts)).repeat_interleave(counts)
        return torch.stack([block, self.tokens[: len(block)].long()], 1)

    def kept(self, rows: int) -> Tensor:
        """[N, blocks]"""
        found = torch.zeros_like(self.tail, dtype=torch.bool)
        block, token = self.pairs(rows).unbind(1)
        found[token, block] = True
        return found


def spread_over_columns(kept: Tensor, vocabulary: int) -> Tensor:
    return kept.repeat_interleave(PAIR_BLOCK, 1)[:, :vocabulary]


def assert_within(found: Tensor, expected: Tensor, allowed: Tensor) -> None:
    excess = ((found.double() - expected).abs() - allowed).max().item()
    assert excess <= 0, excess
