"""`logitless evaluate`: figures are those of full logits and worked values, and what it writes trains."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import (
    completion_rows,
    make_model,
    make_options,
    make_tokenizer,
    preference_rows,
    write_jsonl,
)
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from logitless.cli import EVALUATE_OPTIONS, app
from logitless.training import InputError, TrainOptions, train
from logitless.training.config import field_types
from logitless.training.data import Row, read_rows
from logitless.training.evaluate.command import evaluate_model
from logitless.training.evaluate.measures import Figure, figure, measured
from logitless.training.evaluate.sampled import pass_rates
from logitless.training.forms import canonical, with_completion
from logitless.training.metrics import read_metrics
from logitless.training.right import Right
from logitless.training.statistics import bootstrap_interval, wilson_interval

REWARDS = """
def share(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(x.isascii() for x in text) / max(len(text), 1) for text in texts]

def even(completion_ids, **columns):
    return [None if ids[0] % 3 == 0 else float(ids[0] % 2 == 0) for ids in completion_ids]
"""
TOKENIZER = make_tokenizer()


#: The defaults of options that only a run that samples reads.
NOT_SAMPLED = {"num_generations": 8, "max_completion_length": 256}


class Places:
    """A model that is far from uniform, another one, rewards and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.other = (self._sharp(name, factor) for name, factor in (("model", 12.0), ("other", 8.0)))
        (folder / "rewards.py").write_text(REWARDS)
        self.rewards = tuple(f"{folder}/rewards.py:{name}" for name in ("share", "even"))
        self.rows = write_jsonl(folder / "rows.jsonl", completion_rows(5))
        self.pairs = write_jsonl(folder / "pairs.jsonl", preference_rows(6))

    def _sharp(self, name: str, factor: float) -> str:
        make_model(self.folder / name, tied=False, sharpness=factor)
        model = LlamaForCausalLM.from_pretrained(self.folder / name)
        with torch.no_grad():
            model.lm_head.weight[TOKENIZER.eos_token_id].mul_(4)  # so that some completions end
        model.save_pretrained(self.folder / name)
        return str(self.folder / name)

    def options(self, data: str | None = None, **changes: Any) -> TrainOptions:
        defaults = {"num_generations": 3, "max_completion_length": 8, "per_device_eval_batch_size": 2}
        return make_options(self.folder / "run", self.model, data or self.rows, **defaults | changes)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("evaluate"))


