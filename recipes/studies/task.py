"""A task with verifiable answers for a model of 300,000 parameters: running sums, and what is known about them.

    prompt "3+1+4+2=", right answer "3430": after each number the sum so far, modulo 5

Answers are of several parts that depend on one another, as worked solutions are, and a wrong part makes all that follow
wrong. Demonstrations may come from a teacher that makes one mistake: it takes a 3 behind a 4 for a 1, so that a fifth
of its answers to six numbers are wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MODULUS = 5
BEHIND, MISTAKEN, TAKEN_FOR = 4, 3, 1  # the teacher's mistake
HARD = 6  # numbers of a question in the studies; the base model has seen few of these
HARDER = 7  # and as few of these, which the studies do not train on

Row = dict[str, Any]
Teacher = Callable[[Sequence[int]], str]


def right(numbers: Sequence[int]) -> str:
    """The right answer."""
    return _sums(numbers)


def mistaken(numbers: Sequence[int]) -> str:
    """The answer of the teacher that makes a mistake."""
    before = [-1, *numbers]
    wrong = [(first, number) == (BEHIND, MISTAKEN) for first, number in zip(before, numbers, strict=False)]
    return _sums([TAKEN_FOR if each else number for each, number in zip(wrong, numbers, strict=True)])


def _sums(numbers: Iterable[int]) -> str:
    total, parts = 0, []
    for number in numbers:
        total = (total + number) % MODULUS
        parts.append(str(total))
    return "".join(parts)


def prompt(numbers: Sequence[int]) -> str:
    """What is asked."""
    return "+".join(map(str, numbers)) + "="


def questions(seed: int, count: int, lengths: Sequence[int]) -> list[list[int]]:
    """`count` questions, each of a length that is drawn from these."""
    draw = random.Random(seed)
    return [[draw.randrange(MODULUS) for _ in range(draw.choice(lengths))] for _ in range(count)]


def demonstrations(seed: int, count: int, teacher: Teacher = right, lengths: Sequence[int] = (HARD,)) -> list[Row]:
    """Rows of prompt and completion, with the right answer beside them for a reward."""
    return [
        {"prompt": prompt(numbers), "completion": teacher(numbers), "answer": right(numbers)}
        for numbers in questions(seed, count, lengths)
    ]


def preferences(seed: int, count: int) -> list[Row]:
    """Pairs of the right answer and one with a wrong part, from which on all parts are wrong."""
    draw, rows = random.Random(seed), []
    for numbers in questions(seed, count, (HARD,)):
        changed = list(numbers)
        place = draw.randrange(len(numbers))
        changed[place] = (changed[place] + draw.randrange(1, MODULUS)) % MODULUS
        rows.append({"prompt": prompt(numbers), "chosen": right(numbers), "rejected": right(changed)})
    return rows


def is_right(completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """The reward: 1 for the right answer, else 0."""
    return [float(text == expected) for text, expected in zip(completions, answer, strict=True)]


def write(path: Path, rows: Iterable[Row]) -> Path:
    """Writes rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
