"""From the rewards of a round to the advantages of its tokens: which estimator a loss has, and what it is given.

The formulas are those of `logitless.losses.policy.advantages`; here stands which of them a method takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from logitless.losses import Loss
from logitless.losses.policy import advantages as formulas
from logitless.losses.policy.policy_loss import PolicyLoss
from logitless.training.errors import InputError

#: What an option may name; "gae" asks a value function, which is trained beside the policy.
ADVANTAGES = ("group", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline", "prefix", "signed", "gae")

#: The deviations that an estimator can divide by; others have none, or one of their own.
SCALES_OF = {
    "group": formulas.SCALES,
    "signed": formulas.SCALES,
    "prefix": ("group", "none"),
}


class Sampled(NamedTuple):
    """What estimators read of a round's completions, `[S]` each; the groups of all processes, in any order."""

    rewards: torch.Tensor
    group: torch.Tensor
    """Int64: the prompt."""
    shown: torch.Tensor
    """Int64: tokens of the demonstration that the completion begins with."""
    length: torch.Tensor
    """Int64: tokens that count, those shown included."""


class Advantages(NamedTuple):
    """Advantages `[S]` of the tokens that a completion sampled, and of those that it was shown."""

    own: torch.Tensor
    shown: torch.Tensor


def estimator_of(loss: Loss, asked: str | None) -> str:
    """The estimator that was asked for, or the one of the loss's paper."""
    return asked or vars(type(loss)).get("advantages_by", PolicyLoss.advantages_by)


def scale_of(loss: Loss, asked: str | None) -> str:
    """The scale of rewards that was asked for, or the one of the loss's paper."""
    return asked or vars(type(loss)).get("rewards_over", PolicyLoss.rewards_over)


def estimate(estimator: str, scale: str, sampled: Sampled) -> Advantages:
    """Advantages of a round, but for "gae", which has one for every token.

    "prefix" and "signed" tell what a completion was shown of a demonstration from its own tokens; by the others all of
    its tokens have one advantage.

    Raises:
        InputError: rewards that the estimator cannot read.
    """
    if estimator == "prefix":
        found = formulas.prefix_rft_advantages(sampled.rewards, sampled.group, _number_of_prefix(sampled), scale=scale)
        return Advantages(found.continuation, found.prefix)
    if estimator == "signed":
        return Advantages(_signed(sampled.rewards), _ESTIMATES["group"](sampled, scale))
    own = _ESTIMATES[estimator](sampled, scale)
    return Advantages(own, own)


def _signed(rewards: torch.Tensor) -> torch.Tensor:
    """SRFT's advantages of own tokens: 1 for what is right, -1 for what is wrong.

    Raises:
        InputError: a reward that is no share of what can be right.
    """
    if ((rewards < 0) | (rewards > 1)).any():
        least, most = rewards.min().item(), rewards.max().item()
        raise InputError(f"advantage_estimator signed: rewards must be in [0, 1], got them from {least} to {most}")
    return 2 * rewards - 1


def _number_of_prefix(sampled: Sampled) -> torch.Tensor:
    """Which prefix of its prompt's demonstration a completion continues: its length says it. -1 for none."""
    return torch.where(sampled.shown > 0, sampled.shown, -1)


def _whitened(sampled: Sampled, scale: str) -> torch.Tensor:
    """REINFORCE++ with a baseline: whitened over tokens, of which every completion has as many as it is long."""
    mask = torch.arange(int(sampled.length.max().clamp(min=1))) < sampled.length[:, None]
    found = formulas.reinforce_plus_plus_baseline_advantages(sampled.rewards, sampled.group, mask)
    return found[:, 0]


_ESTIMATES: dict[str, Callable[[Sampled, str], torch.Tensor]] = {
    "group": lambda sampled, scale: formulas.group_advantages(sampled.rewards, sampled.group, scale=scale),
    "rloo": lambda sampled, scale: formulas.rloo_advantages(sampled.rewards, sampled.group),
    "opo": lambda sampled, scale: formulas.opo_advantages(sampled.rewards, sampled.group, sampled.length),
    "gpg": lambda sampled, scale: formulas.gpg_advantages(sampled.rewards, sampled.group),
    "reinforce_plus_plus_baseline": _whitened,
}


def filled(rewards: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards `[S]` without NaN, and which of them are known, as float32.

    An unknown reward is the mean of its group's known ones, 0 where there is none, so that it moves no other's
    advantage; its own does not count.
    """
    known = rewards.isfinite()
    index = torch.unique(group, return_inverse=True)[1]
    groups = int(index.max()) + 1
    zeros = torch.zeros(groups, dtype=rewards.dtype)
    total = zeros.index_add(0, index, torch.where(known, rewards, 0.0))
    count = zeros.index_add(0, index, known.to(rewards.dtype)).clamp(min=1.0)
    return torch.where(known, rewards, (total / count)[index]), known.float()


def share_of_right(rewards: torch.Tensor | None, tokens: torch.Tensor) -> float:
    """Tokens of a round over those of right answers, whose reward is above 0; 0 where none is right."""
    right = 0 if rewards is None else int(tokens[rewards > 0].sum())
    return int(tokens.sum()) / right if right else 0.0
