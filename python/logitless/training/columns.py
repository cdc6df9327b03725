"""Columns of the rows that are inputs of the loss: one number a row, one a turn, or one a token that counts.

A value that belongs to a token stands where the token is predicted, one position before it, as in `Batch.loss_inputs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from logitless.training.data import Row
from logitless.training.errors import InputError

ABSENT = -100  # fills the lists of tokens that have fewer ids, or log-probabilities, than others
OTHER_NAMES = {"desirable": "label"}  # names of columns in TRL's rows
#: Columns that are true or false, for which 1 and 0 stand too.
BOOLEANS = ("desirable", "from_reference")
#: The column of the ids that each token lists, for a loss that reads lists of them.
TARGET_IDS = "target_ids"
#: The column that multiplies the losses of tokens, whatever the loss. A token of weight 0 does not count.
TOKEN_WEIGHT = "token_weight"
_INTEGER_TEXT = re.compile(r"[+-]?[0-9]+")
_NUMBER_TEXT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf(inity)?)", re.IGNORECASE)


def present_columns(names: Iterable[str], rows: Sequence[Row], sides: Sequence[str] = ("",)) -> tuple[str, ...]:
    """The names that any of the rows has a value for."""
    return tuple(n for n in names if any(_value(row, n, side) is not None for row in rows for side in sides))


def read_columns(
    names: Iterable[str], row: Row, counts: torch.Tensor, *, single: Collection[str] = (), side: str = ""
) -> dict[str, torch.Tensor]:
    """The row's values of these columns, `[T]` each, or `[T, K]` where the row has a list a token; else 0.

    A row without a `token_weight` has 1 for every token.

    Args:
        counts: `[T]` bool, the tokens that count.
        single: those of the names that belong to a whole row, so that they have one value.
        side: "chosen" or "rejected" of a pair, whose columns are `<side>_<name>`.

    Raises:
        InputError: a column that this row lacks, holds something else, or has another number of values than the row
            has tokens that count, or turns.
    """
    found = {}
    for name in names:
        called = f"{side}_{name}" if side else _called(name, row)
        value = _value(row, name, side)
        values = _numbers(1.0 if value is None and name == TOKEN_WEIGHT else value, called, row)
        if name == TOKEN_WEIGHT:
            values = _checked_weights(values, called, row)
        if name in BOOLEANS:
            values = _booleans(values, called, row)
        if name in single and values.shape != (1,):
            raise InputError(f"{row.origin}: the column {called} has {len(values)} values; expected one for the row")
        found[name] = _at_predictions(values, called, row, counts)
    return found


def _value(row: Row, name: str, side: str) -> Any:
    names = (f"{side}_{name}",) if side else (name, OTHER_NAMES.get(name, name))
    return next((value for n in names if (value := row.values.get(n)) is not None), None)


def _called(name: str, row: Row) -> str:
    """The name of the column in the row's file."""
    return OTHER_NAMES.get(name, name) if name not in row.values else name


def _numbers(value: Any, name: str, row: Row) -> torch.Tensor:
    """The values, `[n]` or lists of them `[n, K]`: bool, int64, or float32; shorter lists end with -100."""
    read = _of_text(value)
    values = read if isinstance(read, list) else [read]
    lists = [[_of_text(x) for x in part] if isinstance(part, list) else [_of_text(part)] for part in values]
    if not lists or not all(isinstance(x, (bool, int, float)) for part in lists for x in part):
        raise InputError(
            f"{row.origin}: the loss reads the column {name}, a number, true or false, or a list of them; got {value!r}"
        )
    if any(isinstance(part, list) for part in values):
        width = max(map(len, lists))
        numbers: list[Any] = [part + [ABSENT] * (width - len(part)) for part in lists]
    else:
        numbers = [x for (x,) in lists]
    return _finite_numbers(numbers, name, row)


def _of_text(value: Any) -> Any:
    """The number, truth value or list that a text is, as every cell of a CSV file is one; else the value itself."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if _INTEGER_TEXT.fullmatch(text):
            return int(text)
        if _NUMBER_TEXT.fullmatch(text):
            return float(text)
        return json.loads(text) if text.startswith("[") else value
    except (ValueError, RecursionError):
        return value


def _finite_numbers(numbers: list[Any], name: str, row: Row) -> torch.Tensor:
    try:
        values = torch.tensor(numbers)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # an integer beyond 64 bits
        raise InputError(f"{row.origin}: the column {name} has a number that is too large: {error}") from error
    usable = values.isfinite()
    if "teacher_" in name:
        usable |= values.isneginf()  # the logarithm of a probability of 0
    if not usable.all():
        raise InputError(
            f"{row.origin}: the column {name} has {values[~usable][0].item()}; expected finite numbers of float32"
        )
    return values


def _booleans(values: torch.Tensor, name: str, row: Row) -> torch.Tensor:
    if not ((values == 0) | (values == 1)).all():
        raise InputError(f"{row.origin}: the column {name} must be true or false, or 1 or 0, got {values.tolist()}")
    return values.bool()


def _checked_weights(values: torch.Tensor, name: str, row: Row) -> torch.Tensor:
    if values.dim() > 1 or (values < 0).any():
        raise InputError(
            f"{row.origin}: the column {name} must hold numbers of at least 0, got {values.tolist()!r:.100}"
        )
    return values.float()


def _at_predictions(values: torch.Tensor, name: str, row: Row, counts: torch.Tensor) -> torch.Tensor:
    """The values where their tokens are predicted; one alone is every token's."""
    if len(values) == 1:
        return values.expand(len(counts), *values.shape[1:])
    tokens = counts.nonzero()[:, 0]
    begins = counts & ~torch.cat([counts.new_zeros(1), counts[:-1]])
    turns = int(begins.sum())
    if len(values) == turns:
        values = values[begins.cumsum(0)[tokens] - 1]
    if len(values) != len(tokens):
        each = f"one for each of the {len(tokens)} tokens that count" + (f" or the {turns} turns" if turns > 1 else "")
        raise InputError(f"{row.origin}: the column {name} has {len(values)} values; expected one, or {each}")
    aligned = values.new_zeros(len(counts) + 1, *values.shape[1:])
    aligned[tokens] = values  # at the token itself; the first of all is predicted from nothing
    return aligned[1:]
