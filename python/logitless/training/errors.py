"""The two ways a training run ends early on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's options, data or model cannot be used; the message says what came and what to do about it."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient norm became NaN or infinite; earlier checkpoints are untouched."""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that a misspelt or shortened one may mean, likeliest first.

    After names that differ in a letter or two come those that have all of its words or these initials, such as
    model_name_or_path for model or learning_rate for lr, and at last those that are spelt somewhat alike.
    """
    names, name = sorted(known), name.lower()
    close, distant = (difflib.get_close_matches(name, names, n=3, cutoff=cutoff) for cutoff in (0.85, 0.6))
    longer = [each for each in names if _shortened(name, each)]
    longer.sort(key=lambda each: (not each.startswith(name), len(each)))
    return list(dict.fromkeys([*close, *longer, *distant]))[:3]


def _shortened(name: str, known: str) -> bool:
    words = known.split("_")
    return set(name.split("_")) <= set(words) or name == "".join(word[:1] for word in words)


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (nearest: a, b)"` for a misspelt `name`, or an empty string when nothing known is close."""
    matches = nearest_names(name, known)
    return f" (nearest: {', '.join(matches)})" if matches else ""
