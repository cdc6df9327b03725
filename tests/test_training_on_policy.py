"""Runs that sample: steps and passes, resuming, processes, mixtures, adapters and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import VARIED, Folder, make_folder, rounds_of, rows_with_answers, sampled_round
from safetensors.torch import load_file
from training_fixtures import make_model, train_in_two_processes, write_jsonl

from logitless import losses
from logitless.losses.policy.policy_loss import PolicyLoss
from logitless.training import InputError, train
from logitless.training.metrics import read_metrics
from logitless.training.rollouts.model_generator import ModelTextGenerator
from logitless.training.trainer import run_steps, take_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_folder(tmp_path_factory.mktemp("on-policy"))


def records_of(folder: Folder, name: str) -> list[dict[str, Any]]:
    """What the run has recorded, without times and memory."""
    clocks = ("seconds", "runtime", "per_second", "peak_memory")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in clocks)}
        for record in read_metrics(folder.path / name)
    ]


def trained(folder: Folder, name: str, **changes: Any) -> list[dict[str, Any]]:
    """The records of a run, which goes on where one of that name has stopped."""
    train(folder.options(name, resume=True, **changes))
    return records_of(folder, name)


def weights_of(folder: Folder, name: str) -> dict[str, torch.Tensor]:
    (file,) = (folder.path / name).glob("*.safetensors")
    return load_file(file)


def same_weights(folder: Folder, *names: str) -> bool:
    first, second = (weights_of(folder, name) for name in names)
    return first.keys() == second.keys() and all(value.equal(second[key]) for key, value in first.items())


def logged(folder: Folder, name: str) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((folder.path / name / "rollouts").iterdir())}


# ---------------------------------------------------------------------------------------------------------------------
# Steps and passes


def test_accumulation_changes_nothing_but_rounding(folder: Folder) -> None:
    found = {}
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        name = f"accumulated-{size}"
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "log_completions": True}
        found[size] = trained(folder, name, **changes, method="dapo"), logged(folder, name)
    for records, lines in (found[4], found[2]):
        assert lines["step-000001.jsonl"] == found[8][1]["step-000001.jsonl"]
        for ours, theirs in zip(records, found[8][0], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_a_round_serves_its_updates_and_passes(folder: Folder) -> None:
    """Two updates a pass and two passes: a second pass reads the same completions in another order."""
    run = folder.prepared(
        method="dapo", steps_per_generation=4, num_iterations=2, num_generations=4, learning_rate=0.02,
        per_device_train_batch_size=4, max_steps=5, loss={"epsilon_low": 0.9, "epsilon_high": 5.0},
    )  # fmt: skip
    component, rounds = rounds_of(run)
    read, ratios, numbers = [], [], []
    for step in range(5):
        batches = component.batches(step)
        numbers.append(rounds.number)
        read.append([tuple(each.input_ids.tolist()) for batch in batches for each in batch.examples])
        moved = 0.0
        for batch in component.complete(step, batches):
            with torch.no_grad():
                now = component.engine.stats(run.model, batch, ("logprob",)).logprob
            counts = batch.labels[:, 1:] != -100
            moved = max(moved, float((now[:, :-1] - batch.loss_inputs["old_logprob"][:, :-1])[counts].abs().max()))
        ratios.append(moved)
        take_step(run, step)
    assert numbers == [0, 0, 0, 0, 1]
    first, second = read[0] + read[1], read[2] + read[3]
    assert len(first) == 16 and sorted(first) == sorted(second) and first != second
    assert ratios[0] < 1e-5 and ratios[4] < 1e-5 and min(ratios[1:4]) > 1e-4
    assert rounds.steps_per_epoch(run.world) == 3 * 4  # ten prompts, four a round


def test_steps_of_a_run_are_rounds_of_its_epochs(folder: Folder) -> None:
    assert len(trained(folder, "epochs", max_steps=-1, num_train_epochs=1, num_iterations=2)) == 10


@pytest.mark.parametrize("seed", [2**32 - 1, -(2**32) + 1, 0])
def test_any_seed_can_be_used(folder: Folder, seed: int) -> None:
    trained(folder, f"seed{seed}", seed=seed, max_steps=1)


POLICY = sorted(
    name
    for name in losses.names()
    if isinstance(losses.get(name), PolicyLoss) and "advantages" in losses.get(name).inputs
)


@pytest.mark.parametrize("method", POLICY)
def test_every_policy_loss_takes_steps(folder: Folder, method: str) -> None:
    records = trained(folder, f"every-{method}", method=method, num_iterations=2)
    assert len(records) == 2 and records[0]["grad_norm"] > 0  # some clip all in the second


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

RESUMED: dict[str, dict[str, Any]] = {
    "grpo": {"loss": {"beta": 0.1}, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "ppo": {"critic_learning_rate": 1e-2},
    "prefix_rft": {"temperature": 1.2},
    "uft": {"top_p": 0.9},
}
ROUND: dict[str, Any] = {
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 1,
    "log_completions": True,
    "learning_rate": 0.01,
}


class Killed(Exception):
    """A run that ends without saying so."""


def kill_sampling(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The sampler fails half-way through its n-th call."""
    real, calls = ModelTextGenerator._sample, []

    def sample(self: ModelTextGenerator, *args: Any) -> Any:
        calls.append(1)
        found = real(self, *args)
        if len(calls) == call:
            raise Killed
        return found

    monkeypatch.setattr(ModelTextGenerator, "_sample", sample)


