"""A round against the same numbers from full logits in float64, and the degenerate rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import (
    HERE,
    Folder,
    Twin,
    cut,
    make_folder,
    rounds_of,
    sampled_round,
    taken,
)
from rollout_rewards import reward_of
from training_fixtures import write_jsonl

from logitless import losses
from logitless.training import InputError, train
from logitless.training.examples import IGNORED, Example
from logitless.training.metrics import read_metrics
from logitless.training.rollouts import advantages
from logitless.training.rollouts.generation import Sampling
from logitless.training.run import Component, Run

LR = {"learning_rate": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_folder(tmp_path_factory.mktemp("rollouts"))


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient


def perturb(run: Run) -> None:
    """Moves the weights off the policy that sampled, so that no ratio is 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (each for each in run.model.parameters() if each.requires_grad):
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def update(run: Run, component: Component) -> float:
    """The loss of the first update, with its gradients, as `trainer` computes both."""
    batches = component.batches(0)
    normalizer = sum(map(component.count, batches))
    total = 0.0
    for batch in component.complete(0, batches):
        loss = component.engine.objective(run.model.train(), batch, normalizer).loss
        loss.backward()
        total += float(loss.detach())
    return total


def counted(example: Example) -> torch.Tensor:
    return example.labels[1:] != IGNORED


def completion_of(example: Example) -> list[int]:
    ids: list[int] = example.input_ids[1:][counted(example)].tolist()
    return ids


def group_advantages(rewards: list[float], size: int, scaled: bool) -> list[float]:
    found = []
    for start in range(0, len(rewards), size):
        group = torch.tensor(rewards[start : start + size], dtype=torch.float64)
        centred = group - group.mean()
        found += (centred / (group.std() + 1e-4) if scaled else centred).tolist()
    return found