@functools.lru_cache
def loaded(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def log_probs(folder: str, ids: list[int], begin: int, temperature: float = 1.0) -> torch.Tensor:
    """`[n, V]` float64 about the tokens from `begin` on."""
    logits = loaded(folder)(torch.tensor([ids])).logits[0, begin - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


# Figures


def test_the_interval_of_a_ratio_resamples_whole_prompts() -> None:
    total, weight = torch.tensor([1.0, 4.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 2.0, 3.0])
    prompt = torch.tensor([0, 0, 1, 2])
    found = figure(measured(total, prompt, weight), seed=3)
    assert found.value == 2.0 and found.prompts == 3 and found.items == 4
    ratio = bootstrap_interval(lambda times: (times @ total.double()) / (times @ weight.double()), prompt, seed=3)
    assert found.interval == ratio and ratio.low < 2 < ratio.high


def test_intervals_of_shares() -> None:
    """Wilson's where prompts are single trials, or where a bootstrap would have no width."""
    right = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert figure(measured(right, torch.arange(4), share=True)).interval == wilson_interval(3, 4)
    every = torch.ones(6)
    assert figure(measured(every, torch.arange(6) // 2, share=True)).interval == wilson_interval(3, 3)
    tokens = measured(torch.zeros(3), torch.arange(3), torch.tensor([5.0, 1.0, 2.0]), share=True)
    assert figure(tokens).interval == wilson_interval(0, 3)
    several = figure(measured(right, torch.tensor([0, 0, 1, 1]), share=True)).interval
    assert several == (0.5, 1.0)  # of means 1/2 and 1


def test_what_is_not_known_is_left_out() -> None:
    found = figure(measured(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([0, 1, 2])))
    assert found.value == 2.0 and found.prompts == 2
    alone = figure(measured(torch.tensor([1.0]), torch.tensor([0])))
    assert alone.value == 1.0 and alone.to_dict()["low"] is None
    assert math.isnan(figure(measured(torch.tensor([math.nan]), torch.tensor([0]))).value)


def test_pass_at_k_of_worked_values() -> None:
    """One right of 4: 1/4, 1/2, 1. Two of 4: 1/2, 1 - C(2,2)/C(4,2) = 5/6, 1. One of 3 known: 1/3, 2/3, no pass@4."""
    right = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, math.nan], dtype=torch.float64)
    found = {name: figure(own) for name, own in pass_rates(right, torch.arange(12) // 4).items()}
    assert list(found) == ["pass@1", "pass@2", "pass@4"]
    assert found["pass@1"].value == pytest.approx((1 / 4 + 1 / 2 + 1 / 3) / 3)
    assert found["pass@2"].value == pytest.approx((1 / 2 + 5 / 6 + 2 / 3) / 3)
    assert found["pass@4"].value == 1.0 and found["pass@4"].prompts == 2
    assert list(pass_rates(torch.ones(6), torch.arange(6) // 3)) == ["pass@1", "pass@2", "pass@3"]


# Samples


def sampled(places: Places, **changes: Any) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    output = places.folder / "samples.jsonl"
    right = changes.pop("right", None)
    found = evaluate_model(places.options(reward_funcs=places.rewards, **changes), output=str(output), right=right)
    return found, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_are_measured_as_full_logits_have_them(places: Places, temperature: float) -> None:
    found, rows = sampled(places, temperature=temperature, teacher_model_name_or_path=places.other)
    assert len(rows) == 15
    sums: Counter[str] = Counter()
    for row in rows:
        prompt, own = TOKENIZER(row["prompt"])["input_ids"], row["token_ids"]
        ours, theirs = (log_probs(name, [*prompt, *own], len(prompt), temperature)
                        for name in (places.model, places.other))  # fmt: skip
        ratio = (theirs - ours)[range(len(own)), own]
        sums["tokens"] += len(own)
        sums["entropy"] -= float((ours.exp() * ours).sum())
        sums["kl"] += float((ours.exp() * (ours - theirs)).sum())
        sums["kl/k1"] += float(-ratio.sum())
        sums["kl/k3"] += float((ratio.exp() - 1 - ratio).sum())
        sums["cut"] += not row["ended"]
    for name in ("entropy", "kl", "kl/k1", "kl/k3"):
        assert found[name].value == pytest.approx(sums[name] / sums["tokens"], rel=2e-4, abs=2e-5), name
    assert found["kl"].value > 0.01 and 0 < sums["cut"] < 15
    assert found["completions/mean_length"].value == pytest.approx(sums["tokens"] / 15)
    assert found["completions/clipped_ratio"].value == pytest.approx(sums["cut"] / 15)


def test_rewards_are_means_over_what_is_known(places: Places) -> None:
    found, rows = sampled(places)
    known = [row["rewards"]["even"] for row in rows if row["rewards"]["even"] is not None]
    assert any(row["rewards"]["even"] is None for row in rows) and 0 < sum(known) < len(known)
    assert found["rewards/even/mean"].value == pytest.approx(sum(known) / len(known))
    assert found["rewards/even/mean"].items == len(known) and found["rewards/even/mean"].prompts <= 5
    assert found["reward"].value == pytest.approx(sum(row["reward"] for row in rows) / 15)
    right = [row["reward"] >= 1.0 for row in rows]
    assert found["accuracy"].value == pytest.approx(sum(right) / 15) == found["pass@1"].value
    again, _ = sampled(places, right=Right(1.0, "even"))
    assert again["accuracy"].value == pytest.approx(sum(known) / len(known))
    assert again["reward"] == found["reward"]  # equal options draw alike
    assert sampled(places, seed=1)[0]["reward"] != found["reward"]


def test_a_model_is_no_distance_from_itself(places: Places) -> None:
    found, _ = sampled(places, teacher_model_name_or_path=places.model)
    assert {found[name].value for name in ("kl", "kl/k1", "kl/k3")} == {0.0}


def test_estimates_need_samples_of_the_policy(places: Places) -> None:
    found, rows = sampled(places, teacher_model_name_or_path=places.other, temperature=0.0, num_generations=1)
    assert "kl" in found and not {"kl/k1", "kl/k3"} & found.keys()
    for row in rows:
        prompt, own = TOKENIZER(row["prompt"])["input_ids"], row["token_ids"]
        assert log_probs(places.model, [*prompt, *own], len(prompt)).argmax(-1).tolist() == own


def test_samples_without_rewards(places: Places) -> None:
    found = evaluate_model(places.options(on_policy=True))
    assert "entropy" in found and "reward" not in found and "nll" in found


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_is_written_is_trained_on(places: Places, tmp_path: Path, ending: str) -> None:
    """Rows with turns and a further column: filtered by their reward, they train as they are."""
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "x"}], "gold": i}
            for i in range(4)]  # fmt: skip
    output = tmp_path / f"samples.{ending}"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    evaluate_model(places.options(data, reward_funcs=places.rewards[:1]), output=str(output))
    written = [dict(row.values) for row in read_rows(str(output))]
    assert [row["gold"] for row in written] == [i for i in range(4) for _ in range(3)]
    assert written[0]["prompt"] == [{"role": "user", "content": "0?"}]
    assert written[0]["completion"][0]["role"] == "assistant" and "messages" not in written[0]
    least = sorted(row["reward"] for row in written)[6]
    kept = write_jsonl(tmp_path / "kept.jsonl", [row for row in written if row["reward"] >= least])
    result = train(places.options(kept, method="dft", output_dir=str(tmp_path / "run"), max_steps=1, **NOT_SAMPLED))
    assert math.isfinite(result.train_loss)
    again = evaluate_model(places.options(str(output), reward_funcs=places.rewards[:1]))
    assert again["nll"].items == len(written) and again["nll"].prompts == 4


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}], "id": 1},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1},
        {"question": "a", "answer": "b", "system": "Be brief.", "id": 1},
        {"instruction": "a", "input": "c", "output": "b", "id": 1},
        {"prompt": "a", "answer": "b", "id": 1},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
         "rejected": [{"role": "assistant", "content": "c"}], "id": 1},
    ],
)  # fmt: skip
def test_every_form_of_prompt_is_answered_in_a_form_that_trains(row: dict[str, Any]) -> None:
    from logitless.training.forms import canonical_prompt

    prompt = canonical_prompt(Row(row, "here")).values["prompt"]
    completion = "new" if isinstance(prompt, str) else [{"role": "assistant", "content": "new"}]
    written = with_completion(row, prompt, completion)
    assert written["id"] == 1
    made = canonical(Row(written, "there")).values
    assert made["prompt"] == prompt and made["completion"] == completion


