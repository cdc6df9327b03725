"""Runs the studies and writes their results, which docs/studies.md shows: `python recipes/studies`.

    python recipes/studies                          what is missing of all studies, three seeds; an hour
    python recipes/studies --only dft --seeds 1     one study, one seed
    python recipes/studies --short                  a few steps of everything, which shows that it runs

Runs are kept in `runs/studies`, so that a second call computes what the first one left. The results go to studies.json
in this machine's folder of `benchmarks/results`; `python -m benchmarks figures` makes tables and plots of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
BASE_STEPS, SHORT_STEPS = 700, 400


def main() -> None:
    """The command."""
    options = _parse()
    os.chdir(HERE)  # where the reward of rl.yaml is found
    import base
    import engine
    import task
    import torch
    from plans import STUDIES

    from logitless.bench.environment import describe, machine_kind
    from logitless.training.files import write_text

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
    about = describe()
    setting = _setting(first[f"accuracy, {task.HARD} numbers"], asked, options.seeds, task.HARD)
    file = RESULTS / machine_kind(about) / "studies.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"environment": about, "setting": setting, "studies": found}, indent=1) + "\n")


def _setting(first: float, asked: int, seeds: int, hard: int) -> dict[str, Any]:
    """What the page says of the base model, `first` being its accuracy, and of the questions."""
    return {
        "parameters": "335,000",
        "base_steps": BASE_STEPS,
        "base": round(asked * first),
        "hard": hard,
        "seeds": seeds,
        "questions": asked,
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
