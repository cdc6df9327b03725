"""Prompts with their demonstrations, what completions are shown of these, and the losses that learn from them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_cases import HERE, Folder, Twin, make_folder, rounds_of, rows_with_answers, sampled_round
from rollout_rewards import reward_of
from training_fixtures import CHATML, make_tokenizer, write_jsonl

from logitless import losses
from logitless.losses.policy.advantages import group_advantages
from logitless.losses.policy.demonstrations import PrefixRFT
from logitless.losses.policy.schedules import prefix_rft_length, uft_hint_length
from logitless.training import InputError, train
from logitless.training.data import Row
from logitless.training.examples import IGNORED, Example
from logitless.training.metrics import read_metrics
from logitless.training.render import Renderer
from logitless.training.rollouts import advantages
from logitless.training.rollouts.generation import Completion
from logitless.training.rollouts.groups import Schedule, Slot, shows, slots_of
from logitless.training.rollouts.prompts import Demonstration, Prompt, Prompts, read_prompts
from logitless.training.rollouts.rollout import rollout_of
from logitless.training.run import Run
from logitless.types import TokenStats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return make_folder(tmp_path_factory.mktemp("demonstrations"))


# ---------------------------------------------------------------------------------------------------------------------
# Rows as prompts

USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}
ASKED = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def read(
    *rows: dict[str, Any], chat: str | None = CHATML, room: int = 40, demonstrations: bool = True, **settings: Any
) -> Prompts:
    renderer = Renderer(make_tokenizer(chat), settings.pop("max_length", 200))
    listed = [Row(row, f"rows:{number}") for number, row in enumerate(rows, 1)]
    return read_prompts(listed, renderer, "rows", room=room, demonstrations=demonstrations, **settings)


def texts(prompt: Prompt) -> tuple[str, str | None]:
    tokenizer = make_tokenizer()
    shown = prompt.demonstration
    return tokenizer.decode(prompt.ids), None if shown is None else tokenizer.decode(shown.ids)


@pytest.mark.parametrize(
    ("row", "opening", "demonstration"),
    [
        ({"prompt": "1+1="}, "1+1=", None),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2<|im_end|>"),
        ({"prompt": "1+1=", "completion": ""}, "1+1=", "<|im_end|>"),
        ({"prompt": "1+1=", "answer": "2", "solution": "2"}, "1+1=", None),
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", None),
        ({"prompt": [USER]}, ASKED, None),
        ({"prompt": [USER], "completion": [ANSWER]}, ASKED, "two<|im_end|>"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, ASKED, None),
        ({"question": "1+1?"}, ASKED, None),
        ({"question": "1+1?", "answer": "two"}, ASKED, "two<|im_end|>"),
        ({"messages": [USER]}, ASKED, None),
        ({"messages": [USER, ANSWER]}, ASKED, "two<|im_end|>"),
        ({"messages": [USER, ANSWER, USER]}, f"{ASKED}two<|im_end|>\n{ASKED}", None),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, f"{ASKED}two<|im_end|>\n{ASKED}", "two<|im_end|>"),
    ],
)
def test_forms_of_rows(row: dict[str, Any], opening: str, demonstration: str | None) -> None:
    """A demonstration ends at its end token, whatever a template writes behind it."""
    (prompt,) = read(row).prompts
    assert texts(prompt) == (opening, demonstration)
    assert prompt.ids.dtype == torch.int32 and prompt.columns.keys() == row.keys() and prompt.origin == "rows:1"
    assert isinstance(prompt.asked, str) == isinstance(row.get("prompt"), str)
    if prompt.demonstration is not None:
        assert prompt.demonstration.prompt.equal(prompt.ids)
    (without,) = read(row, demonstrations=False).prompts
    assert without.demonstration is None and without.ids.equal(prompt.ids)


@pytest.mark.parametrize("row", [{"prompt": "1+1=", "completion": "2"}, {"messages": [USER, ANSWER]}])
def test_a_prompt_is_what_a_row_with_an_answer_begins_with(row: dict[str, Any]) -> None:
    renderer = Renderer(make_tokenizer(), 200)
    example = renderer.whole(Row(row, "rows:1"))
    first = int((example.labels != IGNORED).nonzero()[0])
    assert read(row).prompts[0].ids.equal(example.input_ids[:first])


def test_a_start_token_stands_in_front_once() -> None:
    tokenizer = make_tokenizer(None)
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair=None, special_tokens=[("<|im_start|>", 0)]
    )
    renderer = Renderer(tokenizer, 200)
    rows = [Row({"prompt": text, "completion": "2"}, "rows:1") for text in ("a", "<|im_start|>a", "")]
    found = read_prompts(rows, renderer, "rows", room=4, demonstrations=True).prompts
    assert [tokenizer.decode(each.ids) for each in found] == ["<|im_start|>a", "<|im_start|>a", "<|im_start|>"]
    for each in found:
        assert each.demonstration is not None and each.demonstration.prompt.equal(each.ids)


def test_prompts_that_leave_no_room_are_dropped_and_counted() -> None:
    rows = [{"prompt": "x" * length, "completion": "y" * 30} for length in (5, 30, 10, 11)]
    found = read(*rows, room=10, max_length=20)
    assert [len(each.ids) for each in found.prompts] == [5, 10]
    assert (found.rows, found.dropped, found.kept) == (4, 2, (0, 2))
    assert [len(each.demonstration.ids) for each in found.prompts if each.demonstration] == [10, 10]
    assert found.summary() == (
        "2 of 4 rows as prompts, 2 with a demonstration (2 dropped: no room for a completion within max_length)"
    )
    with pytest.raises(InputError, match=r"rows: none of 4 prompts leaves room for 50 tokens .max_completion_length"):
        read(*rows, room=50, max_length=20)


def test_rows_without_a_prompt_are_named() -> None:
    for row in ({"prompt": ""}, {"prompt": "", "completion": "x"}):
        with pytest.raises(InputError, match="rows:2: the prompt is empty, and the tokenizer has no start token"):
            read({"prompt": "a"}, row)
    with pytest.raises(InputError, match=r"rows:1: expected a prompt to be continued; the columns are .'text'"):
        read({"text": "abc"})
    with pytest.raises(InputError, match="rows: prefix_rft reads demonstrations, and no row has an answer"):
        read({"prompt": "a"}, required="prefix_rft")
    assert len(read({"prompt": "a"}, {"prompt": "a", "completion": "b"}, required="prefix_rft").prompts) == 2


def test_a_fingerprint_is_of_prompts_demonstrations_and_columns() -> None:
    base = {"prompt": "a", "completion": "b", "truth": 1}
    changed = [base, {**base, "prompt": "c"}, {**base, "completion": "c"}, {**base, "truth": 2}]
    assert len({read(row).fingerprint() for row in changed}) == 4
    assert read(base).fingerprint() == read(dict(base)).fingerprint()


def test_the_completion_is_the_demonstration_whatever_sft_learns(folder: Folder) -> None:
    """`completion_only_loss: false` is of rows that are learned; shown is what answers the prompt."""
    plain, whole = (
        rounds_of(folder.prepared(method="luffy", completion_only_loss=value))[1].prompts for value in (None, False)
    )
    assert plain.fingerprint() == whole.fingerprint()


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def prompt_of(length: int, answer: int) -> Prompt:
    ids = torch.arange(length).int()
    shown = Demonstration(ids, 100 + torch.arange(answer).int()) if answer else None
    return Prompt(ids, shown, "asked", {}, "rows:1")


def shown_slots(kind: str, settings: dict[str, Any], step: int = 0, group: int = 4, count: int = 1) -> list[Slot]:
    return slots_of(
        [prompt_of(3, 40), prompt_of(2, 0), prompt_of(4, 25)],
        Schedule(kind, settings),
        group=group,
        demonstrations=count,
        step=step,
        total_steps=100,
        generator=torch.Generator().manual_seed(3),
    )


def test_losses_say_what_they_show() -> None:
    found = {name: shows(losses.get(name)) for name in ("grpo", "ppo", "prefix_rft", "uft", "luffy", "srft", "chord")}
    assert found == {
        **dict.fromkeys(("grpo", "ppo"), "nothing"),
        **dict.fromkeys(("luffy", "srft", "chord"), "whole"),
        "prefix_rft": "prefix",
        "uft": "hint",
    }


@pytest.mark.parametrize("step", [0, 50, 100])
def test_prefixes_have_the_lengths_of_their_schedule(step: int) -> None:
    """One of a group continues a prefix, drawn from one generator; a prompt without a demonstration has none."""
    settings = {"start": 0.9, "end": 0.1}
    slots = shown_slots("prefix", settings, step)
    generator = torch.Generator().manual_seed(3)
    lengths = [prefix_rft_length(n, step, 100, **settings, generator=generator) for n in (40, 25)]
    assert [slot.shown for slot in slots] == [0, 0, 0, lengths[0], 0, 0, 0, 0, 0, 0, 0, lengths[1]]
    assert all(slot.sampled for slot in slots) and [slot.prompt for slot in slots] == [0] * 4 + [1] * 4 + [2] * 4
    assert slots[3].start.tolist() == [0, 1, 2, *range(100, 100 + lengths[0])]
    assert slots[0].start.tolist() == [0, 1, 2]


def test_prefixes_become_shorter_and_keep_a_token_for_the_policy() -> None:
    means = []
    for step in (0, 50, 100):
        lengths = [slot.shown for seed in range(200) for slot in slots_of(
            [prompt_of(1, 40)], Schedule("prefix", {}), group=2, demonstrations=1, step=step, total_steps=100,
            generator=torch.Generator().manual_seed(seed)) if slot.start[-1] >= 100]  # fmt: skip
        assert max(lengths) <= 39
        means.append(sum(lengths) / len(lengths))
    assert means[0] == 38 and means[0] > means[1] + 5 > means[2] + 10  # 0.95 of 40 at first, then any share


def test_a_schedule_that_does_not_fall_is_the_ablation() -> None:
    for share, length in ((0.5, 20), (1.0, 39), (0.0, 0)):
        constant = {"start": share, "end": share, "high": share}
        for step in (0, 60, 100):
            slots = shown_slots("prefix", constant, step)
            assert slots[3].shown == length and slots[3].sampled


def test_several_demonstrations_of_a_group_draw_a_length_each() -> None:
    slots = shown_slots("prefix", {"start": 0.0, "end": 0.0}, group=6, count=4)
    assert [slot.shown > 0 for slot in slots[:6]] == [False, False, True, True, True, True]
    assert len({slot.shown for slot in slots[2:6]}) > 1
    everyone = shown_slots("prefix", {}, count=4)
    assert all(slot.shown for slot in everyone[:4])


def test_a_hint_is_all_groups_and_falls_to_nothing() -> None:
    """All completions of a prompt share one hint, of the length that its rule draws, and have a token to sample."""
    slots = shown_slots("hint", {"hint_steps": 50}, step=20)
    generator = torch.Generator().manual_seed(3)
    lengths = [uft_hint_length(n, 20, 50, generator=generator) for n in (40, 25)]
    assert [slot.shown for slot in slots] == [lengths[0]] * 4 + [0] * 4 + [lengths[1]] * 4
    assert all(slot.start.equal(slots[0].start) for slot in slots[:4])
    assert not any(slot.shown for slot in shown_slots("hint", {"hint_steps": 50}, step=51))
    whole = shown_slots("hint", {"start": 1.0, "end": 1.0})
    assert [whole[0].shown, whole[8].shown] == [39, 24] and whole[0].sampled


def test_a_whole_demonstration_is_not_sampled() -> None:
    slots = shown_slots("whole", {})
    assert [slot.sampled for slot in slots] == [True] * 3 + [False] + [True] * 7 + [False]
    assert slots[3].shown == 40 and slots[11].shown == 25


def completion_of(ids: list[int], ended: bool) -> Completion:
    values = -torch.arange(1.0, len(ids) + 1)
    return Completion(torch.tensor(ids).int(), values, 2 * values, ended)


def test_which_tokens_count_and_where_their_values_stand() -> None:
    """A completion's tokens count, those shown included; a value stands where its token is predicted."""
    slot = Slot(0, torch.tensor([10, 11, 12, 50, 51]).int(), 2, True)
    rollout = rollout_of(slot, completion_of([60, 61, 1], ended=True), room=9)
    assert rollout.ids.tolist() == [10, 11, 12, 50, 51, 60, 61, 1] and rollout.ended
    assert rollout.completion.tolist() == [50, 51, 60, 61, 1] and (rollout.begin, rollout.sampled) == (3, 3)
    assert rollout.example().labels.tolist() == [-100, -100, -100, 50, 51, 60, 61, 1]
    assert rollout.example(masked=True).labels.tolist() == [-100, -100, -100, 50, 51, -100, -100, -100]
    assert rollout.aligned(1.0, 2.0).tolist() == [0, 0, 1, 1, 2, 2, 2, 0]
    assert rollout.aligned(0.0, rollout.logprob).tolist() == [0, 0, 0, 0, -2, -4, -6, 0]