def clipped(ratio: torch.Tensor, advantage: Any, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (reference - policy).exp() - (reference - policy) - 1


def per_token(examples: list[Example], now: Twin, then: Twin, term: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """`term(index, logprob, old_logprob)` of each completion's tokens."""
    found = []
    for index, example in enumerate(examples):
        mask = counted(example)
        with torch.no_grad():
            old = then.logprob(example.input_ids)[mask]
        found.append(term(index, now.logprob(example.input_ids)[mask], old))
    return found


def grpo(examples: list[Example], now: Twin, then: Twin) -> torch.Tensor:
    advantage = group_advantages([reward_of(completion_of(each)) for each in examples], 4, scaled=True)

    def term(index: int, logprob: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return clipped((logprob - old).exp(), advantage[index]) + 0.3 * k3(logprob, old)  # the reference is the start

    return torch.stack([each.mean() for each in per_token(examples, now, then, term)]).mean()


def dapo(examples: list[Example], now: Twin, then: Twin) -> torch.Tensor:
    advantage = group_advantages([reward_of(completion_of(each)) for each in examples], 4, scaled=True)
    sampling = Sampling(max_tokens=8, temperature=now.temperature, top_p=0.9, top_k=40)

    def term(index: int, logprob: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        ids, mask = examples[index].input_ids, counted(examples[index])
        with torch.no_grad():
            drawn_from = torch.stack([cut(each, sampling) for each in then.logits(ids)[mask]])
        weight = (old - taken(drawn_from, ids[1:][mask])).exp().clamp(max=3.0)
        assert (weight < 0.99).any()
        return weight * clipped((logprob - old).exp(), advantage[index], high=0.28)

    return torch.cat(per_token(examples, now, then, term)).mean()


def ppo(examples: list[Example], now: Twin, then: Twin) -> torch.Tensor:
    """The values are 0 before the first update, so that GAE is the reward, discounted."""
    rewards = [reward_of(completion_of(each)) for each in examples]
    lengths = [int(counted(each).sum()) for each in examples]
    raw = [
        torch.tensor([reward * (0.9 * 0.8) ** (length - 1 - t) for t in range(length)], dtype=torch.float64)
        for reward, length in zip(rewards, lengths, strict=True)
    ]
    flat = torch.cat(raw)
    advantage = [(each - flat.mean()) / flat.std() for each in raw]
    terms = per_token(examples, now, then, lambda index, logprob, old: clipped((logprob - old).exp(), advantage[index]))
    return torch.cat(terms).mean()


EXPECTED: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "grpo": (grpo, {"loss": {"beta": 0.3}}),
    "dapo": (dapo, {"top_p": 0.9, "top_k": 40}),
    "ppo": (ppo, {"gamma": 0.9, "lam": 0.8}),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("method", EXPECTED)
def test_loss_and_gradient_are_those_of_full_logits(folder: Folder, method: str, temperature: float) -> None:
    """Both at a temperature, which is the policy's and the reference's."""
    expected, settings = EXPECTED[method]
    run = folder.prepared(method=method, temperature=temperature, **settings)
    component, _ = rounds_of(run)
    examples = sampled_round(run)
    assert len(examples) == 8 and len({len(completion_of(each)) for each in examples}) >= 1
    then, now = Twin(folder.model, temperature), Twin(folder.model, temperature)
    perturb(run)
    now.take(run.model)
    theirs = expected(examples, now, then)
    theirs.backward()
    ours = update(run, component)
    assert ours == pytest.approx(theirs.item(), abs=2e-6)
    names = dict(now.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), names[name].grad, rtol=2e-3, atol=2e-6)


def test_old_logprob_is_todays_policy_at_the_temperature(folder: Folder) -> None:
    run = folder.prepared(temperature=1.3)
    twin = Twin(folder.model, 1.3)
    for example in sampled_round(run):
        mask = counted(example)
        own = twin.logprob(example.input_ids)[mask]
        torch.testing.assert_close(example.inputs["old_logprob"][:-1][mask].double(), own, rtol=0, atol=1e-5)
        assert example.inputs["old_logprob"][-1] == 0


def test_the_round_is_logged_with_its_rewards(folder: Folder) -> None:
    """Metrics by hand from the lines of `log_completions`, and these against what is trained on."""
    options = folder.options("logged", log_completions=True, max_steps=1)
    train(options)
    (file,) = sorted((Path(options.output_dir) / "rollouts").iterdir())
    assert file.name == "step-000001.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (record,) = [each for each in read_metrics(Path(options.output_dir)) if "loss" in each]
    rewards = torch.tensor([line["reward"] for line in lines], dtype=torch.float64)
    assert record["reward"] == pytest.approx(float(rewards.mean()))
    assert record["reward_std"] == pytest.approx(float(rewards.std()))
    assert record["rewards/varied/mean"] == pytest.approx(float(rewards.mean()))
    assert record["frac_reward_zero_std"] == 0.0
    assert record["completions/mean_length"] == pytest.approx(sum(line["tokens"] for line in lines) / 8)
    assert record["completions/max_length"] == max(line["tokens"] for line in lines)
    assert record["completions/clipped_ratio"] == sum(not line["ended"] for line in lines) / 8
    assert record["sampling/sampling_logp_difference/max"] < 1e-5
    assert 0 < record["entropy"] < math.log(258)
    expected = group_advantages(rewards.tolist(), 4, scaled=True)
    assert [line["advantage"] for line in lines] == pytest.approx(expected, abs=1e-5)
    assert len({line["prompt"] for line in lines}) == 2 and all(line["origin"] for line in lines)


def test_a_sampler_that_cuts_differs_from_the_policy_by_what_it_says(folder: Folder) -> None:
    """The metric compares what the model itself gave a token while it was drawn, so that cuts are no error."""
    run = folder.prepared(top_k=3, method="dapo")
    sampled_round(run)
    _, rounds = rounds_of(run)
    assert rounds.metrics["sampling/sampling_logp_difference/max"] < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def sampled_of(rewards: list[float], group: list[int], shown: list[int] | None = None) -> advantages.Sampled:
    count = len(rewards)
    lengths = torch.tensor([3, 5, 2, 6, 1, 4, 7, 8][:count])
    return advantages.Sampled(torch.tensor(rewards), torch.tensor(group), torch.tensor(shown or [0] * count), lengths)


def test_estimators_by_hand() -> None:
    sampled = sampled_of([1.0, 0.0, 0.5, 2.0, 2.0, 2.0], [7, 7, 7, 3, 3, 3])
    found = {name: advantages.estimate(name, "none", sampled).own.tolist() for name in ("group", "rloo", "gpg", "opo")}
    assert found["group"] == pytest.approx([0.5, -0.5, 0.0, 0, 0, 0])
    assert found["rloo"] == pytest.approx([0.75, -0.75, 0.0, 0, 0, 0])
    assert found["gpg"] == pytest.approx([1.0, -1.0, 0.0, 0, 0, 0])  # half of the samples say something
    baseline = (3 * 1 + 5 * 0 + 2 * 0.5) / 10
    assert found["opo"] == pytest.approx([1 - baseline, -baseline, 0.5 - baseline, 0, 0, 0])
    scaled = advantages.estimate("group", "group", sampled).own.tolist()
    assert scaled == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0, 0, 0, 0])
    tokens = torch.tensor([0.5] * 3 + [-0.5] * 5 + [0.0] * (2 + 6 + 1 + 4), dtype=torch.float64)
    whitened = (torch.tensor([0.5, -0.5, 0.0, 0, 0, 0], dtype=torch.float64) - tokens.mean()) / tokens.std()
    own = advantages.estimate("reinforce_plus_plus_baseline", "none", sampled).own
    torch.testing.assert_close(own.double(), whitened, rtol=1e-5, atol=1e-6)


def test_the_paper_of_a_loss_names_estimator_and_scale() -> None:
    assert [
        advantages.estimator_of(losses.get(name), None)
        for name in ("grpo", "rloo", "ppo", "prefix_rft", "srft", "luffy")
    ] == [*("group", "rloo", "gae", "prefix", "signed", "group")]
    assert advantages.estimator_of(losses.get("ppo"), "group") == "group"
    assert [advantages.scale_of(losses.get(name), None) for name in ("grpo", "dr_grpo", "luffy", "prefix_rft")] == [
        *("group", "none", "none", "none")
    ]
    assert advantages.scale_of(losses.get("dr_grpo"), "batch") == "batch"


def test_unknown_rewards_move_no_others() -> None:
    nan = math.nan
    rewards, known = advantages.filled(torch.tensor([1.0, nan, 0.0, nan, nan]), torch.tensor([4, 4, 4, 9, 9]))
    assert rewards.tolist() == [1.0, 0.5, 0.0, 0.0, 0.0] and known.tolist() == [1, 0, 1, 0, 0]


def test_the_share_of_right_answers() -> None:
    tokens = torch.tensor([4, 6, 10])
    assert advantages.share_of_right(torch.tensor([1.0, 0.0, math.nan]), tokens) == 5.0
    assert advantages.share_of_right(torch.tensor([0.0, -1.0, 0.0]), tokens) == 0.0
    assert advantages.share_of_right(None, tokens) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Rounds in which there is little to learn


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def records_of(folder: Folder, name: str, **changes: Any) -> list[dict[str, Any]]:
    options = folder.options(name, **changes)
    train(options)
    return [each for each in read_metrics(Path(options.output_dir)) if "loss" in each]


def final_weights(folder: Folder, name: str) -> torch.Tensor:
    twin = Twin(str(folder.path / name))
    return torch.cat([value.flatten() for value in twin.model.state_dict().values()])


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "gspo"])
def test_equal_rewards_teach_nothing(folder: Folder, method: str) -> None:
    name = f"equal-{method}"
    records = records_of(folder, name, method=method, reward_funcs=(f"{HERE}:equal",), **LR)
    assert [each["frac_reward_zero_std"] for each in records] == [1.0, 1.0]
    assert all(each["grad_norm"] == 0 and each["reward_std"] == 0 and each["reward"] == 1 for each in records)
    start = torch.cat([value.flatten() for value in Twin(folder.model).model.state_dict().values()])
    assert final_weights(folder, name).equal(start)


