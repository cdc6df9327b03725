"""The tables and plots of docs/studies.md, from the results of `python recipes/studies`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from logitless.bench.targets import Json

from .pictures import Picture
from .results import newest, paragraph, plain_table, release

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "studies"
NAMES = ("sft-rate", "f-divergence", "joint", "dft", "prefix-rft")


def blocks() -> Mapping[str, Callable[[Path], str]]:
    """The setting, and a table for each study."""
    return {"studies": setting} | {f"study {name}": partial(table, name) for name in NAMES}


def setting(results: Path) -> str:
    """The model, what the numbers are, and the machine."""
    measured = newest(results, FILE)
    found, about = measured.found["setting"], measured.found["environment"]
    points = (
        f"- **Model**: a Llama of {found['parameters']} parameters over single characters, trained by `logitless "
        f"train` for {found['base_steps']} steps on 50,000 answers, mostly to shorter questions. It answers "
        f"{found['base']} of {found['questions']} questions of {found['hard']} numbers rightly.",
        f"- **Numbers** are means over {found['seeds']} seeds with 95% intervals (Student's t over the seeds), on "
        f'{found["questions"]} held-out questions. "Accuracy" is of the likeliest answer, "sampled" of 8 answers at '
        "temperature 1.",
        f"- **Machine**: {measured.origin}, transformers {release(about, 'transformers')}.",
    )
    return "".join(paragraph(point, "  ") for point in points)


def table(name: str, results: Path) -> str:
    """Accuracies of every case of a study."""
    cases = newest(results, FILE).found["studies"][name]
    columns = list(next(iter(cases.values()))["mean"])
    rows = ([case, *(_cell(found["mean"].get(column)) for column in columns)] for case, found in cases.items())
    return plain_table(["", *columns], rows)


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    half = "" if math.isnan(value["half"]) else f" ± {value['half']:.2f}"
    return f"{value['mean']:.2f}{half}"


def pictures(root: Path, results: Path) -> Iterator[Picture]:
    every = newest(results, FILE).found["studies"]
    for name in NAMES:
        yield Picture(root / "docs" / "studies" / f"{name}.png", every[name], draw)


def draw(cases: Json) -> Figure:
    """Bars of the study's last accuracies with their intervals, and a point for each seed."""
    from matplotlib.figure import Figure

    names = [name for name in next(iter(cases.values()))["mean"] if not name.startswith("stage")]
    size = (2.6 * len(names) + 1.5, 0.35 * len(cases) + 1.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        means = [found["mean"][name] for found in cases.values()]
        places = range(len(means))
        errors = [0.0 if math.isnan(mean["half"]) else mean["half"] for mean in means]
        axis.barh(places, [mean["mean"] for mean in means], xerr=errors, color="#9ecae1", ecolor="#555555", height=0.6)
        for place, found in zip(places, cases.values(), strict=True):
            axis.plot([seed[name] for seed in found["seeds"]], [place] * len(found["seeds"]), "k.", markersize=4)
        axis.set_title(name, fontsize="medium")
        axis.set_xlim(0, 1)
        axis.set_yticks(list(places), list(cases))
    axis.invert_yaxis()  # which all of them share
    return figure