def test_shown_and_sampled_share_the_longest_completion() -> None:
    slot = Slot(0, torch.tensor([10, 50, 51]).int(), 2, True)
    for ended, room, kept in ((True, 5, [60, 61, 1]), (True, 4, [60, 61]), (False, 4, [60, 61])):
        rollout = rollout_of(slot, completion_of([60, 61, 1], ended), room)
        assert rollout.ids[3:].tolist() == kept and rollout.ended == (ended and room == 5)
        assert len(rollout.logprob) == len(rollout.sampling_logprob) == len(kept)
    whole = rollout_of(Slot(0, torch.tensor([10, 50, 1]).int(), 2, False), None, 5)
    assert whole.ended and whole.sampled == 0 and whole.example().labels.tolist() == [-100, 50, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Advantages


def test_prefix_rft_advantages_of_a_group_of_four() -> None:
    """The prefixed answer keeps its bare reward, and its prefix has the others' mean less."""
    rewards, shown = torch.tensor([1.0, 0.0, 0.5, 0.75]), torch.tensor([0, 0, 0, 7])
    sampled = advantages.Sampled(rewards, torch.zeros(4, dtype=torch.int64), shown, torch.tensor([5, 5, 5, 9]))
    found = advantages.estimate("prefix", "none", sampled)
    assert found.own.tolist() == pytest.approx([0.5, -0.5, 0.0, 0.75])
    assert found.shown.tolist() == pytest.approx([0, 0, 0, 0.75 - 0.5])
    scaled = advantages.estimate("prefix", "group", sampled)
    assert scaled.own.tolist() == pytest.approx([1.0, -1.0, 0.0, 0.75], abs=1e-5)
    plain = advantages.estimate("group", "none", sampled)  # the ablation: one group, one advantage for all tokens
    assert plain.own.tolist() == pytest.approx([0.4375, -0.5625, -0.0625, 0.1875])
    assert plain.shown.equal(plain.own)


def test_two_prefixes_of_one_length_are_one_prefix() -> None:
    rewards, shown = torch.tensor([0.5, 1.0, 0.0, 1.0]), torch.tensor([0, 6, 6, 3])
    sampled = advantages.Sampled(rewards, torch.zeros(4, dtype=torch.int64), shown, torch.full((4,), 9))
    found = advantages.estimate("prefix", "none", sampled)
    assert found.own.tolist() == pytest.approx([0.5, 0.5, -0.5, 1.0])
    assert found.shown.tolist() == pytest.approx([0, (0.5 - 0.5) / 2, (-0.5 - 0.5) / 2, 1.0 - 0.5])


def test_srft_advantages_are_signed() -> None:
    rewards, shown = torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 0, 0, 4])
    sampled = advantages.Sampled(rewards, torch.zeros(4, dtype=torch.int64), shown, torch.full((4,), 4))
    found = advantages.estimate("signed", "group", sampled)
    assert found.own.tolist() == [1.0, -1.0, 0.0, 1.0]
    assert found.shown.equal(group_advantages(rewards, 4))
    with pytest.raises(InputError, match=r"rewards must be in \[0, 1\], got them from -0.5 to 0.5"):
        advantages.estimate("signed", "group", sampled._replace(rewards=rewards - rewards.flip(0)))


