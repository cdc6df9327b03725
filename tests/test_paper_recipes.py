"""recipes/papers: every file is a run that could start, its batch is the one it states, and its small twin runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import make_model

from logitless.losses import PairLoss
from logitless.rewards import final_answer
from logitless.training import TrainOptions, train
from logitless.training.config import options_from_mapping, read_yaml
from logitless.training.data import Row
from logitless.training.forms import canonical, canonical_pair, canonical_prompt
from logitless.training.metrics import read_metrics
from logitless.training.mixture import ComponentOptions, components_of
from logitless.training.parallel import World
from logitless.training.rollouts.advantages import estimator_of
from logitless.training.rollouts.groups import Schedule, shows
from logitless.training.rollouts.inputs import correction_of
from logitless.training.rollouts.rewards import load_rewards, score_completions
from logitless.training.rollouts.setup import check_options, round_sizes, sampling_of

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ROOT / "recipes" / "papers"
NAMES = sorted(path.stem for path in PAPERS.glob("*.yaml"))
FILES = [*NAMES, *(f"small/{name}" for name in NAMES)]
ALONE = World(0, 1, torch.device("cpu"))

#: "Batch of expert: 8 processes x 4 x 2 = 64 rows an update."
BATCH = re.compile(
    r"Batch(?: of (\w+))?: (\d+) process(?:es)? x (\d+) x (\d+) = (\d+) (rows|pairs|completions) an update"
)
#: "a round is 32 prompts x 8 = 256 completions, 1 update."
ROUND = re.compile(r"a round is (\d+) prompts x (\d+) = (\d+) completions, (\d+) updates?\.")


def read(name: str, **changes: Any) -> TrainOptions:
    options, notes = options_from_mapping(read_yaml(PAPERS / f"{name}.yaml") | changes, name)
    assert notes == []
    return options


def comment_of(name: str) -> str:
    """What a file says before its first option, on one line."""
    text = (PAPERS / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines)


def sampling_components(name: str) -> list[ComponentOptions]:
    return [component for component in components_of(read(name)) if component.options.samples]


SAMPLING = [name for name in FILES if sampling_components(name)]
REWARDED = [name for name in SAMPLING if any(c.options.reward_funcs for c in sampling_components(name))]


# Files


def test_every_file_has_a_twin_and_a_row_in_the_documentation() -> None:
    assert sorted(path.stem for path in (PAPERS / "small").glob("*.yaml")) == NAMES
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"(../recipes/papers/{name}.yaml)" in page


@pytest.mark.parametrize("name", FILES)
def test_options_make_losses_and_say_how_to_be_run(name: str) -> None:
    options = read(name)
    assert options.model_name_or_path
    assert f"--config recipes/papers/{name}.yaml" in comment_of(name)
    for component in components_of(options):
        component.options.make_loss()
        assert component.options.dataset_name


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_has_the_loss_of_the_paper(name: str) -> None:
    losses = [[c.options.make_loss() for c in components_of(read(each))] for each in (name, f"small/{name}")]
    assert losses[0] == losses[1]
    whole, small = (components_of(read(each)) for each in (name, f"small/{name}"))
    for one, other in zip(whole, small, strict=True):
        assert (one.name, one.weight, one.options.method) == (other.name, other.weight, other.options.method)
        assert one.options.advantage_estimator == other.options.advantage_estimator
        assert one.options.scale_rewards == other.options.scale_rewards


@pytest.mark.parametrize("name", FILES)
def test_the_batch_is_the_one_that_is_stated(name: str) -> None:
    comment = comment_of(name)
    stated = {found[0]: found[1:] for found in BATCH.findall(comment)}
    components = {component.name: component.options for component in components_of(read(name))}
    assert set(stated) == set(components)
    rounds = iter(ROUND.findall(comment))
    for part, (*numbers, total, unit) in stated.items():
        processes, size, accumulation = map(int, numbers)
        own = components[part]
        assert (size, accumulation) == (own.per_device_train_batch_size, own.gradient_accumulation_steps)
        assert processes * size * accumulation == int(total)
        if own.samples:
            assert unit == "completions"
            groups, updates = round_sizes(own, own.make_loss())
            sampled = groups * processes * own.num_generations
            found = (groups * processes, own.num_generations, sampled, updates * own.num_iterations)
            assert tuple(map(int, next(rounds))) == found
        else:
            assert unit == ("pairs" if isinstance(own.make_loss(), PairLoss) else "rows")
    assert next(rounds, None) is None


@pytest.mark.parametrize("name", SAMPLING)
def test_rounds_could_be_made(name: str) -> None:
    for component in sampling_components(name):
        own, loss = component.options, component.options.make_loss()
        check_options(own, loss, ALONE)
        assert own.max_completion_length < own.max_length
        Schedule(shows(loss), own.demonstration_schedule or {}).confirm()
        assert correction_of(own, loss, sampling_of(own), served=False) == "none"
        assert own.advantage_estimator in (None, estimator_of(loss, own.advantage_estimator))


@pytest.mark.parametrize("line", re.findall(r"^#   ((?:loss|advantage_estimator|demonstration_schedule): .*)$",
                                            (PAPERS / "prefix-rft.yaml").read_text(), re.MULTILINE))  # fmt: skip
def test_ablations_are_options(line: str) -> None:
    import yaml

    changes = yaml.safe_load(line)
    options = read("prefix-rft", **changes)
    loss = options.make_loss()
    check_options(options, loss, ALONE)
    Schedule(shows(loss), options.demonstration_schedule or {}).confirm()
    assert options != read("prefix-rft")


# Rewards


@pytest.mark.parametrize("name", REWARDED)
def test_reward_functions_are_found(name: str) -> None:
    pytest.importorskip("logitless.rewards")
    for component in sampling_components(name):
        own = component.options
        assert own.reward_funcs is not None
        found = load_rewards(own.reward_funcs)
        assert len(found) == len(own.reward_weights or found)


@pytest.mark.parametrize(
    ("name", "completions", "expected"),
    [
        ("reft-ppo", ["1 + 2 = 3\nTherefore, the answer is: 3", "Therefore, the answer is: 4", "no"], [1.0, 0.1, 0.0]),
        ("uft", [r"So \boxed{3}.", r"So \boxed{4}.", "no"], [1.0, 0.1, 0.0]),
        ("dapo", ["Answer: 3", "Answer: 4", "no"], [2.0, 0.0, 0.0]),
    ],
)
def test_rewards_are_those_of_the_paper(name: str, completions: list[str], expected: list[float]) -> None:
    pytest.importorskip("logitless.rewards")
    pytest.importorskip("math_verify")
    own = read(name)
    assert own.reward_funcs is not None
    count = len(completions)
    columns = {"answer": ["3"] * count}
    ids = [[1, 2, 3]] * count
    scores = score_completions(
        load_rewards(own.reward_funcs), own.reward_weights, ["?"] * count, completions, ids, columns, ["row"] * count
    )
    assert scores.total.tolist() == pytest.approx(expected)


# Data


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the recipes importable, as they are for one another when they run."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    yield
    for name in ("reasoning_data", "paper_data"):
        sys.modules.pop(name, None)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, TOLD = turn("user", "q"), turn("assistant", "a")


def test_rows_of_the_hub_are_read_as_they_are() -> None:
    """The columns of the data sets that files name directly."""
    numina = {"source": "s", "problem": "q", "solution": "a", "messages": [ASKED, TOLD]}
    chat = {"prompt": "q", "prompt_id": "1", "messages": [ASKED, TOLD]}
    assert canonical(Row(numina, "x"), chat=True).values["messages"] == [ASKED, TOLD]
    assert canonical(Row(chat, "x"), chat=True).values["messages"] == [ASKED, TOLD]
    asked = canonical_prompt(Row(numina, "x"), chat=True).values
    assert (asked["prompt"], asked["completion"]) == ([ASKED], [TOLD])
    deepmath = {"question": "q", "final_answer": "a", "difficulty": 5.0, "topic": "t", "r1_solution_1": "s"}
    assert canonical_prompt(Row(deepmath, "x"), chat=True).values["prompt"] == [ASKED]
    worse = [ASKED, turn("assistant", "b")]
    feedback = {"prompt": "q", "prompt_id": "1", "chosen": [ASKED, TOLD], "rejected": worse, "score_chosen": 8.0}
    pair = canonical_pair(Row(feedback | {"messages": [ASKED, TOLD]}, "x"), chat=True).values
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ([ASKED], [TOLD], worse[1:])


def test_rows_that_are_made() -> None:
    import paper_data

    gsm8k = {"question": " 48 / 2 + 1,000? ", "answer": "48/2 = <<48/2=24>>24\nSo 1,024.\n#### 1,024"}
    made = paper_data.gsm8k_row(gsm8k)
    assert made["answer"] == "1024"
    assert made["prompt"] == [turn("user", f"48 / 2 + 1,000?\n\n{paper_data.BOXED}")]
    assert made["completion"][0]["content"] == "48/2 = 24\nSo 1,024.\nThe answer is \\boxed{1024}."
    text = paper_data.gsm8k_reft_row(gsm8k)
    assert text["prompt"] == "Question:\n48 / 2 + 1,000?\nAnswer reasoning:\n"
    assert text["completion"].endswith("So 1,024.\nTherefore, the answer is: 1024")
    problem = {"problem": "q", "solution": r"\boxed{2}", "level": "Level 3", "type": "t"}
    assert paper_data.hard_math_row(problem) == paper_data.math_row(problem)
    assert paper_data.hard_math_row(problem | {"level": "Level 2"}) is None
    verl = {"prompt": [ASKED], "target": [TOLD], "reward_model": {"ground_truth": 7, "style": "rule"}}
    assert paper_data.verl_row(verl) == {"prompt": [ASKED], "completion": [TOLD], "answer": "7"}
    del verl["target"]
    assert list(paper_data.rows_of([verl, verl], paper_data.verl_row)) == [{"prompt": [ASKED], "answer": "7"}]


def test_right_completions_become_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import paper_data

    sampled = [
        {"prompt": [ASKED], "completion": "right", "ended": True, "reward": 1.0},
        {"prompt": [ASKED], "completion": "wrong", "ended": True, "reward": 0.5},
        {"prompt": "q", "completion": "cut", "ended": False, "reward": 1.0},
        {"prompt": "q", "completion": " text", "ended": True, "reward": 1.0},
    ]
    for number, line in enumerate(sampled):
        (tmp_path / f"step-{number}.jsonl").write_text(json.dumps(line) + "\n")
    output = tmp_path / "out" / "right.jsonl"
    paper_data.main(["right", str(tmp_path), "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [
        {"prompt": [ASKED], "completion": [turn("assistant", "right")]},
        {"prompt": "q", "completion": " text"},
    ]
    with pytest.raises(SystemExit):
        paper_data.main(["right", str(tmp_path / "nothing"), "--output", str(output)])
    assert "there are no such rows" in capsys.readouterr().err


def test_rows_of_reasoning_name_their_questions(tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym")
    import reasoning_data

    reasoning_data.main(["--output", str(tmp_path), "--train", "5", "--held-out", "2"])
    rows, kept = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("rows.jsonl", "held-out-rows.jsonl")
    )
    pairs = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert (len(rows), len(kept), len(pairs)) == (5, 2, 5)
    assert not {str(row["prompt"]) for row in rows} & {str(row["prompt"]) for row in kept}
    for row in rows:
        data = gym.create_dataset(row["task"], size=row["index"] + 1, seed=row["seed"], **json.loads(row["options"]))
        assert row["prompt"][0]["content"].startswith(data[row["index"]]["question"].strip())
        answer = final_answer(row["completion"][0]["content"])
        assert data.score_answer(answer=answer, entry=data[row["index"]]) == 1


# Small twins

UPDATES = 2
FAST = ("dft", "prefix-rft")
#: Nothing is learned without a right answer, of which a random model gives none.
REWARD_ALONE = ("dapo", "dft-rewarded-samples", "grpo", "reft-ppo")
#: What makes a run short whatever it trains. A token of the tiny model is a byte.
SHORT = {"max_steps": UPDATES, "max_length": 1024, "eval_strategy": "no", "use_cpu": True, "cache_dir": "cache"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_twins_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    import reasoning_data

    if f"small/{name}" in REWARDED:
        pytest.importorskip("logitless.rewards")
    monkeypatch.chdir(tmp_path)
    data = Path("data/reasoning")
    reasoning_data.write_rows(data, train=6, held_out=2, seed=0)
    reasoning_data.write_rows(data / "expert", train=6, held_out=2, seed=100_000)
    (data / "right.jsonl").write_bytes((data / "rows.jsonl").read_bytes())
    values = (
        read_yaml(PAPERS / "small" / f"{name}.yaml") | SHORT | {"model_name_or_path": make_model(tmp_path / "tiny")}
    )
    for part in (values, *values.get("mixture", ())):
        if "max_completion_length" in part:
            part["max_completion_length"] = 12
    if "teacher_model_name_or_path" in values:
        values["teacher_model_name_or_path"] = make_model(tmp_path / "teacher", tied=False)
    options, _ = options_from_mapping(values, name)
    train(options)
    records = [record for record in read_metrics(Path(options.output_dir)) if "loss" in record]
    assert len(records) == UPDATES
    assert name in REWARD_ALONE or records[0]["grad_norm"] > 0
    if f"small/{name}" in SAMPLING and options.mixture is None:
        rollouts = sorted((Path(options.output_dir) / "rollouts").glob("*.jsonl"))
        lines = [json.loads(line) for line in rollouts[0].read_text().splitlines()]
        assert len(lines) == options.per_device_train_batch_size * (
            options.steps_per_generation or options.gradient_accumulation_steps)  # fmt: skip
        assert any("shown" in line for line in lines) == (shows(options.make_loss()) in ("prefix", "whole", "hint"))
