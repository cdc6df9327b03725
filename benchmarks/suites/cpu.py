"""Against materialised logits and other libraries on the processor: NLL and DPO, time, memory and gradient error.

python -m benchmarks cpu                      what this machine's cpu.json in benchmarks/results lacks from this commit
python -m benchmarks cpu --only dpo nll       these parts again; the others in the file stay as they are
python -m benchmarks cpu --tiny               the same structure in seconds, to see that it runs; not saved
python -m benchmarks cpu --tables FILE.json   the tables of a file again, without measuring
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from logitless.bench.environment import BF16_UNITS
from logitless.bench.measure import Method, Part
from logitless.bench.problem import Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import floors, materialised, own, peers
from logitless.bench.targets import LOGITS, Target

from .suite import Suite, on_processor

#: A peer slower than this many times the materialised loss is timed once: its rank is beyond doubt.
METHOD = Method(rounds=3, patience=1.5)
COLUMNS = (
    *("seconds", "/ materialised", "/ GEMMs", "extra MiB", "of logits", "resident"),
    *("d_hidden", "d_weight"),
)
HOW_TO_READ = (
    "Forward and backward of one step. Ratios are medians over rounds of the ratio within a round; `x n` is the number "
    "of rounds. Extra memory is beyond the inputs and one copy of the gradients (below float32, and of their float32 "
    "accumulators): by PyTorch's allocator, as a share of the float32 logits, and by the resident set. Errors are "
    "relative, against float64 on few tokens. benchmarks/README.md says how each is measured."
)
#: bf16 products without bf16 units take minutes at N = 4096 in PyTorch: the competitors get fewer tokens there.
BF16_TOKENS = 4096 if BF16_UNITS else 64


def _part(name: str, problem: Problem, providers: Sequence[Provider], *targets: Target, memory: bool = True) -> Part:
    return Part(name, problem, tuple(providers), targets, METHOD, COLUMNS, memory=memory)


def against(provider: Provider, *others: Provider) -> tuple[Target, ...]:
    """Targets: none of these is faster."""
    return tuple(Target(provider.name, "seconds", other.name, 1.0) for other in others)


_NLL, _DPO, _TOP_K = own.NLL, own.DPO, "top_k_distillation"
PARTS = (
    _part(
        "nll",
        Problem(4096),
        (materialised.NLL, floors.GEMMS, floors.CHUNKED_GEMMS, _NLL, own.NLL_RECOMPUTE, *peers.ON_PROCESSOR),
        Target(_NLL.name, "seconds", materialised.NLL.name, 0.65),
        Target(_NLL.name, "seconds", floors.GEMMS.name, 1.08),
        Target(_NLL.name, "memory", LOGITS, 0.05),
        *against(_NLL, *peers.ON_PROCESSOR),
    ),
    _part(
        "frozen",
        Problem(4096, pairs=32, frozen_head=True),
        (materialised.NLL, floors.GEMMS, floors.CHUNKED_GEMMS, _NLL, _DPO, peers.TORCH),
        Target(_NLL.name, "seconds", floors.GEMMS.name, 1.12),
        Target(_DPO.name, "seconds", floors.GEMMS.name, 1.12),
        Target(_NLL.name, "memory", LOGITS, 0.05),
        Target(_DPO.name, "memory", LOGITS, 0.05),
        *against(_NLL, peers.TORCH),
    ),
    _part(
        "dpo",
        Problem(4096, pairs=32),
        (materialised.DPO, floors.GEMMS, _DPO, peers.TRL_DPO, peers.LIGER_DPO),
        Target(_DPO.name, "seconds", materialised.DPO.name, 0.85),
        Target(_DPO.name, "memory", materialised.DPO.name, 0.05),
        *against(_DPO, peers.TRL_DPO, peers.LIGER_DPO),
    ),
    _part(
        "dpo-long",
        Problem(2048, pairs=2),
        (materialised.DPO, floors.GEMMS, _DPO),
        Target(_DPO.name, "seconds", materialised.DPO.name, 1.0),
        Target(_DPO.name, "memory", materialised.DPO.name, 0.05),
    ),
    _part(
        "lists",
        Problem(2048),
        (materialised.TOP_K, floors.GEMMS, own.of_registry("nll"), own.of_registry(_TOP_K), peers.TRL_TOP_K),
        Target(_TOP_K, "seconds", "nll", 1.1),
        Target(_TOP_K, "memory", LOGITS, 0.1),
        *against(own.of_registry(_TOP_K), peers.TRL_TOP_K),
    ),
    _part(
        "bf16",
        Problem(BF16_TOKENS, dtype=torch.bfloat16),
        (materialised.NLL, floors.GEMMS, _NLL, *peers.ON_PROCESSOR),
        Target(_NLL.name, "seconds", materialised.NLL.name, 1.1),
        Target(_NLL.name, "seconds", peers.TORCH.name, 1 / 3),
        *against(_NLL, *peers.ON_PROCESSOR[1:]),
        memory=False,
    ),
    _part(
        "bf16-many",
        Problem(4096, dtype=torch.bfloat16),
        (floors.FLOAT32_GEMMS, _NLL),
        Target(_NLL.name, "memory", LOGITS, 0.05),
    ),
)
SUITE = Suite("cpu", "Measured on a CPU", HOW_TO_READ, PARTS)


def main(arguments: Sequence[str] | None = None) -> None:
    on_processor(SUITE, __doc__, arguments, minutes=20)
