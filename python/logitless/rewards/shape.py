"""Rewards for the form and the length of a completion, which do not ask whether its answer is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from logitless.rewards.answers import completion_text


def think_format(completions: Sequence[Any], **columns: Any) -> list[float]:
    """Reward 1 for a completion that begins by thinking inside `<think>...</think>`, once; else 0.

    Args:
        completions: texts or lists of turns.
        columns: not read.

    Source: the template of DeepSeek-R1, arXiv 2501.12948, table 1; equal to TRL's `think_format_reward`.
    """
    return [float(_thinks_once(completion_text(completion))) for completion in completions]


def _thinks_once(text: str) -> bool:
    return text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text


def pattern_format(completions: Sequence[Any], *, pattern: str, **columns: Any) -> list[float]:
    r"""Reward 1 for a completion that a regular expression matches from its first to its last character; else 0.

    Args:
        completions: texts or lists of turns.
        pattern: regular expression of Python's `re`. Flags stand in it: `(?s)` lets a dot match line ends too.
        columns: not read.

    Raises:
        ValueError: the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern: expected a regular expression, got {pattern!r}: {error}") from error
    return [float(compiled.fullmatch(completion_text(completion)) is not None) for completion in completions]


def soft_overlong_punishment(
    completion_ids: Sequence[Sequence[int]], *, max_completion_len: int, soft_punish_cache: int, **columns: Any
) -> list[float]:
    """Punishment of long completions: `0`, then `(L_max - L_cache - length) / L_cache`, then -1 beyond `L_max` tokens.

    It is 0 up to `L_max - L_cache` tokens, and falls to -1 at `L_max`.

    Args:
        completion_ids: token ids of every completion.
        max_completion_len: `L_max`, in tokens. A completion that a sampler cuts off at `L_max` gets -1, unless the
            cache is 0.
        soft_punish_cache: `L_cache`, the tokens below `L_max` in which the punishment grows; 0 for no such range.
        columns: not read.

    Raises:
        ValueError: not `0 <= soft_punish_cache <= max_completion_len`.

    Source: DAPO, arXiv 2503.14476, equation 13; names and values of TRL's `get_soft_overlong_punishment`.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache: expected 0 <= soft_punish_cache <= max_completion_len, got {soft_punish_cache} and "
            f"{max_completion_len}"
        )
    free = max_completion_len - soft_punish_cache

    def punishment(length: int) -> float:
        if length <= free:
            return 0.0
        return -1.0 if length > max_completion_len else (free - length) / soft_punish_cache

    return [punishment(len(ids)) for ids in completion_ids]


def repetition_penalty(
    completion_ids: Sequence[Sequence[int]], *, ngram_size: int = 3, max_penalty: float = -1.0, **columns: Any
) -> list[float]:
    """Penalty of repetition: `max_penalty (1 - distinct / all)` over a completion's runs of `ngram_size` tokens.

    A completion that is shorter than such a run gets 0.

    Args:
        completion_ids: token ids of every completion.
        ngram_size: length of the runs, in tokens; 3 as in TRL.
        max_penalty: what a completion of nothing but repetition approaches; -1 as in TRL.
        columns: not read.

    Raises:
        ValueError: `ngram_size` below 1, or `max_penalty` above 0.

    Source: TRL's `get_repetition_penalty_reward`, which follows the repetition penalty of arXiv 2502.03373.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size: expected at least 1, got {ngram_size}")
    if max_penalty > 0:
        raise ValueError(f"max_penalty: expected at most 0, got {max_penalty}")
    return [max_penalty * _repeated(ids, ngram_size) or 0.0 for ids in completion_ids]


def _repeated(ids: Sequence[int], size: int) -> float:
    """The share of runs of `size` tokens that stand earlier in the sequence too."""
    count = len(ids) - size + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(ids[start : start + size]) for start in range(count)}) / count
