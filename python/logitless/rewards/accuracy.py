"""Rewards for a right answer, by mathematics, by its letters, or by the task's own rule."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from logitless.rewards.answers import completion_text, final_answer, gold_answers, normalized
from logitless.rewards.helper import UnansweredError, ask, require_package


def math_equal(
    completions: Sequence[Any], *, gold_column: str | None = None, time_limit: float = 5.0, **columns: Any
) -> list[float | None]:
    r"""Reward 1 for a final answer that equals the right one in mathematics, else 0.

    Both are read as LaTeX, with or without `$` and `\boxed`, and compared by math-verify: `1/2` equals `0.5`, and
    `\{1, 2\}` equals `2, 1`. Units after a number make no difference, and `50\%` equals both `0.5` and `50`. An
    expression that has the right value is right, also where it repeats the question.

    Args:
        completions: texts or lists of turns. `final_answer` says what their answer is.
        gold_column: the column of right answers, by default `answer` or else `solution`. `marked_answer` of a right
            answer counts, so that GSM8K's `#### 42` and worked solutions that end in a box will do.
        time_limit: seconds of processor time for one comparison, in a process of its own. What takes longer, or more
            than 2 GiB of memory, is wrong. So is an answer of more than 200 characters and four times the right
            one's, which is prose.
        columns: the data's other columns.

    Returns:
        A reward for each completion; None where the row has no right answer, or one that cannot be read.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: the data has no such column.
    """
    require_package("math_verify", "math-verify", "math_equal")
    golds = gold_answers("math_equal", columns, gold_column)
    answers = [final_answer(completion_text(completion)) for completion in completions]
    return [
        None if gold is None else _math_reward(gold, answer, time_limit)
        for gold, answer in zip(golds, answers, strict=True)
    ]


#: Characters of the longest answer that is asked about, beside four times the right one's: prose can take a second.
_LONGEST = 200


@functools.lru_cache(maxsize=4096)  # a group's completions often agree; and what hangs should do so once
def _math_reward(gold: str, answer: str, time_limit: float) -> float | None:
    prose = len(answer) > _LONGEST + 4 * len(gold)
    try:
        equal = ask("math", time_limit, gold=gold, answer="" if prose else answer)
    except UnansweredError:
        return 0.0
    return None if equal is None else float(equal)


def exact_match(completions: Sequence[Any], *, gold_column: str | None = None, **columns: Any) -> list[float | None]:
    """Reward 1 for a final answer that is the right one letter by letter, after `normalized`; else 0.

    Args:
        completions: texts or lists of turns. `final_answer` says what their answer is.
        gold_column: the column of right answers, by default `answer` or else `solution`. `marked_answer` of a right
            answer counts, or without a mark all of it.
        columns: the data's other columns.

    Returns:
        A reward for each completion; None where the row has no right answer.

    Raises:
        ValueError: the data has no such column.
    """
    golds = gold_answers("exact_match", columns, gold_column)
    answers = [final_answer(completion_text(completion)) for completion in completions]
    return [
        None if gold is None else float(normalized(answer) == normalized(gold))
        for gold, answer in zip(golds, answers, strict=True)
    ]


def reasoning_gym(
    completions: Sequence[Any],
    *,
    task: Sequence[str | None],
    seed: Sequence[int | None] | None = None,
    index: Sequence[int | None] | None = None,
    options: Sequence[Any] | None = None,
    entry: Sequence[Any] | None = None,
    time_limit: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    """Score in [0, 1] that reasoning-gym gives the final answer to a question of its own.

    The question is an `entry` of reasoning-gym, or `seed`, `index` and `options` name it, and it is made again.

    Args:
        completions: texts or lists of turns. `final_answer` says what their answer is.
        task: names of reasoning-gym's data sets.
        seed: their seeds.
        index: the questions' places in them.
        options: the data sets' other options, as objects or as JSON text of one; None where there are none. A column
            of objects may hold nulls, which Arrow adds, and which count as absent.
        entry: the questions themselves, as JSON text or as objects; None where the others name it.
        time_limit: seconds of processor time for one score, in a process of its own. What takes longer scores 0.
        columns: not read.

    Returns:
        A score for each completion; None where the row names no task.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: reasoning-gym knows no such task, or refuses its options; or no entry is given, and none can be
            made again, as the task makes another in every process.
    """
    require_package("reasoning_gym", "reasoning-gym", "reasoning_gym")
    none = [None] * len(completions)
    rows = zip(task, seed or none, index or none, options or none, entry or none, strict=True)
    answers = [final_answer(completion_text(completion)) for completion in completions]
    return [
        None if row[0] is None else _gym_score(_gym_question(*row), answer, time_limit)
        for row, answer in zip(rows, answers, strict=True)
    ]


def _gym_question(task: str | None, seed: int | None, index: int | None, options: Any, entry: Any) -> dict[str, Any]:
    if entry is not None:
        text = entry if isinstance(entry, str) else json.dumps(entry)
        return {"task": task, "options": _options_text(options), "entry": text}
    if seed is None or index is None:
        raise ValueError(f"reasoning_gym: expected seed and index, or an entry, of task {task!r}; got {seed}, {index}")
    return {"task": task, "seed": seed, "index": index, "options": _options_text(options)}


def _options_text(options: Any) -> str:
    """The options of a data set as JSON text, equal options as equal text."""
    found = json.loads(options) if isinstance(options, str) else options or {}
    return json.dumps({name: value for name, value in sorted(found.items()) if value is not None})


def _gym_score(question: dict[str, Any], answer: str, time_limit: float) -> float:
    try:
        score: float = ask("gym", time_limit, **question, answer=answer)
    except UnansweredError:
        return 0.0
    except ValueError as error:
        raise ValueError(f"reasoning_gym: no question is made of {question!s:.300}: {error}") from error
    return score
