"""The whole road once: a real model, DFT, then DPO, each with logitless and with materialised logits, side by side.

Below the output folder, in the order in which they appear:

    model/                      SmolLM2-135M-Instruct: the GGUF file of its wheel, and its float32 conversion
    data/sft-*.jsonl            questions of reasoning-gym with worked solutions
    dft/, dft-materialised/     `logitless train` with dft.yaml
    data/pairs-*.jsonl          worked solutions against the DFT model's own wrong ones
    dpo/, dpo-materialised/     `logitless train` with dpo.yaml, from the DFT model
    results.json, curves.png    every number, and both ways' training curves

first_run.sh makes the environment and calls this. Every training is a process of its own, so that its peak memory is
its own too; the two runs of a method differ in `--backend` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import smollm2
from answers import answers
from compare import COSTS_HEADER, CURVE_TOLERANCE, LEARNT_HEADER, Comparison, Run, costs, curves, learnt, printed
from reasoning_data import Question, Row, make_questions, preference_rows, sft_row, write_jsonl
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROWS_PER_STEP = 14  # worked solutions that fill the four packs of a DFT step
PAIRS_PER_STEP = 4  # as in dpo.yaml
SEEDS = {"held-out": 1, "sft": 2, "pairs": 3}  # of the questions

Options = Mapping[str, str | bool]
Train = Callable[[Path, Options], None]  # config file, options by name


@dataclass(frozen=True)
class Settings:
    """Choices of the command line."""

    output: Path
    model: Path | None = None  # folder or .gguf file; None: SmolLM2
    steps: int = 6  # of DFT, and of DPO
    held_out: int = 20  # questions
    setup_seconds: float = 0.0


@dataclass
class FirstRun:
    """The stages in order, their durations, and the places of their files."""

    settings: Settings
    train: Train
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.settings.setup_seconds:
            self.seconds["environment"] = self.settings.setup_seconds
        steps = self.settings.steps
        self.held_out = make_questions(SEEDS["held-out"], self.settings.held_out)
        self.taught = make_questions(SEEDS["sft"], steps * ROWS_PER_STEP, held_out=self.held_out)
        self.compared = make_questions(SEEDS["pairs"], steps * PAIRS_PER_STEP, held_out=self.held_out)

    def run(self) -> dict[str, Any]:
        """Runs all stages and returns the contents of results.json."""
        with self._stage("model"):
            base = self._base_model()
        with self._stage("data"):
            rows = self._write_sft_rows()
        dft = self._both("dft", base, rows)
        with self._stage("answers of the DFT model"):
            found = self._answers(self._folder("dft"), [*self.held_out, *self.compared])
            held_out, compared = found[: len(self.held_out)], found[len(self.held_out) :]
            pairs, wrong_from = self._write_pairs(held_out, compared)
        dpo = self._both("dpo", self._folder("dft"), pairs)
        with self._stage("answers of the first and the last model"):
            completions = {"base": self._answers(base, self.held_out), "DFT": held_out}
            completions["DPO"] = self._answers(self._folder("dpo"), self.held_out)
        right = {name: self._right(texts) for name, texts in completions.items()}
        return self._report([dft, dpo], right, wrong_from)

    # Stages

    def _base_model(self) -> Path:
        from logitless.training.model import convert_gguf

        model = self.settings.model or smollm2.fetch(self._folder("model"))
        return convert_gguf(model, self._folder("model")) if model.suffix == ".gguf" else model

    def _write_sft_rows(self) -> dict[str, Path]:
        return self._write("sft", map(sft_row, self.taught), map(sft_row, self.held_out))

    def _write_pairs(self, held_out: list[str], compared: list[str]) -> tuple[dict[str, Path], dict[str, int]]:
        """Pairs against the DFT model's answers, and where the wrong ones of the training pairs came from."""
        rows, wrong_from = preference_rows(self.compared, compared)
        self.console.print(f"wrong answers of the pairs: {wrong_from['model']} of {len(rows)} are the model's own")
        return self._write("pairs", rows, preference_rows(self.held_out, held_out)[0]), dict(wrong_from)

    def _both(self, method: str, model: Path, data: Mapping[str, Path]) -> Comparison:
        """Trains with logitless, then again with materialised logits."""
        options: dict[str, str | bool] = {"model_name_or_path": str(model), "dataset_name": str(data["train"])}
        options |= {"cache_dir": str(self._folder("cache")), "max_steps": str(self.settings.steps)}
        held_out: dict[str, str | bool] = {"eval_dataset_name": str(data["held_out"]), "eval_on_start": True}
        ours, other = self._folder(method), self._folder(f"{method}-materialised")
        with self._stage(f"{method} with logitless"):
            self.train(HERE / f"{method}.yaml", options | held_out | {"output_dir": str(ours)})
        with self._stage(f"{method} with materialised logits"):
            self.train(HERE / f"{method}.yaml", options | {"output_dir": str(other), "backend": "materialised"})
        (other / "model.safetensors").unlink()  # the other run's, to rounding
        return Comparison(method.upper(), Run.read(ours), Run.read(other))

    def _report(self, runs: list[Comparison], right: dict[str, int], wrong_from: dict[str, int]) -> dict[str, Any]:
        results: dict[str, Any] = {run.name: run.to_dict() for run in runs}
        results |= {"right_answers": right | {"of": len(self.held_out)}, "wrong_answers_from": wrong_from}
        results |= {"seconds": self.seconds, "minutes": sum(self.seconds.values()) / 60, "environment": environment()}
        self._folder("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        curves(results).savefig(self._folder("curves.png"))
        self.console.rule("result")
        self.console.print(printed("What was learnt", LEARNT_HEADER, learnt(results)))
        self.console.print(printed("What it cost", COSTS_HEADER, costs(results)))
        for line in (
            f"curves: {self._folder('curves.png')}",
            f"numbers: {self._folder('results.json')}",
            f"took {results['minutes']:.1f} minutes",
        ):
            self.console.print(line, soft_wrap=True)
        return results

    # Helpers

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.console.rule(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def _folder(self, name: str) -> Path:
        return self.settings.output / name

    def _write(self, name: str, train: Iterable[Row], held_out: Iterable[Row]) -> dict[str, Path]:
        """Writes both parts to files, short rows first, so that the batches of the evaluation hold less padding."""
        files = {part: self._folder("data") / f"{name}-{part}.jsonl" for part in ("train", "held_out")}
        for file, rows in zip(files.values(), (train, held_out), strict=True):
            write_jsonl(file, sorted(rows, key=lambda row: len(str(row))))
        return files

    def _answers(self, model: Path, questions: list[Question]) -> list[str]:
        return answers(model, [question.prompt for question in questions], self._folder("cache") / "answers")

    def _right(self, completions: list[str]) -> int:
        """How many of the held-out questions are answered rightly."""
        return sum(question.is_right(text) for question, text in zip(self.held_out, completions, strict=True))


def environment() -> dict[str, Any]:
    """Device, versions, date and commit."""
    import torch

    from logitless.bench.environment import describe

    return describe(gpu=torch.cuda.is_available())


def run_in_process_of_its_own(command: Sequence[str], options: Options) -> None:
    """Runs `logitless <command> --name value --switch ...`; raises SystemExit if it fails."""
    flags = [word for name, value in options.items() for word in (f"--{name}", value) if isinstance(word, str)]
    done = subprocess.run([sys.executable, "-m", "logitless", *command, *flags])
    if done.returncode:
        raise SystemExit(f"logitless {' '.join(command)} ended with status {done.returncode}; above is why")


def train_in_process_of_its_own(config: Path, options: Options) -> None:
    """Runs `logitless train --config ...`, as `run_in_process_of_its_own` does."""
    run_in_process_of_its_own(("train", "--config", str(config)), options)


def parse(arguments: list[str] | None = None) -> Settings:
    """The command line."""
    parser = argparse.ArgumentParser(description="DFT and DPO of a small real model, with and without logits.")
    add = parser.add_argument
    add("--output", type=Path, default=HERE.parent / "runs" / "first-run", help="folder of everything")
    add("--model", type=Path, help="model folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--steps", type=int, default=Settings.steps, help="steps of each training (default: %(default)s)")
    add("--held-out", type=int, default=Settings.held_out, help="questions kept for evaluation (default: %(default)s)")
    add("--setup-seconds", type=float, default=0.0, help="seconds that the environment took, for the report")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they are for downloads, and nothing is downloaded
    results = FirstRun(parse(), train_in_process_of_its_own, Console()).run()
    apart = max(results[method]["largest_curve_difference"] for method in ("DFT", "DPO"))
    if apart > CURVE_TOLERANCE:
        raise SystemExit(f"the training curves differ by {apart:.1e}, more than rounding explains ({CURVE_TOLERANCE})")


if __name__ == "__main__":
    main()
