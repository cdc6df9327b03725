"""Problems: a shape with its data, and the seeded tensors that go with it.

One legend throughout: N tokens, H hidden size, V vocabulary. One product is `2 N H V` flops; materialised losses and
the single pass need three of them, a frozen head two, recomputation four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Data = Literal["random", "peaked"]
CPU = torch.device("cpu")
#: Standard deviation of the logits without their peaks, in nats: distributions about as sharp as a model's.
SPREAD = 2.0
#: Mean and standard deviation of a peaked target's lead over all others together, in nats: an NLL of about 1 on
#: average, and half of the tokens under 0.15.
LEAD, LEAD_SPREAD = 2.0, 4.0
#: Ids that each token lists for a loss of lists: its target, and others.
LISTED = 64
#: Tokens of a first call, and of the comparison with float64.
FEW = 256
#: Numbers of the hidden states that get their peaks at once: in bfloat16 that takes 33 MiB, whatever the problem.
BLOCK = 2**21


class Inputs(NamedTuple):
    """The tensors of a problem. The targets are aligned with the hidden states and all of them count."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    ref_logprob: Tensor  # [N] float32; of a uniform reference, which cancels between sequences of equal length
    problem: Problem

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that every provider holds, so that memory is counted beyond them."""
        return self.problem.gradient_bytes

    def about(self) -> dict[str, Any]:
        """The problem in words, and sizes in bytes that memory is compared with."""
        return self.problem.about()

    def operands(self) -> tuple[Tensor, Tensor, Inputs]:
        """What a loss is called with: fresh leaves, which are constants under `no_grad` or of a frozen head."""
        learns = torch.is_grad_enabled()
        hidden = self.hidden.detach().requires_grad_(learns)
        weight = self.weight.detach().requires_grad_(learns and not self.problem.frozen_head)
        return hidden, weight, self

    def gradients(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the operands, after the backward pass."""
        return hidden.grad, weight.grad

    def lists(self) -> Tensor:
        """`[N, LISTED]` different ids for each token, its target the first."""
        steps = torch.arange(LISTED, device=self.targets.device) * (self.problem.vocabulary // LISTED)
        return (self.targets[:, None] + steps) % self.problem.vocabulary

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._replace(
            hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), problem=replace(self.problem, dtype=dtype)
        )

    def first(self, problem: Problem) -> Inputs:
        """Inputs of a shorter problem: this head, and the first tokens, as many as `problem` has."""
        hidden, targets, ref_logprob = (x[: problem.tokens] for x in (self.hidden, self.targets, self.ref_logprob))
        return Inputs(hidden, self.weight, targets, ref_logprob, problem)

    def brief(self) -> Inputs:
        """Few tokens of the same structure, for warming up and for the comparison with float64."""
        return self.first(self.problem.brief())


