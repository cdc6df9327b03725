"""The table of the report: each part one problem, its providers, and what logitless has to reach there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from . import peers
from . import providers as own
from .problems import Problem
from .providers import Provider

#: bf16 products without bf16 units take minutes at N = 4096 in PyTorch: the competitors get fewer tokens there.
BF16_UNITS: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
BF16_TOKENS = 4096 if BF16_UNITS else 64

LOGITS = "float32 logits"


@dataclass(frozen=True)
class Target:
    """`provider`'s time or extra memory, at most `limit` times another provider's (or the size of the logits)."""

    provider: Provider
    measure: Literal["seconds", "memory"]
    relative_to: str
    limit: float


@dataclass(frozen=True)
class Part:
    """A problem and the providers that are timed on it, in turns; `targets` are the issue's numbers."""

    name: str
    problem: Problem
    providers: tuple[Provider, ...]
    targets: tuple[Target, ...]
    memory: bool = True  # whether the providers' memory is measured too

    def tiny(self) -> Part:
        return replace(self, problem=self.problem.tiny())

    def provider(self, name: str) -> Provider:
        return next(p for p in self.providers if p.name == name)


def _against_peers(provider: Provider, *others: Provider) -> tuple[Target, ...]:
    return tuple(Target(provider, "seconds", other.name, 1.0) for other in others)


_NLL_PEERS = (peers.TORCH, peers.TRL, peers.LIGER, peers.CCE)
_DPO_PEERS = (peers.TRL_DPO, peers.LIGER_DPO)

PARTS = (
    Part(
        "nll",
        Problem(4096),
        (own.MATERIALISED_NLL, own.GEMMS, own.CHUNKED_GEMMS, own.NLL, own.NLL_RECOMPUTE, *_NLL_PEERS),
        (
            Target(own.NLL, "seconds", own.MATERIALISED_NLL.name, 0.65),
            Target(own.NLL, "seconds", own.GEMMS.name, 1.08),
            Target(own.NLL, "memory", LOGITS, 0.05),
            *_against_peers(own.NLL, *_NLL_PEERS),
        ),
    ),
    Part(
        "frozen",
        Problem(4096, pairs=32, frozen_head=True),
        (own.MATERIALISED_NLL, own.GEMMS, own.CHUNKED_GEMMS, own.NLL, own.DPO, peers.TORCH),
        (
            Target(own.NLL, "seconds", own.GEMMS.name, 1.12),
            Target(own.DPO, "seconds", own.GEMMS.name, 1.12),
            Target(own.NLL, "memory", LOGITS, 0.05),
            Target(own.DPO, "memory", LOGITS, 0.05),
            *_against_peers(own.NLL, peers.TORCH),
        ),
    ),
    Part(
        "dpo",
        Problem(4096, pairs=32),
        (own.MATERIALISED_DPO, own.GEMMS, own.DPO, *_DPO_PEERS),
        (
            Target(own.DPO, "seconds", own.MATERIALISED_DPO.name, 0.85),
            Target(own.DPO, "memory", own.MATERIALISED_DPO.name, 0.05),
            *_against_peers(own.DPO, *_DPO_PEERS),
        ),
    ),
    Part(
        "dpo-long",
        Problem(2048, pairs=2),
        (own.MATERIALISED_DPO, own.GEMMS, own.DPO),
        (
            Target(own.DPO, "seconds", own.MATERIALISED_DPO.name, 1.0),
            Target(own.DPO, "memory", own.MATERIALISED_DPO.name, 0.05),
        ),
    ),
    Part(
        "bf16",
        Problem(BF16_TOKENS, dtype=torch.bfloat16),
        (own.MATERIALISED_NLL, own.NLL, *_NLL_PEERS),
        (
            Target(own.NLL, "seconds", own.MATERIALISED_NLL.name, 1.1),
            Target(own.NLL, "seconds", peers.TORCH.name, 1 / 3),
            *_against_peers(own.NLL, *_NLL_PEERS[1:]),
        ),
        memory=False,
    ),
    Part(
        "bf16-many",
        Problem(4096, dtype=torch.bfloat16),
        (own.FLOAT32_GEMMS, own.NLL),
        (Target(own.NLL, "memory", LOGITS, 0.05),),
    ),
)


def get(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)
