"""Checks of a loss's hyper-parameters, for its `__post_init__`, and of the tensors that it is called with."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ..peers import value_hint
from ..types import TokenStats

if TYPE_CHECKING:
    from .loss import Loss

# ---------------------------------------------------------------------------------------------------------------------
# Hyper-parameters


def check_number(
    loss: Loss,
    field: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises unless the field is a finite number between `low` and `high` (either end excluded where it is open)."""
    value = getattr(loss, field)
    where = f"{type(loss).__name__}: {field}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {type(value).__name__} {value!r}")
    below = value <= low if low_open else value < low
    above = value >= high if high_open else value > high
    if not -math.inf < value < math.inf or below or above:
        left, right = "(" if low_open or low == -math.inf else "[", ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{where} must be a finite number in {left}{low}, {high}{right}, got {value!r}")


def check_one_of(loss: Loss, field: str, choices: Iterable[str]) -> None:
    """Raises unless the field is one of the choices; near ones are listed."""
    value, choices = getattr(loss, field), tuple(choices)
    where = f"{type(loss).__name__}: {field}"
    if not isinstance(value, str):
        raise TypeError(f"{where} must be a string, got {type(value).__name__} {value!r}")
    if value not in choices:
        hint = value_hint(field, value) or near_words(value, choices)
        raise ValueError(f"{where} must be one of {', '.join(choices)}; got {value!r}{hint}")


def check_optional(loss: Loss, field: str, *, low: float) -> None:
    """Raises unless the field is None or a finite number, `low` at least."""
    if getattr(loss, field) is not None:
        check_number(loss, field, low=low)


def check_flag(loss: Loss, field: str) -> None:
    """Raises unless the field is a bool."""
    value = getattr(loss, field)
    if not isinstance(value, bool):
        raise TypeError(f"{type(loss).__name__}: {field} must be a bool, got {type(value).__name__} {value!r}")


def near_words(word: str, words: Iterable[str]) -> str:
    """` (did you mean ...?)` with the words most like `word`; nothing where none is."""
    matches = difflib.get_close_matches(str(word).lower(), list(words), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def statistic(loss: Loss, stats: TokenStats, field: str) -> Tensor:
    """The field of the statistics; raises ValueError if it was not computed."""
    value: Tensor | None = getattr(stats, field)
    if value is None:
        raise ValueError(f"{loss.name} reads stats.{field}, which is None: compute it with outputs={loss.outputs}")
    return value


def constant(loss: Loss, name: str, value: Tensor | None, like: Tensor) -> Tensor:
    """An input, detached and in the dtype of `like`; raises if it is missing, no tensor, or of another shape."""
    if value is None:
        raise ValueError(f"{loss.name} needs {name}, a tensor of shape {tuple(like.shape)}, got None")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{loss.name}: {name} must be a tensor of shape {tuple(like.shape)}, got {type(value).__name__}"
        )
    if value.shape != like.shape:
        raise ValueError(f"{loss.name}: {name} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value.detach().to(like.dtype)


def shared_constant(loss: Loss, name: str, value: Tensor | None, like: Tensor) -> Tensor:
    """A constant that all of a batch's sequences share, `[]`, or one each."""
    if value is not None and value.dim() == 0:
        value = value.expand(like.shape)
    return constant(loss, name, value, like)
