"""Inputs that a run estimates itself, stated again from full logits of the unpatched model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from training_fixtures import completion_rows, make_model, make_options, write_jsonl
from transformers import LlamaForCausalLM

from logitless import losses
from logitless.training import InputError, train
from logitless.training.collate import Batch
from logitless.training.examples import Example
from logitless.training.metrics import read_metrics
from logitless.training.parallel import World
from logitless.training.run import Run, prepare
from logitless.training.trainer import take_step

WORLD = World(0, 1, torch.device("cpu"))
ROWS = [
    {**row, "desirable": i % 2 == 0, "group": i // 3, "negative": i % 3 > 0} for i, row in enumerate(completion_rows())
]
SAMPLED = [{**row, "advantages": 1.0, "old_logprob": -5.0, "demonstration": i % 3 == 0} for i, row in enumerate(ROWS)]
METHODS = ("psft", "kto", "bco", "discriminative_sft", "chord")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one that it is compared with, and rows."""
    folder = tmp_path_factory.mktemp("estimates")
    make_model(folder / "model", tied=False)
    teacher = make_model(folder / "teacher", tied=False)
    model = LlamaForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.lm_head.weight *= 3
    model.save_pretrained(teacher)
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "sampled.jsonl", SAMPLED)
    return folder


def options(folder: Path, method: str, **changes: Any) -> Any:
    output = folder / f"run-{len(list(folder.iterdir()))}"
    data = folder / ("sampled.jsonl" if method == "chord" else "rows.jsonl")
    return make_options(output, str(folder / "model"), str(data), method=method, **changes)


class Step(NamedTuple):
    """What a step read: its batches with their inputs, and the weights that it started from."""

    batches: list[Batch]
    weights: dict[str, Tensor]


