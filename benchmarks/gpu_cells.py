"""What `gpu_report` measures: cells (a shape and its data), and the targets of the Triton and CUDA kernels.

One legend: N tokens, H hidden size, V vocabulary. Tensors are drawn on the device: a head of 128256 x 8192 takes a CPU
longer than all that is measured with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .problems import Inputs, Problem

HEADS = ((4096, 128256), (2304, 256000), (8192, 128256), (576, 49152))  # Llama 3 8B, Gemma 2 2B, Llama 3 70B, SmolLM2
TOKENS = (8192, 2048, 32768)

#: Standard deviation of the logits without their peaks, in nats, as in `logitless.testing.make_problem`.
SPREAD = 2.0
#: Mean and standard deviation of a peaked target's lead over all others together, in nats: an NLL of about 1 on
#: average, and half of the tokens under 0.15.
LEAD, LEAD_SPREAD = 2.0, 4.0


@dataclass(frozen=True)
class Cell:
    """A shape and its data: "peaked" as a trained model's, or "random", normal logits and uniform targets."""

    problem: Problem
    data: Literal["peaked", "random"]

    @property
    def name(self) -> str:
        p = self.problem
        return f"n{p.tokens}-h{p.hidden}-v{p.vocabulary}-{self.data}"

    def tiny(self) -> Cell:
        return replace(self, problem=self.problem.tiny())

    def inputs(self, device: torch.device) -> Inputs:
        """Seeded tensors on the device; every target counts."""
        p, draw = self.problem, torch.Generator(device).manual_seed(0)
        hidden = torch.randn(p.tokens, p.hidden, generator=draw, dtype=p.dtype, device=device)
        weight = torch.randn(p.vocabulary, p.hidden, generator=draw, dtype=p.dtype, device=device)
        weight *= SPREAD / p.hidden**0.5
        uniform = torch.rand(p.tokens, generator=draw, device=device)
        if self.data == "random":
            targets = (uniform * p.vocabulary).long().clamp(max=p.vocabulary - 1)
        else:
            targets = (float(p.vocabulary) ** uniform).long().sub(1).clamp(0, p.vocabulary - 1)  # Zipf's law
            _peak(hidden, weight, targets, torch.randn(p.tokens, generator=draw, device=device))
        ref_logprob = torch.full((p.tokens,), -math.log(p.vocabulary), device=device)
        return Inputs(hidden, weight, targets, ref_logprob, p)


def _peak(hidden: Tensor, weight: Tensor, targets: Tensor, noise: Tensor) -> None:
    """Gives the logits Zipf's frequencies, through one coordinate, and each target its lead, along its own row."""
    ranks = torch.arange(1, len(weight) + 1, device=weight.device)
    hidden[:, 0], weight[:, 0] = 1.0, -ranks.log().to(weight.dtype)
    others = (1.0 / ranks).sum().log() + SPREAD**2 / 2  # their logsumexp, by the mean of a log-normal variable
    row = weight[targets, 1:].float()
    rest = hidden[:, 1:].float()
    now = (rest * row).sum(-1) + weight[targets, 0].float()
    lead = others + LEAD + LEAD_SPREAD * noise - now
    hidden[:, 1:] = (rest + row * (lead / row.square().sum(-1))[:, None]).to(hidden.dtype)


def _cell(tokens: int, head: tuple[int, int], data: Literal["peaked", "random"]) -> Cell:
    return Cell(Problem(tokens, *head, dtype=torch.bfloat16), data)


#: The most valuable first: the one that the targets are about, its random twin, then every shape once.
CELLS = tuple(
    dict.fromkeys(
        (
            *(_cell(TOKENS[0], HEADS[0], data) for data in ("peaked", "random")),
            *(_cell(tokens, head, "peaked") for tokens in TOKENS for head in HEADS),
            *(_cell(tokens, head, "random") for tokens in TOKENS for head in HEADS),
        )
    )
)
MAIN = CELLS[0]


@dataclass(frozen=True)
class Target:
    """What a way reaches in the main cell: at most `limit` times `relative_to`'s, or less than it (`beaten`).

    `measure`: the time of a forward or of a step ("both"), extra memory, or the larger of the gradients' errors.
    `part`: another part than the main cell, whose rows have a floor of their own.
    """

    way: str
    measure: Literal["forward", "both", "memory", "error"]
    relative_to: str
    limit: float = 1.0
    beaten: bool = False
    part: str = MAIN.name


#: What memory is relative to, and a part's own floor.
LOGITS, HEAD_GRADIENT, BUDGET = "bfloat16 logits", "the head's gradient in float32", "256 MiB"
FLOOR = "one cuBLAS GEMM as large"
GEMM, FROZEN_GEMMS = "cuBLAS GEMMs", "cuBLAS GEMMs, frozen head"
#: Of copy bandwidth: what the CUDA chunk kernels reach at least.
ROWS_SHARE = 0.9

_STEP, _FROZEN, _TAIL = "cuda, single_pass", "cuda, frozen head", "cuda, tail_corrected"
_BEATEN = (
    *("materialised", "materialised, compiled", "Liger fused linear", "Liger fused linear, float32 sums"),
    *("Liger scaled", "Cut Cross-Entropy", "TRL ChunkedLogProbFunction", "quack"),
)
TARGETS = (
    Target(_STEP, "both", GEMM, 1.10),
    *(Target(_STEP, "both", way, beaten=True) for way in _BEATEN),
    Target(_FROZEN, "both", FROZEN_GEMMS, 1.10),
    *(Target(f"linear_logprobs, N {n}", "forward", FLOOR, 1.10, part="tokens") for n in (8192, 512)),
    Target(_STEP, "memory", HEAD_GRADIENT, 2.0),
    Target(_FROZEN, "memory", BUDGET, 1.0),
    Target(_TAIL, "both", GEMM, 0.6),
    Target(_TAIL, "error", _STEP, 2.0),
    Target("triton, single_pass", "both", GEMM, 1.15),
    Target("triton, recompute", "forward", GEMM, 1.25),
    *(Target(f"{backend}, recompute", "both", GEMM, 1.6) for backend in ("cuda", "triton")),
    *(Target(f"{backend}, recompute", "memory", LOGITS, 0.01) for backend in ("cuda", "triton")),
)
