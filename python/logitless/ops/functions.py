"""Python functions as arguments of an op, whose schema knows only tensors and numbers: each gets an integer handle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

from torch import Tensor

PerTokenLoss = Callable[..., Tensor]

_functions: dict[int, Any] = {}  # handle -> a function, or its description
_kept_handles: dict[Any, int] = {}
_next_handle = itertools.count()
_NUMBER = "<number>"


@contextmanager
def handle_of(function: PerTokenLoss) -> Iterator[int]:
    """The function's handle for the length of an eager call."""
    handle = next(_next_handle)
    _functions[handle] = function
    try:
        yield handle
    finally:
        del _functions[handle]


def keep(description: Any) -> int:
    """A handle for the life of the process: a compiled graph calls the function again and again."""
    if description not in _kept_handles:
        _kept_handles[description] = next(_next_handle)
        _functions[_kept_handles[description]] = description
    return _kept_handles[description]


# What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes.
keep._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe(function: PerTokenLoss, numbers: list[float]) -> Any:
    """The function in constants that `torch.compile` can hand over: a dataclass as `(class, values)`, fields likewise.

    An object built inside a compiled region must not go over as it stands: Dynamo would rebuild it without its fields.
    Its floats, which Dynamo may have made symbolic, are appended to `numbers` and travel as arguments of the op.
    """
    if isinstance(function, FunctionType):
        return function
    if not is_dataclass(function):
        raise TypeError(f"per_token_loss: under torch.compile a function or a dataclass, got {type(function).__name__}")
    values: list[Any] = []
    for field in fields(function):
        value = getattr(function, field.name)
        if isinstance(value, float):
            numbers.append(value)
            value = _NUMBER
        values.append(describe(value, numbers) if callable(value) else value)
    return (type(function), tuple(values))


def of_handle(handle: int, numbers: Sequence[float]) -> Any:
    """The function behind a handle, built again from its description and its floats where it has one."""
    return _rebuild(_functions[handle], iter(numbers))


def _rebuild(description: Any, numbers: Iterator[float]) -> Any:
    if isinstance(description, tuple) and description and isinstance(description[0], type):
        kind, values = description
        names = (field.name for field in fields(kind))  # some fields may be keyword-only
        return kind(**{name: _rebuild(value, numbers) for name, value in zip(names, values, strict=True)})
    return next(numbers) if isinstance(description, str) and description == _NUMBER else description
