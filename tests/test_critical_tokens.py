"""A column `token_weight` weights the losses of tokens, and `logitless mask-critical` finds the tokens that decide."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import completion_rows, make_model, make_options, make_tokenizer, preference_rows, write_jsonl
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from logitless.cli import CRITICAL_OPTIONS, app
from logitless.training import InputError, TrainOptions, train
from logitless.training.config import field_types
from logitless.training.critical_tokens import Search, mask_critical_tokens
from logitless.training.metrics import read_metrics
from logitless.training.right import Right

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id
ROOM = 6
#: Right is what has a vowel; and what has no line break, of which nothing is known.
REWARDS = """
def right(completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(any(x in text for x in "aeiou")) for text in texts]

def picky(completions, **columns):
    return [None if "\\n" in c else 1.0 for c in completions]
"""
ROWS = [{"prompt": f"{i}: ", "completion": word} for i, word in enumerate(["a", "bcd", "xe", "oo", "zzzi"])]


class Places:
    """A model that is far from uniform, rewards and rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model", tied=False, sharpness=12)
        model = LlamaForCausalLM.from_pretrained(self.model)
        with torch.no_grad():
            vowels = TOKENIZER("aeiou")["input_ids"]
            model.lm_head.weight[[END, *vowels]] *= 4  # so that some continuations end, and some are right
        model.save_pretrained(self.model)
        (folder / "rewards.py").write_text(REWARDS)
        self.rows = write_jsonl(folder / "rows.jsonl", ROWS)

    def options(self, data: str | None = None, **changes: Any) -> TrainOptions:
        sampled = {"reward_funcs": (f"{self.folder}/rewards.py:right",), "max_completion_length": ROOM}
        return self.trained(data, **sampled | changes)

    def trained(self, data: str | None = None, **changes: Any) -> TrainOptions:
        """Options of a run over rows, which samples nothing."""
        return make_options(self.folder / "run", self.model, data or self.rows, **changes)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tmp_path_factory.mktemp("critical"))


