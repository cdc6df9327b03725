"""README's picture: the memory of a cross-entropy step against the vocabulary, and the sentence under it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from logitless.bench.providers import materialised, own, peers
from logitless.bench.targets import MIB, Json

from .pictures import Picture
from .results import commits, day, newest, paragraph, release

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE, PICTURE = "memory", "docs/memory.png"


def text(results: Path) -> str:
    """The picture, and what the largest vocabulary takes."""
    measured = newest(results, FILE)
    found, about = measured.found, measured.found["environment"]
    ours, theirs = (list(curves(found)[name].items()) for name in (own.NLL.name, materialised.NLL.name))
    (largest, whole), (_, mine), sizes = theirs[-1], ours[-1], [size for _, size in ours]
    alt = f"{min(sizes):.0f} to {max(sizes):.0f} MiB with logitless, up to {whole:.0f} materialised"
    names = {"torch": "torch", "TRL": "trl", "Liger": "liger-kernel"}
    releases = ", ".join(f"{name} {release(about, package)}" for name, package in names.items())
    where = f"`{measured.kind}`, {releases}, {day(about)}, {commits([about])}"
    sentence = (
        f"Of {found['tokens']} tokens and a vocabulary of {largest}, materialised logits take {whole:.0f} MiB beside "
        f"inputs and gradients, logitless {mine:.0f} MiB ({where})."
    )
    return f"![Memory of a cross-entropy step by vocabulary: {alt}]({PICTURE})\n\n{paragraph(sentence)}"


def picture(root: Path, results: Path) -> Picture:
    return Picture(root / PICTURE, newest(results, FILE).found, draw)


def curves(found: Json) -> dict[str, dict[int, float]]:
    """MiB by provider and vocabulary."""
    result: dict[str, dict[int, float]] = {}
    for point in sorted(found["points"], key=lambda point: point["vocabulary"]):
        result.setdefault(point["provider"], {})[point["vocabulary"]] = point["extra_bytes"] / MIB
    return result


def draw(found: Json) -> Figure:
    """A curve for each provider, ours the widest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    every = curves(found)
    for name in (peers.TRL.name, materialised.NLL.name, peers.LIGER.name, peers.TORCH.name, own.NLL.name):
        width = 2.5 if name == own.NLL.name else 1.3
        x = [vocabulary / 1000 for vocabulary in every[name]]
        axes.plot(x, list(every[name].values()), marker="o", markersize=4, linewidth=width, label=name)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("vocabulary, thousands")
    axes.set_ylabel("MiB beside inputs and gradients")
    shape = f"{found['tokens']} tokens, H {found['hidden_size']}, {found['dtype']}"
    axes.set_title(f"Cross-entropy, forward and backward: {shape}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
