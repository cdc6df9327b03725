"""Rewards that a program can verify, in the form that TRL gives reward functions.

    reward(prompts=[...], completions=[...], completion_ids=[...], **columns) -> [float or None, ...]

Every argument is given by name. Completions are texts, or lists of turns where the prompts are conversations. Every
other column of the data comes as a list with a value for each completion. None means that the reward does not apply.

    answers     where the final answer of a text is
    accuracy    rewards for a right answer: math_equal, exact_match, reasoning_gym
    shape       rewards for form and length: think_format, pattern_format, soft_overlong_punishment, repetition_penalty
    helper      a process of its own, with a limit on its time and memory, for what a model's text may bring to a halt
    judge       what that process runs
"""

from logitless.rewards.accuracy import exact_match, math_equal, reasoning_gym
from logitless.rewards.answers import final_answer, marked_answer
from logitless.rewards.shape import pattern_format, repetition_penalty, soft_overlong_punishment, think_format

__all__ = [
    "exact_match",
    "final_answer",
    "marked_answer",
    "math_equal",
    "pattern_format",
    "reasoning_gym",
    "repetition_penalty",
    "soft_overlong_punishment",
    "think_format",
]