def test_a_group_of_one_teaches_nothing(folder: Folder) -> None:
    records = records_of(folder, "one", num_generations=1, **LR)
    assert all(each["grad_norm"] == 0 and each["frac_reward_zero_std"] == 1 for each in records)


def test_rewards_of_none(folder: Folder) -> None:
    """None of all counts nothing and leaves the means out; None of some counts not, and moves no others."""
    records = records_of(folder, "none", reward_funcs=(f"{HERE}:unknown",), **LR)
    assert all(each["grad_norm"] == 0 and each["loss"] == 0 for each in records)
    assert all("reward" not in each and "rewards/unknown/mean" not in each for each in records)
    assert all(each["frac_reward_zero_std"] == 1 for each in records)
    text = (folder.path / "none" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    run = folder.prepared(reward_funcs=(f"{HERE}:some_unknown",), scale_rewards="none")
    examples = sampled_round(run)
    known = [sum(completion_of(each)) % 2 == 0 for each in examples]
    assert 1 < sum(known) < 7
    for start in (0, 4):
        group = range(start, start + 4)
        rewards = {i: reward_of(completion_of(examples[i])) for i in group if known[i]}
        for i in group:
            expected = rewards[i] - sum(rewards.values()) / len(rewards) if known[i] else 0.0
            own = examples[i].inputs["advantages"][:-1][counted(examples[i])]
            torch.testing.assert_close(own, torch.full_like(own, expected), rtol=0, atol=1e-5)


def test_huge_rewards_stay_finite(folder: Folder) -> None:
    for scale in ("group", "none"):
        records = records_of(folder, f"huge-{scale}", reward_funcs=(f"{HERE}:huge",), scale_rewards=scale)
        assert all(math.isfinite(each["loss"]) and math.isfinite(each["grad_norm"]) for each in records)


def test_masked_completions_do_not_count(folder: Folder) -> None:
    """None ends here, so that nothing at all counts; what the sampler and the model say is compared all the same."""
    changes = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 1, **LR}
    records = records_of(folder, "truncated", seed=3, **changes)
    assert all(each["completions/clipped_ratio"] == 1 for each in records)
    assert all(each["loss"] == 0 and each["grad_norm"] == 0 for each in records)
    assert all(each["sampling/sampling_logp_difference/max"] < 1e-5 for each in records)
    assert all(each["entropy"] > 1 for each in records)
    for method in ("ppo", "prefix_rft"):
        records = records_of(folder, f"truncated-{method}", method=method, seed=3, **changes)
        assert all(math.isfinite(each["loss"]) and math.isfinite(each["grad_norm"]) for each in records)