# ---------------------------------------------------------------------------------------------------------------------
# Rounds of each loss

LONG = {"max_completion_length": 12, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def parts_of(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool `[T - 1]`: the places of tokens shown, and of those sampled."""
    counts = example.labels[1:] != IGNORED
    shown = counts & (example.inputs["demonstration"][:-1] != 0)
    return shown, counts & ~shown


def gradient_of(run: Run) -> dict[str, torch.Tensor]:
    component, _ = rounds_of(run)
    batches = component.batches(0)
    normalizer = sum(map(component.count, batches))
    for batch in component.complete(0, batches):
        component.engine.objective(run.model.train(), batch, normalizer).loss.backward()
    return {name: each.grad for name, each in run.model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_prefix_rft_against_full_logits(folder: Folder, keep: float) -> None:
    """The prefix tokens of highest entropy in a batch have a gradient, all others of it stay in the normaliser."""
    run = folder.prepared(method="prefix_rft", loss={"keep": keep}, **LONG)
    examples = sampled_round(run)
    twin = Twin(folder.model)
    rewards = [reward_of(each.input_ids[each.labels != IGNORED].tolist()) for each in examples]
    shown_entropy = torch.cat([twin.entropy(each.input_ids)[parts_of(each)[0]] for each in examples]).detach()
    assert len(shown_entropy) > 9
    least = shown_entropy.quantile(1 - keep)
    assert keep == 1 or 1 < (shown_entropy >= least).sum() < 0.4 * len(shown_entropy)
    total = torch.zeros((), dtype=torch.float64)
    for start in (0, 4):
        free = sum(rewards[start : start + 3]) / 3
        for place in range(start, start + 4):
            example = examples[place]
            shown, own = parts_of(example)
            assert shown.any() == (place % 4 == 3)
            logprob = twin.logprob(example.input_ids)
            ratio = (logprob - logprob.detach()).exp()
            chosen = shown & (twin.entropy(example.input_ids).detach() >= least)
            hybrid = place % 4 == 3
            total = total - ratio[own].sum() * (rewards[place] - (0.0 if hybrid else free))
            total = total - ratio[chosen].sum() * (rewards[place] - free)
    (total / (8 * 12)).backward()  # Dr. GRPO's: the longest completion for each of the sequences
    expected = dict(twin.model.named_parameters())
    for name, gradient in gradient_of(run).items():
        torch.testing.assert_close(gradient.double(), expected[name].grad, rtol=2e-3, atol=2e-6)


def test_prefix_rft_selection_is_a_mask() -> None:
    """The gradient of `keep` is that of `keep=1` times a mask made by hand."""
    generator = torch.Generator().manual_seed(0)
    entropy, old, shift = (torch.rand(2, 10, generator=generator, dtype=torch.float64) for _ in range(3))
    demonstration = torch.zeros(2, 10)
    demonstration[1, :5] = 1
    found = {}
    for keep in (0.4, 1.0):
        logprob = (-old + 0.1 * shift).requires_grad_()
        inputs = {"advantages": torch.full((2, 10), 0.7), "old_logprob": -old, "demonstration": demonstration}
        stats = TokenStats(logprob=logprob, entropy=entropy)
        PrefixRFT(keep=keep)(stats, **inputs).sum().backward()
        assert logprob.grad is not None
        found[keep] = logprob.grad
    prefix = entropy[1, :5]
    mask = torch.ones(2, 10, dtype=torch.float64)
    mask[1, :5] = (prefix >= prefix.sort().values[3]).double()  # two of five
    assert mask.sum() == 17
    torch.testing.assert_close(found[0.4], found[1.0] * mask)
    assert found[1.0].all()


def test_the_clip_of_prefix_tokens_can_be_left_out() -> None:
    inputs = {"advantages": torch.ones(1, 2), "old_logprob": torch.zeros(1, 2), "demonstration": torch.tensor([[1, 0]])}
    for clip, expected in ((True, [0.0, 0.0]), (False, [-math.exp(0.5), 0.0])):
        logprob = torch.full((1, 2), 0.5, requires_grad=True)
        PrefixRFT(keep=1.0, clip_demonstration=clip)(TokenStats(logprob=logprob), **inputs).sum().backward()
        assert logprob.grad is not None
        assert logprob.grad[0].tolist() == pytest.approx(expected)


def test_uft_shows_a_group_one_hint_of_which_nothing_is_reinforced(folder: Folder) -> None:
    """Hint tokens have the NLL with a mean of their own, answers the surrogate with theirs."""
    settings = {"start": 0.5, "end": 0.5}
    run = folder.prepared(method="uft", demonstration_schedule=settings, seed=1, **LONG)
    examples = sampled_round(run)
    twin = Twin(folder.model)
    hint, answer = ([twin.logprob(e.input_ids)[parts_of(e)[part]] for e in examples] for part in (0, 1))
    for start in (0, 4):
        openings = {tuple(each.input_ids[:-1][parts_of(each)[0]].tolist()) for each in examples[start : start + 4]}
        assert len(openings) == 1
    assert sum(map(len, hint)) > 8
    rewards = torch.tensor([reward_of(e.input_ids[e.labels != IGNORED].tolist()) for e in examples])
    parts = zip(group_advantages(rewards, 4).double(), answer, strict=True)
    surrogate = -torch.cat([own * (each - each.detach()).exp() for own, each in parts]).mean()
    (surrogate - 0.001 * torch.cat(hint).mean()).backward()
    expected = dict(twin.model.named_parameters())
    for name, gradient in gradient_of(run).items():
        torch.testing.assert_close(gradient.double(), expected[name].grad, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("method", ["luffy", "srft", "chord"])
def test_whole_demonstrations_stand_in_the_group(folder: Folder, method: str) -> None:
    """Whole demonstrations are rewarded as the other completions are, and share in the group's mean."""
    run = folder.prepared(method=method, num_demonstrations=2, **LONG)
    examples = sampled_round(run)
    _, rounds = rounds_of(run)
    answers = {texts(prompt)[1] for prompt in rounds.prompts.prompts}
    rewards = torch.tensor([reward_of(e.input_ids[e.labels != IGNORED].tolist()) for e in examples])
    scaled = group_advantages(rewards, 4, scale="none" if method == "luffy" else "group")
    for place, example in enumerate(examples):
        shown, own = parts_of(example)
        whole = place % 4 >= 2
        assert bool(shown.any()) == whole and bool(own.any()) != whole
        if whole:
            assert make_tokenizer().decode(example.input_ids[1:][shown]) in answers
        expected = 2 * rewards[place] - 1 if method == "srft" and not whole else scaled[place]
        found = example.inputs["advantages"][:-1][shown | own]
        torch.testing.assert_close(found, torch.full_like(found, float(expected)), rtol=0, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradient_of(run).values())


def test_metrics_of_demonstrations(folder: Folder) -> None:
    """Rewards are of what was sampled; how much was shown is told."""
    options = folder.options("metrics", method="prefix_rft", reward_funcs=(f"{HERE}:equal",), **LONG)
    train(options)
    records = [each for each in read_metrics(Path(options.output_dir)) if "loss" in each]
    assert all(each["completions/shown_length"] > 0 and each["reward"] == 1 for each in records)
    luffy = folder.options("metrics-luffy", method="luffy", num_demonstrations=4, **LONG)
    train(luffy)
    records = [each for each in read_metrics(Path(luffy.output_dir)) if "loss" in each]
    assert all("reward" not in each and each["completions/mean_length"] == 0 for each in records)
    assert "NaN" not in (Path(luffy.output_dir) / "metrics.jsonl").read_text()


def test_prompts_without_a_demonstration_stand_beside_others(folder: Folder) -> None:
    rows = [{"prompt": "a is "}, {"prompt": "b is ", "completion": "b" * 9}]
    data = write_jsonl(folder.path / "some.jsonl", rows)
    examples = sampled_round(folder.prepared(method="prefix_rft", dataset_name=data, **LONG))
    assert Counter(bool(parts_of(each)[0].any()) for each in examples) == {False: 7, True: 1}


def test_a_log_line_averages_the_rounds_that_have_a_metric(folder: Folder) -> None:
    """A round without a demonstration has no length of one; the mean is over the others."""
    rows = rows_with_answers()
    few = [{"prompt": row["prompt"]} for row in rows[1:]] + rows[:1]
    data = write_jsonl(folder.path / "few.jsonl", few)
    every = folder.options("each-step", method="luffy", dataset_name=data, max_steps=6, logging_steps=1, **LONG)
    train(every)
    lengths = [each.get("completions/shown_length") for each in read_metrics(Path(every.output_dir)) if "loss" in each]
    known = [length for length in lengths if length is not None]
    assert 0 < len(known) < len(lengths)
    window = folder.options("window", method="luffy", dataset_name=data, max_steps=6, logging_steps=6, **LONG)
    train(window)
    *_, last = [each for each in read_metrics(Path(window.output_dir)) if "loss" in each]
    rest = [length for length in lengths[1:] if length is not None]  # the first step has a line of its own
    assert last.get("completions/shown_length") == (pytest.approx(sum(rest) / len(rest)) if rest else None)
