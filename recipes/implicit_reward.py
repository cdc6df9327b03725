"""Does the reward that a fine-tuned model implies tell right answers from wrong ones? One AUC for each way of asking.

Below the output folder:

    model/                         SmolLM2-135M-Instruct, as in first_run.py (not with --model)
    data/sft.jsonl, tuned/         worked solutions, and the model fine-tuned on them with dft.yaml (not with --tuned)
    data/pairs-<wrong>.jsonl       worked solutions to held-out questions against wrong ones
    rewards/<wrong>-<way>.*        what `logitless reward` writes
    results.json                   every number

Wrong answers are of two kinds: `answer` has one character of the final answer replaced, so that nothing is wrong before
it, and `step` also one of a step before. Three ways of asking: the endogenous reward of the model before fine-tuning
(base) and after it (tuned), and the log-odds of the tuned model against the base.

    python recipes/implicit_reward.py --tuned runs/first-run/dft
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smollm2
from first_run import (
    HERE,
    ROWS_PER_STEP,
    SEEDS,
    Options,
    Train,
    environment,
    run_in_process_of_its_own,
    train_in_process_of_its_own,
)
from reasoning_data import Question, corrupted, make_questions, mistaken, pair_row, sft_row, write_jsonl
from rich.console import Console
from rich.table import Table

WRONG: dict[str, Callable[[Question, random.Random], str]] = {"answer": corrupted, "step": mistaken}
SEED = 0  # of what is wrong where

Score = Callable[[Options], None]  # of `logitless reward`


@dataclass(frozen=True)
class Settings:
    """Choices of the command line."""

    output: Path
    model: Path | None = None  # folder or .gguf file; None: SmolLM2
    tuned: Path | None = None  # folder; None: fine-tuned here
    steps: int = 6  # of the fine-tuning, as in the first run
    pairs: int = 40  # of each kind


@dataclass
class RewardCheck:
    """The stages in order."""

    settings: Settings
    train: Train
    score: Score
    console: Console

    def __post_init__(self) -> None:
        self.held_out = make_questions(SEEDS["held-out"], self.settings.pairs)

    def run(self) -> dict[str, Any]:
        """Runs all stages and returns the contents of results.json."""
        started = time.perf_counter()
        base = self._base_model()
        tuned = self.settings.tuned or self._fine_tuned(base)
        ways = {
            "base": {"model": str(base)},
            "tuned": {"model": str(tuned)},
            "log-odds": {"model": str(tuned), "reference": str(base)},
        }
        found = {
            wrong: {name: self._summary(wrong, name, way, self._pairs(wrong)) for name, way in ways.items()}
            for wrong in WRONG
        }
        minutes = (time.perf_counter() - started) / 60
        results = found | {"minutes": minutes, "environment": environment()}
        self._folder("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for wrong, where in itertools.product(WRONG, ("_within_prompts", "")):
            self.console.print(auc_table(wrong, where, found[wrong]))
        self.console.print(f"numbers: {self._folder('results.json')}; took {minutes:.1f} minutes", soft_wrap=True)
        return results

    def _base_model(self) -> Path:
        from logitless.training.model import convert_gguf

        model = self.settings.model or smollm2.fetch(self._folder("model"))
        return convert_gguf(model, self._folder("model")) if model.suffix == ".gguf" else model

    def _fine_tuned(self, base: Path) -> Path:
        taught = make_questions(SEEDS["sft"], self.settings.steps * ROWS_PER_STEP, held_out=self.held_out)
        rows, folder = self._folder("data") / "sft.jsonl", self._folder("tuned")
        write_jsonl(rows, map(sft_row, taught))
        options: dict[str, str | bool] = {"model_name_or_path": str(base), "dataset_name": str(rows)}
        self.train(HERE / "dft.yaml", options | {"output_dir": str(folder), "max_steps": str(self.settings.steps)})
        return folder

    def _pairs(self, wrong: str) -> Path:
        """Short rows first, so that batches hold less padding."""
        draw, file = random.Random(SEED), self._folder("data") / f"pairs-{wrong}.jsonl"
        rows = [pair_row(question, WRONG[wrong](question, draw)) for question in self.held_out]
        write_jsonl(file, sorted(rows, key=lambda row: len(str(row))))
        return file

    def _summary(self, wrong: str, way: str, models: Options, pairs: Path) -> dict[str, Any]:
        output = self._folder("rewards") / f"{wrong}-{way}.jsonl"
        self.console.rule(f"{wrong}: {way}")
        files = {"dataset_name": str(pairs), "output": str(output), "html": str(output.with_suffix(".html"))}
        self.score(dict(models) | files | {"max_length": "512", "per_device_eval_batch_size": "4"})
        found: dict[str, Any] = json.loads(output.with_suffix(".summary.json").read_text(encoding="utf-8"))
        return found

    def _folder(self, name: str) -> Path:
        return self.settings.output / name


def auc_table(wrong: str, where: str, summaries: Mapping[str, Any]) -> Table:
    """The AUC of every measure in every way, with its interval.

    Args:
        wrong: the kind of wrong answers.
        where: "" for the AUC over all answers, "_within_prompts" for the one against answers to the same prompt.
        summaries: of `logitless reward`, by way.
    """
    table = Table("AUC", *summaries, title=f"wrong {wrong}: {where.replace('_', ' ').strip() or 'over all answers'}")
    columns = [summary["ranking"]["measures"] for summary in summaries.values()]
    for rows in zip(*columns, strict=True):
        table.add_row(rows[0]["measure"], *(_cell(row[f"auc{where}"], row[f"interval{where}"]) for row in rows))
    return table


def _cell(value: float, interval: list[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def score_in_process_of_its_own(options: Options) -> None:
    """Runs `logitless reward --name value ...`, as `run_in_process_of_its_own` does."""
    run_in_process_of_its_own(("reward",), options)


def parse(arguments: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description="AUC of the implicit reward, right against wrong answers.")
    add = parser.add_argument
    add("--output", type=Path, default=HERE.parent / "runs" / "implicit-reward", help="folder of everything")
    add("--model", type=Path, help="model folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--tuned", type=Path, help="its fine-tuned version, a folder (default: fine-tuned here)")
    add("--steps", type=int, default=Settings.steps, help="steps of the fine-tuning (default: %(default)s)")
    add("--pairs", type=int, default=Settings.pairs, help="pairs of each kind (default: %(default)s)")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    RewardCheck(parse(), train_in_process_of_its_own, score_in_process_of_its_own, Console()).run()


if __name__ == "__main__":
    main()
