"""How well the implicit reward tells right answers from wrong ones, with intervals that resample prompts.

A sum of log-odds is comparable among answers to one prompt, and V is comparable among states where training left it
so (docs/reward.md). Each number is therefore ranked twice: over all answers, and only against answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless.training.implicit_reward.scores import Answer
from logitless.training.statistics import (
    Interval,
    auc,
    bootstrap_interval,
    numbered,
    weighted_auc,
    wilson_interval,
    wins,
)

SHARES = (0.25, 0.5, 0.75, 1.0)  # of an answer, at which V is looked at
MEASURES: dict[str, Callable[[Answer], float]] = {
    "sequence_reward": lambda answer: answer.sequence_reward,
    "mean_log_odds": lambda answer: answer.mean_log_odds,
    **{f"value_at_{share:.0%}": partial(Answer.value_at, share=share) for share in SHARES},
}


class Judged(NamedTuple):
    """What is kept of an answer: its measures, whether it is right, and what it answers."""

    measures: tuple[float, ...]  # in the order of MEASURES
    right: bool
    prompt: str


def judged(answer: Answer, right: bool, prompt: str) -> Judged:
    """An answer with its measures."""
    return Judged(tuple(measure(answer) for measure in MEASURES.values()), right, prompt)


def ranking(answers: Sequence[Judged], seed: int) -> dict[str, Any]:
    """The AUC of every measure, right against wrong answers, with 95% intervals; plain values.

    Args:
        answers: at least one.
        seed: of the resampling.
    """
    label = torch.tensor([answer.right for answer in answers])
    prompt = numbered([answer.prompt for answer in answers])
    columns = torch.tensor([answer.measures for answer in answers], dtype=torch.float64).T
    rows = [
        {"measure": name} | _ranked(values, label, prompt, seed) for name, values in zip(MEASURES, columns, strict=True)
    ]
    counts = {"right": int(label.sum()), "wrong": int((~label).sum()), "prompts": int(prompt.max()) + 1}
    return counts | {"measures": rows}


def _ranked(score: Tensor, label: Tensor, prompt: Tensor, seed: int) -> dict[str, Any]:
    won, met = wins(score, label, prompt)
    over_all = bootstrap_interval(lambda weight: weighted_auc(score, label, weight), prompt, seed=seed)
    within = bootstrap_interval(lambda weight: (weight @ won) / (weight @ met), prompt, seed=seed)
    return {
        "auc": _or_none(auc(score, label)),
        "interval": _ends(over_all),
        "auc_within_prompts": _or_none(auc(score, label, prompt)),
        "interval_within_prompts": _ends(within),
    }


def preference(prefers: Sequence[bool], prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """The share of pairs whose chosen answer has the greater sequence reward, with its 95% interval; plain values.

    The interval is Wilson's where every pair has a prompt of its own, and else resamples prompts.
    """
    won, prompt = torch.tensor(prefers, dtype=torch.float64), numbered(prompts)
    distinct = int(prompt.max()) + 1
    if distinct == len(prompts):
        kind, interval = "wilson", wilson_interval(sum(prefers), len(prefers))
    else:
        kind, interval = "bootstrap", bootstrap_interval(lambda weight: weight @ won / weight.sum(1), prompt, seed=seed)
    counts = {"pairs": len(prefers), "prompts": distinct}
    return counts | {"accuracy": float(won.mean()), "interval": _ends(interval), "interval_of": kind}


def _or_none(value: float) -> float | None:
    return None if value != value else value  # JSON has no NaN


def _ends(interval: Interval) -> list[float | None]:
    return [_or_none(end) for end in interval]