# Answers and pairs


def test_answers_are_measured_as_full_logits_have_them(places: Places) -> None:
    found = evaluate_model(places.options())
    assert found.keys() == {"nll", "mean_token_accuracy"}
    nll, right, count = 0.0, 0, 0
    for row in completion_rows(5):
        prompt, own = (TOKENIZER(row[name])["input_ids"] for name in ("prompt", "completion"))
        own = [*own, TOKENIZER.eos_token_id]
        values = log_probs(places.model, [*prompt, *own], len(prompt))
        nll -= float(values[range(len(own)), own].sum())
        right += int((values.argmax(-1) == torch.tensor(own)).sum())
        count += len(own)
    assert found["nll"].value == pytest.approx(nll / count, rel=1e-5)
    assert found["mean_token_accuracy"].value == pytest.approx(right / count)
    assert found["nll"].interval.low < found["nll"].value < found["nll"].interval.high


def test_pairs_are_measured_as_full_logits_have_them(places: Places) -> None:
    found = evaluate_model(places.options(places.pairs, teacher_model_name_or_path=places.other, beta=0.2))
    sums: dict[str, list[torch.Tensor]] = {}
    for row in preference_rows(6):
        for side in ("chosen", "rejected"):
            prompt = TOKENIZER.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            ids = TOKENIZER(prompt)["input_ids"]
            own = TOKENIZER(row[side][0]["content"])["input_ids"] + [TOKENIZER.eos_token_id]
            own += TOKENIZER("\n")["input_ids"]  # the template's, which counts in a completion
            parts = [log_probs(name, [*ids, *own], len(ids))[range(len(own)), own]
                     for name in (places.model, places.other)]  # fmt: skip
            sums.setdefault(side, []).append(torch.stack([parts[0].sum(), parts[0].mean(), parts[1].sum()]))
    chosen, rejected = (torch.stack(sums[side]) for side in ("chosen", "rejected"))
    reward = 0.2 * ((chosen[:, 0] - chosen[:, 2]) - (rejected[:, 0] - rejected[:, 2]))
    assert found["rewards/margins"].value == pytest.approx(float(reward.mean()), rel=1e-4)
    assert found["rewards/accuracies"].value == pytest.approx(float((reward > 0).double().mean()))
    for place, name in ((0, "logps"), (1, "mean_logps")):
        margin = chosen[:, place] - rejected[:, place]
        assert found[f"{name}/margins"].value == pytest.approx(float(margin.mean()), rel=1e-4)
        assert found[f"{name}/accuracies"].value == pytest.approx(float((margin > 0).double().mean()))
    without = evaluate_model(places.options(places.pairs))
    assert without.keys() == {key for key in found if "logps" in key}