def steps_of(run: Run, count: int, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    steps: list[Step] = []
    (component,) = run.components
    complete = component.complete

    def keep(step: int, batches: list[Batch]) -> list[Batch]:
        weights = {name: x.detach().clone() for name, x in run.model.state_dict().items()}
        steps.append(Step(list(complete(step, batches)), weights))
        return steps[-1].batches

    monkeypatch.setattr(component, "complete", keep)
    for step in range(count):
        take_step(run, step)
    return steps


def logprobs(folder: Path, example: Example, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Log-probabilities of the counted tokens of one sequence, float64; of the model given, or of the teacher."""
    model = LlamaForCausalLM.from_pretrained(folder / "teacher")
    if weights is not None:
        model.load_state_dict(weights)
    with torch.no_grad():
        logits = model.double()(example.input_ids.long()[None]).logits[0, :-1]
    labels = example.labels.long()[1:]
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return found[labels != -100]


def counted(batch: Batch, name: str) -> Tensor:
    """An input at the predictions that count, row after row, float64."""
    return batch.loss_inputs[name][:, :-1][batch.labels[:, 1:] != -100].double()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_old_policy_is_that_of_the_first_of_its_updates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    run = prepare(options(folder, "psft", old_policy_steps=keep, gradient_accumulation_steps=2), WORLD)
    steps = steps_of(run, 4, monkeypatch)
    for number, (batches, _) in enumerate(steps):
        first = steps[keep * (number // keep)].weights
        for batch in batches:
            expected = torch.cat([logprobs(folder, example, first) for example in batch.examples])
            torch.testing.assert_close(counted(batch, "old_logprob"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(steps[0].weights["lm_head.weight"], steps[3].weights["lm_head.weight"])


def test_the_old_policy_of_the_paper_is_kept_for_eight_updates(folder: Path) -> None:
    assert options(folder, "psft").old_policy_steps == 8


def test_a_reference_point_is_a_mean_over_mismatched_rows_of_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(folder / "teacher")
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "teacher_model_name_or_path": teacher,
    }
    seen = []
    for batches, weights in steps_of(prepare(options(folder, "kto", **changes), WORLD), 4, monkeypatch):
        rows = [example for batch in batches for example in batch.examples]
        ratios = []
        for example, before in zip(rows, rows[-1:] + rows[:-1], strict=True):
            start, other = (int((x.labels != -100).nonzero()[0]) for x in (example, before))
            ids = torch.cat([example.input_ids[:start], before.input_ids[other:]])
            wrong = Example(ids, torch.cat([example.labels[:start], before.labels[other:]]))
            ratios.append((logprobs(folder, wrong, weights) - logprobs(folder, wrong)).sum())
        expected = torch.stack(ratios).mean().clamp(min=0)
        for batch in batches:
            torch.testing.assert_close(batch.loss_inputs["reference_point"].double(), expected, rtol=1e-5, atol=1e-5)
        seen.append(float(expected))
    assert len({value for value in seen if value > 0}) > 1


def test_a_reward_shift_is_the_mean_of_all_rewards_up_to_the_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(folder / "teacher")
    run = prepare(options(folder, "bco", gradient_accumulation_steps=2, teacher_model_name_or_path=teacher), WORLD)
    rewards: list[Tensor] = []
    for batches, weights in steps_of(run, 3, monkeypatch):
        for example in (example for batch in batches for example in batch.examples):
            rewards.append(0.1 * (logprobs(folder, example, weights) - logprobs(folder, example)).sum())
        for batch in batches:
            expected = torch.stack(rewards).mean()
            torch.testing.assert_close(batch.loss_inputs["reward_shift"].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_s_normaliser_moves_when_its_answers_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """u = log((1 - g) exp(u) + g mean_j exp(d_j)), d_j = s_j / temperature - r_j of the sampled answers."""
    changes: dict[str, Any] = {"learning_rate": 3e-5, "per_device_train_batch_size": 1, "max_steps": 8}
    run = prepare(options(folder, "discriminative_sft", loss={"temperature": 1.5, "decay": 0.9}, **changes), WORLD)
    kept: dict[int, float] = {}
    start = {name: x.detach().clone() for name, x in run.model.state_dict().items()}
    for batches, weights in steps_of(run, 8, monkeypatch):
        (batch,) = batches
        (group,) = set(counted(batch, "group").tolist())
        assert len(batch.examples) == 3  # all of a prompt's
        before = kept.get(int(group), 0.0)
        assert counted(batch, "log_normalizer").unique().tolist() == pytest.approx([before], abs=1e-4)
        sampled = [example for example in batch.examples if example.inputs["negative"].any()]
        d = [logprobs(folder, x, weights).sum() / 1.5 - logprobs(folder, x, start).sum() for x in sampled]
        mean = torch.stack(d).logsumexp(0) - math.log(len(d))
        kept[int(group)] = float(torch.logaddexp(torch.tensor(before + math.log(0.1)), mean + math.log(0.9)))
    assert len(kept) == 4 and all(value != 0 for value in kept.values())


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_changes_nothing(folder: Path, method: str) -> None:
    same: dict[str, Any] = {"eval_dataset_name": str(folder / "sampled.jsonl"), "max_steps": 3}
    found = []
    for changes in ({}, {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}):
        records = read_metrics(train(options(folder, method, **same, **changes)).output_dir)
        found.append([(record["loss"], record["grad_norm"]) for record in records if "loss" in record])
        evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
        assert evaluated and all(map(math.isfinite, evaluated))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", METHODS)
def test_padding_free_rows_are_given_the_same(folder: Path, method: str) -> None:
    curves = []
    for flat in (False, True):
        records = read_metrics(train(options(folder, method, padding_free=flat)).output_dir)
        curves.append(torch.tensor([[r["loss"], r["grad_norm"]] for r in records if "loss" in r]))
    torch.testing.assert_close(curves[0], curves[1], rtol=3e-5, atol=3e-5)


def test_what_cannot_be_estimated_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kto: reference_point is estimated from steps of two rows at least"):
        prepare(options(folder, "kto", per_device_train_batch_size=1), WORLD)
    with pytest.raises(InputError, match="which precompute_ref_log_probs leaves out; a column reference_point"):
        prepare(options(folder, "kto", precompute_ref_log_probs=True), WORLD)
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"ref_logprob": -5.0} for row in ROWS])
    with pytest.raises(InputError, match="which the column ref_logprob leaves out; a column reference_point"):
        prepare(options(folder, "kto", dataset_name=rows), WORLD)
    given = write_jsonl(tmp_path / "given.jsonl", [row | {"reference_point": 0.25} for row in ROWS])
    run = prepare(options(folder, "kto", dataset_name=given, precompute_ref_log_probs=True), WORLD)
    assert not run.components[0].estimates


def test_a_step_of_one_row_has_no_mismatched_pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of an epoch may be one: its reference point is 0, the least that there is."""
    teacher = str(folder / "teacher")
    run = prepare(
        options(folder, "kto", per_device_train_batch_size=11, teacher_model_name_or_path=teacher, max_steps=2), WORLD
    )
    first, last = steps_of(run, 2, monkeypatch)
    assert [len(step.batches[0].examples) for step in (first, last)] == [11, 1]
    assert first.batches[0].loss_inputs["reference_point"] > 0
    assert last.batches[0].loss_inputs["reference_point"] == 0


def test_names_of_estimates_are_inputs_of_losses() -> None:
    from logitless.training.estimates import ESTIMATED_INPUTS

    every = [losses.get(name) for name in losses.names()]
    read = {name for loss in every for name in (*loss.inputs, *loss.sequence_inputs)}
    assert ESTIMATED_INPUTS.keys() - {"token_weight"} <= read
