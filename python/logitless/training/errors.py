"""The two ways a training run ends early on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's options, data or model can not be used; the message says what came and what to do about it."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; earlier checkpoints are untouched."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (nearest: a, b)"` for a misspelt `name`, or an empty string when nothing known is close."""
    matches = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" (nearest: {', '.join(matches)})" if matches else ""