@pytest.mark.parametrize("method", RESUMED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In the middle of a round, between rounds, and while one is sampled: bit for bit, metrics and files included."""
    settings = {"method": method, **RESUMED[method], **ROUND}
    whole = f"whole-{method}"
    expected = trained(folder, whole, **settings)
    assert len(expected) == 9
    for stop in (2, 4):
        name = f"stopped-{method}-{stop}"
        trained(folder, name, **{**settings, "max_steps": stop, "lr_scheduler_type": "constant"})
        steady = f"steady-{method}"
        if stop == 2:
            trained(folder, steady, **settings, lr_scheduler_type="constant")
        if method in ("prefix_rft", "uft"):  # their schedules look at the length of the run
            continue
        found = trained(folder, name, **settings, lr_scheduler_type="constant")
        assert found == records_of(folder, steady)
        assert same_weights(folder, name, steady) and logged(folder, name) == logged(folder, steady)
    name = f"killed-{method}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_sampling(patch, 2)
        trained(folder, name, **settings)
    assert max(record["step"] for record in records_of(folder, name)) == 4
    assert trained(folder, name, **settings) == expected
    assert same_weights(folder, name, whole) and logged(folder, name) == logged(folder, whole)


def test_a_run_killed_within_a_round_goes_on_with_it(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a schedule and a value function; nothing is sampled again."""
    for method in ("prefix_rft", "ppo"):
        settings = {"method": method, **RESUMED[method], **ROUND}
        whole, name = f"within-whole-{method}", f"within-{method}"
        expected = trained(folder, whole, **settings)
        run = folder.prepared(name, **settings)
        from logitless.training import trainer

        real = trainer.take_step

        def take(run: Any, step: int, real: Any = real) -> Any:
            if step == 6:
                raise Killed
            return real(run, step)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "take_step", take)
            with pytest.raises(Killed):
                run_steps(run)
        with monkeypatch.context() as patch:
            kill_sampling(patch, 2)  # of the rest of the run, which samples once more
            assert trained(folder, name, **{**settings, "max_steps": 9}) == expected
        assert same_weights(folder, name, whole)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_generations", 2), ("num_iterations", 1), ("temperature", 0.5), ("advantage_estimator", "rloo")],
)
def test_options_that_number_the_rounds_cannot_change(folder: Folder, name: str, value: Any) -> None:
    if not (folder.path / "fixed").exists():
        trained(folder, "fixed", **{**ROUND, "max_steps": 1})
    with pytest.raises(InputError, match=name):
        trained(folder, "fixed", **{**ROUND, name: value})


