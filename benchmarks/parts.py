"""The table of the report: each part one problem, its providers, and what logitless has to reach there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from logitless.types import BackwardName

from . import peers
from . import providers as own
from .definitions import LOSSES
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
class Bound:
    """No provider of logitless may take more than `limit` times as long as `relative_to`."""

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
    bound: Bound | None = None

    def tiny(self) -> Part:
        return replace(self, problem=self.problem.tiny())

    def provider(self, name: str) -> Provider:
        return next(p for p in self.providers if p.name == name)


def _against_peers(provider: Provider, *others: Provider) -> tuple[Target, ...]:
    return tuple(Target(provider, "seconds", other.name, 1.0) for other in others)


_NLL_PEERS = (peers.TORCH, peers.TRL, peers.LIGER, peers.CCE)
_DPO_PEERS = (peers.TRL_DPO, peers.LIGER_DPO)

#: Where losses are compared with each other: a third of the real vocabulary, in chunks of 128 tokens where the real one
#: has 170, so that a loss's own work weighs three to four times what it does in training.
_SMALL = Problem(512, vocabulary=16384, pairs=16, chunk_bytes=2**23)
_REAL = Problem(256, pairs=8)


def _registered(*levels: str, backward: BackwardName = "auto") -> tuple[Provider, ...]:
    """The losses of these levels."""
    return tuple(own.of_registry(name, backward) for name, loss in LOSSES.items() if loss.level in levels)


def _with_peers(losses: Sequence[Provider]) -> tuple[tuple[Provider, ...], tuple[Target, ...]]:
    """Losses, their peers, and that none of these is faster."""
    others = tuple(other for loss in losses for other in peers.OF_REGISTRY.get(loss.name, ()))
    targets = (_against_peers(loss, *peers.OF_REGISTRY.get(loss.name, ())) for loss in losses)
    return (*losses, *others), tuple(target for found in targets for target in found)


_SEQUENCES = _registered("sequence", "pair", "unpaired", backward="recompute")
_REAL_LOSSES, _REAL_TARGETS = _with_peers(
    [own.of_registry(name) for name in ("nll", *(x for x in peers.OF_REGISTRY if not LOSSES[x].compares_distributions))]
)
_DISTRIBUTIONS, _DISTRIBUTION_TARGETS = _with_peers(_registered("distribution"))

#: What `--only` takes for several parts.
GROUPS = {"losses": ("losses-token", "losses-sequence", "losses-real", "losses-distribution")}

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
    Part("losses-token", _SMALL, (own.GEMMS, *_registered("token")), (), memory=False, bound=Bound("nll", 1.05)),
    Part(
        "losses-sequence",
        _SMALL,
        (own.GEMMS, own.LOGPROBS, *_SEQUENCES),
        (),
        memory=False,
        bound=Bound(own.LOGPROBS.name, 1.05),
    ),
    Part(
        "losses-real",
        _REAL,
        (own.MATERIALISED_NLL, own.GEMMS, *_REAL_LOSSES),
        _REAL_TARGETS,
        memory=False,
    ),
    Part(
        "losses-distribution",
        _REAL,
        (own.MATERIALISED_JS, own.GEMMS_OF_BOTH_HEADS, *_DISTRIBUTIONS),
        _DISTRIBUTION_TARGETS,
        memory=False,
    ),
)


def get(name: str) -> Part:
    return next(part for part in PARTS if part.name == name)
