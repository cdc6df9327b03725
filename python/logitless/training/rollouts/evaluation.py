"""Evaluation by generation: held-out prompts are answered and rewarded as in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from logitless.training.rollouts import summary
from logitless.training.rollouts.groups import Schedule, slots_of
from logitless.training.rollouts.inputs import policy_statistics
from logitless.training.rollouts.prompts import Prompts
from logitless.training.rollouts.rounds import Rounds, answered

if TYPE_CHECKING:
    from logitless.training.estimates import Running

#: The seed of every evaluation: the same draws before and after training.
SEED = 0


def evaluate_prompts(run: Running, rounds: Rounds, prompts: Prompts, step: int) -> dict[str, float]:
    """Metrics of a round over held-out prompts, of which nothing is shown and each is answered alike in every run.

    Processes share the prompts out.
    """
    settings, world, count = rounds.settings, run.world, run.options.num_generations_eval
    # every process must come to the sums: one without a prompt of its own takes the first, and tells nothing of it
    own = prompts.prompts[world.rank :: world.size]
    asked = own or prompts.prompts[:1]
    nothing = Schedule("nothing", {})
    slots = slots_of(asked, nothing, group=count, demonstrations=0, step=0, total_steps=1,
                     generator=torch.Generator())  # fmt: skip
    settings.generator.follow(run.model, step)
    rollouts = answered(settings.generator, slots, settings.sampling, SEED + world.rank)
    of_slots = [asked[slot.prompt] for slot in slots]
    scores = None if settings.judge is None else settings.judge(of_slots, rollouts, settings.tokenizer)
    values = policy_statistics(run, rounds.loader, [each.example() for each in rollouts])
    group = torch.tensor([slot.prompt for slot in slots])
    everyone = summary.of_everyone(rollouts, values, group, scores, world, counts=bool(own))
    return summary.metrics(everyone)
