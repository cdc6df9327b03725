"""docs/studies.md and its plots, from docs/studies.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import Study


def page(studies: Sequence[Study], results: Mapping[str, Any]) -> str:
    """The page; what was run and what came out, a section for each study."""
    parts = [_HEAD.format(**results["setting"])]
    for study in studies:
        if study.name in results["studies"]:
            parts.append(_section(study, results["studies"][study.name]))
    return "\n".join(parts)


_HEAD = """# Studies

What the three papers say, tried on a scale that two CPU cores carry. Written by `python recipes/studies` from
[studies.json](studies.json), which has every number of every seed; the command runs what is missing. The full scale is
that of [recipes/papers](recipes.md).

- **Task**: running sums modulo 5, `3+1+4+2=` to be answered `3430`; an answer is right if all of it is. Such answers
  are built step by step, and one wrong step makes the rest wrong.
- **Model**: a Llama of {parameters} parameters over single characters, trained by `logitless train` for {base_steps}
  steps on 50,000 answers, mostly to shorter questions. It answers {base} of 200 questions of {hard} numbers rightly.
- **Numbers** are means over {seeds} seeds with 95% intervals (Student's t over the seeds), on 200 held-out questions.
  "Accuracy" is of the likeliest answer, "sampled" of 8 answers at temperature 1.
- **Machine**: {machine}, {versions}; one thread.

The papers train models of billions of parameters that know much of their task. This one knows little of its own. What
agrees with a paper here is no proof of it, and what disagrees is no refutation. What needs more scale than was had: all
of them on a model that has something to lose, which is what `recipes/papers/small` does with SmolLM2, overnight, and
`recipes/papers` with GPUs. [The implicit reward](reward.md) was tried on SmolLM2.
"""


def _section(study: Study, cases: Mapping[str, Any]) -> str:
    names = list(next(iter(cases.values()))["mean"])
    lines = [f"## {study.title}", "", _wrapped(f"**The paper**: {study.claim}"), ""]
    lines += [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for case, found in cases.items():
        cells = [_cell(found["mean"][name]) if name in found["mean"] else "" for name in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![{study.title}](studies/{study.name}.png)", "",
                      _wrapped(f"**Here**: {study.finding}"), ""])  # fmt: skip


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _cell(value: Mapping[str, float]) -> str:
    half = "" if math.isnan(value["half"]) else f" ± {value['half']:.2f}"
    return f"{value['mean']:.2f}{half}"


def plot(study: Study, cases: Mapping[str, Any], file: Path) -> None:
    """Bars of the study's last accuracies with their intervals, and a point for each seed."""
    from matplotlib.figure import Figure

    names = [name for name in next(iter(cases.values()))["mean"] if not name.startswith("stage")]
    figure = Figure(figsize=(2.6 * len(names) + 1.5, 0.35 * len(cases) + 1.2), layout="constrained")
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
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