# ---------------------------------------------------------------------------------------------------------------------
# Processes, mixtures, adapters


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_two_processes_share_a_round(folder: Folder, method: str) -> None:
    """Advantages and metrics are of the completions of both."""
    name = f"two-{method}"
    options = folder.options(name, method=method, log_completions=True, scale_rewards=None, max_steps=2)
    if method == "grpo":
        options = folder.options(name, scale_rewards="batch", log_completions=True)
    scripts = folder.path / f"scripts-{method}"
    scripts.mkdir()
    train_in_two_processes(scripts, options)
    files = logged(folder, name)
    assert list(files) == [f"step-00000{step}.{rank}.jsonl" for step in (1, 2) for rank in (0, 1)]
    lines = [json.loads(line) for rank in (0, 1) for line in files[f"step-000001.{rank}.jsonl"].splitlines()]
    assert len(lines) == 16 and len({line["origin"] for line in lines}) == 4
    rewards = torch.tensor([line["reward"] for line in lines], dtype=torch.float64)
    record = next(each for each in read_metrics(folder.path / name) if each.get("step") == 1)
    assert record["reward"] == pytest.approx(float(rewards.mean()))
    assert record["reward_std"] == pytest.approx(float(rewards.std()))
    assert record["completions/mean_length"] == sum(line["tokens"] for line in lines) / 16
    if method == "grpo":
        centred = rewards - rewards.view(4, 4).mean(1).repeat_interleave(4)
        expected = centred / (rewards.std() + 1e-4)
        assert [line["advantage"] for line in lines] == pytest.approx(expected.tolist(), abs=1e-5)
        return
    # values begin at 0, so that GAE is the discounted reward, whitened over the tokens of both processes
    raw = [r * 0.95 ** torch.arange(line["tokens"] - 1, -1, -1).double()
           for r, line in zip(rewards, lines, strict=True)]  # fmt: skip
    flat = torch.cat(raw)
    expected = [float((each[0] - flat.mean()) / flat.std()) for each in raw]
    assert [line["advantage"] for line in lines] == pytest.approx(expected, abs=1e-4)
    assert record["value/loss"] == pytest.approx(float(flat.square().mean() / 2), rel=1e-4)


def test_a_mixture_of_sft_and_grpo(folder: Folder) -> None:
    sft = {"method": "sft", "dataset_name": folder.data, "name": "sft", "weight": 0.5}
    grpo = {"method": "grpo", "dataset_name": folder.data, "name": "rl", "reward_funcs": [VARIED]}
    shared: dict[str, Any] = {"method": "sft", "dataset_name": "", "reward_funcs": None, "mixture": [sft, grpo]}
    settings = {**shared, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5, "save_strategy": "steps",
                "save_steps": 1, "lr_scheduler_type": "constant"}  # fmt: skip
    records = trained(folder, "mixed", **settings)
    for record in records:
        assert record["loss"] == pytest.approx(0.5 * record["sft/loss"] + record["rl/loss"])
        assert 0 <= record["rl/reward"] <= 1 and "sft/reward" not in record
    trained(folder, "mixed-stopped", **{**settings, "max_steps": 3})
    assert trained(folder, "mixed-stopped", **settings) == records
    assert same_weights(folder, "mixed", "mixed-stopped")


