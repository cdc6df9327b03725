"""The memory of one cross-entropy step against the size of the vocabulary, for README's picture.

python -m benchmarks memory

One step is the forward and backward of the mean negative log-likelihood, float32, with a trainable head. Each point is
measured in a process of its own: the peak of PyTorch's allocator beyond the inputs and the two gradients. That figure
counts tensors alone, and is the same on every run however busy the machine is. The peers are in `logitless[test]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from logitless.bench import memory
from logitless.bench.environment import describe, machine_kind
from logitless.bench.measure import Part
from logitless.bench.problem import Problem
from logitless.bench.providers import materialised, own, peers

from ..internals import write_text
from ..places import RESULTS

TOKENS, HIDDEN = 2048, 576
#: Vocabularies of Llama 2, SmolLM2, Phi-4, Llama 3, Qwen3 and Gemma 2.
VOCABULARIES = (32000, 49152, 100352, 128256, 151936, 256000)
PROVIDERS = (peers.TRL, materialised.NLL, peers.LIGER, peers.TORCH, own.NLL)


def step(vocabulary: int, tokens: int = TOKENS, hidden: int = HIDDEN) -> Part:
    """The part whose memory is measured."""
    return Part(f"V {vocabulary}", Problem(tokens, hidden, vocabulary))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "default: this machine's, in benchmarks/results"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"for memory.json ({default})")
    given = parser.parse_args(arguments)
    about = describe()
    points = [
        {"provider": p.name, "vocabulary": v, "extra_bytes": memory.in_process(step(v), p)["allocated"]}
        for p in PROVIDERS
        for v in VOCABULARIES
    ]
    found = {"environment": about, "tokens": TOKENS, "hidden_size": HIDDEN, "dtype": "float32", "points": points}
    folder = given.output or RESULTS / machine_kind(about)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "memory.json", json.dumps(found, indent=1) + "\n")