def test_empty_completions_do_not_count(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may give none at all."""
    run = folder.prepared()
    component, rounds = rounds_of(run)
    real = rounds.settings.generator.generate

    def generate(*args: Any) -> Any:
        return [
            each if place else each._replace(ids=each.ids[:0], logprob=each.logprob[:0],
                                             sampling_logprob=each.sampling_logprob[:0], ended=True)
            for place, each in enumerate(real(*args))
        ]  # fmt: skip

    monkeypatch.setattr(rounds.settings.generator, "generate", generate)
    examples = sampled_round(run)
    assert not counted(examples[0]).any() and all(counted(each).any() for each in examples[1:])
    assert math.isfinite(update(run, component))
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in (each for each in run.model.parameters() if each.requires_grad)
    )


@pytest.mark.parametrize("method", ["grpo", "ppo", "prefix_rft"])
def test_completions_that_are_all_empty(folder: Folder, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    run = folder.prepared(method=method)
    component, rounds = rounds_of(run)
    real = rounds.settings.generator.generate

    def generate(*args: Any) -> Any:
        return [each._replace(ids=each.ids[:0], logprob=each.logprob[:0], sampling_logprob=each.logprob[:0])
                for each in real(*args)]  # fmt: skip

    monkeypatch.setattr(rounds.settings.generator, "generate", generate)
    batches = component.batches(0)
    normalizer = sum(map(component.count, batches)) or 1
    for batch in component.complete(0, batches):
        assert component.engine.objective(run.model, batch, normalizer).loss.isfinite()
    assert all(math.isfinite(value) for value in rounds.metrics.values())


def test_one_prompt_alone_and_fewer_prompts_than_a_round(folder: Folder) -> None:
    """A round goes on with the next epoch's prompts, so that one may stand in it twice, as two groups."""
    for count in (1, 3):
        rows = [{"prompt": f"{i} is "} for i in range(count)]
        data = write_jsonl(folder.path / f"few-{count}.jsonl", rows)
        run = folder.prepared(dataset_name=data, gradient_accumulation_steps=5)
        examples = sampled_round(run)
        assert len(examples) == 20
        openings = [bytes(each.input_ids[: len(each.labels) - int(counted(each).sum())].tolist()) for each in examples]
        assert len(set(openings)) == count
        assert all(openings[i] == openings[i - i % 4] for i in range(20))
        own = [each.inputs["advantages"].sum() for each in examples]
        assert any(x != 0 for x in own)


def test_prompts_of_a_round_are_an_epochs_order(folder: Folder) -> None:
    """Every prompt is answered once in an epoch; the order is another one in the next."""
    run = folder.prepared(num_generations=1, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    _, rounds = rounds_of(run)
    drawn = [[prompt.origin for prompt in rounds._drawn(number, run.world, 42)] for number in range(10)]
    first, second = ([origin for own in part for origin in own] for part in (drawn[:5], drawn[5:]))
    assert len(set(first)) == 10 and set(first) == set(second) and first != second
    assert rounds.steps_per_epoch(run.world) == 5


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_reward_function_that_fails_is_named_with_its_row(folder: Folder) -> None:
    with pytest.raises(InputError, match=r"reward failing failed on .*train.jsonl, line 4: RuntimeError: no 3"):
        train(folder.options("failing", reward_funcs=(f"{HERE}:failing",), max_steps=10, num_generations=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 3}, "4 \\* 2 completions are no whole groups of num_generations=3"),
        ({"steps_per_generation": 3}, "steps_per_generation must be a multiple of .*=2, got 3"),
        ({"temperature": 0.0}, "temperature must be above 0 to sample a group, got 0.0"),
        ({"packing": True}, "packing: completions are not packed"),
        ({"loss": {"beta": 0.1}, "precompute_ref_log_probs": True}, "precompute_ref_log_probs: comp"),
        ({"method": "dft"}, "reward_funcs: dft reads no advantages"),
        ({"method": "sft"}, "reward_funcs: nll reads no advantages"),
        ({"reward_funcs": None, "on_policy": True}, "grpo reads advantages, which come from rewards"),
        ({"reward_funcs": None, "on_policy": True, "method": "ppo"}, "ppo reads advantages"),
        ({"method": "kto", "on_policy": True, "reward_funcs": None}, "kto reads .*which sampling does not give"),
        ({"num_demonstrations": 2}, "num_demonstrations: grpo reads no demonstrations"),
        ({"demonstration_schedule": {"end": 0.1}}, "demonstration_schedule: grpo reads no demonstrations"),
        ({"method": "prefix_rft", "num_demonstrations": 0}, "num_demonstrations must be from 1 to .*=4, got 0"),
        ({"method": "prefix_rft", "num_demonstrations": 5}, "num_demonstrations must be from 1 to .*=4, got 5"),
        ({"method": "prefix_rft", "demonstration_schedule": {"slope": 1}}, "demonstration_schedule: .*slope"),
        ({"method": "prefix_rft", "demonstration_schedule": {"start": 2}}, "demonstration_schedule: start, end, high"),
        ({"method": "prefix_rft", "demonstration_schedule": {"length": 2}}, "demonstration_schedule: .*length"),
        ({"method": "luffy", "demonstration_schedule": {"end": 0.1}}, "demonstration_schedule: nothing is shown by a"),
        ({"method": "prefix_rft", "max_completion_length": 1}, "max_completion_length must be at least 2"),
        ({"method": "prefix_rft", "scale_rewards": "batch"}, "scale_rewards: .* prefix's, expected one"),
        ({"method": "rloo", "scale_rewards": "group"}, "scale_rewards: the advantages are rloo's, it divides by no"),
        ({"lam": 0.9}, "lam: the advantages are group's, without a value function"),
        ({"reward_weights": (1.0, 2.0)}, "reward_weights: expected 1, one for each of reward_funcs, got 2"),
        ({"reward_funcs": ("nowhere:f",)}, "reward_funcs: nowhere:f: there is no module 'nowhere'"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_completion_length": 64}, "none of 10 prompts leaves room for 64 tokens"),
        ({"advantage_estimator": "signed", "reward_funcs": (f"{HERE}:huge",)}, "advantage_estimator signed: rew"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_cannot_be_used_are_named(folder: Folder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(folder.options("refused", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "best"}, "advantage_estimator must be one of group, rloo"),
        ({"scale_rewards": "all"}, "scale_rewards must be one of group, batch, none"),
        ({"importance_sampling": "clip"}, "importance_sampling must be one of none, token_truncate"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"num_generations_eval": 0}, "num_generations_eval must be at least 1"),
        ({"steps_per_generation": 0}, "steps_per_generation must be at least 1"),
        ({"per_device_generation_batch_size": 0}, "per_device_generation_batch_size must be at least 1"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"cliprange_value": 0.0}, "cliprange_value must be finite and above 0"),
        ({"importance_sampling_cap": -1.0}, "importance_sampling_cap must be finite and above 0"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate must be finite and at least 0"),
    ],
)
def test_values_outside_their_range_are_named(folder: Folder, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        folder.options("refused", **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 4),
        ("max_completion_length", 9),
        ("temperature", 0.5),
        ("top_p", 0.5),
        ("log_completions", True),
        ("mask_truncated_completions", True),
        ("reward_weights", (1.0,)),
        ("advantage_estimator", "rloo"),
        ("demonstration_schedule", {"end": 0.1}),
    ],
)
def test_options_of_rollouts_without_rollouts_are_named(folder: Folder, name: str, value: Any) -> None:
    plain = {"method": "sft", "reward_funcs": None, "num_generations": 8, "max_completion_length": 256}
    with pytest.raises(InputError, match=f"^{name}: nothing is sampled, as reward_funcs are not named"):
        train(folder.options("refused", **{**plain, name: value}))


def test_rewards_of_a_run_that_is_told_not_to_sample(folder: Folder) -> None:
    changes = {"on_policy": False, "num_generations": 8, "max_completion_length": 256}
    with pytest.raises(InputError, match=r"^reward_funcs: nothing is sampled, as on_policy is false"):
        train(folder.options("refused", **changes))


def test_components_share_the_runs_options_and_not_each_others(folder: Folder) -> None:
    """An SFT component beside one that samples may stand under the run's options, and has none of its own."""
    sft = {"method": "sft", "dataset_name": folder.data, "name": "sft"}
    grpo = {"method": "grpo", "dataset_name": folder.data, "name": "grpo"}
    shared: dict[str, Any] = {"method": "sft", "dataset_name": "", "reward_funcs": None, "max_steps": 1}
    own = {"reward_funcs": [f"{HERE}:varied"]}
    train(folder.options("shared", **shared, mixture=[sft, {**grpo, **own}]))
    with pytest.raises(InputError, match="mixture, sft: num_generations: nothing is sampled"):
        train(folder.options("refused", **shared, mixture=[{**sft, "num_generations": 2}, {**grpo, **own}]))
    with pytest.raises(InputError, match="mixture, grpo: num_generations: nothing is sampled"):
        train(folder.options("refused", **{**shared, "max_completion_length": 256}, mixture=[grpo]))


def test_a_head_larger_than_the_embedding_is_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token could be drawn that cannot be read."""
    from logitless.training.rollouts import setup

    monkeypatch.setattr(setup, "head_rows", lambda model: 300)
    with pytest.raises(InputError, match="the head has 300 rows and the embedding 258, so that tokens may be drawn"):
        train(folder.options("refused"))