def test_an_adapter_is_trained_and_sampled_from(folder: Folder) -> None:
    """The reference is the model without it."""
    changes = {"use_peft": True, "lora_r": 4, "lora_target_modules": ("q_proj", "v_proj"), "loss": {"beta": 0.1}}
    settings = {**changes, **ROUND, "max_steps": 5, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    records = trained(folder, "lora", **settings)
    assert records[0]["grad_norm"] > 0 and records[4]["sampling/sampling_logp_difference/max"] < 1e-5
    assert list((folder.path / "lora").glob("adapter_model*"))
    trained(folder, "lora-stopped", **{**settings, "max_steps": 2})
    assert trained(folder, "lora-stopped", **settings) == records


def test_dropout_is_off_where_a_policy_is_compared_with_itself(tmp_path: Path) -> None:
    """Ratios of the first pass are 1, also for a model that has dropout."""
    data = write_jsonl(tmp_path / "train.jsonl", rows_with_answers())
    folder = Folder(tmp_path, make_model(tmp_path / "model", dropout=0.5), data)
    run = folder.prepared()
    sampled_round(run)
    assert all(getattr(layer.self_attn, "attention_dropout", 0) == 0 for layer in run.model.model.layers)


def test_bfloat16_autocast_samples_and_trains(folder: Folder) -> None:
    records = trained(folder, "bf16", bf16=True)
    assert all(0 < record["sampling/sampling_logp_difference/max"] < 0.1 for record in records)


def test_padding_free_batches_are_the_same_rounds(folder: Folder) -> None:
    """One row a batch instead of padding."""
    changes = {"max_steps": 1, "log_completions": True}
    padded = trained(folder, "padded", **changes)
    try:
        flat = trained(folder, "flat", **changes, padding_free=True)
    except InputError as error:
        pytest.skip(str(error))
    assert logged(folder, "flat") == logged(folder, "padded")
    assert flat[0]["loss"] == pytest.approx(padded[0]["loss"], abs=1e-5)
    assert flat[0]["grad_norm"] == pytest.approx(padded[0]["grad_norm"], rel=1e-4)


def test_distillation_samples_by_itself(folder: Folder) -> None:
    """A student's own completions, without rewards."""
    changes = {"method": "on-policy-distillation", "teacher_model_name_or_path": folder.model, "reward_funcs": None}
    records = trained(folder, "distilled", **changes)
    assert len(records) == 2 and all("reward" not in record for record in records)
    assert all(record["completions/mean_length"] > 0 for record in records)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_answers_held_out_prompts(folder: Folder) -> None:
    """Every evaluation has the same draws, before and after resuming, in batches no larger than a round's."""
    held_out = write_jsonl(folder.path / "eval.jsonl", rows_with_answers(23))
    settings = {**ROUND, "max_steps": 6, "eval_dataset_name": held_out, "eval_strategy": "steps", "eval_steps": 2,
                "eval_on_start": True, "num_generations_eval": 2, "lr_scheduler_type": "constant"}  # fmt: skip
    records = trained(folder, "evaluated", **settings)
    evaluations = [record for record in records if "eval_reward" in record]
    assert [record["step"] for record in evaluations] == [0, 2, 4, 6]
    assert all(0 < record["eval_reward"] < 1 and "eval_loss" not in record for record in evaluations)
    trained(folder, "evaluated-stopped", **{**settings, "max_steps": 2})
    assert trained(folder, "evaluated-stopped", **settings) == records
    frozen = {**settings, "learning_rate": 0.0, "max_steps": 2}
    first, second = [each for each in trained(folder, "frozen", **frozen) if "eval_reward" in each]
    assert {**first, "step": 0, "epoch": 0} == {**second, "step": 0, "epoch": 0}


def test_evaluation_takes_no_more_memory_than_a_round(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], ModelTextGenerator._sample

    def sample(self: ModelTextGenerator, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return real(self, prompts, *rest)

    monkeypatch.setattr(ModelTextGenerator, "_sample", sample)
    held_out = write_jsonl(folder.path / "many.jsonl", rows_with_answers(23))
    changes = {"eval_dataset_name": held_out, "eval_on_start": True, "max_steps": 1}
    trained(folder, "memory", **changes)
    assert max(sizes) == 8 and sum(sizes) == 23 + 8 + 23
    sizes.clear()
    trained(folder, "memory-small", **changes, per_device_generation_batch_size=3)
    assert max(sizes) == 3 and sum(sizes) == 23 + 8 + 23
