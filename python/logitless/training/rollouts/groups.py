"""What each completion of a prompt is shown of its demonstration: nothing, a prefix, all of it, or a hint.

    nothing    every completion is sampled from the prompt (GRPO, PPO, ...)
    prefix     some begin with a prefix of the demonstration and are sampled from there (Prefix-RFT)
    whole      some are the demonstration itself (LUFFY, SRFT, CHORD)
    hint       all begin with one prefix, which counts as the prompt's (UFT)

A loss that reads demonstrations says which of the three it means by `shows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from logitless.losses import Loss
from logitless.losses.policy.demonstrations import Mixed
from logitless.losses.policy.schedules import prefix_rft_length, uft_hint_length
from logitless.training.errors import InputError
from logitless.training.rollouts.prompts import Prompt


class Slot(NamedTuple):
    """One completion of a group before it is sampled."""

    prompt: int
    """The number of its prompt among those of the round."""
    start: torch.Tensor
    """`[T]` int32: the prompt and what is shown."""
    shown: int
    """How many of these tokens are the demonstration's."""
    sampled: bool
    """Whether it goes on from there; else it is the demonstration itself."""


def shows(loss: Loss) -> str:
    """What a loss's completions are shown: "nothing", "prefix", "whole" or "hint"."""
    return str(loss.shows) if isinstance(loss, Mixed) else "nothing"


class Schedule(NamedTuple):
    """How much of a demonstration is shown at a step.

    Args:
        kind: of `shows`.
        settings: keyword arguments of the kind's rule, `prefix_rft_length` or `uft_hint_length`.
    """

    kind: str
    settings: Mapping[str, Any]

    def length(self, tokens: int, step: int, total_steps: int, generator: torch.Generator) -> int:
        """How many of a demonstration's `tokens` are shown at an update of a run of `total_steps`.

        Raises:
            InputError: settings that the rule does not have, or does not take.
        """
        if self.kind == "whole":
            return tokens
        try:
            if self.kind == "prefix":
                return prefix_rft_length(tokens, step, **{"total_steps": total_steps, **self.settings},
                                         generator=generator)  # fmt: skip
            hint = uft_hint_length(tokens, step, **self.settings, generator=generator)
            return min(hint, tokens - 1)  # behind its end nothing is left to sample
        except (TypeError, ValueError) as error:
            raise InputError(f"demonstration_schedule: {error}") from error

    def confirm(self) -> None:
        """Raises InputError for settings that no step could use."""
        if self.settings and self.kind in ("nothing", "whole"):
            raise InputError(f"demonstration_schedule: nothing is shown by a schedule where {self.kind} is shown")
        if self.kind != "nothing":
            self.length(1, 0, 1, torch.Generator())


def slots_of(
    prompts: Sequence[Prompt],
    schedule: Schedule,
    *,
    group: int,
    demonstrations: int,
    step: int,
    total_steps: int,
    generator: torch.Generator,
) -> list[Slot]:
    """The completions of a round, the groups of its prompts behind one another.

    Args:
        group: completions of a prompt.
        demonstrations: how many of them are shown something, where the kind is not "hint", by which all are. A prompt
            without a demonstration has none.
        step, total_steps: of the updates, where the round begins, and of the run.
        generator: of the lengths that a schedule draws.
    """
    found = []
    for number, prompt in enumerate(prompts):
        free = Slot(number, prompt.ids, 0, True)
        own = prompt.demonstration
        if own is None or schedule.kind == "nothing":
            found += [free] * group
            continue
        if schedule.kind == "hint":
            found += [_behind(number, prompt, schedule.length(len(own.ids), step, total_steps, generator))] * group
            continue
        found += [free] * (group - demonstrations)
        lengths = [schedule.length(len(own.ids), step, total_steps, generator) for _ in range(demonstrations)]
        found += [_behind(number, prompt, length, whole=schedule.kind == "whole") for length in lengths]
    return found


def _behind(number: int, prompt: Prompt, length: int, *, whole: bool = False) -> Slot:
    assert prompt.demonstration is not None
    if not length:
        return Slot(number, prompt.ids, 0, True)
    start = torch.cat([prompt.demonstration.prompt, prompt.demonstration.ids[:length]])
    return Slot(number, start, length, not whole)
