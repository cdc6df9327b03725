"""The answers to score: rows as training reads them, each with its prompt and whether it is right."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple

from logitless.training.checks import Reach, reach_of
from logitless.training.config import TRUTH, TrainOptions
from logitless.training.data import Row, read_rows
from logitless.training.errors import InputError, nearest
from logitless.training.examples import Item, TokenizedData
from logitless.training.forms import canonical, canonical_pair, prompts_are_repeated, renamed
from logitless.training.loader import row_renderer
from logitless.training.marks import answers
from logitless.training.model import load_tokenizer
from logitless.training.template_date import with_date

PAIR, PAIR_LABELS = ("chosen", "rejected"), (True, False)


class AnswerRows(NamedTuple):
    """The rows to score, without those of which nothing that counts is left."""

    rows: list[Row]
    numbers: tuple[int, ...]  # of the rows in the data, from 0
    items: list[Item]
    names: tuple[str, ...]  # of a row's answers
    right: list[tuple[bool, ...]] | None  # whether each is right, where that is known
    prompts: list[str]  # equal for answers to one prompt
    data: TokenizedData
    reach: Reach
    tokenizer: Any

    @property
    def paired(self) -> bool:
        """Whether a row has two answers, chosen and rejected."""
        return self.names == PAIR


def read_answers(options: TrainOptions, source: str, labels: str | None) -> AnswerRows:
    """The rows of `options.dataset_name`, tokenised; all are pairs where one is.

    Args:
        source: where the tokenizer is.
        labels: the column that says which single answers are right, or None.

    Raises:
        InputError: rows without a form, mixed ones, or a label that is none.
    """
    given = read_rows(options.dataset_name, split=options.dataset_train_split, config=options.dataset_config)
    rows = renamed(given, options.column_map)
    paired = any(_is_pair(row) for row in rows)
    if paired and labels is not None:
        raise InputError(f"labels: {options.dataset_name} has pairs, whose sides say which answer is right")
    single: list[tuple[bool, ...]] | None = None if labels is None else [(_label(row, labels),) for row in rows]
    tokenizer = with_date(load_tokenizer(source, options), datetime.now())
    renderer = row_renderer(options, tokenizer)
    data = (renderer.pairs if paired else renderer.sequences)(rows, options.dataset_name)
    repeats = paired and prompts_are_repeated(rows)
    kept = [rows[number] for number in data.kept]
    return AnswerRows(
        rows=kept,
        numbers=data.kept,
        items=data.items,
        names=PAIR if paired else ("answer",),
        right=[PAIR_LABELS] * len(kept) if paired else single and [single[number] for number in data.kept],
        prompts=[
            _prompt(row, options.dataset_text_field, bool(tokenizer.chat_template), paired, repeats) for row in kept
        ],
        data=data,
        reach=reach_of(data, rows),
        tokenizer=tokenizer,
    )


def _is_pair(row: Row) -> bool:
    present = [name for name in (*PAIR, "completion") if row.values.get(name) is not None]
    return present == list(PAIR)


def _label(row: Row, name: str) -> bool:
    """Whether a row's answer is right, from its column of this name."""
    value = row.values.get(name)
    if value is None:
        raise InputError(f"{row.origin}: labels: expected a column {name}; the columns are {sorted(row.values)}"
                         f"{nearest(name, row.values)}")  # fmt: skip
    number = value == 1 if value in (0, 1) else None
    found = TRUTH.get(value.lower()) if isinstance(value, str) else number
    if found is None:
        raise InputError(f"{row.origin}: {name}: expected true or false, 1 or 0, got {value!r}")
    return found


def _prompt(row: Row, text_field: str, chat: bool, paired: bool, repeats: bool) -> str:
    """What tells a row's prompt from others: its text or turns. A plain text has one of its own."""
    if paired:
        return json.dumps(canonical_pair(row, chat=chat, repeats=repeats).values["prompt"], sort_keys=True)
    values = canonical(row, text_field=text_field, chat=chat).values
    if "messages" in values:
        turns = values["messages"]
        return json.dumps(turns[: next(iter(answers(turns)), 0)], sort_keys=True)
    return json.dumps(values["prompt"], sort_keys=True) if "prompt" in values else row.origin
