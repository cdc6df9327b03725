"""README's picture: the memory of a cross-entropy step against the vocabulary, from `logitless bench`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from logitless.bench import fits
from logitless.bench.targets import MIB, Json

from .pictures import Picture
from .results import Measured, commits, day, newest, paragraph, release

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE, PART, PICTURE = "bench", "vocabulary", "docs/memory.png"
#: The curves that the sentence under the picture is about.
OURS, MATERIALISED = "logitless, auto", "materialised"


def measured(results: Path) -> Measured:
    """The most recent curve along the vocabulary."""
    return newest(results, FILE, PART)


def text(results: Path) -> str:
    """The picture, and what the largest vocabulary takes."""
    kind, found = measured(results)
    about, every = found["environment"], curves(found)
    ours, theirs = every[OURS], every[MATERIALISED]
    largest = max(theirs.keys() & ours.keys())
    sizes = list(ours.values())
    alt = f"{min(sizes):.0f} to {max(sizes):.0f} MiB with logitless, up to {theirs[largest]:.0f} materialised"
    where = f"`{kind}`, torch {release(about, 'torch')}, {day(about)}, {commits([about])}"
    sentence = (
        f"Of {step(found)} and a vocabulary of {largest}, materialised logits take {theirs[largest]:.0f} MiB beside "
        f"inputs and gradients, logitless {ours[largest]:.0f} MiB ({where})."
    )
    return f"![Memory of a cross-entropy step by vocabulary: {alt}]({PICTURE})\n\n{paragraph(sentence)}"


def step(found: Json) -> str:
    """The tokens of a step, and their hidden size."""
    tokens, hidden = re.findall(r"\b[NH] (\d+)", found["points"][0]["problem"])
    return f"{tokens} tokens, H {hidden}"


def picture(root: Path, results: Path) -> Picture:
    return Picture(root / PICTURE, measured(results).found, draw)


def curves(found: Json) -> dict[str, dict[int, float]]:
    """MiB by provider and vocabulary, of everyone whose memory is known."""
    every = {name: dict(fits.memories(found, name)) for name in fits.providers(found)}
    return {name: {x: y / MIB for x, y in curve.items()} for name, curve in every.items() if curve}


def draw(found: Json) -> Figure:
    """A curve for each provider, ours the widest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves(found).items():
        width = 2.5 if name == OURS else 1.3
        axes.plot(list(curve), list(curve.values()), marker="o", markersize=4, linewidth=width, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("MiB beside inputs and gradients")
    axes.set_title(f"Cross-entropy, forward and backward: {step(found)}, float32", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
