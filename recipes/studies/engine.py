"""Runs of the studies: stages of `logitless train` one behind another, each kept in a folder and not run again.

    <output>/<study>/<case>/seed-<n>/<stage>/     what `logitless train` writes
    <output>/<study>/<case>/seed-<n>/result.json  accuracies behind every stage

A killed run goes on with the first stage that has no model yet.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import task
import torch

from logitless.training import train
from logitless.training.config import options_from_mapping, read_yaml
from logitless.training.rollouts.generation import Sampling
from logitless.training.rollouts.model_generator import ModelTextGenerator, ends_of
from logitless.training.seeds import of_all_metrics

HERE = Path(__file__).resolve().parent
SAMPLES = 8  # of each question, beside the likeliest answer
QUESTIONS = 200  # held out, of each length
HELD_OUT = 1_000_003  # seed of the questions that no training sees

Data = Callable[[Path, int], list[task.Row]]  # of the model that a stage begins with, and a seed


@dataclass(frozen=True)
class Stage:
    """One training: a file of options, some of them changed, over data."""

    recipe: str
    data: Mapping[str, Data]
    """Rows by the option that names their file; of a mixture, by the component's name."""
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A way to train: its stages in their order."""

    name: str
    stages: Sequence[Stage]


@dataclass(frozen=True)
class Study:
    """Cases that are compared; docs/studies.md has what a paper says of them, and what came out."""

    name: str
    cases: Sequence[Case]
    lengths: Sequence[int] = (task.HARD,)


def run(
    study: Study, base: Path, output: Path, seeds: Sequence[int], say: Callable[[str], None], questions: int = QUESTIONS
) -> dict[str, Any]:
    """Runs what is missing of a study; returns its results by case: of each seed, and over them.

    `questions` of each length are asked behind every stage.
    """
    found = {}
    for case in study.cases:
        results = []
        for seed in seeds:
            folder = output / study.name / case.name / f"seed-{seed}"
            results.append(_result(case, study, base, folder, seed, questions))
            say(f"{study.name}, {case.name}, seed {seed}: {_shown(results[-1])}")
        found[case.name] = {"seeds": results, "mean": _over_seeds(results)}
    return found


def _shown(result: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in result.items())


def _result(case: Case, study: Study, base: Path, folder: Path, seed: int, questions: int) -> dict[str, float]:
    file = folder / "result.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    model, found = base, {}
    for number, stage in enumerate(case.stages, 1):
        trained = folder / f"{number}-{Path(stage.recipe).stem}"
        if not (trained / "model.safetensors").is_file():
            _train(stage, model, trained, seed)
        model = trained
        if number < len(case.stages):
            behind = accuracies(model, study.lengths, questions)
            found |= {f"stage {number}: {name}": value for name, value in behind.items()}
    found |= accuracies(model, study.lengths, questions)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "data", ignore_errors=True)
    return found


def _train(stage: Stage, model: Path, output: Path, seed: int) -> None:
    shutil.rmtree(output, ignore_errors=True)
    data = output.parent / "data"
    files = {name: str(task.write(data / f"{name}.jsonl", make(model, seed))) for name, make in stage.data.items()}
    values = read_yaml(HERE / stage.recipe) | dict(stage.changes)
    if "mixture" in values:
        values["mixture"] = [each | {"dataset_name": files[each["method"]]} for each in values["mixture"]]
    else:
        values |= files
    values |= {"model_name_or_path": str(model), "output_dir": str(output), "seed": seed, "use_cpu": True}
    options, _ = options_from_mapping(values, stage.recipe)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train(options)


def accuracies(model: Path, lengths: Sequence[int], count: int = QUESTIONS) -> dict[str, float]:
    """How often the likeliest answer to held-out questions is right, and a sampled one, by their length."""
    found = {}
    for length in lengths:
        asked = task.demonstrations(HELD_OUT + length, count, lengths=(length,))
        found[f"accuracy, {length} numbers"] = _share_of_right(answers(model, asked, 1, 0.0), asked)
        found[f"sampled, {length} numbers"] = _share_of_right(answers(model, asked, SAMPLES, 1.0), asked)
    return found


def _share_of_right(texts: Sequence[Sequence[str]], rows: Sequence[task.Row]) -> float:
    return statistics.fmean(text == row["answer"] for several, row in zip(texts, rows, strict=True) for text in several)


def answers(model: Path, rows: Sequence[task.Row], count: int, temperature: float, seed: int = 0) -> list[list[str]]:
    """`count` answers of a model to each row's prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ends = ends_of(loaded, tokenizer, "")
    generator = ModelTextGenerator(loaded, pad_token=tokenizer.pad_token_id, ends=ends, batch_size=400)
    prompts = [torch.tensor(tokenizer(row["prompt"])["input_ids"], dtype=torch.int32) for row in rows]
    sampling = Sampling(max_tokens=2 * task.HARDER, temperature=temperature)
    found = generator.generate([prompt for prompt in prompts for _ in range(count)], sampling, seed)
    texts = tokenizer.batch_decode([each.ids for each in found], skip_special_tokens=True)
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def _over_seeds(results: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean over the seeds and half of its 95% interval, Student's t."""
    found = of_all_metrics(results)
    return {name: {"mean": each.mean, "half": each.interval.high - each.mean} for name, each in found.items()}
