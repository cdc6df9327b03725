"""Reward functions of runs in tests, which other processes load from this file."""

from __future__ import annotations

from typing import Any


def varied(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A number in [0, 1] that hardly two completions share."""
    return [reward_of(ids) for ids in completion_ids]


def reward_of(ids: list[int]) -> float:
    return sum(ids) % 17 / 16


def equal(completions: list[Any], **_: Any) -> list[float]:
    """One reward for all."""
    return [1.0] * len(completions)


def huge(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Far apart, and below 0."""
    return [-1e9 * (1 + sum(ids) % 3) for ids in completion_ids]


def some_unknown(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """None for about half of them."""
    return [None if sum(ids) % 2 else reward_of(ids) for ids in completion_ids]


def unknown(completions: list[Any], **_: Any) -> list[float | None]:
    """None for all of them."""
    return [None] * len(completions)


def failing(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """An error on one prompt."""
    if any(prompt.startswith("3 ") for prompt in prompts):
        raise RuntimeError("no 3, please")
    return [0.0] * len(completions)
