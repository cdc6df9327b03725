"""Measures and draws README's picture: the memory of one cross-entropy step against the size of the vocabulary.

    python -m docs.memory measure       # docs/memory.json, then the picture; some 11 minutes with one thread
    python -m docs.memory plot          # docs/memory.png, from docs/memory.json

One step is the forward and backward of the mean negative log-likelihood, float32, with a trainable head. The harness of
`benchmarks/` measures it, in a process of its own: the peak of PyTorch's allocator beyond the inputs and the two
gradients. That figure counts tensors alone, and is the same on every run however busy the machine is.
The plot needs matplotlib (`pip install "logitless[recipes]"`), the peers are in `logitless[test]`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.internals import write_text

from logitless.bench.environment import describe
from logitless.bench.measure import Part
from logitless.bench.memory import in_process, of_step
from logitless.bench.problem import Problem
from logitless.bench.providers import materialised, own, peers

HERE = Path(__file__).resolve().parent
RESULTS, PICTURE = HERE / "memory.json", HERE / "memory.png"
TOKENS, HIDDEN = 2048, 576
#: Vocabularies of Llama 2, SmolLM2, Phi-4, Llama 3, Qwen3 and Gemma 2.
VOCABULARIES = (32000, 49152, 100352, 128256, 151936, 256000)
CURVES = {
    peers.TRL.name: peers.TRL,
    "materialised logits": materialised.NLL,
    peers.LIGER.name: peers.LIGER,
    peers.TORCH.name: peers.TORCH,
    own.NLL.name: own.NLL,
}


def extra_bytes(name: str, vocabulary: int, tokens: int = TOKENS, hidden_size: int = HIDDEN) -> int:
    """The step's peak memory beyond its inputs and its gradients, measured in this process."""
    return of_step(_part(vocabulary, tokens, hidden_size), CURVES[name])["allocated"]  # type: ignore[return-value]


def _part(vocabulary: int, tokens: int = TOKENS, hidden_size: int = HIDDEN) -> Part:
    return Part(f"V {vocabulary}", Problem(tokens, hidden_size, vocabulary))


def measure() -> None:
    """Writes every point to docs/memory.json, each measured in a new process."""
    points = [
        {"loss": name, "vocabulary": v, "extra_bytes": in_process(_part(v), provider)["allocated"]}
        for name, provider in CURVES.items()
        for v in VOCABULARIES
    ]
    results = describe() | {"tokens": TOKENS, "hidden_size": HIDDEN, "dtype": "float32", "points": points}
    write_text(RESULTS, json.dumps(results, indent=1) + "\n")


def curves() -> dict[str, dict[int, float]]:
    """MiB by loss and vocabulary, from docs/memory.json."""
    points = json.loads(RESULTS.read_text())["points"]
    return {
        name: {point["vocabulary"]: point["extra_bytes"] / 2**20 for point in points if point["loss"] == name}
        for name in CURVES
    }


def plot() -> None:
    """Draws docs/memory.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.8), dpi=120)
    for name, curve in curves().items():
        width = 2.5 if name == own.NLL.name else 1.3
        axes.plot(
            [v / 1000 for v in curve], list(curve.values()), marker="o", markersize=4, linewidth=width, label=name
        )
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("vocabulary, thousands")
    axes.set_ylabel("MiB beside inputs and gradients")
    axes.set_title(f"Cross-entropy, forward and backward: {TOKENS} tokens, H {HIDDEN}, float32", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(PICTURE, bbox_inches="tight")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "plot"))
    if parser.parse_args().action == "measure":
        measure()
    plot()
