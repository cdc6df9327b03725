"""What every registered loss costs on top of NLL or log-probs alone, and TRL's and Liger's losses of the same name.

python -m benchmarks losses                        what this machine's losses.json lacks from this commit
python -m benchmarks losses --only losses-token    these parts again
python -m benchmarks losses --tiny                 the same structure in seconds, to see that it runs; not saved
python -m benchmarks losses --tables FILE.json     the tables of a file again, without measuring
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from logitless.bench.measure import Part
from logitless.bench.problem import Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import floors, materialised, own, peers
from logitless.bench.targets import SLOWEST, Target

from . import cpu
from .cpu import against
from .suite import Suite, on_processor

METHOD = replace(cpu.METHOD, counted=True)
COUNTED = ("seconds", "/ base", "spread", "/ GEMMs", "products", "passes", "d_hidden", "d_weight")
HOW_TO_READ = (
    "Forward and backward of one step. Ratios are medians over rounds of the ratio within a round; `x n` is the number "
    "of rounds, spread the smallest and the largest ratio. Products are counted in units of 2 N H V flops, passes are "
    "row operations over N V entries. Errors are relative, against float64 on few tokens. benchmarks/README.md says "
    "how each is measured."
)
#: A third of the real vocabulary, in chunks of 128 tokens where the real one has 170: a loss's own work weighs three to
#: four times what it does in training.
SMALL = Problem(512, vocabulary=16384, pairs=16, chunk_bytes=2**23)
REAL = Problem(256, pairs=8)


def _on_top(name: str, base: Provider, *providers: Provider) -> Part:
    """Losses, each of which is to cost no more than `base`."""
    target = Target(SLOWEST, "seconds", base.name, 1.05)
    return Part(name, SMALL, (floors.GEMMS, *providers), (target,), METHOD, COUNTED, base.name)


def _with_peers(name: str, *others: Provider, losses: Sequence[Provider]) -> Part:
    """Losses and the other libraries' of the same name, none of which is to be faster."""
    pairs = [(loss, peers.OF_REGISTRY.get(loss.name, ())) for loss in losses]
    same = tuple(peer for _, result in pairs for peer in result)
    targets = tuple(target for loss, result in pairs for target in against(loss, *result))
    return Part(name, REAL, (*others, *losses, *same), targets, METHOD, cpu.COLUMNS)


_SEQUENCES = own.of_levels("sequence", "pair", "unpaired", backward="recompute")
_SHARED = ("nll", *(name for name in peers.OF_REGISTRY if materialised.LOSSES[name].level != "distribution"))
PARTS = (
    _on_top("losses-token", own.of_registry("nll"), *own.of_levels("token")),
    _on_top("losses-sequence", own.LOGPROBS, own.LOGPROBS, *_SEQUENCES),
    _with_peers("losses-real", materialised.NLL, floors.GEMMS, losses=[own.of_registry(name) for name in _SHARED]),
    _with_peers(
        "losses-distribution",
        *(materialised.JS, floors.GEMMS_OF_BOTH_HEADS),
        losses=own.of_levels("distribution"),
    ),
)
SUITE = Suite("losses", "Losses beside NLL, measured on a CPU", HOW_TO_READ, PARTS)


def main(arguments: Sequence[str] | None = None) -> None:
    on_processor(SUITE, __doc__, arguments, minutes=20)
