"""Runs the studies and writes docs/studies.md: `python recipes/studies`.

    python recipes/studies                          what is missing of all studies, three seeds; an hour
    python recipes/studies --only dft --seeds 1     one study, one seed
    python recipes/studies --short                  a few steps of everything, which shows that it runs

Runs are kept in `runs/studies`, so that a second call computes what the first one left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
BASE_STEPS, SHORT_STEPS = 700, 400


def main() -> None:
    """The command."""
    options = _parse()
    os.chdir(HERE)  # where the reward of rl.yaml is found
    import base
    import engine
    import report
    import task
    import torch
    from plans import STUDIES

    torch.set_num_threads(1)
    studies = [study for study in STUDIES if options.only in ("", study.name)]
    if options.short:
        studies = [_shortened(study) for study in studies]
    model = base.make(options.output, SHORT_STEPS if options.short else BASE_STEPS)
    asked = 20 if options.short else engine.QUESTIONS
    first = engine.accuracies(model, (task.HARD,), asked)
    found = {each.name: engine.run(each, model, options.output, range(options.seeds), print, asked) for each in studies}
    if options.short or options.only:
        return
    file = DOCS / "studies.json"
    results = {"setting": _setting(first, options.seeds, task.HARD), "studies": found}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (DOCS / "studies.md").write_text(report.page(STUDIES, results), encoding="utf-8")
    for study in STUDIES:
        report.plot(study, found[study.name], DOCS / "studies" / f"{study.name}.png")


def _setting(first: dict[str, float], seeds: int, hard: int) -> dict[str, Any]:
    import torch
    import transformers

    import logitless

    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (logitless, torch, transformers))
    return {
        "parameters": "335,000",
        "base_steps": BASE_STEPS,
        "base": round(200 * first[f"accuracy, {hard} numbers"]),
        "hard": hard,
        "seeds": seeds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions,
    }


def _shortened(study: Any) -> Any:
    """The study with two steps of every stage."""
    return dataclasses.replace(
        study,
        cases=[
            dataclasses.replace(
                case,
                stages=[dataclasses.replace(stage, changes={**stage.changes, "max_steps": 2}) for stage in case.stages],
            )
            for case in study.cases
        ],
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The papers' claims on a small scale.")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "runs" / "studies", help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every case (default: %(default)s)")
    parser.add_argument("--only", default="", help="name of one study, which is run and not reported")
    parser.add_argument("--short", action="store_true", help="two steps of everything, not reported")
    options = parser.parse_args()
    options.output = options.output.absolute()
    return options


if __name__ == "__main__":
    main()
