"""Questions with verifiable answers, as SFT rows and preference pairs; reasoning-gym makes them without a network.

A question is (task, seed, index): from these three reasoning-gym makes the same question again and scores any answer to
it. What a model learns to write is a worked solution of tens of tokens whose last line, "Answer: ...", is scored; the
prompt shows the form on a small example. A preference pair sets the worked solution against a wrong one: the model's
own wherever it was wrong.

    python recipes/reasoning_data.py --output data/reasoning

writes the rows of recipes/papers/small: SFT rows, which are demonstrations and prompts for the reward `reasoning_gym`
too, and pairs whose wrong answers differ from the right ones in one character.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logitless.rewards import reasoning_gym
from logitless.rewards.judge import GYM_SIZE, gym_dataset

Row = dict[str, Any]
Steps = Callable[[dict[str, Any]], list[str]]  # a question's metadata -> the lines that lead to its answer

ANSWER = "Answer:"  # a mark that logitless.rewards.final_answer knows


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym: the sizes asked of it, the form shown in the prompt, the worked solution."""

    options: dict[str, int]
    example: str
    steps: Steps


@dataclass(frozen=True)
class Question:
    """One question: a task of `TASKS`, the seed of its data set, and its place there."""

    task: str
    seed: int
    index: int

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f"{self._entry['question'].strip()}\n\nWork it out in this form:\n{TASKS[self.task].example}"

    @property
    def solution(self) -> str:
        """The worked solution, which ends in the right answer."""
        return "\n".join([*TASKS[self.task].steps(self._entry["metadata"]), f"{ANSWER} {self.answer}"])

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(self._entry["answer"])

    @property
    def columns(self) -> Row:
        """What names the question in a row of data, for the reward `logitless.rewards:reasoning_gym`."""
        return asdict(self) | {"options": self._options}

    def is_right(self, completion: str) -> bool:
        """Whether the completion's answer gets reasoning-gym's full score."""
        [score] = reasoning_gym([completion], **{name: [value] for name, value in self.columns.items()})
        return score == 1

    @property
    def _options(self) -> str:
        return json.dumps(TASKS[self.task].options)

    @property
    def _entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = gym_dataset(self.task, self.seed, self._options)[self.index]
        return entry


# Worked solutions


