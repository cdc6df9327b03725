"""The inputs of a loss that a round gives: log-probabilities of today's policy, advantages, weights, marks.

old_logprob        of the policy that sampled, scored by the model as it is trained, at the sampling temperature
sampling_logprob   of the distribution that was drawn from, as the sampler says
policy_weight      `sampler_correction` of the two, where the sampler draws from another distribution
advantages         of `advantages.estimate`, or of a value function
demonstration      1 on what was shown
nll_weight         VAPO's: tokens of the round over those of right answers, on right answers
group, draw        the prompt; a random number a token
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from logitless.losses import Loss
from logitless.losses.policy.weights import sampler_correction
from logitless.training.collate import Batch, Piece, by_sequence, consecutive
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.estimates import Running, current_stats
from logitless.training.examples import Example
from logitless.training.loader import Loader
from logitless.training.parallel import World
from logitless.training.rollouts.generation import Sampling
from logitless.training.rollouts.rollout import Rollout

#: One sequence's values by name, `[T]` each, those of a token where it is predicted.
Values = dict[str, torch.Tensor]


def policy_statistics(run: Running, loader: Loader, examples: Sequence[Example]) -> list[Values]:
    """`old_logprob` and `entropy` of sequences under today's model, without dropout and without a gradient."""
    found: list[Values] = []
    for batch in batches_of(examples, loader, run.options, run.world):
        stats = current_stats(run, batch, ("logprob", "entropy"))
        assert stats.logprob is not None and stats.entropy is not None
        parts = (by_sequence(batch, values.detach().float().cpu()) for values in (stats.logprob, stats.entropy))
        found += [{"old_logprob": old, "entropy": entropy} for old, entropy in zip(*parts, strict=True)]
    return found


def batches_of(examples: Sequence[Example], loader: Loader, options: TrainOptions, world: World) -> Iterator[Batch]:
    """The sequences in their order, in batches of an update's size, on the device."""
    for numbers in consecutive(len(examples), options.per_device_train_batch_size):
        yield loader.collate([Piece(examples[number]) for number in numbers]).to(world.device)


def correction_of(options: TrainOptions, loss: Loss, sampling: Sampling, *, served: bool) -> str:
    """How a sampler's other distribution is corrected for: a mode of `sampler_correction`, or "none".

    Raises:
        InputError: a correction is needed, or asked for, and the loss has no weight of samples.
    """
    needed = sampling.cuts or served
    asked = options.importance_sampling or ("token_truncate" if needed else "none")
    if asked == "none" or "policy_weight" in loss.optional_inputs or loss.compares_distributions:
        return asked if "policy_weight" in loss.optional_inputs else "none"
    option = "importance_sampling" if options.importance_sampling else "top_p, top_k, min_p"
    raise InputError(f"{option}: {loss.name} takes samples for the policy's own and has no weight that corrects for "
                     "another distribution; set importance_sampling to none to train on them as they are")  # fmt: skip


def add_inputs(
    values: Sequence[Values],
    rollouts: Sequence[Rollout],
    group: torch.Tensor,
    nll_weight: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Adds to each sequence's statistics what a round gives, but for weights and advantages.

    Args:
        values: of `policy_statistics`; they are changed.
        group: `[S]`, the prompts.
        nll_weight: `[S]`, that of the sampled tokens.
        generator: of the draws.
    """
    for own, rollout, number, weight in zip(values, rollouts, group.tolist(), nll_weight.tolist(), strict=True):
        drawn = rollout.aligned(torch.nan, rollout.sampling_logprob)
        own["sampling_logprob"] = torch.where(drawn.isfinite(), drawn, own["old_logprob"])
        own["demonstration"] = rollout.aligned(1.0, 0.0)
        own["nll_weight"] = rollout.aligned(0.0, weight)
        own["group"] = torch.full_like(own["old_logprob"], float(number))
        own["draw"] = torch.rand(len(rollout.ids), generator=generator)


def add_weights(values: Sequence[Values], rollouts: Sequence[Rollout], correction: str, cap: float) -> None:
    """Adds `policy_weight`, of a mode of `sampler_correction` with its greatest weight.

    What was shown was drawn from no distribution, and counts as it is.
    """
    for own, rollout in zip(values, rollouts, strict=True):
        sampled = rollout.aligned(0.0, 1.0) > 0
        pair = (own[name][None] for name in ("old_logprob", "sampling_logprob"))
        weight = sampler_correction(*pair, mode=correction, high=cap, mask=sampled[None])[0]
        own["policy_weight"] = torch.where(sampled, weight, 1.0)
