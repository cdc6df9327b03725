"""Measures and draws README's picture: the memory of one cross-entropy step against the size of the vocabulary.

    python docs/memory.py measure       # docs/memory.json, then the picture; took 11 minutes with one thread
    python docs/memory.py plot          # docs/memory.png, from docs/memory.json

One step is the forward and backward of the mean negative log-likelihood, float32, with a trainable head. Each step runs
in a process of its own, after a warm-up. Its memory is the peak of PyTorch's allocator beyond the inputs and the two
gradients. That figure counts tensors alone, and is the same on every run however busy the machine is.
The plot needs matplotlib (`pip install "logitless[recipes]"`), the peers are in `logitless[test]`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
from logitless.testing import make_problem, watch_allocations

HERE = Path(__file__).resolve().parent
RESULTS, PICTURE = HERE / "memory.json", HERE / "memory.png"
TOKENS, HIDDEN = 2048, 576
#: Vocabularies of Llama 2, SmolLM2, Phi-4, Llama 3, Qwen3 and Gemma 2.
VOCABULARIES = (32000, 49152, 100352, 128256, 151936, 256000)
PACKAGES = ("torch", "logitless", "trl", "liger-kernel")


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def pytorch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The PyTorch fallback that Liger takes on a CPU."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets).mean()


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The operation of TRL's trainers, with the vocabulary chunk that they pass."""
    from trl.kernels import ChunkedLogProbFunction

    chunk = min(32768, len(weight))
    return -ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0].mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "TRL ChunkedLogProbFunction": trl,
    "materialised logits": materialised,
    "Liger scaled cross-entropy": liger,
    "torch F.linear_cross_entropy": pytorch,
    "logitless": logitless.linear_cross_entropy,
}


def extra_bytes(name: str, vocabulary: int, tokens: int = TOKENS, hidden_size: int = HIDDEN) -> int:
    """The step's peak memory beyond its inputs and its gradients."""
    _step(name, 64, hidden_size, 256)
    return _step(name, tokens, hidden_size, vocabulary)


def _step(name: str, tokens: int, hidden_size: int, vocabulary: int) -> int:
    hidden, weight, _, targets = make_problem((tokens,), hidden_size, vocabulary)
    with watch_allocations() as seen:
        LOSSES[name](hidden, weight, targets).backward()
    return seen.peak - hidden.nbytes - weight.nbytes


def measure() -> None:
    """Writes every point to docs/memory.json, each measured in a new process."""
    points = [(name, vocabulary) for name in LOSSES for vocabulary in VOCABULARIES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as processes:
        peaks = list(processes.map(extra_bytes, *zip(*points, strict=True)))
    results = {
        "tokens": TOKENS,
        "hidden_size": HIDDEN,
        "dtype": "float32",
        "processor": _processor(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "points": [
            {"loss": name, "vocabulary": vocabulary, "extra_bytes": peak}
            for (name, vocabulary), peak in zip(points, peaks, strict=True)
        ],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def curves() -> dict[str, dict[int, float]]:
    """MiB by loss and vocabulary, from docs/memory.json."""
    points = json.loads(RESULTS.read_text())["points"]
    return {
        name: {point["vocabulary"]: point["extra_bytes"] / 2**20 for point in points if point["loss"] == name}
        for name in LOSSES
    }


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.8), dpi=120)
    for name, curve in curves().items():
        width = 2.5 if name == "logitless" else 1.3
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