def masked(places: Places, output: Path, data: str | None = None, **changes: Any) -> list[dict[str, Any]]:
    search, right = changes.pop("search", None), changes.pop("right", None)
    mask_critical_tokens(places.options(data, **changes), str(output), search=search, right=right)
    return [json.loads(line) for line in output.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# The column


@functools.lru_cache
def plain(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def log_probs(folder: str, ids: list[int]) -> torch.Tensor:
    return plain(folder)(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def first_loss(places: Places, rows: list[dict[str, Any]], tmp_path: Path, **changes: Any) -> float:
    data = write_jsonl(tmp_path / "weighted.jsonl", rows)
    changes = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": len(rows), "max_steps": 1} | changes
    train(places.trained(data, **changes))
    return float(read_metrics(tmp_path / "run")[0]["loss"])


WEIGHTED = [
    {"prompt": "0: ", "completion": "abc", "token_weight": [1, 0, 0.5, 0]},
    {"prompt": "1: ", "completion": "d", "token_weight": [0, 2]},
    {"prompt": "2: ", "completion": "ef", "token_weight": 3},
    {"prompt": "3: ", "completion": "g"},
    {"prompt": "4: ", "completion": "h", "token_weight": [0, 0]},
]


@pytest.mark.parametrize("changes", [{}, {"backend": "materialised"}, {"packing": True, "max_length": 64},
                                     {"padding_free": True}, {"method": "dft"}])  # fmt: skip
def test_a_weight_multiplies_the_loss_and_0_counts_nothing(
    places: Places, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The mean is over tokens whose weight is not 0; a row without the column has 1; one of zeros is dropped."""
    total, count = 0.0, 0
    for row in WEIGHTED:
        prompt, own = (TOKENIZER(row[name])["input_ids"] for name in ("prompt", "completion"))
        own = [*own, END]
        logp = log_probs(places.model, [*prompt, *own])[len(prompt) - 1 : -1][range(len(own)), own]
        loss = -logp * (logp.exp() if changes.get("method") == "dft" else 1)
        given = row.get("token_weight", 1)
        weight = torch.tensor(given if isinstance(given, list) else [given] * len(own)).double()
        total, count = total + float((weight * loss).sum()), count + int((weight != 0).sum())
    expected = {"rel": 1e-4, "abs": 1e-7}
    assert first_loss(places, WEIGHTED, tmp_path, **changes) == pytest.approx(total / count, **expected)


def test_weights_of_0_and_1_train_as_labels_that_do_not_count(places: Places, tmp_path: Path) -> None:
    """Weights that leave a whole turn out give the training that leaves the turn out by its own mark."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"},
             {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]  # fmt: skip
    marked = [{**turn, "train": False} if turn["content"] == "bc" else turn for turn in turns]
    curves = []
    for name, row in (("weight", {"messages": turns, "token_weight": [0, 1]}), ("mark", {"messages": marked})):
        folder = tmp_path / name
        folder.mkdir()
        first_loss(places, [row], folder, max_steps=3)
        curves.append([record["loss"] for record in read_metrics(folder / "run") if "loss" in record])
    assert curves[0] == curves[1] and len(set(curves[0])) == 3


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1, 0], "the column token_weight has 2 values; expected one, or one for each of the 4 tokens that count"),
        ([1, -1, 1, 1], "the column token_weight must hold numbers of at least 0"),
        ([[1], [1], [1], [1]], "the column token_weight must hold numbers of at least 0"),
        ("much", "the loss reads the column token_weight, a number"),
    ],
)
def test_weights_that_are_none(places: Places, tmp_path: Path, weight: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"weighted.jsonl, line 1: {message}"):
        first_loss(places, [{"prompt": "0: ", "completion": "abc", "token_weight": weight}], tmp_path)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"method": "dpo"}, [{**row, "chosen_token_weight": 1} for row in preference_rows(2)],
         "multiplies losses of tokens, and dpo has one of whole sequences"),
        ({"method": "chord"}, [{**row, "demonstration": True, "advantages": 1.0, "old_logprob": -1.0,
                                "token_weight": 1} for row in completion_rows(2)],
         "chord weights demonstrations and own tokens itself"),
    ],
)  # fmt: skip
def test_losses_whose_tokens_have_no_weight(
    places: Places, tmp_path: Path, changes: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        first_loss(places, rows, tmp_path, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Critical tokens


def greedy(folder: str, ids: list[int], room: int) -> list[int]:
    """What the likeliest tokens go on with, its end included."""
    found: list[int] = []
    while len(found) < room and (not found or found[-1] != END):
        found.append(int(log_probs(folder, [*ids, *found])[-1].argmax()))
    return found


def is_right(ids: list[int]) -> bool:
    return any(x in TOKENIZER.decode(ids, skip_special_tokens=True) for x in "aeiou")


def by_hand(folder: str, row: dict[str, str], alternatives: int, positions: int | None = None) -> list[int]:
    """The weights of a row's tokens, one forward pass after another."""
    prompt, own = TOKENIZER(row["prompt"])["input_ids"], [*TOKENIZER(row["completion"])["input_ids"], END]
    looked: list[tuple[float, int, list[int]]] = []
    for place, token in enumerate(own):
        logp = log_probs(folder, [*prompt, *own[:place]])[-1]
        others = [other for other in logp.argsort(descending=True).tolist() if other != token][:alternatives]
        looked.append((float(logp[others[0]]), place, others))
    weights = [0] * len(own)
    for _, place, others in sorted(looked, key=lambda each: -each[0])[:positions]:
        wrong = 0
        for other in others:
            start = [*own[:place], other]
            wrong += not is_right(
                [*start, *([] if other == END else greedy(folder, prompt + start, ROOM - len(start)))]
            )
        weights[place] = int(2 * wrong >= alternatives)
    return weights


@pytest.mark.parametrize("search", [Search(), Search(alternatives=1), Search(alternatives=1, positions=1)])
def test_critical_tokens_are_those_found_by_hand(places: Places, tmp_path: Path, search: Search) -> None:
    found = masked(places, tmp_path / "masked.jsonl", search=search)
    right = [row for row in ROWS if is_right(TOKENIZER(row["completion"])["input_ids"])]
    assert [{name: row[name] for name in ("prompt", "completion")} for row in found] == right and len(right) == 4
    expected = [by_hand(places.model, row, search.alternatives, search.positions) for row in right]
    assert [row["token_weight"] for row in found] == expected
    flat = [weight for weights in expected for weight in weights]
    assert 0 < sum(flat) < len(flat)
    assert search.positions is None or max(map(sum, expected)) <= search.positions


def test_batches_change_nothing(places: Places, tmp_path: Path) -> None:
    whole = masked(places, tmp_path / "whole.jsonl")
    small = {"per_device_eval_batch_size": 1, "per_device_generation_batch_size": 2}
    assert masked(places, tmp_path / "small.jsonl", **small) == whole


def test_sampled_continuations(places: Places, tmp_path: Path) -> None:
    """Equal seeds draw alike; half of them must be wrong."""
    one, two = (masked(places, tmp_path / f"{name}.jsonl", search=Search(1, samples=3)) for name in ("one", "two"))
    assert one == two
    everything = masked(places, tmp_path / "all.jsonl", search=Search(1, samples=3), right=Right(-1.0))
    assert not any(weight for row in everything for weight in row["token_weight"])  # nothing can be wrong


def test_rows_of_other_forms_train_on_what_is_critical(places: Places, tmp_path: Path) -> None:
    """The last answer of a conversation is looked at; its row trains, and zeros do not count."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "and?"}, {"role": "assistant", "content": "ab"}]  # fmt: skip
    rows = [{"messages": turns, "gold": 7}, {"question": "q", "answer": "e"}, {"prompt": "no answer"},
            {"prompt": "p", "completion": "too long, and out"}]  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = masked(places, tmp_path / "masked.jsonl", data)
    assert len(found) == 2 and found[0]["gold"] == 7 and "messages" not in found[0]
    assert found[0]["prompt"] == turns[:3] and found[0]["completion"] == turns[3:]
    assert len(found[0]["token_weight"]) == len(TOKENIZER("ab")["input_ids"]) + 2  # the end, and the template's newline
    assert found[0]["token_weight"][-1] == 0  # which no model writes
    found[0]["token_weight"][0] = 1
    loss = first_loss(places, found[:1], tmp_path)
    assert math.isfinite(loss)


def test_unknown_rewards_decide_nothing(places: Places, tmp_path: Path) -> None:
    """A continuation without a reward is neither right nor wrong; all known ones are right here."""
    found = masked(places, tmp_path / "masked.jsonl", reward_funcs=(f"{places.folder}/rewards.py:picky",))
    assert len(found) == len(ROWS) and not any(sum(row["token_weight"]) for row in found)


# Going on


class Stopped(Exception):
    """What ends a search in the middle."""


def test_rows_that_are_done_are_kept(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logitless.training import critical_tokens

    expected = masked(places, tmp_path / "whole.jsonl")
    output, part = tmp_path / "masked.jsonl", tmp_path / "masked.jsonl.part"
    real, looked = critical_tokens._Searcher.weights, []

    def stopping(searcher: Any, answer: Any) -> list[int]:
        if len(looked) == 2:
            raise Stopped
        looked.append(answer.row["completion"])
        return real(searcher, answer)

    monkeypatch.setattr(critical_tokens._Searcher, "weights", stopping)
    with pytest.raises(Stopped):
        masked(places, output)
    assert not output.exists() and len(part.read_text().splitlines()) == 1 + 3  # settings, two rows and a wrong one
    part.write_text(part.read_text() + '{"prompt": "ha')  # a line that a killed process left
    seen = []
    monkeypatch.setattr(critical_tokens._Searcher, "weights", lambda s, a: [seen.append(a), real(s, a)][1])
    assert masked(places, output) == expected
    assert looked + [answer.row["completion"] for answer in seen] == ["a", "xe", "oo", "zzzi"]
    assert not part.exists()
    with pytest.raises(InputError, match=r"masked.jsonl is there, and whole"):
        masked(places, output)


def test_what_other_options_began_is_not_gone_on_with(places: Places, tmp_path: Path) -> None:
    part = tmp_path / "masked.jsonl.part"
    part.write_text(json.dumps({"model_name_or_path": "another"}) + "\n")
    with pytest.raises(InputError, match=r"was begun with model_name_or_path='another', not '.*model'"):
        masked(places, tmp_path / "masked.jsonl")


# The command


def test_the_command_line(places: Places, tmp_path: Path) -> None:
    output = tmp_path / "masked.jsonl"
    flags = ["--model_name_or_path", places.model, "--dataset_name", places.rows, "--use_cpu", "--output", str(output)]
    flags += ["--max_completion_length", str(ROOM), "--alternatives", "1", "--positions", "2"]
    result = CliRunner().invoke(app, ["mask-critical", *flags])
    assert result.exit_code == 2 and "reward_funcs: name a function" in result.output
    result = CliRunner().invoke(app, ["mask-critical", *flags, "--reward_funcs", f"{places.folder}/rewards.py:right"])
    assert result.exit_code == 0, result.output
    assert "4 rows with a right answer" in result.output and len(output.read_text().splitlines()) == 4
    assert set(CRITICAL_OPTIONS) <= set(field_types())


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({}, "masked.parquet", "output: expected a name that ends in .jsonl"),
        ({"search": Search(samples=2), "temperature": 0.0}, "x.jsonl", "samples: at temperature 0 all of them"),
        ({"search": Search(alternatives=258)}, "x.jsonl", "alternatives must be below 258"),
        ({"max_completion_length": 62}, "x.jsonl", "none of 5 rows has an answer of at most 62 tokens"),
        ({"right": Right(1.0, "left")}, "x.jsonl", "threshold_func: expected one of right, got 'left'"),
    ],
)
def test_what_cannot_be_used(places: Places, tmp_path: Path, changes: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        masked(places, tmp_path / name, **changes)


@pytest.mark.parametrize("field", ["alternatives", "positions", "samples"])
def test_numbers_out_of_range(field: str) -> None:
    with pytest.raises(InputError, match=rf"{field} must be at least"):
        Search(**{field: -1})