@dataclass(frozen=True)
class Problem:
    """A shape and its data.

    Args:
        pairs: unless 0, the tokens are 2 * pairs sequences of one length, the chosen ones first.
        chunk_bytes: budget of a chunk of logits; None: the library's default.
        data: "random" has normal logits and uniform targets. "peaked" is like a trained model's: Zipf's frequencies,
            and targets that lead all others by 2 nats, give or take 4.
    """

    tokens: int
    hidden: int = 576  # SmolLM2-135M
    vocabulary: int = 49152
    dtype: torch.dtype = torch.float32
    pairs: int = 0
    frozen_head: bool = False
    chunk_bytes: int | None = None
    data: Data = "random"

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.tokens // (2 * self.pairs) if self.pairs else self.tokens

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and their length."""
        return self.tokens // self.length, self.length

    @property
    def logits_bytes(self) -> int:
        """Size of the logits in float32, the yardstick of all memory figures."""
        return 4 * self.tokens * self.vocabulary

    @property
    def gradient_bytes(self) -> int:
        """Size of one copy of the gradients asked for and, below float32, of their float32 accumulators."""
        elements = self.tokens * self.hidden + (0 if self.frozen_head else self.vocabulary * self.hidden)
        accumulators = 4 * elements if self.dtype.itemsize < 4 else 0
        return elements * self.dtype.itemsize + accumulators

    @property
    def input_bytes(self) -> int:
        """Size of the hidden states, the head, the targets and the reference's log-probabilities."""
        elements = (self.tokens + self.vocabulary) * self.hidden
        return elements * self.dtype.itemsize + self.tokens * (8 + 4)

    def about(self) -> dict[str, Any]:
        """The problem in words, and sizes in bytes that memory is compared with."""
        return {
            "problem": str(self),
            "logits_bytes": self.logits_bytes,
            "head_gradient_bytes": 4 * self.vocabulary * self.hidden,
            "held_bytes": self.input_bytes + self.gradient_bytes,
        }

    def inputs(self, device: torch.device = CPU) -> Inputs:
        """Seeded tensors, drawn on the device: for a CPU a large head takes longer than all that a GPU does with it."""
        draw = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(self.tokens, self.hidden, generator=draw, dtype=self.dtype, device=device)
        weight = torch.randn(self.vocabulary, self.hidden, generator=draw, dtype=self.dtype, device=device)
        weight *= SPREAD / self.hidden**0.5
        uniform = torch.rand(self.tokens, generator=draw, device=device)
        if self.data == "random":
            targets = (uniform * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        else:
            targets = (float(self.vocabulary) ** uniform).long().sub(1).clamp(0, self.vocabulary - 1)  # Zipf's law
            _peak(hidden, weight, targets, torch.randn(self.tokens, generator=draw, device=device))
        ref_logprob = torch.full((self.tokens,), -math.log(self.vocabulary), device=device)
        return Inputs(hidden, weight, targets, ref_logprob, self)

    def brief(self) -> Problem:
        """Problem of few tokens under this head.

        As many pairs, for a peer compiles anew for another number, and pairs still longer than a chunk if these are.
        """
        if not self.pairs:
            return replace(self, tokens=min(FEW, max(1, self.tokens // 4)))
        return replace(self, tokens=2 * self.pairs * max(1, min(self.length, FEW // self.pairs)))

    def tiny(self) -> Problem:
        """Problem of this structure in milliseconds. A chunk holds 16 tokens: what did not fit one still does not."""
        if not self.pairs:
            tokens, pairs = 40, 0
        else:
            tokens, pairs = 2 * 2 * (32 if self.length > 128 else 8), 2
        return replace(self, tokens=tokens, pairs=pairs, hidden=24, vocabulary=96, chunk_bytes=16 * 4 * 96)

    def __str__(self) -> str:
        sequences = f", {self.pairs} pairs of 2 x {self.length} tokens" if self.pairs else ""
        head = ", frozen head" if self.frozen_head else ""
        peaked = ", peaked" if self.data == "peaked" else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N {self.tokens} H {self.hidden} V {self.vocabulary} {dtype}{sequences}{head}{peaked}"


def _peak(hidden: Tensor, weight: Tensor, targets: Tensor, noise: Tensor) -> None:
    """Gives the logits Zipf's frequencies, through one coordinate, and each target its lead, along its own row."""
    ranks = torch.arange(1, len(weight) + 1, device=weight.device)
    hidden[:, 0], weight[:, 0] = 1.0, -ranks.log().to(weight.dtype)
    others = (1.0 / ranks).sum().log() + SPREAD**2 / 2  # their logsumexp, by the mean of a log-normal variable
    leads = others + LEAD + LEAD_SPREAD * noise
    tokens = max(1, BLOCK // hidden.shape[1])
    for block, ids, lead in zip(hidden.split(tokens), targets.split(tokens), leads.split(tokens), strict=True):
        row = weight[ids, 1:].float()
        rest = block[:, 1:].float()
        now = (rest * row).sum(-1) + weight[ids, 0].float()
        block[:, 1:] = (rest + row * ((lead - now) / row.square().sum(-1))[:, None]).to(hidden.dtype)