def _chain_sum(metadata: dict[str, Any]) -> list[str]:
    first, *rest = metadata["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return lines


def _spell_backward(metadata: dict[str, Any]) -> list[str]:
    return ["Forward: " + " ".join(metadata["word"]), "Backward: " + " ".join(reversed(metadata["word"]))]


def _letter_counting(metadata: dict[str, Any]) -> list[str]:
    letter, total, lines = metadata["target_letter"].lower(), 0, []
    for word in metadata["span"]:
        count = word.lower().count(letter)
        total += count
        lines.append(f"{word}: {count}, total {total}")
    return lines


def _gcd(metadata: dict[str, Any]) -> list[str]:
    small, large = sorted(metadata["numbers"])
    lines = []
    while small:
        quotient, remainder = divmod(large, small)
        lines.append(f"{large} = {quotient} * {small} + {remainder}")
        large, small = small, remainder
    return lines


def _leg_counting(metadata: dict[str, Any]) -> list[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total, lines = 0, []
    for animal, count in metadata["animals"].items():
        legs = count * ANIMALS[animal]
        total += legs
        lines.append(f"{count} {animal}: {count} * {ANIMALS[animal]} = {legs}, total {total}")
    return lines


TASKS = {
    "chain_sum": Task(
        {"min_terms": 3, "max_terms": 6, "max_digits": 2}, "12 + 5 = 17\n17 - 3 = 14\nAnswer: 14", _chain_sum
    ),
    "spell_backward": Task(
        {"min_word_len": 4, "max_word_len": 8}, "Forward: s u n\nBackward: n u s\nAnswer: nus", _spell_backward
    ),
    "letter_counting": Task(
        {"min_words": 4, "max_words": 9}, "tree: 2, total 2\nsea: 1, total 3\nAnswer: 3", _letter_counting
    ),
    "gcd": Task({"max_value": 200}, "15 = 1 * 10 + 5\n10 = 2 * 5 + 0\nAnswer: 5", _gcd),
    "leg_counting": Task(
        {"min_animals": 2, "max_animals": 4},
        "3 dog: 3 * 4 = 12, total 12\n2 hen: 2 * 2 = 4, total 16\nAnswer: 16",
        _leg_counting,
    ),
}


# Rows


def make_questions(seed: int, count: int, *, held_out: Iterable[Question] = ()) -> list[Question]:
    """`count` different questions, the tasks in turn, none of them worded as one of `held_out`."""
    seen = {question.prompt for question in held_out}
    found: list[Question] = []
    for number in range(GYM_SIZE):
        if len(found) == count:
            break
        index, turn = divmod(number, len(TASKS))
        question = Question(list(TASKS)[turn], seed, index)
        if question.prompt not in seen:
            seen.add(question.prompt)
            found.append(question)
    return found


def sft_row(question: Question) -> Row:
    """A prompt-completion row, with what names the question beside it."""
    completion = _turn("assistant", question.solution)
    return {"prompt": _turn("user", question.prompt), "completion": completion} | question.columns


def preference_rows(
    questions: Sequence[Question], samples: Sequence[str], seed: int = 0
) -> tuple[list[Row], Counter[str]]:
    """Pairs of the worked solution and a wrong one, and how many of the wrong ones came from where.

    Args:
        questions: what was asked.
        samples: the model's completions, one for each question.
        seed: of the corruptions, which stand in for a sample that is right (or empty): "rejected_by" is "model" where
            the sample itself is the rejected completion, "corruption" elsewhere.
    """
    draw, sources, rows = random.Random(seed), Counter[str](), []
    for question, sample in zip(questions, samples, strict=True):
        own = bool(sample.strip()) and not question.is_right(sample)
        source = "model" if own else "corruption"
        rejected = sample.strip() if own else corrupted(question, draw)
        sources[source] += 1
        rows.append(pair_row(question, rejected) | {"rejected_by": source})
    return rows, sources


def corrupted(question: Question, draw: random.Random) -> str:
    """The worked solution with one character of the answer replaced, so that it is wrong."""
    answer = question.answer
    places = [place for place, character in enumerate(answer) if character.isalnum()]
    while True:
        place = draw.choice(places)
        character = draw.choice("0123456789" if answer[place].isdigit() else "aeionrst")
        completion = question.solution.removesuffix(answer) + answer[:place] + character + answer[place + 1 :]
        if not question.is_right(completion):
            return completion


def mistaken(question: Question, draw: random.Random) -> str:
    """The worked solution with one character of a step replaced, and one of the answer, so that both are wrong.

    What stands before the step is right, so the states of the answer become worse in the middle of it.
    """
    steps, answer = corrupted(question, draw).rsplit("\n", 1)
    places = [place for place, character in enumerate(steps) if character.isdigit()]
    places = places or [place for place in range(steps.rindex(":"), len(steps)) if steps[place].isalpha()]
    place = draw.choice(places)
    others = "0123456789" if steps[place].isdigit() else "aeionrst"
    character = draw.choice([other for other in others if other != steps[place]])
    return steps[:place] + character + steps[place + 1 :] + "\n" + answer


def pair_row(question: Question, wrong: str) -> Row:
    """A preference row of the worked solution against a wrong one, with the question's identity beside it."""
    pair = {"chosen": _turn("assistant", question.solution), "rejected": _turn("assistant", wrong)}
    return {"prompt": _turn("user", question.prompt)} | pair | question.columns


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# The command


def write_rows(folder: Path, *, train: int, held_out: int, seed: int) -> list[Path]:
    """Writes rows and pairs to train on and to evaluate on: `rows.jsonl`, `pairs.jsonl`, `held-out-rows.jsonl`, ...

    Args:
        train, held_out: how many questions each have; none is in both.
        seed: of the questions.
    """
    kept = make_questions(seed + 1, held_out)
    parts = {"": make_questions(seed, train, held_out=kept), "held-out-": kept}
    paths = []
    for part, questions in parts.items():
        pairs = preference_rows(questions, [""] * len(questions), seed)[0]
        for name, rows in {"rows": [sft_row(question) for question in questions], "pairs": pairs}.items():
            write_jsonl(folder / f"{part}{name}.jsonl", rows)
            paths.append(folder / f"{part}{name}.jsonl")
    return paths


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Questions with verifiable answers, as rows and preference pairs.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the files")
    add("--train", type=int, default=512, help="questions to train on (default: %(default)s)")
    add("--held-out", type=int, default=64, help="questions kept for evaluation (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the questions (default: %(default)s)")
    given = parser.parse_args(arguments)
    for path in write_rows(given.output, train=given.train, held_out=given.held_out, seed=given.seed):
        print(path)


if __name__ == "__main__":
    main()
