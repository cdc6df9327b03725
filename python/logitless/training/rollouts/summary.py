"""Metrics of a round, under TRL's names where it has them, over the completions of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from logitless.training.metrics import Record
from logitless.training.parallel import World
from logitless.training.rollouts.advantages import filled
from logitless.training.rollouts.inputs import Values
from logitless.training.rollouts.rewards import Scores
from logitless.training.rollouts.rollout import Rollout

TOTAL = "total"


def of_everyone(
    rollouts: Sequence[Rollout],
    values: Sequence[Values],
    group: torch.Tensor,
    scores: Scores | None,
    world: World,
    *,
    counts: bool = True,
) -> dict[str, torch.Tensor]:
    """Numbers of every completion, `[S]` each, of all processes; groups are told apart across them.

    `counts` False leaves this process's completions out.
    """
    both = list(zip(rollouts, values, strict=True))
    own = {
        "length": torch.tensor([len(each.completion) for each in rollouts]),
        "sampled": torch.tensor([each.sampled for each in rollouts]),
        "shown": torch.tensor([each.shown for each in rollouts]),
        "ended": torch.tensor([each.ended for each in rollouts]),
        "entropy": torch.stack([_over_sampled(*each, "entropy") for each in both]),
        "off_by": torch.stack([_off_by(*each).sum() for each in both]),
        "off_by_most": torch.stack([_most(_off_by(*each)) for each in both]),
        "group": group * world.size + world.rank,
    }
    if scores is not None:
        own |= {f"rewards/{name}": part for name, part in scores.parts.items()} | {TOTAL: scores.total}
    everyone = world.gather(own if counts else {name: x[:0] for name, x in own.items()})
    return {name: torch.cat([each[name] for each in everyone]) for name in own}


def _over_sampled(rollout: Rollout, own: Values, name: str) -> torch.Tensor:
    return own[name][rollout.aligned(0.0, 1.0) > 0].sum()


def _off_by(rollout: Rollout, own: Values) -> torch.Tensor:
    """How far the sampler's log-probabilities are from the model's own, token by token; only where both are known."""
    theirs = torch.where(rollout.logprob.isnan(), rollout.sampling_logprob, rollout.logprob)
    scored = own["old_logprob"][rollout.aligned(0.0, 1.0) > 0]
    difference = (theirs - scored).abs()
    return difference[difference.isfinite()]


def _most(values: torch.Tensor) -> torch.Tensor:
    return values.max() if len(values) else torch.zeros(())


def metrics(found: Mapping[str, torch.Tensor]) -> Record:
    """The round's metrics, of `of_everyone` numbers.

    Rewards are of sampled completions; those that are demonstrations from end to end say nothing about the policy. A
    mean over no known reward is left out.
    """
    own = found["sampled"] > 0
    length, tokens = found["length"].double(), found["sampled"].sum().clamp(min=1)
    record: Record = {
        "completions/mean_length": float(length[own].mean()) if own.any() else 0.0,
        "completions/max_length": float(length[own].max()) if own.any() else 0.0,
        "completions/clipped_ratio": float((~found["ended"][own]).double().mean()) if own.any() else 0.0,
        "sampling/sampling_logp_difference/mean": float(found["off_by"].double().sum() / tokens),
        "sampling/sampling_logp_difference/max": float(found["off_by_most"].max()),
        "entropy": float(found["entropy"].double().sum() / tokens),
    }
    if (found["shown"] > 0).any():
        record["completions/shown_length"] = float(found["shown"][found["shown"] > 0].double().mean())
    if TOTAL not in found:
        return record
    total = _told(found[TOTAL], own)
    if len(total):
        record |= {"reward": float(total.mean()), "reward_std": float(total.std()) if len(total) > 1 else 0.0}
    if (own & (found["shown"] > 0)).any() and len(unaided := _told(found[TOTAL], own & (found["shown"] == 0))):
        record["reward_unaided"] = float(unaided.mean())
    record["frac_reward_zero_std"] = _equal_groups(filled(found[TOTAL], found["group"])[0], found["group"])
    for name, part in found.items():
        if name.startswith("rewards/") and len(known := _told(part, own)):
            record[f"{name}/mean"] = float(known.mean())
    return record


def _told(rewards: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return rewards[own & rewards.isfinite()].double()


def _equal_groups(rewards: torch.Tensor, group: torch.Tensor) -> float:
    """Share of the groups of which all rewards are equal, so that none of them has an advantage."""
    groups = [rewards[group == each] for each in group.unique()]
    return sum(bool((each == each[0]).all()) for each in groups) / len(groups)