def test_answers_of_one_prompt_are_one_cluster(places: Places, tmp_path: Path) -> None:
    rows = completion_rows(4)
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[0], "completion": "other"}])
    assert evaluate_model(places.options(data))["nll"].prompts == 4
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}, {"text": "abc"}, {"text": "d"}])
    assert evaluate_model(places.options(texts))["nll"].prompts == 3


# The command


def test_the_command_line(places: Places, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", places.model, "--dataset_name", places.rows, "--use_cpu", "--num-generations", "2"]
    flags += ["--reward_funcs", ",".join(places.rewards), "--max_completion_length", "4", "--threshold", "0.5"]
    result = CliRunner().invoke(app, ["evaluate", *flags, "--json", str(tmp_path / "deep" / "metrics.json")])
    assert result.exit_code == 0, result.output
    assert "pass@2" in result.output and "95% interval" in result.output
    written = json.loads((tmp_path / "deep" / "metrics.json").read_text())
    assert written["sampling"]["num_generations"] == 2 and written["metrics"]["accuracy"]["prompts"] == 5
    assert written["metrics"]["nll"].keys() == {"value", "low", "high", "prompts", "items"}
    result = CliRunner().invoke(app, ["evaluate", *flags, "--learning_rate", "1"])
    assert result.exit_code == 2 and "--learning_rate is an option of train" in result.output


def test_its_options_are_those_of_training() -> None:
    assert set(EVALUATE_OPTIONS) <= set(field_types())


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"output": "samples.jsonl"}, "output: nothing is sampled without reward_funcs"),
        ({"on_policy": True}, {"output": "samples.csv"}, r"output: expected a name that ends in .jsonl or .parquet"),
        ({}, {"metrics_file": "metrics.txt"}, "json: expected a name that ends in .json"),
        ({"reward_weights": (1.0,)}, {}, "reward_weights: no reward_funcs are named"),
        ({"rewarded": True}, {"right": Right(1.0, "evn")}, r"threshold_func: expected one of share, even, got 'evn'"),
        ({"rewarded": True}, {"right": Right(math.nan)}, "threshold must be finite"),
        ({"rewarded": True, "temperature": 0.0}, {}, "num_generations must be 1 at temperature 0"),
        ({"rewarded": True, "num_generations": 0}, {}, "num_generations must be at least 1"),
        ({"rewarded": True, "max_completion_length": 63}, {}, "none of 5 prompts leaves room for 63 tokens"),
        ({"backend": "materialised"}, {}, "backend: hidden states are needed"),
        ({"mixture": [{"method": "sft", "dataset_name": "x"}]}, {}, "mixture: rows of one dataset_name"),
        ({"dataset_name": ""}, {}, "--dataset_name is required"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(
    places: Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any],
    arguments: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if changes.pop("rewarded", False):
        changes["reward_funcs"] = places.rewards
    with pytest.raises(InputError, match=message):
        evaluate_model(places.options(**changes), **arguments)


def test_rows_that_hold_nothing_to_measure(places: Places, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    with pytest.raises(InputError, match="no row has an answer, or chosen and rejected; name reward_funcs"):
        evaluate_model(places.options(data))
    found = evaluate_model(places.options(data, reward_funcs=places.rewards))
    assert "nll" not in found and math.isnan(found["reward"].interval.low)


def test_a_reference_with_other_tokens_or_a_shorter_head(places: Places, tmp_path: Path) -> None:
    small = make_model(tmp_path / "small", vocabulary=257, tied=False)
    with pytest.raises(InputError, match="257 rows"):
        evaluate_model(places.options(places.pairs, teacher_model_name_or_path=small))
    large = make_model(tmp_path / "large", vocabulary=264, tied=False)
    found = evaluate_model(places.options(on_policy=True, teacher_model_name_or_path=large))
    assert math.isfinite(found["kl"].value) and found["kl"].value > 0


def test_a_run_is_evaluated_where_it_stands(places: Places, tmp_path: Path) -> None:
    """Evaluation of the model that a run wrote gives what the run's own last evaluation gave."""
    run = tmp_path / "run"
    train(places.options(eval_dataset_name=places.rows, output_dir=str(run), max_steps=2, **NOT_SAMPLED))
    before = read_metrics(run)[-1]
    found = evaluate_model(places.options(model_name_or_path=str(run)))
    assert found["nll"].value == pytest.approx(before["eval_nll"], rel=1e-5)
    assert found["mean_token_accuracy"].value == pytest.approx(before["eval_mean_token_accuracy"])
